"""A Parquet file as rows of plain Python values, a row group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, BinaryIO

# Rows that are turned into Python values at once: enough to cost little a row, few enough to hold few long texts.
_BATCH_ROWS = 256


class ParquetReader:
    """What is in a Parquet file.

    Args:
        stream: the file, which must be one that can be sought.
    Attributes:
        columns: their names, in order; a file may name one twice.
        first_rows: for each row group that has rows, the index of its first row, and then the number of all rows.
        sizes: uncompressed bytes of those row groups.
    Raises:
        OSError or ValueError: it is no Parquet file, or a broken one; pyarrow's errors are both.
    """

    def __init__(self, stream: BinaryIO) -> None:
        import pyarrow.parquet

        # Without its threads, which would read the stream from elsewhere and share the cores with other workers.
        self._file = pyarrow.parquet.ParquetFile(stream, pre_buffer=False)
        self.columns: list[str] = self._file.schema_arrow.names
        metadata = self._file.metadata
        self._groups = [group for group in range(metadata.num_row_groups) if metadata.row_group(group).num_rows]
        rows = [metadata.row_group(group).num_rows for group in self._groups]
        self.first_rows: list[int] = list(accumulate(rows, initial=0))
        self.sizes: list[int] = [metadata.row_group(group).total_byte_size for group in self._groups]

    def rows(self, first: int, columns: list[str] | None) -> Iterator[dict[str, Any]]:
        """The rows of all row groups from one on, a value a column.

        A value that Python has no type for comes as pyarrow's scalar; `plain` raises the reason.

        Args:
            first: number of the row group, counted as in `first_rows`.
            columns: those that are wanted; None for all.
        """
        for group in self._groups[first:]:
            batches = self._file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False)
            for batch in batches:
                names = batch.schema.names
                values = [_values(column) for column in batch.columns]
                yield from (dict(zip(names, row, strict=True)) for row in zip(*values, strict=True))


def plain(value: Any) -> Any:
    """The value as Python's own.

    Raises:
        ValueError, OverflowError or another error of pyarrow's choice: there is none.
    """
    return value.as_py() if hasattr(value, "as_py") else value


def _values(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except Exception:  # one row's value is at fault: that row says so when it is its turn
        return list(column)
