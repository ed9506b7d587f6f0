"""The tokenizer is checked when it is opened, and its dropout is a function of the generator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from mmmoe_pretrain.limits import MAX_TEXT_BYTES
from mmmoe_pretrain.modalities import BadSampleError, Tokenizer
from mmmoe_pretrain.modalities.text import Text, TextEmbedder, TextSettings

TEXT = "yellow number 7"


@pytest.fixture(scope="module")
def path(tiny_data: Path) -> Path:
    return tiny_data / "tokens.model"


def test_text_comes_back_and_carries_no_marks(path: Path) -> None:
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int64
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.vocab_size) == (1, 2, 3, 48)


def test_a_long_text_is_cut_and_counted(path: Path) -> None:
    tokenizer = Tokenizer(path)
    text = Text("text", TextSettings(max_tokens=4), tokenizer)
    assert values(text, TEXT) == [tokenizer.bos_id, *tokenizer.encode(TEXT)[:4].tolist(), tokenizer.eos_id]
    assert text.cut == 1
    assert len(values(text, "red")) <= text.max_tokens == 6
    assert text.cut == 1


def values(text: Text, content: str) -> list[int]:
    value = text.decode(content.encode())
    assert value is not None
    return value.tolist()


def test_what_says_nothing_is_nothing_and_what_is_no_text_is_a_bad_sample(path: Path) -> None:
    text = Text("text", TextSettings(), Tokenizer(path))
    for blank in ("", " \n", "\u200b", "\ufeff"):
        assert text.decode(blank.encode()) is None
    assert text.raw(b"\xef\xbb\xbf red ") == "red"  # without the byte order mark
    with pytest.raises(BadSampleError, match="not UTF-8"):
        text.decode(b"\xff\xfe")
    with pytest.raises(BadSampleError, match="exceeds the limit"):
        text.decode(b"a" * (MAX_TEXT_BYTES + 1))


def test_training_alone_drops_pieces_as_the_settings_say(path: Path) -> None:
    text = Text("text", TextSettings(dropout=0.5), Tokenizer(path))
    first, again = ([tuple(text.decode(TEXT.encode(), np.random.default_rng(n))) for n in range(10)] for _ in "ab")
    seen = set(first)
    assert first == again and len(seen) > 3
    assert all(text.tokenizer.decode(np.asarray(ids)) == TEXT for ids in seen)
    assert values(text, TEXT) == values(Text("text", TextSettings(), Tokenizer(path)), TEXT)


def test_full_dropout_leaves_no_piece_that_could_fall_apart(path: Path) -> None:
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode("number", np.random.default_rng(0), 0.999999)
    assert all(len(tokenizer.decode([i])) <= 1 for i in ids)


def test_a_wrong_tokenizer_is_refused_with_the_remedy(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer at .*mmmoe-data"):
        Tokenizer(tmp_path / "absent.model")
    for content in (b"", b"not a model"):
        (tmp_path / "broken.model").write_bytes(content)
        with pytest.raises(ValueError, match="not a sentencepiece model"):
            Tokenizer(tmp_path / "broken.model")
    with pytest.raises(ValueError, match=r"fingerprint .* but the run was made with abc"):
        Tokenizer(path, expected_fingerprint="abc")


def test_a_tokenizer_with_a_piece_that_is_no_text_is_refused(path: Path, tmp_path: Path) -> None:
    damaged, piece = tmp_path / "t.model", max(map(Tokenizer(path).piece, range(4, 40)), key=len).encode()
    damaged.write_bytes(path.read_bytes().replace(piece, piece[:-1] + b"\xff", 1))
    with pytest.raises(ValueError, match=r"t\.model is not a sentencepiece model \('utf-8' codec can't decode"):
        Tokenizer(damaged)


def test_a_tokenizer_without_marks_is_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["red green blue"] * 9), model_prefix=str(tmp_path / "bare"), vocab_size=20,
        hard_vocab_limit=False, model_type="char", bos_id=-1, eos_id=-1, minloglevel=2)  # fmt: skip
    with pytest.raises(ValueError, match="no begin or end mark"):
        Tokenizer(tmp_path / "bare.model")


def test_learned_positions_reach_the_end_mark_of_the_longest_text() -> None:
    embedder = TextEmbedder(9, 4, TextSettings(max_tokens=6, positions="learned"))
    last = torch.tensor([7])  # begin mark, six tokens, end mark: positions 0 to 7
    expected = embedder.table.weight[3] + embedder.positions[7]
    torch.testing.assert_close(embedder(torch.tensor([3]), last)[0], expected)


class Pieces:
    """A vocabulary of five pieces and two marks."""

    bos_id, eos_id = 5, 6

    def piece(self, token_id: int) -> str:
        return ["▁a", "▁re", "d*", "▁", "dog", "<s>", "</s>"][token_id]


def excerpt(ids: list[int], place: int) -> tuple[str, str, str] | None:
    return Text("text", TextSettings(), Pieces()).excerpt(np.array(ids), place)  # type: ignore[arg-type]


SENTENCE = [5, 0, 1, 2, 3, 4, 6]


def test_a_piece_is_found_in_its_sentence() -> None:
    assert excerpt(SENTENCE, 1) == ("", "a", " red* dog")
    assert excerpt(SENTENCE, 2) == ("a ", "re", "d* dog")  # the space stands before the piece
    assert excerpt(SENTENCE, 3) == ("a re", "d*", " dog")
    assert excerpt(SENTENCE, 5) == ("a red* ", "dog", "")


def test_marks_and_spaces_have_names() -> None:
    assert excerpt(SENTENCE, 0) == ("", "⟨begin⟩", " a red* dog")
    assert excerpt(SENTENCE, 4) == ("a red* ", "␣", "dog")
    assert excerpt(SENTENCE, 6) == ("a red* dog", "⟨end⟩", "")


def test_a_long_text_is_cut_around_its_piece() -> None:
    assert excerpt([5] + [4] * 80 + [6], 40) == ("…" + "dog" * 16, "dog", "dog" * 16 + "…")
