"""Records of a Parquet file: rows of plain Python values, read one row group at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from ..errors import ShardError, described, shortened
from ..paths import splits
from ..tokens import TokenBatch
from .faults import outside_fault
from .options import ReadOptions
from .raw import RawColumns, RawRecord, RecordError, broken
from .shards import Piece
from .token_ids import BESIDE_IDS, check_tokenizer, columns_of_ids, holds_ids

# Rows converted to Python values at a time: enough to cost little per row, few enough to hold few long texts.
_BATCH_ROWS = 256


def read_parquet(stream: BinaryIO, piece: Piece, options: ReadOptions) -> Iterator[RawRecord | RawColumns]:
    """The rows from the row group of the piece's first row on; only the wanted columns are read.

    Where a row group breaks, its other rows come as one broken item, and reading continues with the next group.

    Raises:
        ShardError: a required column is missing, or a wanted name is that of several columns.
    """
    file = ParquetReader(stream)
    wanted = None if options.wanted is None else [name for name in file.columns if name in options.wanted]
    for name in options.stored:
        if not any(head in file.columns for head, _ in splits(name)):
            message = f"{piece.path}, field {name!r}: the file has no such column; it has {shortened(file.columns)}"
            raise ShardError(message, path=piece.path, field=name)
    for name in wanted or file.columns:
        if file.columns.count(name) > 1:
            message = f"{piece.path}, field {name!r}: several columns have this name: {shortened(file.columns)}"
            raise ShardError(message, path=piece.path, field=name)
    as_columns = _as_columns
    if file.holds_ids(options.text):
        check_tokenizer(file.metadata, options.tokenizer, piece.path)
    if file.holds_ids(options.text) and options.keep is None and options.map is None:  # which get plain lists
        as_columns = partial(columns_of_ids, field=options.text, kept=options.required)
        if wanted is not None:
            wanted += [name for name in BESIDE_IDS if name in file.columns and name not in wanted]
    group = bisect_right(file.first_rows, piece.start, hi=len(file.sizes)) - 1 if file.sizes else 0
    if group:
        yield RawRecord(dict, (), records=file.first_rows[group])
    for number in range(group, len(file.sizes)):
        left = file.first_rows[number + 1] - file.first_rows[number]
        try:
            for rows in file.rows(number, wanted, as_columns):
                yield rows
                left -= rows.records
            if left:
                raise EOFError(f"it ends {left} rows before its footer says")
        except Exception as error:  # pyarrow may raise anything
            if not left or outside_fault(error):
                raise
            refusal = RecordError(f"row group {number} cannot be read: {described(error)}")
            refusal.__cause__ = error
            yield RawRecord(broken, refusal, records=left)


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


_AsColumns: TypeAlias = Callable[[Any], dict[str, Any]]


def _as_columns(batch: Any) -> dict[str, Any]:
    return dict(zip(batch.schema.names, batch.columns, strict=True))


class ParquetReader:
    """The rows and row groups of a Parquet file.

    Args:
        stream: the file, seekable.
    Attributes:
        columns: the columns' names, in order; a file may use one twice.
        metadata: of its schema.
        first_rows: the index of the first row of each row group that has rows, and then the number of all rows.
        sizes: uncompressed bytes of those row groups.
    Raises:
        OSError or ValueError: the file is broken, or not Parquet; pyarrow's errors are both.
    """

    def __init__(self, stream: BinaryIO) -> None:
        import pyarrow.parquet

        # No threads of pyarrow: they would read the stream concurrently, and take cores from other workers.
        self._file = pyarrow.parquet.ParquetFile(stream, pre_buffer=False)
        self.columns: list[str] = self._file.schema_arrow.names
        self.metadata: Mapping[bytes, bytes] = self._file.schema_arrow.metadata or {}
        metadata = self._file.metadata
        self._groups = [group for group in range(metadata.num_row_groups) if metadata.row_group(group).num_rows]
        rows = [metadata.row_group(group).num_rows for group in self._groups]
        self.first_rows: list[int] = list(accumulate(rows, initial=0))
        self.sizes: list[int] = [metadata.row_group(group).total_byte_size for group in self._groups]

    def holds_ids(self, column: str) -> bool:
        """Whether a column's values are lists of integers."""
        return column in self.columns and holds_ids(self._file.schema_arrow.field(column).type)

    def rows(
        self, number: int, columns: list[str] | None, as_columns: _AsColumns = _as_columns
    ) -> Iterator[RawRecord | RawColumns]:
        """The rows of one row group: as columns, or one by one where a column has a value that Python lacks.

        Args:
            number: of the row group, counted as in `first_rows`.
            columns: the columns to read; None for all.
            as_columns: from a record batch to its columns by name.
        """
        group = [self._groups[number]]
        for batch in self._file.iter_batches(_BATCH_ROWS, row_groups=group, columns=columns, use_threads=False):
            arrays = as_columns(batch)
            if (values := _values_of(arrays)) is not None:
                yield RawColumns(values, batch.num_rows)
            else:  # one row's value is at fault; parsing that row raises the reason
                entries = (array.apart() if isinstance(array, TokenBatch) else array for array in arrays.values())
                for row in zip(*entries, strict=True):
                    yield RawRecord(_parse_row, dict(zip(arrays, row, strict=True)))


def _values_of(arrays: Mapping[str, Any]) -> dict[str, Any] | None:
    """The values of each column; None if Python has no value for an entry."""
    try:
        return {name: _values(array) for name, array in arrays.items()}
    except Exception:  # pyarrow may raise anything
        return None


def _values(array: Any) -> Any:
    """Numbers in an array of int64, float64 or bool where none is missing, else Python's values in a list."""
    if isinstance(array, (list, TokenBatch)):
        return array
    from pyarrow import types

    kind = array.type
    if not array.null_count:
        if types.is_boolean(kind):
            return array.to_numpy(zero_copy_only=False)
        if types.is_integer(kind) and kind != "uint64":  # whose numbers may exceed 64 bits with a sign
            return array.to_numpy().astype(np.int64)
        if types.is_float32(kind) or types.is_float64(kind):
            return array.to_numpy().astype(np.float64)
    return array.to_pylist()
