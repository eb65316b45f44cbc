"""A bucket becomes batches of neighbours in length: every record once, within the budget, the same every time."""

from __future__ import annotations

import copy
import pickle
import re
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.data import default_collate

from bertstream.reading.bucket import add_fields, cut_bucket, stack_column
from bertstream.tokens import Record, TokenBatch, TokenizedText

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


# Batches of records.


def records(fields: list[dict[str, Any]]) -> list[Record]:
    return [Record(f"text {i}", field, f"k{i}", "a.tar", 10 * i) for i, field in enumerate(fields)]


def batch_of(fields: list[dict[str, Any]], keep_text_as: str | None = None) -> TokenBatch:
    batch = TokenBatch.from_texts([TokenizedText(np.full(i + 1, i, np.int32)) for i in range(len(fields))])
    add_fields(batch, records(fields), keep_text_as=keep_text_as)
    return batch


def test_a_batch_holds_the_records_fields_and_places_as_columns() -> None:
    batch = batch_of([{"label": 1, "name": "a"}, {"label": 2, "name": "b"}])
    assert batch.input_ids.tolist() == [0, 1, 1]
    assert batch.cursor is None
    assert list(batch.fields) == ["label", "name", "__key__", "__shard__", "__index__"]
    assert batch.fields["label"].tolist() == [1, 2] and batch.fields["label"].dtype == np.int64
    assert batch.fields["name"] == ["a", "b"]
    assert batch.fields["__key__"] == ["k0", "k1"] and batch.fields["__shard__"] == ["a.tar", "a.tar"]
    assert batch.fields["__index__"].tolist() == [0, 10] and batch.fields["__index__"].dtype == np.int64


def test_a_field_that_some_records_lack_is_none_there() -> None:
    batch = batch_of([{}, {"label": 2}, {"score": 0.5}])
    assert batch.fields["label"] == [None, 2, None]
    assert batch.fields["score"] == [None, None, 0.5]


def test_the_text_can_stay_in_the_batch() -> None:
    assert batch_of([{}, {}], "said").fields["said"] == ["text 0", "text 1"]


# Columns.

NUMBERS = [
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.booleans(),
    st.floats(width=32).map(np.float32),
    st.integers(-128, 127).map(np.int8),
    st.booleans().map(np.bool_),
]


@given(st.sampled_from(NUMBERS).flatmap(lambda number: st.lists(number, min_size=1, max_size=5)))
def test_a_column_of_numbers_is_what_torchs_default_collate_makes_of_it(values: list[Any]) -> None:
    column, right = torch.from_numpy(stack_column(values)), default_collate(values)
    assert column.dtype == right.dtype
    assert torch.equal(column, right) or (column != column).equal(right != right)


@given(st.lists(st.lists(st.integers(-9, 9), max_size=4), max_size=5))
def test_lists_of_numbers_stay_one_array_a_record(values: list[list[int]]) -> None:
    """Trap 40: torch's default collate transposes them where they are equally long, and fails where they are not."""
    column = stack_column(values)
    assert [list(row) for row in column] == values
    assert {row.dtype for row in column if isinstance(row, np.ndarray)} == (
        {np.dtype(np.int64)} if any(values) else set()
    )
    assert len({type(row) for row in column}) <= 1


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, 2.5], np.float64),
        ([2.5, 1], np.float64),
        ([np.int8(1), np.int64(300)], np.int64),
        ([1, np.float32(0.5)], np.float64),
    ],
)
def test_numbers_of_several_types_get_the_one_that_holds_them(values: list[Any], dtype: npt.DTypeLike) -> None:
    column = stack_column(values)
    assert column.dtype == dtype and column.tolist() == values


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([[1], [2.5, 3]], np.float64), ([[True], [], [False, True]], np.bool_), ([[1, 2], None, []], np.int64)],
)
def test_lists_of_one_column_have_one_dtype(values: list[Any], dtype: npt.DTypeLike) -> None:
    column = stack_column(values)
    assert [row if row is None else row.tolist() for row in column] == values
    assert {row.dtype for row in column if row is not None} == {np.dtype(dtype)}


@pytest.mark.parametrize(
    "values",
    [
        [],
        ["a", "b"],
        [1, None],
        [1, "a"],
        [True, 2],
        [2**63, 1],
        [10**400, 0.5],
        [[2**63], [1]],
        [["B", "O"], ["O"]],
        [["B"], [1]],
        [[[1], [2]], [[3]]],
        [[], []],
        [(1, 2), (3, 4)],
        [{"a": 1}],
        [b"raw"],
        [np.str_("a")],
    ],
    ids=repr,
)
def test_all_else_stays_a_list_with_one_entry_a_record(values: list[Any]) -> None:
    assert stack_column(values) == values
    assert [type(entry) for entry in stack_column(values)] == [type(value) for value in values]


def test_arrays_stay_what_they_are() -> None:
    values = [np.zeros(2), np.zeros((3, 1))]
    assert all(entry is value for entry, value in zip(stack_column(values), values, strict=True))


def test_strings_in_a_loss_end_in_a_hint() -> None:
    column = stack_column(["ham", "spam"])
    assert column == ["ham", "spam"] and pickle.loads(pickle.dumps(column)) == column
    with pytest.raises(
        TypeError, match=r"cross_entropy\(\) takes tensors, and was given strings, \['ham', 'spam'\]: .*fields="
    ):
        torch.nn.functional.cross_entropy(torch.zeros(2, 2), column)
    with pytest.raises(TypeError, match="add.* takes tensors, and was given strings"):
        torch.add(torch.zeros(2), other=column)
    assert type(stack_column(["ham", None])) is list


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        (["24", "40"], '{"id": int}'),
        (["24", "0.5"], '{"id": float}'),
        (["24", "spam"], '{"label": ["ham", "spam"]}'),
        ([""], '{"label": ["ham", "spam"]}'),
    ],
)
def test_strings_that_are_used_as_a_tensor_say_how_they_become_numbers(values: list[str], hint: str) -> None:
    column = stack_column(values)
    with pytest.raises(TypeError, match=re.escape(f"fields={hint}")):
        torch.add(torch.zeros(len(values)), other=column)
    for name in ("to", "float", "shape"):
        assert not hasattr(column, name)
        with pytest.raises(AttributeError, match=re.escape(f"has no attribute {name!r}: ") + ".*" + re.escape(hint)):
            getattr(column, name)
    for again in (pickle.loads(pickle.dumps(column)), copy.copy(column), copy.deepcopy(column)):
        assert again == column and type(again) is type(column)
