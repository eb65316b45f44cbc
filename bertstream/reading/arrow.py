"""Record batches of Arrow, as Parquet, tables and Hugging Face's datasets hold them, as columns of Python's values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from ..errors import described
from ..tokens import TokenBatch
from .options import ReadOptions
from .raw import RawColumns, RawRecord, RecordError, values_of
from .token_ids import columns_of_ids, holds_ids

# Of the columns made at a time, of which every open piece holds its own: more cost little less for each row.
_BYTES = 1 << 20


def records_of(batch: Any, options: ReadOptions) -> Iterator[RawColumns | RawRecord]:
    """The rows of a record batch: as columns, some at a time, or one by one where Python has no value for an entry.

    Args:
        batch: a `pyarrow.RecordBatch`.
        options: say which column holds the text: where that is ids, they become one batch.
    """
    rows = rows_at_a_time(batch)
    for start in range(0, batch.num_rows, rows):
        yield from _records_of(batch.slice(start, rows), options)


def rows_at_a_time(table: Any) -> int:
    """How many rows of a table or record batch become columns at a time, by their mean size."""
    fitting = _BYTES * int(table.num_rows) // max(1, int(table.nbytes))
    return max(4, fitting)  # some arrays count bytes of other rows too


def _records_of(batch: Any, options: ReadOptions) -> Iterator[RawColumns | RawRecord]:
    arrays = dict(zip(batch.schema.names, batch.columns, strict=True))
    text = arrays.get(options.text)
    # Functions of a record get plain lists.
    if text is not None and holds_ids(text.type) and options.keep is None and options.map is None:
        arrays = columns_of_ids(batch, options.text, options.required)
    columns = None
    with suppress(Exception):  # pyarrow may raise anything
        columns = {name: _column(array) for name, array in arrays.items()}
    if columns is not None:
        yield RawColumns(columns, batch.num_rows)
        return
    # Python has no value for an entry of one row; parsing that row raises the reason.
    entries = (values_of(array) if isinstance(array, TokenBatch) else array for array in arrays.values())
    for row in zip(*entries, strict=True):
        yield RawRecord(_parse_row, dict(zip(arrays, row, strict=True)))


def _column(array: Any) -> Any:
    """Numbers in an array of int64, float64 or bool where none is missing, else Python's values in a list."""
    if isinstance(array, (list, TokenBatch)):
        return array
    from pyarrow import types

    kind = array.type
    if not array.null_count:
        if types.is_boolean(kind):
            return array.to_numpy(zero_copy_only=False)
        if types.is_integer(kind) and kind != "uint64":  # whose numbers may be beyond those of int64
            return array.to_numpy().astype(np.int64)
        if types.is_float32(kind) or types.is_float64(kind):
            return array.to_numpy().astype(np.float64)
    return array.to_pylist()


def _parse_row(row: dict[str, Any]) -> dict[str, Any]:
    for name, value in row.items():
        try:
            row[name] = _plain(value)
        except Exception as error:  # pyarrow may raise anything
            raise RecordError(f"Python has no value for it: {described(error)}", name) from error
    return row


def _plain(value: Any) -> Any:
    """The value as Python's own type; pyarrow raises if there is none."""
    return value.as_py() if hasattr(value, "as_py") else value
