"""``mmmoe-data build-mini`` (for maintainers): the small corpus in ``tests/assets/mini``.

Subsets: ``noto`` (emoji and their English names), ``prompts`` (short Asterisk recordings and their transcripts) and
``constructed``: an emoji and a recording of the same thing, paired here by a table. The recordings were not made for
these images.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mmmoe_pretrain.data_prep.corpora import asterisk, emoji
from mmmoe_pretrain.data_prep.corpora.asterisk import Prompt
from mmmoe_pretrain.data_prep.corpora.emoji import STYLES, Emoji, Style
from mmmoe_pretrain.data_prep.rows.manifest import write_manifest
from mmmoe_pretrain.data_prep.rows.row import Row
from mmmoe_pretrain.data_prep.rows.splits import group_items, normalise_text, split_of
from mmmoe_pretrain.data_prep.shards.audio import audio_seconds

SPLIT_SALT = "mini-36"  # the constructed groups are only 32; this salt gives each split some of them
PIXELS = 48
COLOURS = 32
LONGEST_SECONDS = 1.2
PROMPT_NAMES = 32  # beyond those of the constructed triples
LIMIT_BYTES = 6_000_000
_ALL = asterisk.LANGUAGES

# emoji, recording, the languages in which the transcript names what the image shows
CONCEPTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    *((f"{ord(digit):04x}-20e3", f"digits/{digit}", _ALL) for digit in "0123456789"),
    ("1f51f", "digits/10", _ALL),
    ("1f947", "digits/h-1", _ALL),
    ("1f948", "digits/h-2", _ALL),
    ("1f949", "digits/h-3", _ALL),
    ("1f170", "letters/a", _ALL),
    ("1f171", "letters/b", _ALL),
    ("24c2", "letters/m", _ALL),
    ("1f17e", "letters/o", _ALL),
    ("1f17f", "letters/p", _ALL),
    ("002a-20e3", "digits/star", _ALL),
    ("0023-20e3", "digits/pound", ("en", "es", "fr", "it")),
    ("2795", "letters/plus", _ALL),
    ("2796", "digits/minus", _ALL),
    ("1f7f0", "letters/equals", _ALL),
    ("2757", "letters/exclaimation-point", _ALL),
    ("2753", "letters/ascii63", _ALL),
    ("1f4b2", "letters/dollar", _ALL),
    ("1f4af", "digits/hundred", ("en", "fr", "ru")),
    ("26f3", "phonetic/g_p", ("en", "fr", "ru")),
    ("1f3e8", "phonetic/h_p", ("en", "es", "fr", "ru")),
    ("1f943", "phonetic/w_p", ("en", "es", "fr", "ru")),
    ("1fa7b", "phonetic/x_p", ("en", "es", "fr", "ru")),
)


def run(work: Path, out: Path) -> None:
    """Fetch the sources into ``work`` and write ``mini.tar`` into ``out``, beside its LICENCES.md."""
    licences = out / "LICENCES.md"
    if not licences.is_file():
        raise ValueError(f"{licences} is missing; --out is tests/assets/mini of the source tree")
    prompts, _ = asterisk.fetch_prompts(work, asterisk.LANGUAGES)
    catalogue = emoji.fetch_catalogue(work, ("en",))
    styles = {style: style.images(work) for style in STYLES if style.name in ("noto", "fluent")}
    files, rows = build_rows(prompts, catalogue, styles)
    write_manifest(work / "manifest.jsonl", sorted(rows, key=lambda row: row.key))
    content = sorted({**files, licences.name: licences.read_bytes()}.items())
    size = write_archive(out / "mini.tar", [("manifest.jsonl", (work / "manifest.jsonl").read_bytes()), *content])
    print(f"{out / 'mini.tar'}: {len(rows)} rows, {len(files)} files, {size:,} bytes")


def build_rows(
    prompts: Sequence[Prompt], catalogue: Mapping[str, Emoji], styles: Mapping[Style, Mapping[str, Path]]
) -> tuple[dict[str, bytes], list[Row]]:
    """The files by name, and the rows with their groups and splits."""
    files: dict[str, bytes] = {}
    rows: list[Row] = []
    tokens: dict[str, list[str]] = {}

    def image_of(style: Style, code: str) -> str:
        name = f"images/{style.name}-{code}.png"
        if name not in files:
            files[name] = small_png(styles[style][code])
        return name

    def recording(prompt: Prompt) -> str:
        name = f"audio/{prompt.key.removeprefix('asterisk-')}.flac"
        if name not in files:
            files[name] = as_flac(prompt.audio)
        return name

    def add(row: Row, *identities: Iterable[str]) -> None:
        rows.append(row)
        tokens[row.key] = [token for identity in identities for token in identity]

    noto = next(style for style in styles if style.name == "noto")
    for code in _one_a_family(catalogue, styles[noto]):
        [row] = emoji.emoji_rows(catalogue[code], noto, image_of(noto, code), "")
        add(row, _emoji_identity(catalogue[code]))
    for prompt in _short_prompts(prompts):
        add(asterisk.prompt_row(prompt, "", recording(prompt)), asterisk.identity(prompt))
    by_name = {(prompt.name, prompt.language): prompt for prompt in prompts}
    for code, name, languages in CONCEPTS:
        for prompt in (by_name[name, language] for language in languages if (name, language) in by_name):
            for style in (style for style, images in styles.items() if code in images):
                row = _constructed(catalogue[code], style, prompt, image_of(style, code), recording(prompt))
                add(row, _emoji_identity(catalogue[code]), asterisk.identity(prompt))
    groups = group_items(tokens)
    return files, [replace(row, group=groups[row.key], split=split_of(groups[row.key], SPLIT_SALT)) for row in rows]


def small_png(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as opened:
        layer = opened.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    buffer = io.BytesIO()
    flat.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS).quantize(COLOURS).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def as_flac(path: Path) -> bytes:
    import soundfile

    samples, rate = soundfile.read(path, dtype="int16")
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def write_archive(path: Path, files: Iterable[tuple[str, bytes]]) -> int:
    """A tar whose bytes depend on ``files``, names and contents, alone; returns its size."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            _add_file(tar, name, data)
    size = len(buffer.getvalue())
    if size > LIMIT_BYTES:
        raise ValueError(f"mini.tar would have {size:,} bytes and may have {LIMIT_BYTES:,}; lower PROMPT_NAMES")
    path.write_bytes(buffer.getvalue())
    return size


