"""How corpora become rows, from small folders laid out like the packages."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import pytest

from mmmoe_pretrain.data_prep import cli, corpora
from mmmoe_pretrain.data_prep.corpora import asterisk, cldr_emoji, emoji, gcide, tuxpaint


def stamp(root: Path, name: str, text: str, *sounds: str, image: str = ".png") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".txt").write_text(text, encoding="utf-8")
    path.with_name(path.name + image).write_bytes(name.encode())
    for sound in sounds:
        path.with_name(path.name + sound).write_bytes(f"{name}{sound}".encode())


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    root = tmp_path / "stamps"
    stamp(
        root,
        "animals/Cow",
        " A cow. \nfr.utf8=Une vache.\npt_BR.utf8=Uma vaca.\nde.utf8=Eine Kuh.\n",
        "_desc.ogg",
        "_desc_fr.ogg",
        "_desc_pt_BR.wav",
        "_desc_lt.ogg",
        ".ogg",
        "_mirror.png",
    )
    stamp(root, "animals/bull", "A bull.\nfr.utf8=Une vache.\n")
    stamp(root, "symbols/math/7", "Seven.\nde.utf8=Sieben.\n", ".ogg", "_de.ogg", "_xx.ogg")
    stamp(root, "town/doppler_honk", "A car.\n")
    stamp(root, "town/house", "A house.\n", image=".svg")
    return root


def test_stamps_give_a_row_a_subset_and_language(stamps: Path, tmp_path: Path):
    found, notes = tuxpaint.read_stamps(stamps)
    rows = {row.key: row for row in tuxpaint.rows_of(found, tmp_path, "src", ("fr", "de", "en"))}
    assert sorted(rows) == [
        "tux-animals-bull-named-en",
        "tux-animals-bull-translated-fr",
        "tux-animals-cow-effect-en",
        "tux-animals-cow-named-en",
        "tux-animals-cow-spoken-en",
        "tux-animals-cow-spoken-fr",
        "tux-animals-cow-spoken-pt_br",
        "tux-animals-cow-translated-de",
        "tux-symbols-math-7-named-en",
        "tux-symbols-math-7-pronounced-de",
        "tux-symbols-math-7-pronounced-en",
        "tux-symbols-math-7-translated-de",
    ]
    cow = rows["tux-animals-cow-spoken-pt_br"]
    assert (cow.text, cow.language, cow.audio_kind, cow.label) == ("Uma vaca.", "pt_br", "speech", "animals")
    assert cow.audio == "stamps/animals/Cow_desc_pt_BR.wav"
    assert rows["tux-animals-cow-effect-en"].audio == "stamps/animals/Cow.ogg"
    assert rows["tux-animals-cow-named-en"].text == "A cow."
    assert notes["stamps that are SVG only"] == 1


def test_stamps_that_share_a_name_in_a_language_of_the_corpus_share_group_and_split(stamps: Path, tmp_path: Path):
    stamp(stamps, "food/toast", "Toast.\nhu.utf8=Piritos.\n")
    stamp(stamps, "food/rusk", "A rusk.\nhu.utf8=Piritos.\n")
    found, _ = tuxpaint.read_stamps(stamps)
    assert "hu" not in tuxpaint.TRANSLATED_LANGUAGES
    for languages, food in ((("fr",), 2), (("hu",), 1)):
        rows = tuxpaint.rows_of(found, tmp_path, "src", languages)
        groups = {
            label: {(row.group, row.split) for row in rows if row.label == label} for label in ("animals", "food")
        }
        assert [len(its) for its in groups.values()] == [1, food]  # "Une vache" is in the corpus for any language
        assert len({row.group for row in rows}) == 2 + food


def test_prompts_that_are_no_speech_are_left_out_and_notes_are_cut(tmp_path: Path):
    lines = (
        "; Core sounds\n\nhello: Hello.\nbeep: [a tone]\nsilence/1: (1 second of silence)\n"
        "letters/at: at [@]\nbang: [!] bang\ngone: Gone.\n"
    )
    transcript = tmp_path / "t.gz"
    transcript.write_bytes(gzip.compress("\ufeff".encode() + lines.encode()))
    for name in ("hello", "beep", "letters/at", "bang"):
        path = tmp_path / "voice" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    notes: Counter[str] = Counter()
    prompts = list(asterisk.read_prompts(transcript, tmp_path / "voice", "en", "src", notes))
    assert [(prompt.key, prompt.text) for prompt in prompts] == [
        ("asterisk-en-hello", "Hello."),
        ("asterisk-en-letters-at", "at"),
        ("asterisk-en-bang", "bang"),
    ]
    assert sorted(notes.values()) == [1, 2]


def test_a_prompts_split_does_not_depend_on_the_languages_asked_for(tmp_path: Path, monkeypatch):
    """Only French says both in the same words; that makes them one group in every language."""

    def fetched(package: str, work: Path) -> tuple[Path, str]:
        folder, language = work / package, package.removesuffix("-wav")[-2:]
        doc = folder / "usr/share/doc" / package
        doc.mkdir(parents=True, exist_ok=True)
        texts = ("Pareil", "Pareil") if language == "fr" else (f"{language} one", f"{language} two")
        content = "".join(f"{name}: {text}\n" for name, text in zip("ab", texts, strict=True))
        (doc / f"core-sounds-{language}.txt.gz").write_bytes(gzip.compress(content.encode()))
        voice = folder / f"usr/share/asterisk/sounds/{language}_x"
        voice.mkdir(parents=True, exist_ok=True)
        for name in "ab":
            (voice / f"{name}.wav").write_bytes(f"{language}{name}".encode())
        return folder, "1"

    monkeypatch.setattr(asterisk, "fetch_debian", fetched)
    everything = {row.key: row for row in asterisk.build(tmp_path)[0]}
    assert len(everything) == 10
    assert {row.group for row in everything.values()} == {"asterisk-en-a"}
    for languages in (("fr",), ("ru", "en")):
        rows, _ = asterisk.build(tmp_path, languages)
        assert {row.language for row in rows} == set(languages)
        assert all(row == everything[row.key] for row in rows)


ENTRIES = (
    (("00-database-short",), "00-database-short\n   The title\n"),
    (("Dilute", "Diluted"), 'Dilute \\Di*lute"\\, v. t.\n   To make thinner {Thin}. [Obs.]\n   [1913 Webster]\n'),
    (("Ćwikła",), "Ćwikła n.\n   beets with horseradish.\n   [WordNet 1.5]\n"),
    (("dilute",), 'Dilute \\Di*lute"\\, a.\n   Weak. [1913 Webster +PJC]\n'),
)


def dictionary(folder: Path) -> tuple[Path, Path]:
    """``ENTRIES`` as dictd has them; numbers in base 64 have two digits here."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    content, lines = b"", []
    for words, entry in ENTRIES:
        start, length = (digits[n // 64] + digits[n % 64] for n in (len(content), len(entry.encode())))
        lines += [f"{word}\t{start}\t{length}\n" for word in words]
        content += entry.encode()
    folder.mkdir(parents=True)
    (folder / "gcide.index").write_text("".join(sorted(lines)), encoding="utf-8")
    (folder / "gcide.dict.dz").write_bytes(gzip.compress(content))
    return folder / "gcide.index", folder / "gcide.dict.dz"


def test_a_dictionary_gives_a_row_an_entry_and_what_shares_a_headword_one_split(tmp_path: Path):
    rows = gcide.rows_of(gcide.read_entries(*dictionary(tmp_path / "dictd")), "src")
    assert [(row.key, row.text) for row in rows] == [
        ("gcide-dilute-1", "Dilute, v. t. To make thinner Thin. [Obs.]"),
        ("gcide-wik-a-1", "Ćwikła n. beets with horseradish."),
        ("gcide-dilute-2", "Dilute, a. Weak."),
    ]
    assert [row.group for row in rows] == ["gcide-dilute-1", "gcide-wik-a-1", "gcide-dilute-1"]
    assert rows[0].split == rows[2].split
    assert all(row.modalities == ("text",) and row.licence == "GPL-2.0-or-later" for row in rows)


def test_the_dictionary_has_one_language(tmp_path: Path):
    with pytest.raises(ValueError, match="no language fr; it has en"):
        gcide.build(tmp_path, ("fr", "en"))


@pytest.mark.network
@pytest.mark.timeout(300)
def test_the_real_dictionary_is_split_by_headword(tmp_path: Path):
    rows, _ = gcide.build(tmp_path)
    assert len(rows) > 100_000
    shares = Counter(row.split for row in rows)
    assert 0.65 < shares["train"] / len(rows) < 0.80
    assert 0.15 < shares["test"] / len(rows) < 0.25
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row.group, set()).add(row.split)
    assert all(len(its) == 1 for its in splits.values())


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1f468-200d-1f680", "1f469-200d-1f680", True),  # man, woman astronaut
        ("1f46e", "1f46e-200d-2640", True),  # police officer, woman police officer
        ("1f44b", "1f44b-1f3fd", True),  # waving hand in a skin tone
        ("1f1f3-1f1f4", "1f1e7-1f1fb", True),  # Norway, Bouvet Island: the same flag
        ("1f468-200d-1f680", "1f468-200d-1f33e", False),  # astronaut, farmer
    ],
)
def test_variants_of_an_emoji_are_one_family(one: str, other: str, same: bool):
    assert (emoji.Emoji(one, "x", {}).family == emoji.Emoji(other, "x", {}).family) == same


