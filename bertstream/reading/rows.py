"""Records of a dataset of rows (mappings), read in place of shards: Hugging Face's datasets, tables, lists of dicts."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import DataLoader

from ..errors import ConfigError, described, kind_of, shortened, table_columns
from ..paths import find, splits
from .arrow import records_of, rows_at_a_time
from .faults import outside_fault
from .options import ReadOptions
from .raw import RawColumns, RawRecord, RecordError
from .shards import Piece
from .tables import TableRows, is_table
from .token_ids import BESIDE_IDS

T = TypeVar("T")

_BATCH_ROWS = 256

_ROWS_IN_DIGEST = 32


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
            f"shards is {kind_of(source)} of 0 rows with the columns {shortened(table_columns(rows))}: there "
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
    kind = kind_of(source)
    if isinstance(source, Mapping):
        names = list(source)
        way_out = f"pass one of its splits, as in data[{names[0]!r}]" if names else "pass a list of dicts, one a record"
        if names and all(isinstance(column, (list, tuple, np.ndarray)) for column in source.values()):
            way_out = "pass a list of dicts, one a record, as in [dict(zip(data, row)) for row in zip(*data.values())]"
        raise ConfigError(f"shards is {kind} with the keys {shortened(names)}: {way_out}")
    if isinstance(source, Set):
        raise ConfigError(f"shards is {kind}, which has no order: pass a list")
    if any(base.__module__.partition(".")[0] == "pyarrow" for base in type(source).__mro__):
        for method in ("read_all", "to_table"):  # of a RecordBatchReader; of a Dataset or Scanner
            if hasattr(source, method):
                raise ConfigError(f"shards is {kind}, which has no positions to share out: pass its {method}()")
    if type(source).__name__ == "LazyFrame":
        raise ConfigError("shards is a LazyFrame, which has no rows yet: pass what its collect() returns")
    if isinstance(source, DataLoader) or (hasattr(source, "__getitem__") and not hasattr(source, "__len__")):
        raise ConfigError(
            f"shards is {kind}, which has no positions to share out: use bertstream.wrap with a DataLoader"
        )


def name_of_rows(rows: Any) -> str:
    """What messages and states call a dataset of rows: its class, or that of its table."""
    return rows.name if isinstance(rows, TableRows) else type(rows).__name__


def digest_of_rows(sources: Sequence[Any], texts: Sequence[str]) -> dict[str, str]:
    """A digest of the texts of some rows, which a state holds to notice other rows or another order.

    Args:
        sources: the dataset of rows of each source, or None for shards.
        texts: the fields that hold the text.
    Returns:
        The digest as the setting "rows"; nothing where no source has rows that stay what they are.
    """
    found = [None if rows is None else _texts_of_some(rows, texts) for rows in sources]
    if all(source is None for source in found):
        return {}
    return {"rows": hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]}


def _texts_of_some(rows: Any, texts: Sequence[str]) -> list[Any] | None:
    """The texts of up to 32 rows, the first, the last and evenly spaced ones between, as JSON takes them.

    None where a row may be another each time it is asked for, because code of the user's makes it, or where one cannot
    be read, which reading reports.
    """
    of_hugging_face = hasattr(rows, "select_columns") and hasattr(rows, "__len__")
    if of_hugging_face:
        form = getattr(rows, "format", None)
        if form is None or form["type"] is not None:
            return None
    elif not isinstance(rows, TableRows) and type(rows) not in (list, tuple):
        return None
    count = min(_ROWS_IN_DIGEST, len(rows))
    positions = [(len(rows) - 1) * i // max(1, count - 1) for i in range(count)]
    try:
        if of_hugging_face:
            names = [head for name in texts for head, _ in splits(name) if head in rows.column_names]
            # A function of the user's makes the text: of what it is made, all that needs no decoding.
            names = names or [name for name in rows.column_names if _is_stored_as_it_is(rows.features[name])]
            columns = rows.with_format(None).select_columns(names)[positions]
            some: list[Any] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        else:
            some = rows.some(positions) if isinstance(rows, TableRows) else [rows[position] for position in positions]
        return [_texts_of(row, texts) for row in some]
    except Exception:  # a dataset may raise anything
        return None


def _texts_of(row: Any, texts: Sequence[str]) -> Any:
    """A row's texts, or where it has none, because a function of the user's makes them, all of it."""
    if type(row) is not dict:  # it may have code of its own
        return None
    try:
        return [_as_json(find(row, name)) for name in texts]
    except KeyError:
        return _as_json(row)


def _as_json(value: Any) -> Any:
    """The value with None for all that may look different in another process."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {str(name): _as_json(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(part) for part in value]
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value if isinstance(value, (str, int, float)) else None


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


