"""Damaged YAML: tags that construct objects, aliases and merges that multiply, depth, odd scalars."""

from __future__ import annotations

from pathlib import Path
from random import Random

import yaml

from tests.fuzz.mutate import BLIND, change_value

SCALARS = (".nan", ".inf", "-.inf", "2001-99-99", "!!int x", "!!float x", "!!timestamp x", "!!bool x", "!!int ''",
           "!!binary '!'", "!!set {a}", "!!omap [1]", "!!pairs [[1]]", "!!null x", "0x" + "f" * 6000, "9" * 5000,
           "1:99:99", "&a [*a]", "&b {c: *b}", "*nothing", "~", "'\0'", "\"\\ud800\"", "? [1]", "{[1]: 2}", "<<",
           "!unknown x", "!!str [a]", "{<<: 1}", "{<<: [1]}", "=", "%YAML 9.9", "---", "|", "1e999", "''",
           "2001-01-01", "0o9", "1_000", "!!merge x", "!!value x")  # fmt: skip


def aliases(levels: int, width: int) -> str:
    """A billion laughs: ``width`` ** ``levels`` leaves in a few lines."""
    lines = ["- &l0 [x, x]"] + [f"- &l{i} [{', '.join([f'*l{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int, width: int) -> str:
    """The same by merge keys, which multiply while they are read."""
    lines = ["- &m0 {a: 1, b: 2}"]
    lines += [f"- &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * width)}]}}" for i in range(1, levels)]
    return "\n".join(lines)


def code(marker: Path) -> tuple[str, ...]:
    """Tags that would write ``marker`` where YAML is loaded without care."""
    return (
        f"!!python/object/apply:os.system ['touch {marker}']",
        f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.PosixPath ['{marker}']]",
        f"!!python/object/new:os.system ['touch {marker}']",
        "!!python/name:os.system ''",
        "!!python/module:antigravity ''",
        f"!!python/object/apply:eval [\"open('{marker}', 'w')\"]",
    )


def damage_yaml(rng: Random, text: str, marker: Path) -> str:
    kind = rng.random()
    if kind < 0.35:
        value = yaml.safe_load(text)
        for _ in range(rng.randint(1, 3)):
            value = change_value(rng, value)
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=rng.random() < 0.5)
    if kind < 0.6:
        return _replace_scalar(rng, text, rng.choice(SCALARS))
    if kind < 0.7:
        return _replace_scalar(rng, text, rng.choice(code(marker)))
    if kind < 0.8:
        bomb = rng.choice((aliases(9, 9), merges(9, 9), aliases(3, 3), merges(2, 2), aliases(30, 2)))
        return rng.choice(("x:\n" + bomb + "\n" + text, text + "\ny:\n" + bomb))
    if kind < 0.85:
        depth = rng.choice((100, 3_000, 50_000))
        return _replace_scalar(
            rng, text, rng.choice(("[" * depth, "[" * depth + "]" * depth, "{a: " * depth, "- " * depth))
        )
    if kind < 0.9:
        lines = text.splitlines(keepends=True)
        return "".join([*lines, rng.choice(lines)])  # a key twice
    data = text.encode()
    return rng.choice(BLIND)(rng, data, data).decode("utf-8", "surrogateescape")


def _replace_scalar(rng: Random, text: str, scalar: str) -> str:
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    key, colon, _ = lines[at].partition(": ")
    lines[at] = f"{key}{colon or ''}{scalar}" if rng.random() < 0.9 else scalar
    return "\n".join(lines)
