"""The fields of a batch: columns as torch's default collate makes them, where every record has a number; else lists."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import default_collate

from bertstream.reading.batch_fields import add_fields, fields_of, stack_column
from bertstream.reading.record_columns import RecordColumns
from bertstream.tokens import Record, TokenBatch, TokenizedText

# Batches of records.


def records(fields: list[dict[str, Any]]) -> list[Record]:
    return [Record(f"text {i}", field, f"k{i}", "a.tar", 10 * i) for i, field in enumerate(fields)]


def batch_of(fields: list[dict[str, Any]], keep_text_as: str | None = None) -> TokenBatch:
    batch = TokenBatch.from_texts([TokenizedText(np.full(i + 1, i, np.int32)) for i in range(len(fields))])
    columns = RecordColumns.of(records(fields))
    add_fields(batch, fields_of(columns, keep_text_as=keep_text_as), keep_text_as=keep_text_as)
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