def read_rows(rows: Any, piece: Piece, options: ReadOptions) -> Iterator[RawRecord | RawColumns]:
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
            for found in _until_error(_several(rows, range(position, stop), options)):
                yield found
                position += found.records
            if position < stop:  # alone, the row gives its fault or, where another of the same read is at fault, itself
                yield RawRecord(read_row, position)
                position += 1
    else:
        number, count = (int(word) for word in piece.path.split()[-3::2])  # "<name> shard <number> of <count>"
        shard, given = rows.shard(num_shards=count, index=number), 0
        if hasattr(shard, "set_epoch"):
            shard.set_epoch(options.epoch)
        try:
            for found in _streamed(shard, _BATCH_ROWS):
                yield found
                given += found.records
        except Exception as error:  # a dataset may raise anything
            if outside_fault(error):
                raise
            # The rows that were read together with the one at fault are lost: read them again, one at a time.
            yield from itertools.islice(_streamed(shard, 1), given, None)


def _several(rows: Any, positions: range, options: ReadOptions) -> Iterator[RawRecord | RawColumns]:
    """The rows at these positions, where the dataset gives many at a time; else none."""
    if isinstance(rows, TableRows):
        for run in rows.runs(positions):
            if isinstance(run, dict):
                yield _columns(run)
            else:
                yield from records_of(run, options)
    elif hasattr(rows, "select"):  # of Hugging Face
        names = _stored_as_they_are(rows, options)
        if names is None:
            yield from (RawRecord(_copied, row) for row in rows.select(positions))
        else:
            in_arrow = rows.select(positions).select_columns(names).with_format("arrow")
            for table in in_arrow.iter(min(_BATCH_ROWS, rows_at_a_time(in_arrow.data))):
                for batch in table.combine_chunks().to_batches():
                    yield from records_of(batch, options)


def _stored_as_they_are(rows: Any, options: ReadOptions) -> list[str] | None:
    """The columns to read of a dataset of Hugging Face, if what Arrow holds of them is what a row of it holds.

    None where it decodes files, runs a function of the user's, or lacks a column: its rows are asked for then.
    """
    form = getattr(rows, "format", None)
    if form is None or form["type"] is not None:
        return None
    names = rows.column_names if form["output_all_columns"] else form["columns"]
    if any(name not in names for name in options.stored):
        return None
    if options.wanted is not None:
        names = [name for name in names if name in options.wanted or name in BESIDE_IDS]
    return names if all(_is_stored_as_it_is(rows.features[name]) for name in names) else None


def _is_stored_as_it_is(feature: Any) -> bool:
    kind = type(feature).__name__
    if kind in ("Sequence", "List", "LargeList"):
        return _is_stored_as_it_is(feature.feature)
    if isinstance(feature, Mapping):
        return all(map(_is_stored_as_it_is, feature.values()))
    return kind in ("Value", "ClassLabel")


def _streamed(shard: Any, at_a_time: int) -> Iterator[RawColumns]:
    """The rows of an `IterableDataset`."""
    # By batches: its iterator of single rows would split them among DataLoader workers once more.
    for batch in shard.iter(at_a_time):
        yield _columns(batch)


def _columns(columns: Mapping[str, Any]) -> RawColumns:
    plain = {name: _plain_column(column) for name, column in columns.items()}
    return RawColumns(plain, len(next(iter(plain.values()), ())))


def _plain_column(column: Any) -> list[Any]:
    column = column if isinstance(column, list) else list(column)
    has_arrays = any(hasattr(kind, "shape") for kind in set(map(type, column)))
    return [_plain_value(value) for value in column] if has_arrays else column


def _until_error(items: Iterator[T]) -> Iterator[T]:
    try:
        yield from items
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
        return {name: _plain_value(value) for name, value in row.items()}
    except Exception as error:  # of values that are decoded here
        raise RecordError(f"the row raised {described(error)}") from error


def _plain_value(value: Any) -> Any:
    """Where a table, or a function of the dataset, made an array of a single number or of strings, these."""
    if getattr(value, "shape", None) == ():
        return value.item()
    return value.tolist() if isinstance(value, np.ndarray) and value.dtype.kind in "OUT" else value
