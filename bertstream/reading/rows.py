"""Records of a dataset of rows (mappings), read in place of shards: Hugging Face's datasets, tables, lists of dicts."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from ..errors import ConfigError, described, shortened, table_columns
from .faults import outside_fault
from .raw import RawRecord, RecordError
from .shards import Piece
from .tables import TableRows, is_table

_BATCH_ROWS = 256


def find_rows(source: Any) -> Any | None:
    """A dataset of rows as `read_rows` takes it, or None if this is names of shards.

    Rows are Hugging Face's `Dataset` and `IterableDataset`, tables of pandas, polars and Arrow, and lists and map-style
    datasets of dicts.

    Raises:
        ConfigError: it is neither: a mapping (a `DatasetDict`), a set, a DataLoader, has no length, or has no row.
    """
    if isinstance(source, (str, os.PathLike)):
        return None
    if is_table(source):
        rows: Any = TableRows(source)
    elif hasattr(source, "shard") and hasattr(source, "with_format"):  # of Hugging Face
        rows = _without_format(source)
        if not hasattr(rows, "__len__"):
            return rows
    else:
        _check_source(source)
        # Not `source[0]`: of a pandas Series that is the row with the label 0.
        is_rows = hasattr(source, "__getitem__") and len(source) > 0 and isinstance(next(iter(source)), Mapping)
        return source if is_rows else None
    if not len(rows):
        raise ConfigError(
            f"shards is a {type(source).__name__} of 0 rows with the columns {shortened(table_columns(rows))}: there "
            "is nothing to read; did a filter drop every row?"
        )
    return rows


def _without_format(dataset: Any) -> Any:
    """A dataset of Hugging Face that gives Python's values, whatever its format; a transform of the user's stays.

    Arrays, tensors and tables of single rows would become other columns than the values do, or none.
    """
    form = getattr(dataset, "format", None)  # a streaming dataset has none to ask for
    if form is None:
        return dataset.with_format(None)
    if form["type"] in (None, "custom"):
        return dataset
    return dataset.with_format(None, columns=form["columns"], output_all_columns=form["output_all_columns"])


def _check_source(source: Any) -> None:
    kind = type(source).__name__
    if isinstance(source, Mapping):
        names = list(source)
        way_out = f"pass one of its splits, as in data[{names[0]!r}]" if names else "pass a list of dicts, one a record"
        if names and all(isinstance(column, (list, tuple, np.ndarray)) for column in source.values()):
            way_out = "pass a list of dicts, one a record, as in [dict(zip(data, row)) for row in zip(*data.values())]"
        raise ConfigError(f"shards is a {kind} with the keys {shortened(names)}: {way_out}")
    if isinstance(source, Set):
        raise ConfigError(f"shards is a {kind}, which has no order: pass a list")
    if kind == "LazyFrame":
        raise ConfigError("shards is a LazyFrame, which has no rows yet: pass what its collect() returns")
    if isinstance(source, DataLoader) or (hasattr(source, "__getitem__") and not hasattr(source, "__len__")):
        raise ConfigError(
            f"shards is a {kind}, which has no positions to share out: use bertstream.wrap with a DataLoader"
        )


def name_of_rows(rows: Any) -> str:
    """What messages and states call a dataset of rows: its class, or that of its table."""
    return rows.name if isinstance(rows, TableRows) else type(rows).__name__


def split_rows(rows: Any, parts: int) -> list[tuple[Piece, int]]:
    """Cut a dataset of rows into pieces.

    Args:
        rows: the dataset. One with a length is cut into runs of rows. An `IterableDataset` is cut into its shards, and
            each of them is read from its first row on.
        parts: how many pieces a dataset with a length is cut into, at most one per row.
    Returns:
        The pieces in order, each with its number of rows; 1 for each shard of an `IterableDataset`.
    """
    name = name_of_rows(rows)
    if not hasattr(rows, "__len__"):
        return [(Piece(f"{name} shard {number} of {rows.num_shards}"), 1) for number in range(rows.num_shards)]
    bounds = np.linspace(0, len(rows), min(parts, len(rows)) + 1).astype(int).tolist()
    return [(Piece(name, start, stop), stop - start) for start, stop in itertools.pairwise(bounds)]


def read_rows(rows: Any, piece: Piece, epoch: int = 0) -> Iterator[RawRecord]:
    """The rows of a piece that `split_rows` made, in the order that a dataset which shuffles itself has in this epoch.

    A row that raises is a broken record, if the dataset has positions. An `IterableDataset` that raises ends there,
    after the rows before: nothing can continue it.
    """
    if hasattr(rows, "__len__"):
        if piece.start:
            yield RawRecord(dict, (), records=piece.start)
        read_row = partial(_row_at, rows)
        position, stop = piece.start, len(rows) if piece.stop is None else piece.stop
        while position < stop:
            if hasattr(rows, "select"):
                # Of tables, and of Hugging Face: many rows at a time.
                for row in _rows_until_error(rows.select(range(position, stop))):
                    yield RawRecord(_copied, row)
                    position += 1
            if position < stop:  # alone, the row gives its fault or, where another of the same read is at fault, itself
                yield RawRecord(read_row, position)
                position += 1
    else:
        number, count = (int(word) for word in piece.path.split()[-3::2])  # "<name> shard <number> of <count>"
        shard, given = rows.shard(num_shards=count, index=number), 0
        if hasattr(shard, "set_epoch"):
            shard.set_epoch(epoch)
        try:
            for row in _streamed_rows(shard, _BATCH_ROWS):
                yield RawRecord(_plain, row)
                given += 1
        except Exception as error:  # a dataset may raise anything
            if outside_fault(error):
                raise
            # The rows that were read together with the one at fault are lost: read them again, one at a time.
            for row in itertools.islice(_streamed_rows(shard, 1), given, None):
                yield RawRecord(_plain, row)


def _streamed_rows(shard: Any, at_a_time: int) -> Iterator[Iterator[tuple[str, Any]]]:
    """The rows of an `IterableDataset`, each as pairs of field and value."""
    # By batches: its iterator of single rows would split them among DataLoader workers once more.
    for batch in shard.iter(at_a_time):
        for row in zip(*batch.values(), strict=True):
            yield zip(batch, row, strict=True)


def _rows_until_error(rows: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from rows
    except Exception as error:  # a dataset may raise anything
        if outside_fault(error):
            raise


def _row_at(rows: Any, position: int) -> dict[str, Any]:
    try:
        row = rows[position]
    except Exception as error:  # a dataset may raise anything
        raise RecordError(f"the dataset raised {described(error)}") from error
    return _copied(row)


def _copied(row: Any) -> dict[str, Any]:
    """A copy, because the row may be the user's own object."""
    if not isinstance(row, Mapping):
        raise RecordError(f"a row is a mapping from field to value, not {shortened(row)}")
    try:
        return _plain(row.items())
    except Exception as error:  # of values that are decoded here
        raise RecordError(f"the row raised {described(error)}") from error


def _plain(row: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A row; where a table, or a function of the dataset, made arrays of single numbers or of strings, these."""
    return {name: _plain_value(value) for name, value in row}


def _plain_value(value: Any) -> Any:
    if getattr(value, "shape", None) == ():
        return value.item()
    return value.tolist() if isinstance(value, np.ndarray) and value.dtype.kind in "OUT" else value
