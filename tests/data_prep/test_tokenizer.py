from __future__ import annotations

import json

import pytest
import sentencepiece

from mmmoe_pretrain.data_prep import tokenizer
from mmmoe_pretrain.data_prep.rows.manifest import write_manifest
from mmmoe_pretrain.data_prep.rows.row import Row
from mmmoe_pretrain.data_prep.tokenizer import TokenizerOptions
from mmmoe_pretrain.modalities import Tokenizer
from tests.support import write_tar

TEXTS = sorted(
    {
        f"{word} {noun} {number}"
        for word in ("a red", "un rouge", "красный", "ένα κόκκινο", "большой")
        for noun in ("square", "carré", "квадрат", "τετράγωνο", "circle", "circuit")
        for number in (7, 25)
    }
)


def train_tokenizer(texts, out, *options, **named):
    tokenizer.train_tokenizer(texts, out, TokenizerOptions(*options, **named))


def test_any_text_is_decoded_as_it_was_and_the_model_is_the_same_twice(tmp_path):
    for name in ("one.model", "two.model"):
        train_tokenizer(TEXTS, tmp_path / name, 340)
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
    trained = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "one.model"))
    for text in (*TEXTS, "ça va, mañana?", "赤い四角 🦜", "καλημέρα κόσμε"):
        assert trained.decode(trained.encode(text)) == text
        assert trained.unk_id() not in trained.encode(text)
    assert [trained.pad_id(), trained.bos_id(), trained.eos_id(), trained.unk_id()] == [0, 1, 2, 3]
    assert trained.vocab_size() == 340
    assert trained.encode("25 25", out_type=str) == ["▁", "2", "5", "▁", "2", "5"]
    assert trained.encode("A RED Square") == trained.encode("a red square")


def test_a_text_longer_than_sentencepiece_takes_is_learned_too(tmp_path):
    longest = "ж" * (1 << 15) + " кот" * (1 << 14)  # 2 bytes a letter: 64 KiB and 112 KiB
    train_tokenizer([*TEXTS, longest], tmp_path / "t.model", 340)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert model.encode("кот", out_type=str) == ["▁кот"]  # a word of no other text


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_size_that_cannot_be_filled_names_the_largest_that_can(tmp_path, model_type):
    with pytest.raises(ValueError, match=r"largest that works is (\d+)") as caught:
        train_tokenizer(TEXTS, tmp_path / "t.model", 5000, model_type)
    largest = int(str(caught.value).rsplit(" ", 1)[1])
    train_tokenizer(TEXTS, tmp_path / "t.model", largest, model_type)


def test_rare_characters_are_bytes_under_a_lower_coverage(tmp_path):
    """Thirty characters occur once each, among some 1,500 others."""
    rare = [chr(0x4E00 + n) for n in range(30)]
    with pytest.raises(ValueError, match="lower --character-coverage") as caught:
        train_tokenizer([*TEXTS, *rare], tmp_path / "t.model", 270, character_coverage=1.0)
    least = int(str(caught.value).split("use ")[1].split()[0])
    with pytest.raises(ValueError, match=r"--character-coverage 0\.5: sentencepiece takes 0\.98 to 1"):
        train_tokenizer(TEXTS, tmp_path / "t.model", 340, character_coverage=0.5)
    train_tokenizer([*TEXTS, *rare], tmp_path / "t.model", least - 10, character_coverage=0.98)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    in_bytes = [each for each in rare if len(model.encode(each)) > 2]
    assert len(in_bytes) >= 10 and all(model.decode(model.encode(each)) == each for each in rare)


def test_a_size_below_the_characters_names_what_is_needed(tmp_path):
    with pytest.raises(ValueError, match=r"too small for these texts' characters; use (\d+) or more") as caught:
        train_tokenizer(TEXTS, tmp_path / "t.model", 270)
    assert 270 < int(str(caught.value).split("use ")[1].split()[0]) < 340


# Persian "I want" and "books" with non-joiners; Hindi with a non-joiner and a joiner in a conjunct; a Thai zero-width
# space; a right-to-left mark; an emoji of three, joined.
JOINED = (
    "می\u200cخواهم",
    "کتاب\u200cها",
    "क्\u200cष",
    "क्\u200dष",
    "ภาษา\u200bไทย",
    "a\u200fb",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
)


@pytest.mark.parametrize("normalization", ["nfkc", "nfc", "identity"])
def test_joiners_and_what_spells_a_word_come_back(tmp_path, normalization):
    texts = [*TEXTS, *JOINED[:3]]  # bytes stand in for the letters of the others
    train_tokenizer(texts, tmp_path / "t.model", 370, normalization=normalization)
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert [tokenizer.decode(tokenizer.encode(text)) for text in JOINED] == list(JOINED)
    learned, unknown = ([tokenizer.piece(i) for i in tokenizer.encode(text)] for text in (JOINED[0], JOINED[4]))
    assert any("\u200c" in piece for piece in learned) and "<0xE2>" in unknown
    train_tokenizer(texts, tmp_path / "old.model", 370, normalization="nmt_nfkc")
    old = Tokenizer(tmp_path / "old.model")
    assert old.decode(old.encode(JOINED[0])) == JOINED[0].replace("\u200c", " ")  # why it is not the default


