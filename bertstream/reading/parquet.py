"""Records of a Parquet file: rows of plain Python values, read one row group at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, BinaryIO

from ..errors import ShardError, described, shortened
from ..paths import splits
from .arrow import records_of
from .faults import Version, outside_fault
from .options import ReadOptions
from .raw import RawColumns, RawRecord, RecordError, broken
from .shards import Piece
from .token_ids import BESIDE_IDS, check_tokenizer, holds_ids

# Rows converted to Python values at a time: enough to cost little per row, few enough to hold few long texts.
_BATCH_ROWS = 256


def read_parquet(stream: BinaryIO, piece: Piece, options: ReadOptions) -> Iterator[RawRecord | RawColumns]:
    """The rows from the row group of the piece's first row on; only the wanted columns are read.

    Where a row group breaks, its other rows come as one broken item, and reading continues with the next group.

    Raises:
        ShardError: a required column is missing, or a wanted name is that of several columns.
    """
    file = _opened(stream, piece)
    wanted = None if options.wanted is None else [name for name in file.columns if name in options.wanted]
    for name in options.stored:
        if not any(head in file.columns for head, _ in splits(name)):
            message = f"{piece.path}, field {name!r}: the file has no such column; it has {shortened(file.columns)}"
            raise ShardError(message, path=piece.path, field=name)
    for name in wanted or file.columns:
        if file.columns.count(name) > 1:
            message = f"{piece.path}, field {name!r}: several columns have this name: {shortened(file.columns)}"
            raise ShardError(message, path=piece.path, field=name)
    if file.holds_ids(options.text):
        check_tokenizer(file.metadata, options.tokenizer, piece.path)
        if wanted is not None:
            wanted += [name for name in BESIDE_IDS if name in file.columns and name not in wanted]
    group = bisect_right(file.first_rows, piece.start, hi=len(file.sizes)) - 1 if file.sizes else 0
    if group:
        yield RawRecord(dict, (), records=file.first_rows[group])
    for number in range(group, len(file.sizes)):
        left = file.first_rows[number + 1] - file.first_rows[number]
        try:
            for batch in file.batches(number, wanted):
                for records in records_of(batch, options):
                    yield records
                    left -= records.records
            if left:
                raise EOFError(f"it ends {left} rows before its footer says")
        except Exception as error:  # pyarrow may raise anything
            if not left or outside_fault(error):
                raise
            refusal = RecordError(f"row group {number} cannot be read: {described(error)}")
            refusal.__cause__ = error
            yield RawRecord(broken, refusal, records=left)


def _opened(stream: BinaryIO, piece: Piece) -> ParquetReader:
    """The file; its footer is read once for all pieces that were cut from this version of it."""
    if piece.version is None:
        return ParquetReader(stream)
    key = piece.path, piece.version
    footer = _FOOTERS.pop(key, None)
    file = ParquetReader(stream, footer)
    _FOOTERS[key] = file.footer
    if len(_FOOTERS) > _MOST_FOOTERS:
        del _FOOTERS[next(iter(_FOOTERS))]
    return file


_FOOTERS: dict[tuple[str, Version], Any] = {}
"""Of the files that were opened last."""

_MOST_FOOTERS = 64
"""A shuffled stream has as many pieces open; a footer takes some 100 KB."""


class ParquetReader:
    """The rows and row groups of a Parquet file.

    Args:
        stream: the file, seekable.
        footer: of the same file, where it is known.
    Attributes:
        footer: as pyarrow has it.
        columns: the columns' names, in order; a file may use one twice.
        metadata: of its schema.
        first_rows: the index of the first row of each row group that has rows, and then the number of all rows.
        sizes: uncompressed bytes of those row groups.
    Raises:
        OSError or ValueError: the file is broken, or not Parquet; pyarrow's errors are both.
    """

    def __init__(self, stream: BinaryIO, footer: Any = None) -> None:
        import pyarrow.parquet

        # No threads of pyarrow: they would read the stream concurrently, and take cores from other workers.
        self._file = pyarrow.parquet.ParquetFile(stream, metadata=footer, pre_buffer=False)
        self.footer = self._file.metadata
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

    def batches(self, number: int, columns: list[str] | None) -> Iterator[Any]:
        """The rows of one row group, as record batches of Arrow.

        Args:
            number: of the row group, counted as in `first_rows`.
            columns: the columns to read; None for all.
        """
        group = [self._groups[number]]
        return iter(self._file.iter_batches(_BATCH_ROWS, row_groups=group, columns=columns, use_threads=False))
