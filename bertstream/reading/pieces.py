"""Shards are cut into pieces of about equal size, so that several readers can share one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, ShardError, check_at_least, described
from .access import BUFFER_BYTES, DEFAULT_ACCESS, Access, is_local, is_pipe
from .files import on_disk, open_bytes
from .parquet import ParquetReader
from .records import BOM, DELIMITERS, READERS, ReadOptions, csv_rows
from .shards import READ_ERRORS, Piece, check_packages, read_errors, shard_kind
from .tar import TarReader

_BLOCK_BYTES = 1 << 20


def split_shard(path: str, parts: int, access: Access = DEFAULT_ACCESS) -> list[Piece]:
    """Cut a shard into pieces of about equal bytes, for several readers.

    Parquet is cut between row groups, wherever it is. Of the others only files that are not packed and are on disk are
    cut; with `access.shard_cache` a remote one is downloaded for it. The file is read up to its last cut, a tar only
    its headers. A csv is cut up to its first quote that RFC 4180 would not allow, since from there on only a full parse
    finds the rows.

    Args:
        path: a path, URL or `pipe:` command.
        parts: how many pieces are wanted, at least 1.
        access: how it is opened.
    Returns:
        At most `parts` pieces, none empty, in order; together they are the whole shard.
    Raises:
        ConfigError: `parts` is below 1, the shard's ending is not known, or it needs a package that is not installed.
        ShardError: the shard cannot be read.
    """
    check_at_least("parts", parts, 1)
    kind = shard_kind(path)
    cuts = [(0, 0)]  # (index, offset) of each piece's first record
    if parts > 1 and not kind.packing and not is_pipe(path):
        check_packages(path, kind)
        try:
            if kind.name == "parquet":
                with open_bytes(path, access) as stream:
                    cuts.extend(_group_cuts(ParquetReader(stream), parts))
            elif (file := on_disk(path, access)) is not None:
                with open(file, "rb", buffering=BUFFER_BYTES) as stream:
                    size = os.fstat(stream.fileno()).st_size
                    cuts.extend(_cuts(_record_starts(stream, kind.name, path), size, parts))
        except (ShardError, ConfigError):
            raise
        except read_errors(path, kind) as error:
            raise ShardError(f"{path}: cannot be read: {described(error)}", path=path) from error
    stops = [index for index, _ in cuts[1:]]
    return [Piece(path, start, stop, offset) for (start, offset), stop in zip(cuts, [*stops, None], strict=True)]


def count_records(path: str, options: ReadOptions) -> int | None:
    """Records of a shard, broken ones included, where that is found much faster than they are read; else None.

    So it is for Parquet, and for files on disk that are not packed. A tar that is broken is counted as far as it goes.

    Args:
        path: a path, URL or `pipe:` command.
        options: as for reading it.
    Raises:
        ConfigError: the shard's ending is not known, or it needs a package that is not installed.
        ShardError: the shard cannot be read, or its header lacks a field that is asked for.
    """
    kind = shard_kind(path)
    if kind.packing or not is_local(path):
        return None
    check_packages(path, kind)
    try:
        with open_bytes(path, options.access) as stream:
            if kind.name == "parquet":
                return ParquetReader(stream).first_rows[-1]
            if kind.name in DELIMITERS:  # where quotes stand oddly, only a parser knows the rows
                return sum(raw.records for raw in READERS[kind.name](stream, Piece(path), options))
            if kind.name == "tar":
                count = 0
                with suppress(*READ_ERRORS):  # reading it will tell
                    for _ in itertools.groupby(TarReader(stream, 0).members(), lambda member: member.key):
                        count += 1
                return count
            return sum(len(starts) for starts in _record_starts(stream, kind.name, path))
    except (ShardError, ConfigError):
        raise
    except read_errors(path, kind) as error:
        raise ShardError(f"{path}: cannot be read: {described(error)}", path=path) from error


def split_rows(rows: Any, parts: int) -> list[tuple[Piece, int]]:
    """A dataset as pieces, each with its size: rows where they can be counted, else 1.

    What has a length is cut into `parts` runs of rows. A Hugging Face `IterableDataset` is taken shard by shard, and
    read from a shard's first row on.
    """
    name = type(rows).__name__
    if not hasattr(rows, "__len__"):
        return [(Piece(f"{name} shard {number} of {rows.num_shards}"), 1) for number in range(rows.num_shards)]
    bounds = np.linspace(0, len(rows), min(parts, len(rows)) + 1).astype(int).tolist()
    return [(Piece(name, start, stop), stop - start) for start, stop in itertools.pairwise(bounds)]


# --- cutting: where records start, as int64 arrays of byte offsets, in order ------------------------------------------


def _cuts(blocks: Iterable[npt.NDArray[np.int64]], size: int, parts: int) -> Iterator[tuple[int, int]]:
    """Index and offset of the records that stand first in each share of the file's bytes, but for the first share."""
    index, part = 0, 1
    for starts in blocks:
        while part < parts and len(starts) and (target := -(-size * part // parts)) <= starts[-1]:
            at = int(np.searchsorted(starts, target))
            offset = int(starts[at])
            if index + at:
                yield index + at, offset
            part = offset * parts // size + 1
        if part >= parts:
            return
        index += len(starts)


def _group_cuts(file: ParquetReader, parts: int) -> Iterator[tuple[int, int]]:
    """Index, and 0 for the offset, of the row groups that begin nearest to where each share but the first should."""
    ends = np.cumsum(file.sizes, dtype=np.float64)
    if len(ends) > 1:
        shares = ends[-1] * np.arange(1, parts) / parts
        for group in np.unique(np.abs(ends[:-1, None] - shares).argmin(axis=0)):
            yield file.first_rows[group + 1], 0


def _record_starts(stream: BinaryIO, kind: str, path: str) -> Iterator[npt.NDArray[np.int64]]:
    if kind == "tar":
        tar = TarReader(stream, 0)
        with suppress(*READ_ERRORS):  # a broken tar is cut as far as it goes: reading the last piece will tell
            for _, members in itertools.groupby(tar.members(), lambda member: member.key):
                if tar.pax_headers:  # global: they speak for all members that follow, in later pieces too
                    return
                yield np.array([next(members).info.offset])
        return
    delimiter = DELIMITERS.get(kind)
    if delimiter:
        csv_rows(stream, path, delimiter)
    elif stream.read(len(BOM)) != BOM:
        stream.seek(0)
    yield from _line_starts(stream, delimiter, count_blank=kind == "txt")


def _line_starts(stream: BinaryIO, delimiter: str | None, *, count_blank: bool) -> Iterator[npt.NDArray[np.int64]]:
    """Starts of lines or, where a delimiter is given, of rows: they end at newlines after an even number of quotes."""
    position = start = stream.tell()
    quoted = 0  # 1 where the block begins inside quotes
    while block := stream.read(_BLOCK_BYTES):
        block += stream.readline()
        data = np.frombuffer(block if block.endswith(b"\n") else block + b"\n", np.uint8)
        ends = np.flatnonzero(data == ord("\n"))
        if delimiter:
            quotes = np.flatnonzero(data == ord('"'))
            if not _obeys_rfc_4180(data, quotes[quoted::2], quotes[1 - quoted :: 2], delimiter):
                return
            ends = ends[(np.searchsorted(quotes, ends) + quoted) % 2 == 0]
            quoted = (quoted + len(quotes)) % 2
        starts = np.concatenate([[start], position + ends + 1])
        start = int(starts[-1])  # of a record in the next block
        lengths = np.diff(starts) - 1
        blank = (lengths == 0) | ((lengths == 1) & (data[ends - 1] == ord("\r")))
        yield starts[:-1][~blank | count_blank]
        position += len(data)


def _obeys_rfc_4180(
    data: npt.NDArray[np.uint8], opening: npt.NDArray[np.intp], closing: npt.NDArray[np.intp], delimiter: str
) -> bool:
    """Whether, in whole lines, quotes open and close where a parser that knows the rows sees them do so.

    An opening quote follows a delimiter, a line's end or, where two stand for one, the closing quote before it; a
    closing quote precedes one of those. A bare carriage return or (before Python 3.11) a NUL would upset the parser.
    """
    before = np.isin(data[opening - 1], np.frombuffer(f'{delimiter}\n"'.encode(), np.uint8))
    after = np.isin(data[closing + 1], np.frombuffer(f'{delimiter}\r\n"'.encode(), np.uint8))
    returns = np.flatnonzero(data == ord("\r"))
    return bool(before.all() and after.all() and (data[returns + 1] == ord("\n")).all() and data.all())
