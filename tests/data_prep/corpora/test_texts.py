"""How text from Debian becomes rows, from small files laid out like those of its packages."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mmmoe_pretrain.data_prep import corpora
from mmmoe_pretrain.data_prep.corpora import (
    manuals,
    package_descriptions,
    wordnet,
)
from mmmoe_pretrain.data_prep.corpora.packages import Translations
from mmmoe_pretrain.data_prep.rows.row import Row

SYNSETS = """\
  1 This software and database is being provided to you, the LICENSEE, by
00001740 29 v 02 breathe 0 take_a_breath 0 001 $ 00002325 v 0000 01 + 02 00 | draw air into;  "He is respiring"
00002325 29 v 01 sigh 4 000 01 + 02 00 | breathe deeply; "he is respiring!"
00003131 00 s 0a a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 sensitive(p) 0 000 | able to feel
00004413 00 r 01 a_lot 0 000 | Able to feel
00004500 03 n 01 lung 0 000 | an organ
"""


def test_a_synset_gives_its_words_and_gloss_and_what_is_said_twice_is_one_group(tmp_path: Path):
    path = tmp_path / "data.verb"
    path.write_text(SYNSETS.replace("\n", "  \n"))  # as the lines of the package end
    rows = wordnet.rows_of(list(wordnet.read_synsets(path)), "src")
    assert [(row.key, row.text) for row in rows] == [
        ("wordnet-verb-00001740", 'breathe, take a breath (verb): draw air into; "He is respiring"'),
        ("wordnet-verb-00002325", 'sigh (verb): breathe deeply; "he is respiring!"'),
        ("wordnet-adjective-00003131", "a, b, c, d, e, f, g, h, i, sensitive (adjective): able to feel"),
        ("wordnet-adverb-00004413", "a lot (adverb): Able to feel"),
        ("wordnet-noun-00004500", "lung (noun): an organ"),
    ]
    assert rows[0].group == rows[1].group  # the same example
    assert rows[2].group == rows[3].group  # the same definition
    assert len({row.group for row in rows}) == 3


@pytest.mark.parametrize(
    "line", ["00001740 29 v 02 breathe 0 | draw air", "00001740 29 x 01 breathe 0 000 | x", "a | b"]
)
def test_a_line_that_is_no_synset_is_named(line: str, tmp_path: Path):
    path = tmp_path / "data.verb"
    path.write_text(f"{SYNSETS}{line}\n")
    with pytest.raises(ValueError, match=r"data\.verb, line 7 is no synset"):
        list(wordnet.read_synsets(path))


PAGE = """<html><head><meta name="generator" content="x"><title>The title of the page in the head</title></head><body>
<div class="navheader"><p>Navigation to the page before this one</p></div>
<div class="titlepage"><h2 class="title"><a name="{anchor}"></a><a id="id-1.2.3"></a>1.1. A long title</h2></div>
<p>A paragraph with <code class="command">apt &amp; dpkg</code><sup>[<a href="#f">1</a>]</sup>,<br>in lines,
<pre>apt-get install something</pre> and a list:<ul><li><p>An item of the list, in words.</p></li></ul>which ends.</p>
<div class="para">A block that <em>publican</em> writes.<p class="title">Titles are left out here</p></div>
<p>Too short.</p><dl><dt>No paragraph, but a term of a list</dt></dl></body></html>
"""


def page(folder: Path, language: str, name: str, *paragraphs: str, anchor: str = "") -> None:
    path = folder / language / f"{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(f"<p>{text}</p>" for text in paragraphs)
    path.write_text(f'<a name="{anchor}"></a>{body}' if anchor else body, encoding="utf-8")


def test_a_page_gives_its_paragraphs_and_the_anchors_that_writers_named(tmp_path: Path):
    path = tmp_path / "pt-BR" / "ch01s01.html"
    path.parent.mkdir()
    path.write_text(PAGE.format(anchor="what-is-debian"))
    found = manuals.read_page(path)
    assert (found.language, found.name, found.anchors) == ("pt_br", "ch01s01", ("what-is-debian",))
    assert found.paragraphs == (
        "An item of the list, in words.",
        "A paragraph with apt & dpkg, in lines, and a list: which ends.",
        "A block that publican writes.",
    )


def test_a_line_break_is_no_space_in_chinese_and_japanese_but_in_korean():
    assert manuals.clean(" 日本\n  語の Debian\nです。\n終 ") == "日本語の Debian です。終"
    assert manuals.clean("한국\n어") == "한국 어"


def test_a_folders_region_counts_where_it_is_another_language():
    names = [manuals.language_of(name) for name in ("de-DE", "en", "pt_BR", "zh-CN", "pt")]
    assert names == ["de", "en", "pt_br", "zh_cn", "pt"]


@pytest.fixture
def manual(tmp_path: Path) -> list[manuals.Page]:
    """The German translation has its chapters in another order, and has not translated everything."""
    root = tmp_path / "manual"
    page(root, "en", "ch01", "Debian is a system of free software.", "More than ever before.", anchor="what")
    page(root, "en", "ch02", "How to install it on a disk.", "Boot from this disk first.", anchor="how")
    page(root, "en", "ch03", "boot from this DISK first!", "An end of all things.")
    page(root, "en", "ch04", "What nobody else has said yet.")
    page(root, "de", "ch02", "Debian ist ein System aus freier Software.", "more than ever before", anchor="what")
    page(root, "de", "ch01", "Wie man es auf eine Platte bringt.", "An end of all things.", anchor="how")
    return manuals.read_pages(root)


def rows_of(pages: list[manuals.Page], *languages: str) -> tuple[dict[str, Row], Counter[str]]:
    notes: Counter[str] = Counter()
    rows = manuals.rows_of(manuals.MANUALS["installation-guide"], pages, set(languages), "src", notes)
    return {row.key: row for row in rows}, notes


def test_a_page_and_its_translations_are_one_group_by_the_names_of_anchors(manual: list[manuals.Page]):
    rows, notes = rows_of(manual, "en", "de")
    groups = {key.removeprefix("installation-guide-"): row.group for key, row in rows.items()}
    assert groups["de-ch02-1"] == groups["en-ch01-1"] == groups["en-ch01-2"]
    assert groups["de-ch01-1"] == groups["en-ch02-1"] == groups["en-ch03-2"]  # a paragraph of both English pages
    assert len(set(groups.values())) == 3
    assert all(row.split == rows["installation-guide-de-ch01-1"].split
               for row in rows.values() if row.group == groups["de-ch01-1"])  # fmt: skip
    assert "de-ch02-2" not in groups and "de-ch01-2" not in groups and "en-ch03-1" not in groups
    assert sorted(notes.values()) == [1, 2]


def test_splits_do_not_depend_on_the_languages_asked_for(manual: list[manuals.Page]):
    everything, _ = rows_of(manual, "en", "de")
    german, _ = rows_of(manual, "de")
    assert german == {key: row for key, row in everything.items() if row.language == "de"}


@pytest.mark.parametrize("name", list(manuals.MANUALS))
def test_a_manual_names_the_languages_it_has_and_a_changed_layout(name: str, tmp_path: Path, monkeypatch):
    build, manual = corpora.build(name), manuals.MANUALS[name]
    monkeypatch.setattr(manuals, "fetch_debian", lambda package, work: (work / package, "2"))
    with pytest.raises(ValueError, match=r"2 has no English pages in usr/share/doc/.*its layout has changed"):
        build(tmp_path)
    root = tmp_path / manual.package / manual.folder
    for language in ("en-US", "pt-BR"):
        page(root, language, "ch01", f"A paragraph in the language {language}.")
    with pytest.raises(ValueError, match="has no language fr; there are en, pt_br"):
        build(tmp_path, ("pt-BR", "fr"))
    rows, _ = build(tmp_path, ("pt_BR",))
    assert [(row.language, row.text) for row in rows] == [("pt_br", "A paragraph in the language pt-BR.")]


ENGLISH = """\
Package: 0ad
Description-md5: d1
Description-en: strategy game of ancient warfare
 0 A.D. is a
 free game.
 .
 It has units:
  * archers
  * ships