# Spelling -> NFC (Unicode Standard Annex 15, figures 3 to 6): a singleton, a mark apart, two marks in both orders and
# composed in part, Hangul, a ligature, a width, a circle, a space; then case.
FORMS = {
    "\u212b": "Å", "A\u030a": "Å", "s\u0323\u0307": "ṩ", "s\u0307\u0323": "ṩ", "ṡ\u0323": "ṩ", "ṣ\u0307": "ṩ",
    "\u1112\u1161\u11ab": "한", "하\u11ab": "한", "ﬁ": "ﬁ", "Ｆ": "Ｆ", "①": "①", "x\u00a0y": "x\u00a0y", "É": "É",
}  # fmt: skip


@pytest.mark.parametrize(
    ("normalization", "casefold", "expected"),
    [
        ("identity", None, {form: form for form in FORMS}),
        ("nfc", False, FORMS),
        ("nfc", None, {**{form: nfc.lower() for form, nfc in FORMS.items()}, "STRAẞE İ": "straße İ"}),
        ("nfkc", None, {"ﬁ": "fi", "Ｆ": "f", "①": "1", "x\u00a0y": "x y", "A\u030a": "å", "É": "é"}),
    ],
)
def test_forms_of_a_letter_are_what_the_standard_says(tmp_path, normalization, casefold, expected):
    train_tokenizer(TEXTS, tmp_path / "t.model", 340, "bpe", casefold, normalization)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert {text: model.decode(model.encode(text)) for text in expected} == expected


def test_identity_folds_no_case_and_other_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="identity changes nothing"):
        train_tokenizer(TEXTS, tmp_path / "t.model", 340, casefold=True, normalization="identity")
    with pytest.raises(ValueError, match="nfd' is not one of nfkc, nfc, identity, nmt_nfkc"):
        train_tokenizer(TEXTS, tmp_path / "t.model", 340, normalization="nfd")


def test_only_the_train_split_is_learnt_from(tmp_path):
    rows = [
        Row("a", text="two  words"),
        Row("b", text="two words"),
        Row("c", text="secret", split="test"),
        Row("d", image="x.png"),
        Row("e", text="f\u00a0g"),  # what a space is, is the normalization's to say
        Row("h", parts=[{"text": "part one"}, {"file": "part.txt"}]),
        Row("i", parts=[{"file": "lost.txt"}]),
    ]
    (tmp_path / "part.txt").write_text("part two", encoding="utf-8")
    write_manifest(tmp_path / "manifest.jsonl", rows)
    with (tmp_path / "texts").open("w+b") as file:
        texts = tokenizer.Texts(file, 100)
        assert tokenizer.read_texts([str(tmp_path)], "train", texts) == 1
        assert texts.close() == 4
        assert sorted(texts) == ["f\u00a0g", "part one", "part two", "two words"]


def test_the_same_texts_in_another_container_and_order_give_the_same_model(tmp_path):
    rows = [Row(f"k{n}", text=text) for n, text in enumerate(TEXTS)]
    write_manifest(tmp_path / "whole/manifest.jsonl", rows)
    write_manifest(tmp_path / "some/manifest.jsonl", rows[::-2])
    members = [(f"{n}.json", json.dumps({"caption": text}).encode()) for n, text in enumerate(TEXTS)]
    write_tar(tmp_path / "captions.tar", [*members, ("x.png", b"x"), ("x.txt", TEXTS[0].encode())])
    write_tar(tmp_path / "bad.tar", [("a.json", b"{"), ("b.json", b'{"caption": "secret", "split": "test"}')])
    inputs = {
        "whole": ["whole"], "again": ["some/manifest.jsonl", "whole"], "tar": ["bad.tar", "captions.tar", "whole"]
    }  # fmt: skip
    options = TokenizerOptions(340, normalization="nfc")
    for name, paths in inputs.items():
        tokenizer.run([str(tmp_path / path) for path in paths], tmp_path / f"{name}.model", "train", options)
    assert len({(tmp_path / f"{name}.model").read_bytes() for name in inputs}) == 1


def test_the_texts_that_are_drawn_depend_on_the_texts_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "_AT_ONCE", 2)
    drawn = []
    for number, texts in enumerate((TEXTS, TEXTS[::-1], [*TEXTS, *TEXTS[:7]])):
        with (tmp_path / f"{number}").open("w+b") as file:
            some = tokenizer.Texts(file, 10)
            for text in texts:
                some.add(text)
            assert (some.close(), some.drawn) == (10, True)
            drawn.append(list(some))
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(set(drawn[0])) == 10


def test_an_existing_file_is_kept_unless_overwrite_is_given(tmp_path, capsys):
    write_manifest(tmp_path / "manifest.jsonl", [Row(f"k{n}", text=text) for n, text in enumerate(TEXTS)])
    out, options = tmp_path / "t.model", TokenizerOptions(340)
    tokenizer.run([str(tmp_path)], out, "train", options, dry_run=True, as_json=True)
    assert json.loads(capsys.readouterr().out)["texts"] == len(TEXTS) and not out.exists()
    out.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"t\.model exists; choose another --out, or pass --overwrite"):
        tokenizer.run([str(tmp_path)], out, "train", options)
    assert out.read_bytes() == b"mine"
    tokenizer.run([str(tmp_path)], out, "train", options, overwrite=True)
    assert sentencepiece.SentencePieceProcessor(model_file=str(out)).vocab_size() == 340
    with pytest.raises(ValueError, match="is a folder"):
        tokenizer.run([str(tmp_path)], tmp_path, "train", options)
