"""Whole runs on tiny shards: layouts agree, a killed run resumes as if nothing had happened, and
what cannot work ends with a reason."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain import exit_codes
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.loader import Loader
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.train import loop
from mmmoe_pretrain.train.journal import read_events
from mmmoe_pretrain.train.loop import train
from tests.distributed import run_ranks
from tests.support import objectives, things, tiny_config, write_shards, write_tokenizer
from tests.train.faulty import at_step, codes


def config_in(tmp_path: Path, tiny_data: Path, **sections: Any) -> RunConfig:
    data = {"train": [{"path": str(tiny_data / "train")}], "tokenizer": str(tiny_data / "tokens.model"),
            "num_workers": 0}  # fmt: skip
    return tiny_config(tmp_path, **{"data": data, **sections})


def logged(config: RunConfig) -> list[dict[str, Any]]:
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_missing_folder_of_held_out_shards_is_reported_at_the_start(
    tmp_path: Path, tiny_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here, missing = str(tiny_data / "train"), str(tmp_path / "missing")
    config = config_in(tmp_path, tiny_data, evaluate={"test": [here, missing]})
    with Loader(config, build_modalities(config.modalities, config.data.tokenizer)) as loader:
        loop._survey(config, loader, main=True)
    (message,) = [record.getMessage() for record in caplog.records if "evaluate.test" in record.getMessage()]
    assert missing in message and here not in message


def losses(config: RunConfig) -> np.ndarray:
    return np.array([list(record["losses"].values()) for record in logged(config)])


def test_one_process_and_two_ranks_with_split_experts_log_the_same_losses(tmp_path: Path, tiny_data: Path) -> None:
    """Real loader, same global batches. The tolerance is that of tests/engines/test_parity.py."""
    steps = {"steps": 10, "global_batch_size": 16, "num_microbatches": 2, "log_every": 1}
    single = config_in(tmp_path / "one", tiny_data, train=steps)
    double = config_in(tmp_path / "two", tiny_data, train=steps, parallel={"expert_parallel_size": 2})
    run_ranks(1, train, single)
    run_ranks(2, train, double)
    assert losses(single).shape[0] == 10
    np.testing.assert_allclose(losses(double), losses(single), rtol=5e-4, atol=5e-4)
    assert losses(single)[-1, 0] < 0.9 * losses(single)[0, 0]


def test_a_run_killed_in_the_middle_resumes_to_the_same_losses(tmp_path: Path, tiny_data: Path) -> None:
    steps = {"steps": 14, "global_batch_size": 16, "log_every": 1}
    straight = config_in(tmp_path / "straight", tiny_data, train=steps, checkpoint={"every": 5})
    killed = config_in(tmp_path / "killed", tiny_data, train=steps, checkpoint={"every": 5})
    run_ranks(1, train, straight)
    saved = killed.run_dir / "checkpoints" / "step_00000005"

    def die(_: Any) -> None:
        deadline = time.monotonic() + 60
        while not saved.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    assert codes(1, tmp_path / "killed.yaml", killed, partial(at_step, 9, die)) == [-signal.SIGKILL]
    assert [record["step"] for record in logged(killed)] == list(range(1, 9))
    assert codes(1, tmp_path / "killed.yaml", killed) == [exit_codes.DONE]  # nobody needs to ask it to resume
    assert [event["step"] for event in read_events(killed.run_dir) if event["event"] == "resumed"] == [5]
    assert [record["step"] for record in logged(killed)] == list(range(1, 15))
    np.testing.assert_array_equal(losses(killed), losses(straight))


def test_a_run_that_is_done_stays_as_it_is_unless_it_is_replaced(tmp_path: Path, tiny_data: Path) -> None:
    short = {"steps": 2, "global_batch_size": 8, "log_every": 1}
    config = config_in(tmp_path, tiny_data, train=short)
    run_ranks(1, train, config)
    (config.run_dir / "mark").touch()
    assert run_ranks(1, train, config, True) == [exit_codes.DONE]
    assert (config.run_dir / "mark").exists()
    run_ranks(1, train, config, False, True)
    assert not (config.run_dir / "mark").exists()
    assert len(logged(config)) == 2


def test_a_restarted_worker_does_not_replace_the_run_a_second_time(tmp_path: Path, tiny_data: Path) -> None:
    config = config_in(tmp_path, tiny_data, train={"steps": 2, "global_batch_size": 8, "log_every": 1})
    mark = config.run_dir / "mark"
    run_ranks(2, train, config)

    def start(job: str, restarted: bool) -> bool:
        os.environ["TORCHELASTIC_RUN_ID"] = job
        os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ["RANK"] if restarted else "0"  # one machine is new
        before = mark.exists()
        train(config, overwrite=True)
        return before and not mark.exists()

    for job, restarted, replaced in [("first", False, True), ("first", True, False), ("second", True, True)]:
        mark.touch()
        # A second job whose first start died before it had replaced anything replaces the run in the next one.
        assert run_ranks(2, start, job, restarted) == [replaced] * 2


def test_resume_refuses_to_begin_afresh(tmp_path: Path, tiny_data: Path) -> None:
    config = config_in(tmp_path, tiny_data, train={"steps": 2, "global_batch_size": 8})
    with pytest.raises(AssertionError, match=r"--resume: there is no finished checkpoint in .*leave --resume out"):
        run_ranks(2, train, config, True)
    with pytest.raises(AssertionError, match="give one of them, or neither"):
        run_ranks(1, train, config, True, True)
    assert not config.run_dir.exists()


def test_a_modality_that_no_sample_has_does_not_hang_two_ranks(tmp_path: Path, tiny_data: Path) -> None:
    write_shards(tmp_path / "silent", things(16), lacking=("audio",))
    data = {"train": [{"path": str(tmp_path / "silent")}], "tokenizer": str(tiny_data / "tokens.model"),
            "num_workers": 1}  # fmt: skip
    config = config_in(tmp_path, tiny_data, data=data,
                       train={"steps": 3, "global_batch_size": 8, "log_every": 1})  # fmt: skip
    run_ranks(2, train, config)
    assert [record["routing"][0]["tokens"]["audio"] for record in logged(config)] == [0, 0, 0]
    pairs = {"contrastive/audio-text": 0, "contrastive/image-audio": 0, "contrastive/image-text": 8}
    assert all(record["counts"].items() >= pairs.items() for record in logged(config))
    idle = [event for event in read_events(config.run_dir) if event["event"] == "idle_objective"]
    assert [event["loss"] for event in idle] == ["contrastive/audio-text", "contrastive/image-audio"]
    assert "no sample with audio and text in 3 steps (24 samples)" in idle[0]["why"]


def test_a_run_that_learns_nothing_is_an_error(tmp_path: Path, tiny_data: Path) -> None:
    """All samples are of one group, so none is another's negative."""
    write_shards(tmp_path / "alike", [{**row, "group": "same"} for row in things(16)])
    data = {"train": [{"path": str(tmp_path / "alike")}], "tokenizer": str(tiny_data / "tokens.model"),
            "num_workers": 0}  # fmt: skip
    config = config_in(tmp_path, tiny_data, data=data, objectives=objectives(captioning=None),
                       train={"steps": 2, "global_batch_size": 8, "log_every": 1})  # fmt: skip
    with pytest.raises(AssertionError, match=r"there is nothing to learn: .*no negatives for audio-text in 2 steps"):
        run_ranks(1, train, config)
    assert [record["counts"]["contrastive/audio-text"] for record in logged(config)] == [8, 8]