Package: 0ad-data
Description-md5: d2
Description-en: strategy game of ancient warfare (data)
 0 A.D. is a free game.
 .
 These are the data of 0ad.

Package: 1ad-data
Description-md5: d3
Description-en: another game
 These are the data of 1ad.

Package: g++
Description-md5: d4
Description-en: compiler
 It compiles programs.
 .
 It is fast, too.

Package: 0ad
Description-md5: d9
Description-en: strategy game, updated
 Something else.
"""
GERMAN = """\
Package: 0ad
Description-md5: d1
Description-de: Strategiespiel
 0 A.D. ist ein freies Spiel.
 .
 it has units: * archers * ships

Package: 0ad-data
Description-md5: d2
Description-de: Strategiespiel (Daten)
 0 A.D. ist ein freies Spiel.
 .
 Dies sind die Daten.

Package: g++
Description-md5: d4
Description-de: compiler
 Er übersetzt Programme.
"""


@pytest.fixture
def lists(tmp_path: Path) -> list[Translations]:
    found = []
    for language, content in (("en", ENGLISH), ("de", GERMAN)):
        path = tmp_path / f"Translation-{language}"
        path.write_text(content + "\n", encoding="utf-8")
        found.append(Translations(language, "bookworm", path))
    return found


def test_a_paragraph_that_packages_share_stays_in_the_first_and_translations_follow(lists: list[Translations]):
    rows, notes = package_descriptions.rows_of(lists, ("en", "de"))
    assert {row.key: row.text for row in rows} == {
        "description-0ad-en": "0ad - strategy game of ancient warfare: 0 A.D. is a free game. "
        "It has units: * archers * ships",
        "description-0ad-data-en": "0ad-data - strategy game of ancient warfare (data): These are the data of 0ad.",
        "description-g%2B%2B-en": "g++ - compiler: It compiles programs. It is fast, too.",
        "description-0ad-de": "0ad - Strategiespiel: 0 A.D. ist ein freies Spiel.",
        "description-0ad-data-de": "0ad-data - Strategiespiel (Daten): Dies sind die Daten.",
    }
    assert [row.split for row in rows if row.group == rows[0].group] == [rows[0].split] * 4
    assert rows[2].group != rows[0].group
    assert notes["translations with more or fewer paragraphs than the original"] == 1
    assert rows == [row for language in ("en", "de") for row in package_descriptions.rows_of(lists, (language,))[0]]


def test_an_unknown_language_and_a_stanza_that_is_none_are_refused(lists: list[Translations], tmp_path: Path):
    with pytest.raises(ValueError, match="no language xx; there are en, cs, da"):
        package_descriptions.build(tmp_path, ("de", "xx"))
    lists[0].path.write_text("Package: a\nDescription-en: x\n\n")
    with pytest.raises(ValueError, match="Translation-en has a stanza without package, hash or description"):
        package_descriptions.rows_of(lists, ("en",))


@pytest.mark.network
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("wordnet", 100_000),
        ("debian-handbook", 10_000),
        ("installation-guide", 10_000),
        ("package-descriptions", 50_000),
    ],
)
def test_the_real_texts_have_splits_without_leaks(name: str, least: int, tmp_path: Path):
    rows, _ = corpora.build(name)(tmp_path, ())
    assert len(rows) > least
    splits: dict[str, set[str]] = {}
    for row in rows:
        for token in (row.group, f"{row.language}:{row.text}"):
            splits.setdefault(token, set()).add(row.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {"train", "val", "test"} == {row.split for row in rows}
