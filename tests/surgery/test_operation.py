"""The common steps of all commands: the old run does not change, and the new one trains or is not written."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mmmoe_pretrain import cli
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import load_model, store
from mmmoe_pretrain.checkpoint.state import WholeState, model_key
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.export.write import export_run
from mmmoe_pretrain.modalities.word_vectors import WordVectors
from mmmoe_pretrain.surgery import operation
from mmmoe_pretrain.surgery.add import add
from mmmoe_pretrain.surgery.operation import Result, Source, operate
from mmmoe_pretrain.surgery.split import split
from mmmoe_pretrain.train.loop import train
from tests.distributed import run_ranks
from tests.export.support import make_run
from tests.support import VECTORS, tiny_config

BLOCK = "mmmoe.trunk.blocks.1.ffn."
STEPS = {"steps": 3, "global_batch_size": 8, "log_every": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> RunConfig:
    """Three steps of a run with two of four experts a token."""
    data = {"train": [{"path": str(tiny_data / "train")}], "tokenizer": str(tiny_data / "tokens.model"),
            "num_workers": 0}  # fmt: skip
    moe = {"num_experts": 4, "expert_hidden_size": 8}
    config = tiny_config(tmp_path_factory.mktemp("trained"), data=data, train=STEPS, moe=moe)
    run_ranks(1, train, config)
    return config


def mmmoe(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """The command line; 0 is the only exit code that passes."""
    monkeypatch.setattr(sys, "argv", ["mmmoe", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_split_run_trains_on_from_the_same_step_and_the_old_one_is_untouched(
    tmp_path: Path, trained: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, new = contents(trained.run_dir), tmp_path / "finer"
    mmmoe(monkeypatch, "experts", "split", trained.run_dir, "--out", new, "--factor", 2, "train.steps=5")
    said = capsys.readouterr().out
    assert "the function is preserved" in said and f"mmmoe train {new / 'config.yaml'} (it is at step 3 of 5" in said
    config = run_config.load(new / "config.yaml")
    assert (config.run_dir, config.moe.num_experts, config.moe.experts_per_token) == (new, 8, 4)
    old_checkpoint, checkpoint = (store.find_latest(run / "checkpoints") for run in (trained.run_dir, new))
    assert checkpoint.name == "step_00000003"
    assert store.read_meta(checkpoint) == {
        **store.read_meta(old_checkpoint), "config": config.model_dump(mode="json"),
    }  # fmt: skip
    record = json.loads((new / "surgery.json").read_text())
    assert (record["command"], record["source"], record["step"]) == ("split", str(trained.run_dir), 3)
    assert record["largest_difference"] < 1e-5
    run_ranks(1, train, config, True)
    steps = [json.loads(line)["step"] for line in (new / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 5]
    assert contents(trained.run_dir) == before


def test_a_grown_run_trains_on_and_its_new_experts_become_active(
    tmp_path: Path, trained: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "grown"
    mmmoe(monkeypatch, "experts", "add", trained.run_dir, "--out", new, "--count", 2, "--wake-steps", 4,
          "train.steps=5")  # fmt: skip
    assert "metrics.jsonl" not in contents(new)
    run_ranks(1, train, run_config.load(new / "config.yaml"), True)
    checkpoint = store.find_latest(new / "checkpoints")
    assert checkpoint is not None
    dormancy = store.read_state(checkpoint)[model_key(BLOCK + "router.dormancy")]
    assert dormancy.tolist() == [0, 0, 0, 0, 16, 16]  # two of four steps on the way
    mmmoe(monkeypatch, "experts", "merge", new, "--out", tmp_path / "merged", "--layer", 1, "--experts", "0,5",
          "--lossy")  # fmt: skip
    mmmoe(monkeypatch, "experts", "prune", new, "--out", tmp_path / "pruned", "--unused", "--lossy")
    assert "on 48 samples of" in capsys.readouterr().out  # compared on the run's own data
    assert load_model(tmp_path / "merged")[2] == load_model(tmp_path / "pruned")[2] == 5


def test_a_dense_run_resumes_as_a_sparse_one(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = {"num_experts": 1, "experts_per_token": 1, "expert_hidden_size": 8}
    dense, _ = make_run(tmp_path, tiny_data, steps=(3,), train=STEPS, moe=moe)
    new = tmp_path / "sparse"
    mmmoe(monkeypatch, "experts", "upcycle", dense.run_dir, "--out", new, "--num-experts", 4, "train.steps=4")
    assert "the function is preserved" in capsys.readouterr().out
    run_ranks(1, train, run_config.load(new / "config.yaml"), True)
    assert json.loads((new / "metrics.jsonl").read_text())["step"] == 4


def test_a_checkpoint_of_an_old_version_is_refused_with_the_remedy(tmp_path: Path, tiny_data: Path) -> None:
    """The config of its run was upgraded; what its weights are called stands in the config beside them."""
    config, states = make_run(tmp_path, tiny_data)
    old = {**config.model_dump(mode="json"), "modalities": {"image": {"size": 16}}, "objectives": {}}
    meta = {"version": "0.11", "vocab_size": 48, "tokenizer_fingerprint": "none", "config": old}
    store.write_state(config.checkpoint_root, 20, states[10], meta)
    said = r"step_00000020 was written by MMMoE 0\.11.* mmmoe export .* mmmoe import "
    with pytest.raises(ValueError, match=said):
        operate(config.run_dir, tmp_path / "new", (), "split", lambda source: split(source, 2, lossy=False))
    with pytest.raises(ValueError, match=said):
        export_run(config.run_dir, tmp_path / "new")
    with pytest.raises(AssertionError, match=said):
        run_ranks(1, train, config, True)
    assert not (tmp_path / "new").exists()


METHODS = {
    "objectives": {"pairs": {"kind": "contrastive", "pairs": {"image-text": 1.0}, "queue_size": 8},
                   "anchors": {"kind": "semantic_anchors", "of": "image", "text": "text", "size": 8,
                               "vectors": str(VECTORS), "fingerprint": WordVectors(VECTORS).fingerprint}},
    "optimizer": {"average": 0.9},
    "train": STEPS,
}  # fmt: skip


def test_a_queue_of_another_size_begins_empty_and_other_overrides_of_what_is_trained_are_refused(
    tmp_path: Path, tiny_data: Path
) -> None:
    config, states = make_run(tmp_path, tiny_data, (2,), **METHODS)

    def grown(name: str, *overrides: str) -> WholeState:
        operate(config.run_dir, tmp_path / name, overrides, "add", lambda its: add(its, 1, None, (), 0.1, 1, False))
        return store.read_state(store.find_latest(tmp_path / name / "checkpoints"))

    rows = model_key("tasks.pairs.queue_rows")
    assert torch.equal(grown("same")[rows], states[2][rows])
    assert (tmp_path / "same" / "objectives.anchors.npz").read_bytes() == VECTORS.read_bytes()
    new = grown("longer", "objectives.pairs.queue_size=16")
    assert new[rows].shape[0] == 16 and not new[rows].any() and not new[model_key("tasks.pairs.queue_present")].any()
    run_ranks(1, train, run_config.load(tmp_path / "longer" / "config.yaml"), True)
    for overrides, message in (
        (["objectives.anchors.weight=0"], r"change what is trained \(anchors/image\), .* give mmmoe train those"),
        (
            ["train.loss_weighting=uncertainty"],
            r"ask for other weights, such as loss_weighting.* train.loss_weighting",
        ),
        (["optimizer.average=null"], r"keeps exp_avg, exp_avg_sq of each weight, .* leave out optimizer.kind"),
    ):
        with pytest.raises(ValueError, match=message):
            grown("refused", *overrides)
        assert not (tmp_path / "refused").exists()


def wrong(source: Source) -> Result:
    """A split that forgets the factor of the second product."""
    result = split(source, 2, lossy=False)
    result.state[BLOCK + "experts.down"].value.mul_(0.5)
    return result


def test_a_changed_function_leaves_nothing_behind(tmp_path: Path, trained: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"split did not preserve the function: .* nothing was written"):
        operate(trained.run_dir, tmp_path / "new", (), "split", wrong)
    assert list(tmp_path.iterdir()) == []


def test_an_announced_change_is_measured_and_written(tmp_path: Path, trained: RunConfig) -> None:
    def changed(source: Source) -> Result:
        result = wrong(source)
        return Result(result.config, result.state, result.did, exact=False)

    lines = operate(trained.run_dir, tmp_path / "new", (), "split", changed)
    assert "the function changed, as --lossy allows" in lines[-2]
    assert json.loads((tmp_path / "new" / "surgery.json").read_text())["largest_difference"] > operation.TOLERANCE


def test_an_operation_that_cannot_be_done_is_refused(tmp_path: Path, trained: RunConfig) -> None:
    def halves(source: Source) -> Result:
        return split(source, 2, lossy=False)

    with pytest.raises(ValueError, match=r"exists; choose another --out"):
        operate(trained.run_dir, tmp_path, (), "split", halves)
    with pytest.raises(ValueError, match=r"--out .*-new: name: "):
        operate(trained.run_dir, tmp_path / "-new", (), "split", halves)
    with pytest.raises(ValueError, match="no run in"):
        operate(tmp_path / "empty", tmp_path / "new", (), "split", halves)
    with pytest.raises(
        ValueError, match=r"8 experts cannot be divided .*; choose another .*expert_parallel_size=auto"
    ):
        operate(trained.run_dir, tmp_path / "new", ("parallel.expert_parallel_size=3",), "split", halves)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("prune", "run", "--out", "new"), "either --experts 3,5 or --unused"),
        (("prune", "run", "--out", "new", "--experts", "a,2"), "'a' is not an expert"),
        (("merge", "run", "--out", "new", "--layer", "1", "--experts", "1"), "name two"),
    ],
)
def test_incomplete_commands_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], error: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["mmmoe", "experts", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert error in capsys.readouterr().err
