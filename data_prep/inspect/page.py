"""The page of ``mmmoe-data inspect --html``: one file that needs nothing else, and runs nothing.

Whatever the data holds is escaped, isolated in its direction, and cut to a length; images and sounds are encoded anew
(``sheet.py``). The browser is told to load nothing from anywhere and to run no script.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from mmmoe_pretrain import __version__
from mmmoe_pretrain.data_prep.inspect.histogram import Histogram
from mmmoe_pretrain.data_prep.inspect.measure import QUANTITIES, Found, Kind, amount, lines
from mmmoe_pretrain.data_prep.inspect.sheet import SOUND_SECONDS, sound, thumbnail
from mmmoe_pretrain.data_prep.samples import Piece, Sample
from mmmoe_pretrain.paths import new_file
from mmmoe_pretrain.progress import counted, track
from mmmoe_pretrain.urls import StorageError

SIDE = 256  # pixels of a thumbnail
MAX_LETTERS = 2000  # of a text, and of all fields of a sample
MAX_PIECES = 64  # of a document
MAX_ROWS = 100  # of the table
BAR = 180, 12  # pixels of the longest bar
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .15em .8em; text-align: left; border-bottom: 1px solid #ddd }
td.n { text-align: right } tr.all { font-weight: bold }
.row { display: flex; flex-wrap: wrap; gap: 1.5em; align-items: flex-start }
article { border: 1px solid #ddd; border-radius: 6px; padding: .8em; width: 22em; overflow-wrap: anywhere }
article.document { width: 100% } article h3 { font-size: 1em; margin: 0 }
article p { margin: .4em 0; white-space: pre-wrap }
img { max-width: 100%; background: #fff } audio { width: 100% } pre { white-space: pre-wrap; font-size: .8em }
small, .note { color: #666 } .problem { color: #a00 } rect { fill: #58c }
"""


def write_page(path: Path, found: Found, seed: int, max_bytes: int) -> int:
    """Write the page; returns how many of ``found.chosen`` it shows: those that fit into ``max_bytes``."""
    top = "".join(_top(found)).encode()
    end = "".join(_end(found, seed, len(found.chosen), len(found.chosen))).encode()
    left = max_bytes - len(top) - len(end) - 100  # the numbers at the end may have other lengths
    shown = 0
    with new_file(path) as draft, draft.open("wb") as file:
        file.write(top)
        for sample in track(found.chosen, "writing the page", len(found.chosen), "samples"):
            article = "".join(_article(sample)).encode()
            if len(article) <= left:
                file.write(article)
                left -= len(article)
                shown += 1
        file.write("".join(_end(found, seed, shown, len(found.chosen) - shown)).encode())
    return shown


def text_of(value: str, most: int = MAX_LETTERS) -> str:
    """Text as HTML, isolated in its direction; of a long one, its beginning."""
    cut = f" … ({len(value):,} characters)" if len(value) > most else ""
    value = value[:most].encode("utf-8", "replace").decode().replace("\0", "\ufffd")
    return f"<bdi>{escape(value)}</bdi>{cut}"


def _top(found: Found) -> Iterator[str]:
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; media-src data:; style-src 'sha256-{digest}'; form-action 'none'"
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
    yield f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
    yield '<meta name="referrer" content="no-referrer"><meta name="viewport" content="width=device-width">\n'
    yield f"<title>{escape(found.name[:200])}</title><style>{STYLE}</style></head><body>\n"
    yield f"<h1>{text_of(found.name, 500)}</h1>\n"
    heads = "".join(f"<th>{name}" for name in (*Kind._fields, "rows", "hours of audio", "bytes"))
    yield f"<table><tr>{heads}\n"
    rows = [row for split, kinds in found.by_split() for row in _split(found, split, kinds)]
    yield from rows[:MAX_ROWS]
    more = len(rows) - MAX_ROWS
    yield f"</table>{f'<p class=note>and {more:,} more rows' if more > 0 else ''}\n<div class=row>"
    for name, unit in QUANTITIES.items():
        if found.histograms[name].count:
            yield from _histogram(f"{name}, {unit}" if unit else name, found.histograms[name])
    yield "</div>\n"
    yield from (f"<p class=note>{text_of(line)}\n" for line in lines(found))
    yield f"<h2>{counted(len(found.chosen), 'sample')} of {found.whole.rows:,}</h2><div class=row>\n"


