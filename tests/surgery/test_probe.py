"""What two models are compared on."""

from pathlib import Path

from mmmoe_pretrain.surgery.probe import held_out_batch, noise_batch
from mmmoe_pretrain.surgery.split import split
from tests.support import objectives, tiny_config
from tests.surgery.support import assert_same_function, random_source

SENSORS = {
    "modalities": {name: {"kind": "series", "channels": 2, "patch": 4} for name in ("left", "right")},
    "objectives": {"sides": {"kind": "contrastive", "pairs": {"left-right": 1.0}}},
}


def test_noise_serves_every_objective_whatever_share_of_samples_it_draws(tmp_path: Path) -> None:
    batch = noise_batch(tiny_config(tmp_path, objectives=objectives(captioning={"fraction": 0.01})))
    assert all(bool((segment >= 0).all()) for segment in batch.pooled.values())
    captioned = batch.segment_ids[batch.targets["captioning"].rows].unique()
    assert len(captioned) == len(batch.metas)


def test_a_run_without_text_needs_no_tokenizer(tmp_path: Path) -> None:
    """Its shards are not there either."""
    data = {"train": [{"path": str(tmp_path / "gone")}]}
    source = random_source(tmp_path, {}, data=data, **SENSORS)
    assert held_out_batch(source.config) is None
    assert_same_function(source, split(source, 2, lossy=False), noise_batch(source.config))
