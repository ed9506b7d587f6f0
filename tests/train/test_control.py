"""Numbers that all ranks sum beside a step."""

import pytest
import torch.distributed as dist

from mmmoe_pretrain.parallel.mesh import build_host_groups, destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.train.control import Control, Notes, any_rank, from_rank_0
from tests.distributed import run_ranks


def of_this_rank() -> str:
    if dist.get_rank() > 0:
        raise AssertionError("only rank 0 looks")
    return "seen by rank 0"


def refused() -> None:
    raise OSError("the disk is gone")


def talk() -> tuple[list[Notes], list[object], str]:
    with process_group(0.5):
        group = build_host_groups(0.5).control
        control, rank = Control(group), dist.get_rank()
        sums = []
        for step in range(3):
            control.begin(Notes(stop=float(rank == 1 and step == 1), read=8, bad=rank, failed_saves=2 * (rank == 0)))
            sums.append(control.finish())
        answers = [from_rank_0(group, of_this_rank), any_rank(group, rank == 2), any_rank(group, False)]
        with pytest.raises(ValueError, match="the disk is gone") as raised:
            from_rank_0(group, refused)
        destroy_groups()
    return sums, answers, str(raised.value)


def test_ranks_hear_of_each_other_and_of_what_rank_0_saw() -> None:
    for sums, answers, error in run_ranks(3, talk):
        assert [notes.stop for notes in sums] == [0, 1, 0]
        assert all(notes == Notes(notes.stop, read=24, bad=3, failed_saves=2, worker_restarts=0) for notes in sums)
        assert answers == ["seen by rank 0", True, False]
        assert error == "the disk is gone"


def test_one_process_hears_itself() -> None:
    control = Control(None)
    control.begin(Notes(read=4, bad=1))
    assert control.finish() == Notes(read=4, bad=1)
    assert from_rank_0(None, lambda: 5) == 5
    assert any_rank(None, True)
    with pytest.raises(ValueError, match="the disk is gone"):
        from_rank_0(None, refused)