def test_a_tokenizer_that_does_not_match_is_refused_on_resume(tmp_path: Path, tiny_data: Path) -> None:
    """A run learns the vocabulary's size from its tokenizer, and its saved config has it."""
    short = {"steps": 2, "global_batch_size": 8}
    sized = config_in(tmp_path, tiny_data, train=short)
    model = {**sized.model.model_dump(), "vocab_size": 0}
    run_ranks(1, train, config_in(tmp_path, tiny_data, train=short, model=model))
    assert run_config.load(sized.run_dir / "config.yaml") == sized
    smaller = write_tokenizer(tmp_path / "smaller.model", vocab_size=44)
    same_size = write_tokenizer(tmp_path / "same_size.model", backwards=True)
    for tokenizer, vocab_size, message in (
        (smaller, 0, "cannot change the model .*model.vocab_size was 48 and is 44"),
        (smaller, 48, r"smaller.model has vocabulary size 44, and model.vocab_size is 48; set data.tokenizer"),
        (same_size, 0, r"was trained with another tokenizer .* e.g. the copy in .*tiny/tokenizer.model"),
    ):
        data = {**sized.data.model_dump(), "tokenizer": str(tokenizer)}
        model["vocab_size"] = vocab_size
        with pytest.raises(AssertionError, match=message):
            run_ranks(1, train, config_in(tmp_path, tiny_data, train=short, data=data, model=model), True)


def test_resume_refuses_another_model_and_keeps_the_record_of_the_old_one(tmp_path: Path, tiny_data: Path) -> None:
    short = {"steps": 2, "global_batch_size": 8}
    config = config_in(tmp_path, tiny_data, train=short)
    run_ranks(1, train, config)
    model = {**config.model.model_dump(), "num_heads": 1}
    with pytest.raises(AssertionError, match=r"cannot change the model .*model.num_heads was 2 and is 1"):
        run_ranks(1, train, config_in(tmp_path, tiny_data, train=short, model=model), True)
    assert run_config.load(config.run_dir / "config.yaml") == config


def test_overwrite_replaces_nothing_before_all_else_is_known_to_work(tmp_path: Path, tiny_data: Path) -> None:
    config = config_in(tmp_path, tiny_data, train={"steps": 2, "global_batch_size": 8})
    run_ranks(1, train, config)
    uneven = config_in(tmp_path, tiny_data, train={"steps": 2, "global_batch_size": 9, "num_microbatches": 2})
    with pytest.raises(AssertionError, match="global_batch_size 9 does not divide"):
        run_ranks(1, train, uneven, False, True)
    assert store.find_latest(config.checkpoint_root) is not None


def test_bad_samples_of_every_rank_are_counted(tmp_path: Path, tiny_data: Path) -> None:
    rows = things(16)
    write_shards(tmp_path / "broken", rows, corrupt=(rows[3]["key"], rows[12]["key"]))
    data = {"train": [{"path": str(tmp_path / "broken")}], "tokenizer": str(tiny_data / "tokens.model"),
            "num_workers": 0, "max_bad_fraction": 0.5}  # fmt: skip
    config = config_in(tmp_path, tiny_data, data=data, train={"steps": 2, "global_batch_size": 16, "log_every": 1})
    run_ranks(2, train, config)
    assert [record["bad_samples"] for record in logged(config)] == [2, 4]  # each step reads all sixteen


def test_impossible_layouts_name_the_ones_that_work(tmp_path: Path, tiny_data: Path) -> None:
    config = config_in(tmp_path, tiny_data, parallel={"expert_parallel_size": 3})
    with pytest.raises(AssertionError, match=r"expert_parallel_size 3 does not fit .* use one of \[1, 2\] or auto"):
        run_ranks(2, train, config)
    uneven = config_in(tmp_path, tiny_data, train={"steps": 2, "global_batch_size": 9})
    with pytest.raises(AssertionError, match="global_batch_size 9 does not divide"):
        run_ranks(2, train, uneven)
