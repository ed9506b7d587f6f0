"""The shape of the repository: imports run one way, files stay small, `--help` stays quick."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "mmmoe_pretrain": "mmmoe_pretrain",
    "data_prep": "mmmoe_pretrain.data_prep",  # linked there, as the next
    "launch": "mmmoe_pretrain.launch",
}

_VALUES = {"batch", "config", "kinds", "limits", "paths", "progress", "untrusted", "urls"}
_LAYERS = _VALUES | {"parallel", "kernels"}
_PARTS = {"moe", "modalities", "objectives"}
_MODEL = _LAYERS | _PARTS | {"models"}
# Part of mmmoe_pretrain -> the parts that it may import. A new part gets its line here.
ALLOWED: dict[str, set[str]] = {
    "config": {"kinds", "paths", "untrusted", "urls"},
    "kinds": {"untrusted"},
    "exit_codes": set(),
    "kernels": set(),
    "data_prep": _VALUES | {"data", "exit_codes", "modalities"},
    "launch": _MODEL | {"checkpoint", "data", "engines", "evaluate", "exit_codes", "plan", "train"},
    "launcher": {"exit_codes"},
    "limits": set(),
    "paths": set(),
    "progress": set(),
    "untrusted": set(),
    "urls": {"exit_codes", "paths"},
    "batch": set(),
    "parallel": _VALUES,
    "checkpoint": _MODEL,
    "moe": _LAYERS,
    "modalities": _LAYERS,
    "objectives": _LAYERS | {"modalities"},
    "models": _LAYERS | _PARTS,
    "data": _VALUES | {"exit_codes"} | {"modalities", "objectives"},
    "engines": _MODEL | {"checkpoint"},
    "generate": _MODEL | {"checkpoint", "data", "export"},
    "evaluate": _MODEL | {"checkpoint", "data", "generate"},
    "surgery": _MODEL | {"checkpoint", "data", "evaluate"},
    "plan": _MODEL | {"data", "engines"},
    "export": _MODEL | {"checkpoint", "data", "engines"},
    "train": _MODEL | {"checkpoint", "data", "engines", "evaluate", "exit_codes", "export", "plan"},
    "doctor": _LAYERS | {"data", "exit_codes"},
    "cli": _MODEL | {"checkpoint", "data", "doctor", "engines", "evaluate", "generate", "surgery", "plan", "export"}
    | {"train"}
    | {"exit_codes"},
}  # fmt: skip
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 90
# The leading slash of a path: not a URL's, not one inside a relative path.
ABSOLUTE_PATH = re.compile(r"(?<![\w.\-/})~*])/(?:home|Users|work|tmp)/\w")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sh", ".sbatch", ".json", ".cfg", ""}


def module_files() -> dict[str, Path]:
    """Dotted name -> file, over the packages."""
    files = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (package, *path.relative_to(ROOT / folder).with_suffix("").parts)
            if (name := ".".join(parts[:-1] if parts[-1] == "__init__" else parts)) not in files:
                files[name] = path
    return files


def imports_of(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Every module that ``path`` imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}:{node.lineno}: write the import with its package"
            for alias in node.names:
                child = f"{node.module}.{alias.name}"
                yield child if child in known or node.module == "torch" else node.module


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    known = module_files()
    return {module: set(imports_of(path, known)) for module, path in known.items()}


def is_within(module: str, *prefixes: str) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def part_of(module: str) -> str | None:
    names = module.split(".")
    return names[1] if names[0] == "mmmoe_pretrain" and len(names) > 1 else None


def test_no_import_cycle(imports: dict[str, set[str]]) -> None:
    TopologicalSorter(imports).prepare()  # or a CycleError that names the modules


def test_imports_run_one_way(imports: dict[str, set[str]]) -> None:
    wrong = []
    for module, targets in imports.items():
        part = part_of(module)
        if part is None:
            continue
        assert part in ALLOWED, f"{module}: give the new part {part!r} a line in ALLOWED"
        for target in sorted(targets):
            to = part_of(target)
            if to is not None and to != part and to not in ALLOWED[part]:
                wrong.append(f"{module} imports {target}; {part} may import {sorted(ALLOWED[part])}")
    assert not wrong, "\n".join(wrong)


def test_the_allowed_imports_have_an_order() -> None:
    TopologicalSorter(ALLOWED).prepare()


@pytest.mark.parametrize(
    ("libraries", "importers", "may"),
    [
        (("megatron", "deepspeed"), tuple(PACKAGES.values()), ("mmmoe_pretrain.engines", "mmmoe_pretrain.parallel")),
        (("torch.distributed", "mmmoe_pretrain.engines", "mmmoe_pretrain.train"), ("mmmoe_pretrain.data_prep",), ()),
    ],
    ids=["engine libraries", "data_prep without a distributed runtime"],
)
def test_only_some_parts_import(
    libraries: tuple[str, ...], importers: tuple[str, ...], may: tuple[str, ...], imports: dict[str, set[str]]
) -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in imports.items()
        for target in sorted(targets)
        if is_within(target, *libraries) and is_within(module, *importers) and not is_within(module, *may)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "module", ["mmmoe_pretrain.cli", "mmmoe_pretrain.data_prep.cli", "mmmoe_pretrain.launch.submit"]
)
def test_help_is_quick_and_loads_no_torch(module: str) -> None:
    before = os.times()
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module, "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    after = os.times()
    assert result.returncode == 0, result.stderr[-2000:]
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    names = "torch megatron deepspeed matplotlib numpy PIL soundfile soxr sentencepiece"
    heavy = [name for name in names.split() if name in loaded]
    assert not heavy, f"{module} --help imports {heavy}; import them inside the command"
    cpu_seconds = (after.children_user - before.children_user) + (after.children_system - before.children_system)
    # The aim is 0.3 s; the bound leaves room for a slow machine and for -X importtime itself.
    assert cpu_seconds < 1.5, f"{module} --help took {cpu_seconds:.2f} s of CPU time"


def python_files() -> list[Path]:
    folders = (*PACKAGES, "tests", "benchmarks", "evidence")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_files_and_functions_stay_small() -> None:
    wrong = []
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        if text.count("\n") > MAX_FILE_LINES:
            wrong.append(f"{name}: {text.count(chr(10))} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{name}:{node.lineno} {node.name}: {length} lines, at most {MAX_FUNCTION_LINES}")
    assert not wrong, "\n".join(wrong)


def text_files() -> Iterator[Path]:
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.name != ".git")  # a file in a worktree
    for folder in (*PACKAGES, "tests", "benchmarks", "evidence", "configs", "docs", ".ci"):
        yield from (path for path in (ROOT / folder).rglob("*") if path.is_file())


def test_no_file_names_a_path_of_one_machine() -> None:
    wrong = []
    for path in text_files():
        if path.suffix not in TEXT_SUFFIXES or "__pycache__" in path.parts:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if ABSOLUTE_PATH.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)
