"""What the engine asks of megatron-core, also where its next versions differ, and the page that lists it."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

from mmmoe_pretrain.engines.megatron_setup import inner_optimizers
from mmmoe_pretrain.parallel.mesh import destroy_groups, forget_buffers
from mmmoe_pretrain.parallel.runtime import process_group, silence_megatron
from tests.distributed import run_ranks
from tests.layouts.cases import SGD, Case
from tests.layouts.train import build

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "megatron_core.md").read_text(encoding="utf-8")


def optimizers_of(case: Case) -> list[str]:
    """torch's classes, where the classes of settings mean nothing, as from megatron-core 0.18 on."""
    from megatron.core.optimizer import optimizer_config

    for name in ("AdamOptimizerConfig", "SGDOptimizerConfig"):
        setattr(optimizer_config, name, optimizer_config.OptimizerConfig)
    with process_group(timeout_minutes=0.5) as device:
        made = inner_optimizers(build(case, device).optimizer)
        names = [type(inner.optimizer).__name__ for inner in made]
        destroy_groups()
    return names


@pytest.mark.parametrize(("settings", "expected"), [({}, "Adam"), (SGD, "SGD")], ids=["adamw", "sgd"])
def test_the_optimizer_is_asked_for_by_name(settings: dict[str, object], expected: str) -> None:
    """Adam or AdamW: which one depends on the version, and decay is decoupled in both."""
    (names,) = run_ranks(1, optimizers_of, Case("one process", 1, "megatron", 0, optimizer=settings))
    assert names and all(name.removesuffix("W") == expected for name in names)


def warnings_of_an_import() -> list[str]:
    """Of what ``get_megatron_optimizer`` imports from 0.19 on, imported for the first time."""
    for name in [name for name in sys.modules if name.startswith("megatron.core.models.mimo")]:
        del sys.modules[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with silence_megatron():
            importlib.import_module("megatron.core.models.mimo.model.base")
    return [str(warning.message) for warning in caught]


def test_what_an_optimizer_imports_says_nothing_of_unfinished_models() -> None:
    assert run_ranks(1, warnings_of_an_import) == [[]]


def gathered_before_and_after() -> tuple[int, int]:
    """Tensors in megatron-core's buffer of gathered rows."""
    from megatron.core import parallel_state

    with process_group(timeout_minutes=0.5):
        forget_buffers()  # no groups, no buffer: nothing to forget
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        buffer = parallel_state.get_global_memory_buffer()
        buffer.get_tensor([4, 8], torch.float32, "mpu")
        before = len(buffer.buffer)
        forget_buffers()
        after = len(parallel_state.get_global_memory_buffer().buffer)
        destroy_groups()
    return before, after


def test_gathered_rows_are_forgotten() -> None:
    assert run_ranks(1, gathered_before_and_after) == [(1, 0)]


def test_the_page_is_written_for_the_pinned_version() -> None:
    (pinned,) = re.findall(r"^megatron-core==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    (written_for,) = re.findall(r"^Pinned: megatron-core (\S+)\.$", PAGE, re.MULTILINE)
    assert pinned == written_for, "read the new version and update docs/megatron_core.md (it says how)"


def imports_of_megatron(path: Path) -> set[str]:
    """The names that a file imports from megatron.core."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.core"):
            found |= {alias.name for alias in node.names}
    return found


def test_the_page_lists_every_name_that_we_import() -> None:
    found = {path: imports_of_megatron(path) for path in (ROOT / "mmmoe_pretrain").rglob("*.py")}
    names = set().union(*found.values())
    assert {"parallel_state", "get_megatron_optimizer", "ColumnParallelLinear"} <= names
    missing = {
        str(path.relative_to(ROOT)): sorted(name for name in imported if not re.search(rf"\b{name}\b", PAGE))
        for path, imported in found.items()
    }
    assert not {path: gone for path, gone in missing.items() if gone}
