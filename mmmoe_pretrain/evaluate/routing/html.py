"""The parts that the page of the routing report is made of: escaped text, numbers, tables and line charts.

All that is inserted is escaped here and cut to a length, so that no text of the data can end an element, change the
direction of what follows it, or fill the page. Charts are SVG without styles, which the page's policy forbids.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

MAX_LETTERS = 160  # of a text: two lines beside an image
COLOURS = 8  # of lines; the template defines them as classes c0, c1, ...
LEVELS = 10  # of shade in a heat map: classes h0, h1, ...
WIDTH, HEIGHT, MARGIN = 320, 110, 6  # of a chart, in its own units
# Control characters, halves of characters, non-characters, and marks that change the direction of what follows.
HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def attribute(value: object, most: int = MAX_LETTERS) -> str:
    """Text for the value of an attribute in double quotes; of a long one, its beginning."""
    plain = str(value)
    plain = plain if len(plain) <= most else plain[:most] + "…"
    return escape(HARMFUL.sub("\ufffd", plain))


def text(value: object, most: int = MAX_LETTERS) -> str:
    """Text for the content of an element, isolated in its direction."""
    return f"<bdi>{attribute(value, most)}</bdi>"


def data(value: Any) -> str:
    """JSON for a ``script`` element, which only ``</script>`` or a comment could end."""
    plain = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return plain.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def percent(share: float | None) -> str:
    """A share in percent: three digits at most, so that a column of them can be compared."""
    if share is None:
        return "–"
    if 0 < share < 0.001:
        return "<0.1%"
    if share == 0:
        return "0%"
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def level(share: float, top: float) -> int:
    """The shade of a share, where ``top`` and more have the darkest."""
    return min(LEVELS - 1, max(0, int(LEVELS * share / top))) if top > 0 else 0


def table(label: str, heads: Sequence[str], rows: Sequence[Sequence[str]], attributes: str = "") -> str:
    """A table of HTML cells, the first of each row its heading; one that is wider than the page scrolls by itself."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    return scrolling(label, f"<table{attributes}><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>")


def scrolling(label: str, content: str) -> str:
    """A region with this name that scrolls sideways, also from the keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{attribute(label)}">{content}</div>\n'


Line = tuple[str, str, Sequence[float | None]]  # name, class, values; None where there is none


def chart(title: str, steps: Sequence[int], lines: Sequence[Line], top: float, as_text: Any = percent) -> str:
    """A line chart over steps from 0 to ``top``; what it shows is also told in words."""
    ends = [(name, [value for value in values if value is not None]) for name, _, values in lines]
    words = "; ".join(f"{name} {as_text(seen[0])} to {as_text(seen[-1])}" for name, seen in ends if seen)
    label = attribute(f"{title}, step {steps[0]} to {steps[-1]}: {words}", 1000)
    paths = "".join(f'<path class="{kind}" d="{_path(steps, values, top)}"/>' for _, kind, values in lines)
    base = HEIGHT - MARGIN
    return (
        f'<figure class="chart"><figcaption>{attribute(title)}</figcaption>\n'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f'<path class="axis" d="M0 {MARGIN}H{WIDTH}M0 {base}H{WIDTH}"/>{paths}</svg>\n'
        f"<small>0 to {as_text(top)}; step {steps[0]:,} to {steps[-1]:,}</small></figure>\n"
    )


def _path(steps: Sequence[int], values: Sequence[float | None], top: float) -> str:
    """SVG path data; the line has gaps where values are missing."""
    first, span = steps[0], max(1, steps[-1] - steps[0])
    parts, pen = [], "M"
    for step, value in zip(steps, values, strict=True):
        if value is None:
            pen = "M"
            continue
        x, share = WIDTH * (step - first) / span, min(1.0, value / top) if top > 0 else 0.0
        parts.append(f"{pen}{x:.4g} {HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * share:.4g}")
        pen = "L"
    return "".join(parts)


def largest(lines: Sequence[Line], least: float = 0.0) -> float:
    """The largest value of all lines, and at least ``least``."""
    return max((value for *_, values in lines for value in values if value is not None), default=least) or least


def rounded(value: Any) -> Any:
    """Values for JSON: floats of six digits, which is more than any is known to, and None for those that are not
    numbers."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): rounded(its) for name, its in value.items()}
    return [rounded(its) for its in value] if isinstance(value, list | tuple) else value
