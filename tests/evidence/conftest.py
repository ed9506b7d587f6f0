"""The small corpus, made once for the tests that train."""

from pathlib import Path

import pytest

from evidence import __main__ as command


@pytest.fixture(scope="session")
def quick_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evidence") / "data"
    command.make_data("mini", out)
    return out


@pytest.fixture
def out(quick_data: Path, tmp_path: Path) -> Path:
    """A folder for --out that has its data already."""
    (tmp_path / "data").symlink_to(quick_data)
    return tmp_path
