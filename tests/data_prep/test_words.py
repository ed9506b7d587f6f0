"""Word vectors: the loss and its optimum against the literature, and the command."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mmmoe_pretrain.data_prep import words
from mmmoe_pretrain.data_prep.rows.manifest import write_manifest
from mmmoe_pretrain.data_prep.rows.row import Row
from mmmoe_pretrain.data_prep.words import WordOptions, corpus_of
from mmmoe_pretrain.modalities.word_vectors import WordVectors, words_of


def test_words_are_runs_of_letters_and_digits_without_case() -> None:
    assert words_of("L'Été — ＡＢＣ_2nd, smile-face!") == ["l", "été", "abc", "2nd", "smile", "face"]


def test_marks_belong_to_the_letters_that_they_stand_on() -> None:
    assert words_of("हिन्दी में, שָׁלוֹם عَرَب") == ["हिन्दी", "में", "שָׁלוֹם", "عَرَب"]
    assert words_of("I \u2764\ufe0f 1\ufe0f\u20e3 \u0301") == [
        "i",
        "1",
    ]  # emoji with variation selectors, a mark alone


def test_a_word_that_never_ends_makes_no_file_of_its_length_a_word(tmp_path: Path) -> None:
    endless = "a" * 100_000
    corpus = corpus_of([f"red {endless} blue"] * 2, 1)
    assert corpus.words == ["blue", "red"]
    with pytest.raises(ValueError, match="--dimension 1000000000 is above 65536"):
        WordOptions(dimension=10**9)


def test_gradients_are_those_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    given = [rng.standard_normal((n, 4)) for n in (3, 3, 5)]
    _, slopes = words.loss_and_slopes(*given, 2)
    for which, slope in enumerate(slopes):
        for place in np.ndindex(slope.shape):
            by_step = []
            for step in (1e-5, -1e-5):
                moved = [array.copy() for array in given]
                moved[which][place] += step
                by_step.append(words.loss_and_slopes(*moved, 2)[0])
            assert slope[place] == pytest.approx((by_step[0] - by_step[1]) / 2e-5, rel=1e-6, abs=1e-8)  # fp64


def test_the_loss_is_least_where_products_are_the_pointwise_mutual_information_less_log_k() -> None:
    """Levy and Goldberg 2014, section 3.1: x = log P(w, c) / (P(w) P_n(c)) - log k, here with any noise P_n."""
    negatives, noise = 2, np.asarray([0, 0, 0, 1, 2, 2])
    times = np.asarray([[4, 1, 3], [2, 6, 1], [1, 1, 5]])  # of each word with each other one
    pairs = [(w, c) for w in range(3) for c in range(3) for _ in range(times[w, c])]
    centre_B, context_B = np.asarray(pairs).T
    share_wc = times / times.sum()
    noise_c = np.bincount(noise) / len(noise)
    products = np.log(share_wc / (share_wc.sum(axis=1, keepdims=True) * noise_c)) - np.log(negatives)
    vectors, contexts = products, np.eye(3)  # of full dimension: the products are these
    _, (of_centres, of_contexts, of_noise) = words.loss_and_slopes(
        vectors[centre_B], contexts[context_B], contexts[noise], negatives
    )
    slopes = np.zeros((2, 3, 3))
    np.add.at(slopes[0], centre_B, of_centres)
    np.add.at(slopes[1], np.concatenate([context_B, noise]), np.concatenate([of_contexts, of_noise]))
    np.testing.assert_allclose(slopes, 0, atol=1e-12)  # fp64; each pair alone has slopes of order 1
    assert np.abs(of_centres).max() > 0.1


def test_words_that_are_used_alike_have_near_vectors() -> None:
    rng = np.random.default_rng(1)
    pets, tools = [["cat", "dog", "meows", "eats", "sleeps"], ["saw", "axe", "cuts", "rusts", "breaks"]]
    texts = [f"{kind[rng.integers(2)]} {kind[2 + rng.integers(3)]}" for kind in (pets, tools) for _ in range(150)]
    corpus = corpus_of(texts, 1)
    vectors = words.train(corpus, WordOptions(dimension=8, epochs=40, sample=0))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    near = lambda a, b: float(vectors[corpus.words.index(a)] @ vectors[corpus.words.index(b)])  # noqa: E731
    assert near("cat", "dog") > 0.9 > 0.3 > max(near("cat", "saw"), near("dog", "axe"))


def test_the_command_is_deterministic_takes_filters_and_names_what_is_wrong(tmp_path: Path, capsys) -> None:
    rows = [
        Row(f"{language}-{i}", text=f"{word} number {i % 3}", language=language, split="train")
        for i in range(12)
        for language, word in (("en", "red"), ("de", "rot"))
    ]
    write_manifest(tmp_path / "manifest.jsonl", rows)
    options, paths = WordOptions(dimension=4, epochs=2), [str(tmp_path / "manifest.jsonl")]
    for name in ("one.npz", "two.npz"):
        words.run(paths, tmp_path / name, "train", ["language=en"], options, as_json=True)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert json.loads(capsys.readouterr().out.splitlines()[0])["texts"] == 3
    made = WordVectors(tmp_path / "one.npz")
    assert (sorted(made.words), made.vectors.shape) == (["number", "red"], (2, 4))
    mean = made.vectors[[made.numbers["red"], made.numbers["number"]]].mean(axis=0)
    np.testing.assert_allclose(made.mean("Red NUMBER zwei"), mean / np.linalg.norm(mean), rtol=1e-6)
    assert made.mean("zwei") is None
    out = tmp_path / "three.npz"
    for given, message in (
        ((paths, out, "train", ["language=fr"], options), r"0 texts of split train have 0 words .* check --split"),
        ((paths, tmp_path / "one.npz", "train", [], options), r"one.npz exists; choose another --out"),
        ((paths, tmp_path / "x.txt", "train", [], options), r"not the name of a file that ends with .npz"),
        (([str(tmp_path / "absent.jsonl")], out, "train", [], options), r"absent.jsonl"),
    ):
        with pytest.raises(ValueError, match=message):
            words.run(*given)
    with pytest.raises(ValueError, match="--window 0 is below 1"):
        WordOptions(window=0)
    out.write_bytes(b"no file of numpy")
    with pytest.raises(ValueError, match=r"three.npz is no file of word vectors .* mmmoe-data words"):
        WordVectors(out)


def member(header: str) -> bytes:
    """The start of an array of NumPy's format, without its numbers."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


