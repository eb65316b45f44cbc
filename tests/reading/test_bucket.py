"""A bucket becomes batches of neighbours in length: every record once, within the budget, the same every time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from bertstream.reading.bucket import cut_bucket

WINDOWS = st.lists(st.integers(0, 30), max_size=60)
SEEDS = st.none() | st.integers(0, 9)


def cut(lengths: list[int], seed: int | None, **sizes: int) -> list[list[int]]:
    shuffle = None if seed is None else np.random.default_rng(seed)
    return [batch.tolist() for batch in cut_bucket(np.array(lengths), shuffle=shuffle, **sizes)]


# Laws 2, 3 and 4.


@given(WINDOWS, SEEDS, st.sampled_from(["batch_size", "max_tokens"]), st.integers(1, 40))
@example([], None, "max_tokens", 1)
@example([], 0, "batch_size", 1)
def test_every_place_is_in_exactly_one_batch(lengths: list[int], seed: int | None, name: str, size: int) -> None:
    batches = cut(lengths, seed, **{name: size})
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    assert all(batch and batch == sorted(batch) for batch in batches)


@given(WINDOWS, SEEDS, st.integers(1, 40))
@example([0, 20], None, 10)
@example([50], None, 10)
def test_a_batch_over_its_budget_is_one_text(lengths: list[int], seed: int | None, max_tokens: int) -> None:
    for batch in cut(lengths, seed, max_tokens=max_tokens):
        assert len(batch) == 1 or sum(lengths[place] for place in batch) <= max_tokens


@given(WINDOWS, st.integers(1, 40))
def test_a_batch_within_its_budget_has_no_room_for_the_next_text(lengths: list[int], max_tokens: int) -> None:
    for batch, after in pairwise(cut(lengths, None, max_tokens=max_tokens)):
        shortest_after = min(lengths[place] for place in after)
        assert sum(lengths[place] for place in batch) + shortest_after > max_tokens


@given(WINDOWS, SEEDS, st.integers(1, 40))
def test_a_batch_size_is_exact_but_for_one_batch(lengths: list[int], seed: int | None, batch_size: int) -> None:
    sizes = sorted((len(batch) for batch in cut(lengths, seed, batch_size=batch_size)), reverse=True)
    full, rest = divmod(len(lengths), batch_size)
    assert sizes == [batch_size] * full + [rest] * (rest > 0)


@given(WINDOWS, SEEDS, st.sampled_from(["batch_size", "max_tokens"]), st.integers(1, 40))
def test_a_batch_holds_neighbours_in_length(lengths: list[int], seed: int | None, name: str, size: int) -> None:
    batches = [[lengths[place] for place in batch] for batch in cut(lengths, seed, **{name: size})]
    ranges = sorted((min(batch), max(batch)) for batch in batches)
    assert all(longest <= shortest for (_, longest), (shortest, _) in pairwise(ranges))
    if seed is None:
        assert ranges == [(min(batch), max(batch)) for batch in batches]


@given(WINDOWS, st.integers(0, 9), st.sampled_from(["batch_size", "max_tokens"]), st.integers(1, 40))
def test_the_same_seed_gives_the_same_batches(lengths: list[int], seed: int, name: str, size: int) -> None:
    assert cut(lengths, seed, **{name: size}) == cut(lengths, seed, **{name: size})


def test_a_shuffle_mixes_batches_and_records_of_equal_length() -> None:
    lengths = [5] * 12 + [9] * 12
    orders = {tuple(map(tuple, cut(lengths, seed, batch_size=4))) for seed in range(20)}
    assert len(orders) == 20
    assert any(min(order[0]) >= 12 for order in orders), "the longest come first in some"
    companions = {place for order in orders for batch in order if 0 in batch for place in batch}
    assert companions == set(range(12))


def test_without_a_shuffle_ties_stay_in_reading_order() -> None:
    assert cut([3, 1, 3, 1, 3], None, batch_size=2) == [[1, 3], [0, 2], [4]]
