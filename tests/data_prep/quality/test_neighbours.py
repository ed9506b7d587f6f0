from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from mmmoe_pretrain.data_prep.quality import neighbours
from mmmoe_pretrain.data_prep.quality.fingerprints import rows_of_a_band, signature
from mmmoe_pretrain.data_prep.quality.neighbours import first_close, first_equal, hamming_tables
from mmmoe_pretrain.data_prep.quality.repeats import find_repeats
from mmmoe_pretrain.data_prep.quality.samples import Samples, Settings, Source


def first_within(words: np.ndarray, distance: int, fixed: tuple[int, ...] = (), most: int = 1 << 20) -> list[int]:
    masks = hamming_tables(distance)
    return first_close(
        np.isin(np.arange(len(words)), fixed),
        lambda at: (words[at] & mask for mask in masks),
        lambda i, j: np.bitwise_count(words[i] ^ words[j]) <= distance,
        most,
    ).tolist()


def greedy(words: np.ndarray, distance: int) -> list[int]:
    """The reference: each word against those that are kept, one by one."""
    found: list[int] = []
    for word in words.tolist():
        kept = (i for i, of in enumerate(found) if of < 0)
        found.append(next((i for i in kept if (word ^ int(words[i])).bit_count() <= distance), -1))
    return found


@pytest.mark.parametrize("distance", [0, 1, 4])
def test_words_within_a_distance_agree_under_some_mask(distance):
    masks = [int(mask) for mask in hamming_tables(distance, bits=12)]
    for places in itertools.combinations(range(12), distance):
        difference = sum(1 << place for place in places)
        assert any(not difference & mask for mask in masks)


@pytest.mark.parametrize(("nearest", "held"), [(8, 1 << 21), (1, 1 << 21), (2, 8)])
def test_what_is_dropped_is_close_to_the_first_kept_one_also_where_few_neighbours_are_held(
    monkeypatch, nearest, held
):
    monkeypatch.setattr(neighbours, "NEAREST", nearest)
    monkeypatch.setattr(neighbours, "_HELD", held)
    words = np.random.default_rng(0).integers(0, 1 << 11, 300, dtype=np.uint64)  # each has 67 of 2,048 within 2 bits
    wanted = greedy(words, 2)
    assert first_within(words, 2) == wanted
    assert 20 < wanted.count(-1) < 200


def test_a_chain_of_small_changes_is_not_one_duplicate_and_fixed_ones_stay():
    words = np.array([0b0, 0b11, 0b1111, 0b111111], np.uint64)  # 2 bits from one to the next
    assert first_within(words, 2) == [-1, 0, -1, 2]
    assert first_within(words, 2, fixed=(0, 1)) == [-1, -1, 1, -1]


def test_the_first_of_a_large_bucket_is_compared_with_all():
    words = np.array([0b1, *(1 << n for n in range(2, 20)), 0b11], np.uint64)  # equal above the lowest block
    assert first_within(words, 1, most=2)[-1] == 0


def test_equal_rows_have_the_first_of_them():
    assert first_equal(np.array([[1, 2], [2, 1], [1, 2], [1, 3], [2, 1]])).tolist() == [0, 1, 0, 3, 1]


def test_signatures_estimate_the_jaccard_similarity_of_runs_of_5_characters():
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 104)))  # 100 runs, each once
    same = [(signature(text) == signature(text[:end])).mean() for end in (104, 84, 54)]
    assert same == pytest.approx([1.0, 0.8, 0.5], abs=0.13)  # 80 and 50 of 100 runs; 3 standard errors of 128 draws
    assert (signature(text) == signature(text[::-1])).mean() < 0.05
    assert (signature("cat") == signature("cot")).mean() < 0.05


@pytest.mark.parametrize(("similarity", "rows"), [(0.8, 6), (0.5, 3), (1.0, 32)])
def test_bands_are_the_longest_by_which_just_similar_texts_are_found(similarity, rows):
    assert rows_of_a_band(similarity) == rows  # 0.8: 1 - (1 - 0.8^6)^21 = 0.998, and with 7 rows 0.986


@pytest.mark.parametrize("medium", ["image", "text"])
def test_memory_is_bounded_by_bytes_a_sample(monkeypatch, medium):
    for name in ("_AT_ONCE", "_HELD"):  # what does not grow
        monkeypatch.setattr(neighbours, name, 1000)
    count, settings = 30_000, Settings(by=((medium,),), near=True)
    random = np.random.default_rng(0)
    records = np.zeros(count, settings.record())  # in a file, outside of tests
    for name in ("digest", "look", "phash", *(["signature"] if medium == "text" else [])):
        kind = records[name].dtype
        records[name] = random.integers(1, np.iinfo(kind).max, records[name].shape, dtype=kind)
    records["look"][count // 2 :] += 1
    records["phash"][count // 2 :] = records["phash"][: count // 2]
    tracemalloc.start()
    repeats = find_repeats(Samples([Source("", False, count)], records), settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (repeats.of >= 0).sum() == (count // 2 if medium == "image" else 0)
    assert peak < 200 * count  # 25 numbers of 8 bytes