def _one_a_family(catalogue: Mapping[str, Emoji], images: Mapping[str, Path]) -> list[str]:
    """The first emoji of each family; country flags are skipped, they are hard to read at 48 px."""
    first: dict[str, str] = {}
    for code in sorted(catalogue):
        family = catalogue[code].family
        if code in images and family != "country-flag":
            first.setdefault(family, code)
    return list(first.values())


def _short_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Recordings of the concepts, and of some other names that are short in every language."""
    by_name: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_name.setdefault(prompt.name, []).append(prompt)
    wanted = {name for _, name, _ in CONCEPTS}
    others = sorted(
        (
            name
            for name, same in by_name.items()
            if name not in wanted
            and len(same) == len(_ALL)
            and all(audio_seconds(prompt.audio.read_bytes()) <= LONGEST_SECONDS for prompt in same)
        ),
        key=lambda name: hashlib.blake2b(name.encode()).digest(),
    )
    return [prompt for name in sorted(wanted | set(others[:PROMPT_NAMES])) for prompt in by_name[name]]


def _emoji_identity(item: Emoji) -> list[str]:
    return [f"emoji:{item.family}", f"text:en:{normalise_text(item.names['en'])}"]


def _constructed(item: Emoji, style: Style, prompt: Prompt, image: str, audio: str) -> Row:
    return Row(
        key=f"mini-{style.name}-{item.code}-{prompt.language}",
        image=image,
        audio=audio,
        text=prompt.text,
        language=prompt.language,
        audio_kind="speech",
        label=item.label,
        subset="constructed",
        source=f"{style.source}; {prompt.source}",
        licence=f"{style.licence}; {prompt.licence}",
        attribution=f"{style.attribution}; {prompt.attribution}",
    )


def _add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file whose header depends on its name and size alone."""
    info = tarfile.TarInfo(name)  # mtime, uid and gid are 0
    info.size, info.mode = len(data), 0o644
    tar.addfile(info, io.BytesIO(data))