def annotations(common: Path, folder: str, language: str, names: dict[str, str]) -> None:
    """A file as CLDR has it: keywords beside each name."""
    lines = [f'<annotation cp="{cp}">a | b</annotation><annotation cp="{cp}" type="tts">{name}</annotation>'
             for cp, name in names.items()]  # fmt: skip
    path = common / folder / f"{language}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<ldml><annotations>{''.join(lines)}</annotations></ldml>", encoding="utf-8")


CATALOGUE = {code: emoji.Emoji(code, "animals & nature", {}) for code in ("1f404", "1f402", "1f408-200d-2b1b")}


@pytest.fixture
def cldr(tmp_path: Path) -> dict[str, dict[str, str]]:
    """A cow, an ox and a black cat (two code points and a joiner)."""
    single, sequences = cldr_emoji.FOLDERS
    annotations(tmp_path, single, "de", {"🐄": "Kuh", "🐂": "Ochse", "{": "geschweifte Klammer"})
    annotations(tmp_path, sequences, "de", {"🐈\u200d⬛": "schwarze Katze"})
    annotations(tmp_path, single, "nn", {"🐄": "ku", "🐂": cldr_emoji.INHERITED})
    annotations(tmp_path, single, "de_CH", {"🐄": "Kuh", "🐂": "Ochs"})
    annotations(tmp_path, single, "lb", {"🐄": "Kuh", "🐂": "Kuh"})
    annotations(tmp_path, sequences, "lb", {"🐈\u200d⬛": "schwaarz  Kaz"})
    return cldr_emoji.read_names(tmp_path)


