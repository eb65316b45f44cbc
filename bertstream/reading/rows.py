"""Records of a dataset of rows (mappings), read in place of shards: Hugging Face's datasets, and lists of dicts."""

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
from .raw import RawRecord, RecordError, excerpt
from .shards import Piece

_BATCH_ROWS = 256


def is_rows(source: Any) -> bool:
    """Whether this is a dataset of rows rather than names of shards.

    True for Hugging Face's `Dataset` and `IterableDataset`, and for lists and map-style datasets of dicts.

    Raises:
        ConfigError: it is neither: a mapping (a `DatasetDict`), a table, a set, a DataLoader, or has no length.
    """
    if isinstance(source, (str, os.PathLike)):
        return False
    if hasattr(source, "num_shards") and hasattr(source, "shard"):  # of Hugging Face
        return True
    _check_source(source)
    # Not `source[0]`: of a pandas Series that is the row with the label 0.
    if hasattr(source, "__getitem__") and len(source) > 0 and isinstance(next(iter(source)), Mapping):
        return True
    columns = table_columns(source)
    if columns is not None:
        raise ConfigError(
            f"shards is a {type(source).__name__} of {len(source)} rows with the columns {shortened(columns)}: pass "
            "its rows as a list of dicts, such as df.to_dict('records'), or a Hugging Face Dataset with rows, such as "
            "datasets.Dataset.from_pandas(df)"
        )
    return False


def _check_source(source: Any) -> None:
    kind = type(source).__name__
    if isinstance(source, Mapping):
        names = list(source)
        example = f", such as the one under {names[0]!r}" if names else ""
        raise ConfigError(
            f"shards is a {kind} with the keys {shortened(names)}: pass one of its splits{example}; or a list of "
            "dicts, one a record"
        )
    if isinstance(source, Set):
        raise ConfigError(f"shards is a {kind}, which has no order: pass a list")
    if isinstance(source, DataLoader) or (hasattr(source, "__getitem__") and not hasattr(source, "__len__")):
        raise ConfigError(
            f"shards is a {kind}, which has no positions to share out: use bertstream.wrap with a DataLoader"
        )


def split_rows(rows: Any, parts: int) -> list[tuple[Piece, int]]:
    """Cut a dataset of rows into pieces.

    Args:
        rows: the dataset. One with a length is cut into runs of rows. An `IterableDataset` is cut into its shards, and
            each of them is read from its first row on.
        parts: how many pieces a dataset with a length is cut into, at most one per row.
    Returns:
        The pieces in order, each with its number of rows; 1 for each shard of an `IterableDataset`.
    """
    name = type(rows).__name__
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
                # Hugging Face's own iterator reads many rows at a time.
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
        raise RecordError(f"a row is a mapping from field to value, not {excerpt(row)}")
    try:
        return _plain(row.items())
    except Exception as error:  # of values that are decoded here
        raise RecordError(f"the row raised {described(error)}") from error


def _plain(row: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A row; where a format of the dataset made arrays or tensors of single numbers, they are numbers again."""
    return {name: value.item() if getattr(value, "shape", None) == () else value for name, value in row}
