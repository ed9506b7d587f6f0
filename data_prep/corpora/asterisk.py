"""Asterisk's spoken prompts and their transcripts, one professional voice a language.

A transcript file has ``key: text`` lines, and the key is the path of the recording. Signals that are
no speech have only a bracketed description, and are left out.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmmoe_pretrain.data_prep.corpora.packages import fetch_debian
from mmmoe_pretrain.data_prep.rows.row import Row, slug
from mmmoe_pretrain.data_prep.rows.splits import file_token, group_items, normalise_text, split_of

LANGUAGES = ("en", "es", "fr", "it", "ru")
SPLIT_SALT = "asterisk"
_VOICES = {
    "en": "Allison Smith",
    "es": "Allison Smith",
    "fr": "June Wallack",
    "it": "Carlo Flora",
    "ru": "Maxim Topal",
}
_NO_SPEECH = ("beep", "silence/")
_NOTE = re.compile(r"[\[(<][^\])>]*[\])>]\s*$|^\s*\[.\]")  # "at [@]", "(3 seconds of silence)": not spoken


@dataclass(frozen=True, slots=True)
class Prompt:
    """One recording: ``name`` is the same in all languages."""

    name: str
    language: str
    text: str
    audio: Path
    source: str

    @property
    def key(self) -> str:
        return f"asterisk-{self.language}-{slug(self.name)}"

    @property
    def licence(self) -> str:
        return "CC-BY-3.0" if self.language == "ru" else "CC-BY-SA-3.0"

    @property
    def attribution(self) -> str:
        return f"Asterisk core sounds, voice of {_VOICES[self.language]}"


def build(out: Path, languages: Sequence[str] = ()) -> tuple[list[Row], dict[str, int]]:
    """Fetch the prompts into ``out``; ``languages`` (none: all five) keeps the rows of these.

    All five are fetched in any case: prompts that share words in one language are one group in every
    language, so a row's split does not depend on the languages that are asked for.
    """
    languages = languages or LANGUAGES
    prompts, notes = fetch_prompts(out, languages)
    others, _ = fetch_prompts(out, [language for language in LANGUAGES if language not in languages])
    groups = group_items({prompt.key: identity(prompt) for prompt in (*prompts, *others)})
    rows = [prompt_row(prompt, groups[prompt.key], prompt.audio.relative_to(out).as_posix()) for prompt in prompts]
    return rows, notes


def fetch_prompts(work: Path, languages: Sequence[str]) -> tuple[list[Prompt], dict[str, int]]:
    unknown = sorted(set(languages) - set(LANGUAGES))
    if unknown:
        raise ValueError(f"asterisk has no language {', '.join(unknown)}; there are {', '.join(LANGUAGES)}")
    prompts: list[Prompt] = []
    notes: Counter[str] = Counter()
    for language in languages:
        package = f"asterisk-core-sounds-{language}"
        texts, _ = fetch_debian(package, work)
        sounds, version = fetch_debian(f"{package}-wav", work)
        transcript = texts / f"usr/share/doc/{package}/core-sounds-{language}.txt.gz"
        voices = sorted((sounds / "usr/share/asterisk/sounds").glob(f"{language}_*"))
        if not transcript.is_file() or len(voices) != 1:
            raise ValueError(
                f"{package} {version} has no transcript or voice where 1.6.1-1 has them; its layout has changed"
            )
        prompts += read_prompts(transcript, voices[0], language, f"{package} {version}", notes)
    return prompts, dict(notes)


def read_prompts(transcript: Path, voice: Path, language: str, source: str, notes: Counter[str]) -> Iterator[Prompt]:
    """The prompts of one language that are speech and have both a text and a recording."""
    seen: set[str] = set()
    for name, text in _transcript_lines(gzip.decompress(transcript.read_bytes()).decode("utf-8-sig")):
        audio = voice / f"{name}.wav"
        if not text or name.startswith(_NO_SPEECH):
            notes["prompts that are no speech"] += 1
        elif name in seen or not audio.is_file():
            notes["transcripts without a recording of their own"] += 1
        else:
            seen.add(name)
            yield Prompt(name, language, text, audio, source)


def prompt_row(prompt: Prompt, group: str, audio: str) -> Row:
    return Row(
        key=prompt.key,
        audio=audio,
        text=prompt.text,
        language=prompt.language,
        audio_kind="speech",
        group=group,
        split=split_of(group, SPLIT_SALT),
        subset="prompts",
        source=prompt.source,
        licence=prompt.licence,
        attribution=prompt.attribution,
    )


def identity(prompt: Prompt) -> list[str]:
    """The prompt in any language, the same words, the same recording."""
    text = f"text:{prompt.language}:{normalise_text(prompt.text)}"
    return [f"prompt:{prompt.name}", text, file_token(prompt.audio)]


def _transcript_lines(content: str) -> Iterator[tuple[str, str]]:
    for line in content.splitlines():
        name, separator, text = line.partition(":")
        if separator and not line.startswith(";"):
            yield name.strip(), " ".join(_NOTE.sub(" ", text).split())