def test_names_of_cldr_are_of_emoji_in_languages_that_name_nearly_all(cldr: dict[str, dict[str, str]]):
    found = cldr_emoji.chosen(cldr, CATALOGUE, ())
    assert found == {
        "de": {"1f404": "Kuh", "1f402": "Ochse", "1f408-200d-2b1b": "schwarze Katze"},
        "lb": {"1f404": "Kuh", "1f402": "Kuh", "1f408-200d-2b1b": "schwaarz Kaz"},
    }
    assert cldr_emoji.chosen(cldr, CATALOGUE, ("nn",)) == {"nn": {"1f404": "ku"}}
    with pytest.raises(ValueError, match="no emoji names in xx; it has de, de_CH, lb, nn"):
        cldr_emoji.chosen(cldr, CATALOGUE, ("de", "xx"))


def test_pairs_with_one_name_share_a_group(cldr: dict[str, dict[str, str]]):
    """The cow is "Kuh" in both languages, and so is the ox in one of them."""
    groups = cldr_emoji.group_pairs(CATALOGUE, {name: cldr[name] for name in ("de", "lb")})
    assert groups["1f404-de"] == groups["1f404-lb"] == groups["1f402-lb"]
    assert groups["1f402-de"] != groups["1f404-de"]


def test_a_package_without_names_says_that_its_layout_changed(tmp_path: Path):
    with pytest.raises(ValueError, match="its layout has changed"):
        cldr_emoji.read_names(tmp_path)


@pytest.mark.parametrize("name", corpora.CORPORA)
def test_every_corpus_has_its_file_and_is_named_by_the_command(name: str):
    assert callable(corpora.build(name))
    assert name in cli.corpus.__annotations__["name"]


def test_an_unknown_corpus_names_those_there_are():
    with pytest.raises(ValueError, match="asterisk, gcide, wordnet, debian-handbook, installation-guide"):
        corpora.build("laion")