def _split(found: Found, split: str, kinds: list[Kind]) -> Iterator[str]:
    for kind in kinds:
        yield _line((*(text_of(name, 100) for name in kind),), found.totals[kind].cells())
    yield _line((text_of(split, 100), "", "", "all"), found.sum_of(kinds).cells(), " class=all")


def _line(names: Iterable[str], numbers: Iterable[str], attributes: str = "") -> str:
    cells = "".join(f"<td>{name}" for name in names) + "".join(f"<td class=n>{number}" for number in numbers)
    return f"<tr{attributes}>{cells}\n"


def _histogram(title: str, values: Histogram) -> Iterator[str]:
    bins = values.bins()
    most = max(count for *_, count in bins)
    least, mean, greatest = map(amount, (values.least, values.mean, values.most))
    yield f"<div><h3>{title}</h3><small>{least} to {greatest}, mean {mean}</small><table>"
    for start, end, count in bins:
        width = round(BAR[0] * count / most, 1)
        bar = f'<svg width="{BAR[0]}" height="{BAR[1]}"><rect width="{width}" height="{BAR[1]}"/></svg>'
        yield f"<tr><td class=n>{start:,g}<td>to {end:,g}<td>{bar}<td class=n>{count:,}\n"
    yield "</table></div>\n"


def _article(sample: Sample) -> Iterator[str]:
    yield f"<article{' class=document' * sample.is_document}><h3>{text_of(sample.key, 200)}</h3>"
    yield f"<small>{text_of(sample.split, 100)}, {text_of(sample.where, 300)}</small>\n"
    if sample.problem:
        yield f"<p class=problem>{text_of(sample.problem)}\n"
    for piece in sample.pieces[:MAX_PIECES]:
        yield from _piece(piece)
    if len(sample.pieces) > MAX_PIECES:
        yield f"<p class=note>and {len(sample.pieces) - MAX_PIECES:,} more parts\n"
    fields = {name: value for name, value in sample.fields.items() if value not in ("", None)}
    told = json.dumps(fields, ensure_ascii=False, indent=1, default=str)
    yield f"<details><summary>fields</summary><pre>{text_of(told)}</pre></details></article>\n"


def _piece(piece: Piece) -> Iterator[str]:
    if piece.text is not None:
        yield f"<p>{text_of(piece.text)}\n"
        return
    name = text_of(piece.name, 200)
    try:
        if piece.read is None:
            yield f"<p class=note>{text_of(piece.kind)} {name}: at a URL, which is not fetched to look at it\n"
        elif piece.kind == "image":
            image, (width, height) = thumbnail(piece, SIDE)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=80)
            yield f'<img src="{_uri("image/jpeg", buffer.getvalue())}" alt="image"><br><small>{name}, '
            yield f"{width:,} x {height:,}</small>\n"
        elif piece.kind == "audio":
            data, seconds = sound(piece)
            part = f", of which {SOUND_SECONDS:g} are here" if seconds > SOUND_SECONDS else ""
            yield f'<audio controls preload=none src="{_uri("audio/mpeg", data)}"></audio><small>{name}, '
            yield f"{seconds:,.2f} s{part}</small>\n"
        elif piece.kind == "text":
            yield f"<p>{text_of(piece.read()[: 4 * MAX_LETTERS].decode('utf-8-sig', 'replace'))}\n"
        else:
            yield f"<p class=note>{text_of(piece.kind)} {name}, {len(piece.read()):,} bytes\n"
    except StorageError:
        raise
    except ValueError as error:
        yield f"<p class=problem>{text_of(piece.kind)} {name} cannot be shown: {text_of(str(error))}\n"


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _end(found: Found, seed: int, shown: int, left_out: int) -> Iterator[str]:
    yield f"</div><p class=note>{counted(shown, 'sample')} shown, drawn with seed {seed}"
    if left_out:
        yield f"; {left_out:,} more did not fit into the page (--max-mb)"
    yield f". Written by mmmoe-data {escape(__version__)}.</body></html>\n"
