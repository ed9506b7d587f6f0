"""Fixtures that several folders of tests share."""

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

gc.disable()  # until all tests are imported: a third of the time of these imports were collections that find nothing
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # before torch: these tests fork, and are of gloo on CPUs
if not os.environ["CUDA_VISIBLE_DEVICES"]:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton: it runs kernels on CPU tensors then

import torch  # noqa: E402

from tests.support import things, write_shards, write_tokenizer  # noqa: E402


@pytest.hookimpl(trylast=True)  # behind -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The files of tests that may take longer than others are first, and of the rest those of many tests: one worker
    shall not still run a long file when the other has nothing left."""
    usual, number = float(config.getini("timeout")), Counter(item.path for item in items)
    marked = [(item.path, mark) for item in items for mark in item.iter_markers("timeout") if mark.args]
    long = {path for path, mark in marked if mark.args[0] > usual}
    items.sort(key=lambda item: (item.path not in long, -number[item.path]))


def pytest_collection_finish() -> None:
    """What was imported stays: later collections neither look at it nor, in forks, copy its pages."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Indices that do not lie beside their shards stay away from the user's own."""
    os.environ["MMMOE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``train`` shards of things that can be learned, and ``tokens.model``."""
    root = tmp_path_factory.mktemp("tiny")
    write_shards(root / "train", things(48))
    write_tokenizer(root / "tokens.model")
    return root


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
