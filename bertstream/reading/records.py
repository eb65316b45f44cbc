"""Shards to records.

    ending                 a record                                                 its key
    .tar .tgz              consecutive members that share a name up to its first    the members' common name
                           dot; a field is named by the rest of the member's name
    .jsonl .ndjson .json   a line: one JSON object; blank lines are no records      <file name>:<index>
    .csv .tsv              a row; blank lines are no records                        <file name>:<index>
    .txt                   a line, blank ones too; its only field is "text"         <file name>:<index>
    .parquet               a row                                                    <file name>:<index>

`.gz`, `.zst`, `.bz2` or `.xz` may follow any ending but .tgz and its like, and .parquet, which is compressed already.
Without one, a compression is known by the first bytes. tar.py says how the members of a tar are decoded. Of a Parquet
file only the wanted columns are read, one row group at a time.

`pipe:command` is a shard that a shell command writes to its standard output. The ending of the command's last word
names the format, also in a comment: `pipe:zcat a.gz # .tar`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from typing import BinaryIO, TypeAlias

import numpy as np

from ..errors import ConfigError, ShardError, check_at_least, described
from ..tokens import Indices, Record, TokenizedText
from .access import is_local
from .delimited import DELIMITERS, read_csv
from .faults import outside_fault
from .files import is_file, open_bytes
from .lines import read_json, read_jsonl, read_txt
from .options import ReadOptions, take_columns, take_text_and_fields
from .parquet import read_parquet
from .raw import RawColumns, RawRecord, RecordError
from .record_columns import RecordColumns
from .rows import read_rows, split_rows
from .shards import Piece, ShardKind, check_packages, read_errors, shard_kind
from .tar import read_tar

# The piece's `start` is the first wanted record: a reader yields the earlier ones too, or says how many it jumped over.
_Reader: TypeAlias = Callable[[BinaryIO, Piece, ReadOptions], Iterator[RawRecord] | Iterator[RawRecord | RawColumns]]

_READERS: dict[str, _Reader] = {
    "tar": read_tar,
    "jsonl": read_jsonl,
    "ndjson": read_jsonl,
    "json": read_json,
    "csv": partial(read_csv, delimiter=DELIMITERS["csv"]),
    "tsv": partial(read_csv, delimiter=DELIMITERS["tsv"]),
    "txt": read_txt,
    "parquet": read_parquet,
}


def read_records(
    piece: Piece,
    options: ReadOptions,
    *,
    skip: int = 0,
    on_bad: Callable[[ShardError], bool | None] | None = None,
    on_drop: Callable[[], None] | None = None,
) -> Generator[Record, None, None]:
    """Read the records of a piece in order, one by one; the arguments and errors are those of `read_columns`."""
    with closing(read_columns(piece, options, skip=skip, on_bad=on_bad, on_drop=on_drop)) as found:
        for item in found:
            if isinstance(item, RecordColumns):
                yield from item.records()
            else:
                yield item


def read_columns(
    piece: Piece,
    options: ReadOptions,
    *,
    skip: int = 0,
    on_bad: Callable[[ShardError], bool | None] | None = None,
    on_drop: Callable[[], None] | None = None,
) -> Generator[Record | RecordColumns, None, None]:
    """Read the records of a piece in order, as many at a time as its shard stores as columns.

    Holds as few records as that. The file is closed when the generator ends, raises or is closed.

    Args:
        piece: the whole shard, as in `Piece(path)`, or a part of it; records of other shares are not parsed.
        options: what is read of each record.
        skip: how many records of the piece to skip, broken ones included; they are counted but not parsed.
        on_bad: called with the error of each broken record, or of several at once such as a row group, which are then
            skipped, or, if it returns True, end the reading; None raises the error.
        on_drop: called for each record that `options.keep` or `options.map` drops.
    Yields:
        Records whose `index` is their index in the shard, one by one or as columns.
    Raises:
        ConfigError: the ending is unknown, a `pipe:` is not allowed, a package is missing, or `skip` is negative.
        ShardError: the shard is missing, unreadable, cut off or has no records; or, without `on_bad`, a record is
            broken. Its `records` says how many of the piece are lost from there on, if that is known. It is not
            `skippable` if the machine or network failed, or the shard changed while it was read.
    """
    check_at_least("skip", skip, 0)
    kind = shard_kind(piece.path, options.access) if options.rows is None else ShardKind("rows", "", piece.path)
    first = piece.start if piece.offset else 0
    wanted = replace(piece, start=piece.start + skip)
    seekable = False
    index = first
    check_packages(piece.path, kind)
    try:
        with ExitStack() as stack:
            if options.rows is not None:
                raw_records: Iterator[RawRecord | RawColumns] = read_rows(options.rows, wanted, options)
            else:
                compression = None if kind.format == "parquet" else kind.compression
                opened = open_bytes(piece.path, options.access, compression, piece.version)
                stream = stack.enter_context(opened)
                seekable = is_local(piece.path) and is_file(stream)
                raw_records = _READERS[kind.format](stream, wanted, options)
            apart: Iterator[RawRecord] = iter(())  # of columns, the records that are left
            while piece.stop is None or index < piece.stop:  # checked before reading: a record after it may be broken
                raw = next(apart, None) or next(raw_records, None)
                if raw is None:
                    break
                end = index + raw.records
                if isinstance(raw, RawColumns):
                    if own := wanted.own(index, end):
                        keys, shards, indices = _places(own, kind.stem, piece.path)
                        columns = take_columns(raw.part(own, index), options, (keys, shards, indices))
                        if columns is None:  # one may be broken
                            apart = raw.rows()
                            continue
                        yield RecordColumns(*columns, keys, shards, indices)
                elif end > wanted.start and (piece.shares == 1 or wanted.own(index, end)):
                    key = raw.key or f"{kind.stem}:{index}"
                    try:
                        taken = take_text_and_fields(raw.parse(raw.source), options, (key, piece.path, index))
                    except RecordError as broken:
                        error = _at_records(broken, wanted.path, wanted.own(index, end))
                        if on_bad is None or not error.skippable:
                            raise error from broken.__cause__
                        if on_bad(error):
                            return
                    else:
                        if taken is not None:
                            text, fields = taken
                            offset = raw.offset if seekable else 0
                            yield Record(text, fields, key, piece.path, index, offset)
                        elif on_drop is not None:
                            on_drop()
                index = end
    except ConfigError:
        raise
    except ShardError as error:
        if error.index is None:  # the whole shard's, such as a missing column
            error.records = _left(wanted, index)
        raise
    except Exception as failure:
        fault = outside_fault(failure)
        if fault is None and not isinstance(failure, read_errors(piece.path, kind)):
            raise
        problem = f"cannot be read from record {index} on: {described(fault or failure)}"
        raise _from_record(wanted, index, problem, skippable=fault is None) from failure
    if piece.stop is not None and index < piece.stop:
        raise _from_record(wanted, index, f"it ends after {index} records, but had {piece.stop} when it was split")
    may_be_empty = options.rows is not None  # a filter may leave nothing of a dataset's shard
    if piece.stop is None and index == first and not may_be_empty:
        raise _from_record(wanted, index, f"it holds no record{f' from {first} on' if first else ''}")


def _places(own: range, stem: str, path: str) -> tuple[list[str], list[str], Indices]:
    """The columns of `PLACE` of records with these indices."""
    return [f"{stem}:{index}" for index in own], [path] * len(own), np.array(own, np.int64)


def begins_with_ids(path: str, options: ReadOptions) -> bool:
    """Whether the text of the first good record is token ids; True if there is none, which reading reports.

    Args:
        path: a shard, which counts for nothing where `options` has rows.
        options: how it is read.
    Raises:
        ConfigError: as for `read_records`.
    """
    piece = Piece(path) if options.rows is None else split_rows(options.rows, 1)[0][0]
    with closing(read_records(piece, options, on_bad=lambda error: None)) as records, suppress(ShardError):
        record = next(records, None)
        return record is None or isinstance(record.text, TokenizedText)
    return True


def _from_record(wanted: Piece, index: int, problem: str, *, skippable: bool = True) -> ShardError:
    """The error of a piece that cannot be read from a record on."""
    error = ShardError(f"{wanted.path}: {problem}", path=wanted.path, index=index)
    error.records, error.skippable = _left(wanted, index), skippable
    return error


def _left(wanted: Piece, index: int) -> int | None:
    """How many of a piece's records there are from one on; None if nobody has counted them."""
    return None if wanted.stop is None else len(wanted.own(index, wanted.stop))


def _at_records(broken: RecordError, path: str, lost: range) -> ShardError:
    place = f"record {lost[0]}" if len(lost) == 1 else f"records {lost[0]} to {lost[-1]}"
    if broken.field is not None:
        place += f", field {broken.field!r}"
    fault = outside_fault(broken)
    reason = str(broken) if fault is None else described(fault)
    error = ShardError(f"{path}, {place}: {reason}", path=path, index=lost[0], field=broken.field)
    error.records, error.skippable = len(lost), fault is None
    return error
