"""The start of a job."""

import pytest

from mmmoe_pretrain.parallel.runtime import process_group


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_many_processes_without_ranks_are_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(variable, "4")
    with pytest.raises(ValueError, match=f"{variable} is 4, .*start the ranks by torchrun"), process_group(1):
        pytest.fail("it started")
    monkeypatch.setenv(variable, "1")
    with process_group(1) as device:
        assert device.type in ("cpu", "cuda")
