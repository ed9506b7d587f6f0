from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmoe_pretrain.data_prep.rows.splits import group_items, near_tokens, normalise_text, split_of


def test_items_connected_through_others_are_one_group():
    tokens = {"d": ["text:cow"], "a": ["text:bull", "image:1"], "c": ["image:1", "audio:7"], "b": ["audio:7"]}
    assert group_items(tokens) == {"a": "a", "b": "a", "c": "a", "d": "d"}


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.lists(st.integers(0, 12), max_size=3)))
def test_no_token_is_ever_in_two_splits(tokens):
    groups = group_items({item: [str(token) for token in found] for item, found in tokens.items()})
    splits: dict[int, set[str]] = {}
    for item, found in tokens.items():
        for token in found:
            splits.setdefault(token, set()).add(split_of(groups[item], "salt"))
    assert all(len(found) == 1 for found in splits.values())


def test_a_split_depends_on_its_group_alone_and_the_fractions_hold():
    counts = Counter(split_of(f"group-{number}", "salt", test=0.2, val=0.1) for number in range(5000))
    # binomial: standard deviation below 0.006 of the whole, so 0.025 is four of them
    assert abs(counts["test"] / 5000 - 0.2) < 0.025
    assert abs(counts["val"] / 5000 - 0.1) < 0.025


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A unit of 5 times the weight.", "a unit of 7 times the weight", True),  # another word
        ("the first one that is not last", "the first one that is last", True),  # one word more
        ("the first one that is not last", "the last one that is not first", False),
        ("a unit of five times", "a unit of six times", False),  # short
        ("a unit", "A unit!", True),
    ],
)
def test_texts_that_differ_in_one_word_share_a_token_unless_they_are_short(one: str, other: str, same: bool):
    assert (not set(near_tokens(one)).isdisjoint(near_tokens(other))) == same


def test_case_punctuation_and_spaces_do_not_tell_texts_apart():
    assert normalise_text("  A  Bull. ") == normalise_text("a bull") == "a bull"
    assert normalise_text("$") != normalise_text("#")
