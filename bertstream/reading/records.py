"""Shards to records.

    ending                 a record                                                 its key
    .tar .tgz              consecutive members that share a name up to its first    the members' common name
                           dot; a field is named by the rest of the member's name
    .jsonl .ndjson         a line: one JSON object; blank lines are no records      <file name>:<index>
    .csv .tsv              a row under a header row; blank lines are no records     <file name>:<index>
    .txt                   a line, blank ones too; its only field is "text"         <file name>:<index>
    .parquet               a row                                                    <file name>:<index>

`.gz` or `.zst` may follow any ending but .tgz and .parquet, which are compressed already. tar.py says how the members
of a tar are decoded. Of a Parquet file only the wanted columns are read, one row group at a time.

`pipe:command` is a shard that a shell command writes to its standard output. The ending of the command's last word
names the format, also in a comment: `pipe:zcat a.gz # .tar`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import BinaryIO, TypeAlias

from ..errors import ConfigError, ShardError, check_at_least, described
from ..tokens import Record
from .access import is_local
from .delimited import DELIMITERS, read_csv
from .files import open_bytes
from .lines import read_jsonl, read_txt
from .options import ReadOptions, take_text_and_fields
from .parquet import read_parquet
from .raw import RawRecord, RecordError
from .rows import read_rows
from .shards import Piece, ShardKind, check_packages, read_errors, shard_kind
from .tar import read_tar

# The piece's `start` is the first wanted record: a reader yields the earlier ones too, or says how many it jumped over.
_Reader: TypeAlias = Callable[[BinaryIO, Piece, ReadOptions], Iterator[RawRecord]]

_READERS: dict[str, _Reader] = {
    "tar": read_tar,
    "jsonl": read_jsonl,
    "ndjson": read_jsonl,
    "csv": partial(read_csv, delimiter=DELIMITERS["csv"]),
    "tsv": partial(read_csv, delimiter=DELIMITERS["tsv"]),
    "txt": read_txt,
    "parquet": read_parquet,
}


def read_records(
    piece: Piece, options: ReadOptions, *, skip: int = 0, on_bad: Callable[[ShardError], None] | None = None
) -> Generator[Record, None, None]:
    """Read the records of a piece in order.

    Holds one record at a time. The file is closed when the generator ends, raises or is closed.

    Args:
        piece: the whole shard, as in `Piece(path)`, or a part of it.
        options: what is read of each record.
        skip: how many records of the piece to skip, broken ones included; they are counted but not parsed.
        on_bad: called with the error of each broken record, which is then skipped; None raises the error.
    Yields:
        Records whose `index` is their index in the shard.
    Raises:
        ConfigError: the ending is unknown, a `pipe:` is not allowed, a package is missing, or `skip` is negative.
        ShardError: the shard is missing, unreadable, cut off or has no records; or, without `on_bad`, a record is
            broken.
    """
    check_at_least("skip", skip, 0)
    kind = shard_kind(piece.path) if options.rows is None else ShardKind("rows", "", piece.path)
    first = piece.start if piece.offset else 0
    wanted = replace(piece, start=piece.start + skip)
    seekable = options.rows is None and is_local(piece.path) and not kind.compression
    index = first
    check_packages(piece.path, kind)
    try:
        with ExitStack() as stack:
            if options.rows is not None:
                raw_records = read_rows(options.rows, wanted)
            else:
                stream = stack.enter_context(open_bytes(piece.path, options.access, kind.compression))
                raw_records = _READERS[kind.format](stream, wanted, options)
            while piece.stop is None or index < piece.stop:  # checked before reading: a record after it may be broken
                raw = next(raw_records, None)
                if raw is None:
                    break
                if index >= wanted.start:
                    try:
                        text, fields = take_text_and_fields(raw.parse(raw.source), options)
                    except RecordError as broken:
                        error = _at_record(broken, piece.path, index)
                        if on_bad is None:
                            raise error from broken.__cause__
                        on_bad(error)
                    else:
                        offset = raw.offset if seekable else 0
                        yield Record(text, fields, raw.key or f"{kind.stem}:{index}", piece.path, index, offset)
                index += raw.records
    except (ShardError, ConfigError):
        raise
    except read_errors(piece.path, kind) as failure:
        message = f"{piece.path}: cannot be read from record {index} on: {described(failure)}"
        raise ShardError(message, path=piece.path, index=index) from failure
    if piece.stop is not None and index < piece.stop:
        message = f"{piece.path}: it ends after {index} records, but had {piece.stop} when it was split"
        raise ShardError(message, path=piece.path, index=index)
    if piece.stop is None and index == first:
        message = f"{piece.path}: it holds no record{f' from {first} on' if first else ''}"
        raise ShardError(message, path=piece.path, index=index)


def _at_record(broken: RecordError, path: str, index: int) -> ShardError:
    place = f", field {broken.field!r}" if broken.field is not None else ""
    return ShardError(f"{path}, record {index}{place}: {broken}", path=path, index=index, field=broken.field)
