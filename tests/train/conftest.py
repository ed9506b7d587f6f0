"""A run that the tests of this folder compare with, or begin with a copy of."""

from functools import partial
from pathlib import Path

import pytest

from mmmoe_pretrain.config import RunConfig
from tests.distributed import run_ranks
from tests.train.faulty import config_in, faulty, poison

SKIPPED = partial(poison, [3, 4])  # two steps without an update: the counts of steps and updates differ from then on


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> RunConfig:
    """Finished on two ranks."""
    config = config_in(tmp_path_factory.mktemp("undisturbed"), tiny_data, checkpoint={"every": 4, "keep_last": 9})
    run_ranks(2, faulty, config, SKIPPED)
    return config