ARRAY = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s, 4), }\n"
DAMAGED = {
    "one array": lambda path: np.save(path.open("wb"), np.ones(3)),
    "no arrays": lambda path: zipped(path, b"abc"),
    "no header": lambda path: zipped(path, member("((((")),
    "petabytes": lambda path: zipped(path, member(ARRAY % 10**15)),
    "more than a number holds": lambda path: zipped(path, member(ARRAY % 10**23)),
    "a damaged stream": lambda path: path.write_bytes(with_ones(compressed(path), 60, 90)),
    "an unknown compression": lambda path: path.write_bytes(
        compressed(path).replace(b"PK\1\2", b"PK\1\2\xff\xff\xff\xff\xff\xff\xff")
    ),
    "pickles": lambda path: np.savez(path, words=np.asarray(["a", 1], dtype=object), vectors=np.ones((2, 4), "f4")),
}


def zipped(path: Path, vectors: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("words.npy", member("{'descr': '<U1', 'fortran_order': False, 'shape': (1,), }\n") + b"a\0\0\0")
        file.writestr("vectors.npy", vectors)


def compressed(path: Path) -> bytes:
    np.savez_compressed(path, words=np.asarray(["a", "b"] * 50), vectors=np.ones((100, 4), "f4"))
    return path.read_bytes()


def with_ones(data: bytes, start: int, stop: int) -> bytes:
    return data[:start] + b"\xff" * (stop - start) + data[stop:]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_one_clear_message(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "words.npz"
    DAMAGED[damage](path)
    with pytest.raises(ValueError, match=r"words.npz is no file of word vectors.* make one by mmmoe-data words"):
        WordVectors(path)
