"""Equal texts are found, and texts that differ in anything are never taken for one."""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

import numpy as np
import pytest
from drawn_texts import tokenized
from hypothesis import given
from hypothesis import strategies as st

from bertstream.repeats import distinct, distinct_texts, text_bytes
from bertstream.tokens import TokenBatch, TokenizedText, hash_texts

TEXTS = st.booleans().flatmap(lambda special: st.lists(tokenized(special), max_size=8))


@given(TEXTS, st.sampled_from(["made here", "made before", "all alike"]))
def test_distinct_texts_are_those_that_differ_in_what_the_model_sees_or_in_the_words_cut(
    texts: list[TokenizedText], hashes: str
) -> None:
    batch = TokenBatch.from_texts(texts)
    if hashes != "made here":
        batch.hashes = hash_texts(batch) if hashes == "made before" else np.zeros(len(batch), np.uint64)
    bounds = np.cumsum([0, *batch.num_words])
    cut = np.zeros(bounds[-1], np.bool_) if batch.words_cut is None else batch.words_cut
    keys = [(text, cut[a:b].tobytes()) for text, a, b in zip(text_bytes(batch), bounds, bounds[1:], strict=False)]
    right_first, right_slots = distinct(keys)
    first, slots = distinct_texts(batch)
    if first is None or slots is None:
        assert len(right_first) == len(batch), "a repeat was missed"
    else:
        assert (first.tolist(), slots.tolist()) == (right_first.tolist(), right_slots.tolist())
        assert len(first) < len(batch)


@given(TEXTS)
def test_a_texts_hash_does_not_depend_on_its_batch(texts: list[TokenizedText]) -> None:
    alone = [int(hash_texts(TokenBatch.from_texts([text]))[0]) for text in texts]
    assert hash_texts(TokenBatch.from_texts(texts)).tolist() == alone


def test_texts_of_other_tokens_or_another_order_have_other_hashes() -> None:
    """Else most texts would be compared in full."""
    ids = [drawn for length in range(5) for drawn in product(range(9), repeat=length)]
    batch = TokenBatch.from_texts([TokenizedText(np.array(text, np.int32)) for text in ids])
    assert len(set(hash_texts(batch).tolist())) == len(ids) > 7000


@given(st.lists(st.booleans().flatmap(tokenized), max_size=5))
def test_a_texts_bytes_do_not_depend_on_its_batch(texts: list[TokenizedText]) -> None:
    assert text_bytes(TokenBatch.from_texts(texts)) == [text_bytes(TokenBatch.from_texts([text]))[0] for text in texts]


@pytest.mark.parametrize(
    "difference",
    [
        {"input_ids": [1, 2, 4]},
        {"input_ids": [1, 2]},
        {"token_type_ids": [0, 0, 1]},
        {"word_ids": [0, 0, 1]},
        {"word_ids": [0, -1, 1]},
        {"num_words": 3},
        {"special": [True, False, False]},
        {"owned": [True, False, True]},
        {"window_lengths": [1, 2]},
        {"window_lengths": [2, 1]},
    ],
    ids=str,
)
def test_texts_that_differ_in_anything_have_different_bytes(difference: dict[str, Any]) -> None:
    plain = TokenizedText(np.array([1, 2, 3], np.int32), word_ids=np.array([0, 1, 1], np.int32), num_words=2)
    other = dataclasses.replace(plain)
    for name, value in difference.items():
        setattr(other, name, value if isinstance(value, int) else np.array(value))
    if len(other.input_ids) < 3:
        other.word_ids = np.array([0, 1], np.int32)
    other.input_ids = other.input_ids.astype(np.int32)
    first, second, third = text_bytes(TokenBatch.from_texts([plain, other, plain]))
    assert first == third != second


@given(st.lists(st.integers(0, 5), max_size=12))
def test_distinct_finds_the_first_index_of_each_item(items: list[int]) -> None:
    first, slots = distinct(items)
    assert [items[i] for i in first] == list(dict.fromkeys(items))
    assert [items[first[slot]] for slot in slots] == items
