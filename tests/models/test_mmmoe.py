"""The model: what a token may see, what padding may do, and that nothing is left untouched."""

import dataclasses
from pathlib import Path

import pytest
import torch

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.support import random_batch, random_sample, tiny_config

VOCAB = 48
ROOT = Path("unused")


def config(**sections: object) -> RunConfig:
    return tiny_config(ROOT, objectives={"captioning": {"weight": 0.5, "fraction": 1.0}}, **sections)


def settings(run: RunConfig) -> PackSettings:
    return PackSettings(run.modalities, 1, 2, run.objectives.captioning, run.seed)


@pytest.mark.parametrize("modalities", [["iat", "it"], ["t", "t"], ["a"], ["i", "a"], ["iat"], []])
def test_every_parameter_gets_a_gradient_whatever_is_missing(modalities: list[str]) -> None:
    run = config()
    model = PretrainingModel(run, VOCAB)
    loss, _ = model(random_batch(run, modalities))
    loss.backward()
    assert torch.isfinite(loss)
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def features_of(model: PretrainingModel, batch: Batch) -> torch.Tensor:
    output = model.mmmoe(batch)
    return torch.stack([output.features[m] for m in ("image", "audio", "text")])


def test_a_sample_does_not_depend_on_its_neighbours_in_the_stream() -> None:
    run = config()
    model = PretrainingModel(run, VOCAB).eval()
    samples = [random_sample(i, has, run, VOCAB) for i, has in enumerate(["iat", "at", "iat", "t"])]
    together = features_of(model, pack(samples, settings(run)))
    for i, sample in enumerate(samples):
        alone = features_of(model, pack([sample], settings(run)))
        # The same sums over shorter and longer padded rows: fp32 rounding only.
        torch.testing.assert_close(together[:, i], alone[:, 0], rtol=1e-4, atol=1e-5)


def test_padding_at_the_end_changes_nothing() -> None:
    run = config()
    model = PretrainingModel(run, VOCAB).eval()
    samples = [random_sample(i, "iat", run, VOCAB) for i in range(3)]
    short, long = (pack(samples, settings(run), tokens=tokens) for tokens in (None, 1024))
    assert long.num_tokens == 1024 > short.num_tokens
    a, b = model(short), model(long)
    assert a[0].item() == b[0].item()
    assert [s.tokens_M.tolist() for s in a[1].routing] == [s.tokens_M.tolist() for s in b[1].routing]


def test_a_caption_token_sees_its_prefix_and_nothing_after_itself() -> None:
    run = config()
    model = PretrainingModel(run, VOCAB).eval()
    sample = random_sample(0, "it", run, VOCAB)
    assert sample.text is not None
    sample = dataclasses.replace(sample, text=torch.arange(10, 16).numpy())
    changed_end = dataclasses.replace(sample, text=torch.tensor([10, 11, 12, 13, 14, 20]).numpy())
    changed_image = dataclasses.replace(sample, image=255 - sample.image)
    base, end, image = (model.mmmoe(pack([s], settings(run))).caption_nll
                        for s in (sample, changed_end, changed_image))  # fmt: skip
    torch.testing.assert_close(base[:5], end[:5])  # targets 10 to 14 stand before the change
    assert not torch.isclose(base[5:], end[5:]).any()
    assert not torch.isclose(base, image).any()


def test_absent_modalities_have_zero_features_and_present_ones_unit_features() -> None:
    run = config()
    model = PretrainingModel(run, VOCAB)
    features = features_of(model, random_batch(run, ["iat", "it", "a"]))
    norms = features.norm(dim=-1)
    expected = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    torch.testing.assert_close(norms, expected)


def test_one_expert_is_a_dense_model_of_the_same_code() -> None:
    dense = config(moe={"num_experts": 1, "experts_per_token": 1, "expert_hidden_size": 16})
    model = PretrainingModel(dense, VOCAB)
    loss, report = model(random_batch(dense, ["iat", "it"]))
    assert report.routing == ()
    assert not any("router" in name for name, _ in model.named_parameters())
    assert torch.isfinite(loss)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    first, torch_seed_differs = (PretrainingModel(config(), VOCAB) for _ in range(2))
    other_seed = PretrainingModel(config(seed=1), VOCAB)
    for (name, a), b, c in zip(first.named_parameters(), torch_seed_differs.parameters(),
                               other_seed.parameters(), strict=True):  # fmt: skip
        assert torch.equal(a, b), name
        if a.ndim >= 2:
            assert not torch.equal(a, c), name


def test_jitter_repeats_for_the_same_step_and_differs_between_its_forward_passes(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, moe={"num_experts": 4, "expert_hidden_size": 8, "jitter": 0.5})
    model, batch = PretrainingModel(config, VOCAB), random_batch(config, ["iat", "it"])

    def two_passes(step: int) -> list[float]:
        model.begin_step(step)
        return [model(batch)[0].item() for _ in range(2)]

    first, second = two_passes(3)
    assert first != second
    assert two_passes(3) == [first, second]
    assert two_passes(4)[0] != first
