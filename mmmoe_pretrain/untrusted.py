"""Reading of files that others wrote: JSON and YAML into plain values, nothing of which is run.

Whatever such a file holds, the outcome is plain values or a ValueError that names the file: size, depth and
what aliases multiply to are bounded before values are made.
"""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yaml.nodes import Node

MAX_JSON_BYTES = 64 << 20
MAX_YAML_BYTES = 256 << 10
MAX_YAML_NODES = 20_000  # aliases and merges written out
MAX_YAML_DEPTH = 40
MAX_DIGITS = 40

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 120
_brief.maxlevel = 3


def brief(value: object) -> str:
    """``repr`` for a message: of a huge value, its beginning."""
    return _brief.repr(value)


def parse_json(data: bytes, where: str, limit: int = MAX_JSON_BYTES) -> Any:
    """The value of UTF-8 JSON, with or without a byte order mark. Raises ValueError that begins with ``where``."""
    if len(data) > limit:
        raise ValueError(f"{where} has {len(data)} bytes of JSON, and at most {limit} are read")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{where} is not JSON that can be read (it is nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error})") from None


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in the JSON file ``path``. Raises ValueError that names it, FileNotFoundError where it is absent."""
    value = parse_json(read_bytes(path, limit), str(path), limit)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a plain file (a pipe would never end) of at most ``limit`` bytes."""
    status = path.stat()
    if not path.is_file():
        raise ValueError(f"{path} is not a plain file")
    if status.st_size > limit:
        raise ValueError(f"{path} has {status.st_size} bytes, and at most {limit} are read")
    return path.read_bytes()


def read_yaml(path: Path) -> Any:
    """The value of a YAML file. Raises ValueError that names it."""
    try:
        text = read_bytes(path, MAX_YAML_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The value of YAML with plain tags alone, no key of which stands twice. Raises ValueError."""
    import yaml  # JSON needs none of it

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()  # aliases are shared here, and written out only by construct_document
        if node is None:
            return None
        problem = _yaml_problem(node)
        if not problem:
            return loader.construct_document(node)
    except RecursionError:
        problem = "it is nested too deeply"
    except yaml.YAMLError as error:
        problem = _cut(str(error))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # What PyYAML raises for a scalar that is not of its kind: 2001-99-99, !!int x.
        problem = _cut(f"a value is not of its kind ({type(error).__name__}: {error})")
    raise ValueError(f"{where} is not valid YAML: {problem}")


def _yaml_problem(root: Node) -> str:
    """What would make the value of ``root`` boundless or ambiguous; empty where nothing does."""
    from yaml.nodes import MappingNode, ScalarNode, SequenceNode

    waiting, seen = [(root, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        seen += 1
        if seen > MAX_YAML_NODES:
            return f"it has more than {MAX_YAML_NODES} values, aliases and merges written out"
        if depth > MAX_YAML_DEPTH:
            return f"it is nested more than {MAX_YAML_DEPTH} deep, or holds itself"
        if isinstance(node, MappingNode):
            scalars = [key for key, _ in node.value if isinstance(key, ScalarNode)]
            keys = [(key.tag, key.value) for key in scalars if key.value != "<<"]
            if len(set(keys)) < len(keys):
                twice = next(key for i, key in enumerate(keys) if key in keys[:i])
                return f"the key {brief(twice[1])} stands twice in one section"
            waiting += [(child, depth + 1) for pair in node.value for child in pair]
        elif isinstance(node, SequenceNode):
            waiting += [(child, depth + 1) for child in node.value]
        elif node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
            return f"it holds a number of {len(node.value)} digits"
    return ""


def _cut(text: str) -> str:
    return text if len(text) <= 600 else text[:600] + "..."
