from __future__ import annotations

import pytest
import sentencepiece

from data_prep.manifest import Row
from data_prep.tokenizer import texts_of, train_tokenizer

TEXTS = sorted(
    {
        f"{word} {noun} {number}"
        for word in ("a red", "un rouge", "красный", "ένα κόκκινο", "большой")
        for noun in ("square", "carré", "квадрат", "τετράγωνο", "circle", "circuit")
        for number in (7, 25)
    }
)


@pytest.fixture
def trained(tmp_path):
    train_tokenizer(TEXTS, tmp_path / "t.model", 340)
    return sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))


@pytest.mark.parametrize("text", [*TEXTS[::7], "ça va, mañana?", "赤い四角 🦜", "καλημέρα κόσμε"])
def test_any_text_comes_back_whole(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_the_ids_are_fixed_and_nothing_is_unknown(trained):
    assert [trained.pad_id(), trained.bos_id(), trained.eos_id(), trained.unk_id()] == [0, 1, 2, 3]
    assert trained.vocab_size() == 340
    assert trained.unk_id() not in trained.encode("赤い四角 🦜")


def test_digits_are_pieces_of_their_own_and_case_is_folded(trained):
    assert trained.encode("25 25", out_type=str) == ["▁", "2", "5", "▁", "2", "5"]
    assert trained.encode("A RED Square") == trained.encode("a red square")


def test_the_model_is_the_same_twice(tmp_path):
    train_tokenizer(TEXTS, tmp_path / "one.model", 320)
    train_tokenizer(TEXTS, tmp_path / "two.model", 320)
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_size_that_cannot_be_filled_names_the_largest_that_can(tmp_path, model_type):
    with pytest.raises(ValueError, match=r"largest that works is (\d+)") as caught:
        train_tokenizer(TEXTS, tmp_path / "t.model", 5000, model_type)
    largest = int(str(caught.value).rsplit(" ", 1)[1])
    train_tokenizer(TEXTS, tmp_path / "t.model", largest, model_type)


def test_a_size_below_the_characters_names_what_is_needed(tmp_path):
    with pytest.raises(ValueError, match=r"too small for these texts' characters; use (\d+) or more") as caught:
        train_tokenizer(TEXTS, tmp_path / "t.model", 270)
    assert 270 < int(str(caught.value).split("use ")[1].split()[0]) < 340


def test_only_the_train_split_is_learnt_from():
    rows = [
        Row("a", text="two  words"),
        Row("b", text="two words"),
        Row("c", text="secret", split="test"),
        Row("d", image="x.png"),
    ]
    assert texts_of(rows, "train") == ["two words"]
