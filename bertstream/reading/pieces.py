"""Cut shards into pieces of about equal size, for several readers, and count their records."""

from __future__ import annotations

import itertools
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, ShardError, check_at_least, described
from .access import BUFFER_BYTES, DEFAULT_ACCESS, Access, is_local, is_pipe
from .compression import compression_in
from .delimited import DELIMITERS, Table, read_csv
from .faults import file_version
from .files import is_file, local_path, open_bytes
from .lines import BLANKS, check_json_lines
from .options import ReadOptions
from .parquet import ParquetReader
from .raw import BOM
from .shards import Piece, check_packages, read_errors, shard_kind
from .tar import TarReader

_BLOCK_BYTES = 1 << 20


def split_shard(path: str, parts: int, access: Access = DEFAULT_ACCESS) -> list[Piece]:
    """Cut a shard into pieces of about equal bytes.

    Parquet is cut between row groups, local or remote. Other formats are cut if they are uncompressed and local;
    `access.shard_cache` makes a remote one local. Finding the cuts reads the file up to the last one, of a tar only the
    headers. A csv in which quotes enclose fields is cut only before its first quote that RFC 4180 forbids: beyond it,
    only a full parse finds the rows; and not at all in encodings such as GBK, whose characters may hold the byte of a
    quote. A shard that cannot be cut is one piece.

    Args:
        path: a path, URL or `pipe:` command.
        parts: how many pieces to make, at least 1.
        access: how it is opened.
    Returns:
        At most `parts` pieces, none empty, in order; together they are the whole shard.
    Raises:
        ConfigError: `parts` is below 1, the shard's ending is unknown, or it needs a package that is not installed.
        ShardError: the shard cannot be read.
    """
    check_at_least("parts", parts, 1)
    kind = shard_kind(path, access)
    cuts = [(0, 0)]  # (index, offset) of each piece's first record
    version = file_version(path) if is_local(path) else None
    if parts > 1 and not kind.compression and not is_pipe(path):
        check_packages(path, kind)
        try:
            if kind.format == "parquet":
                with open_bytes(path, access) as stream:
                    cuts.extend(_group_cuts(ParquetReader(stream), parts))
            elif (file := local_path(path, access)) is not None:
                with open(file, "rb", buffering=BUFFER_BYTES) as stream:
                    size = os.fstat(stream.fileno()).st_size
                    if not compression_in(stream):
                        cuts.extend(_cuts(_record_starts(stream, kind.format, path, access), size, parts))
        except (ShardError, ConfigError):
            raise
        except read_errors(path, kind) as error:
            raise ShardError(f"{path}: cannot be read: {described(error)}", path=path) from error
    stops = [index for index, _ in cuts[1:]]
    return [
        Piece(path, start, stop, offset, version=version)
        for (start, offset), stop in zip(cuts, [*stops, None], strict=True)
    ]


def count_records(path: str, options: ReadOptions) -> int | None:
    """Count the records of a shard, broken ones included, if that is much faster than reading them.

    Args:
        path: a path, URL or `pipe:` command.
        options: how the shard will be read.
    Returns:
        The number of records, of a broken tar up to where it breaks; None for a shard that is compressed or not local.
    Raises:
        ConfigError: the shard's ending is unknown, or it needs a package that is not installed.
        ShardError: the shard cannot be read, or its header lacks a required field.
    """
    kind = shard_kind(path, options.access)
    if kind.compression or not is_local(path):
        return None
    check_packages(path, kind)
    try:
        with open_bytes(path, options.access, None if kind.format == "parquet" else "") as stream:
            if kind.format == "parquet":
                return ParquetReader(stream).first_rows[-1]
            if not is_file(stream):
                return None
            if (delimiter := DELIMITERS.get(kind.format)) is not None:  # with odd quotes, only a parser finds the rows
                return sum(1 for _ in read_csv(stream, Piece(path), options, delimiter=delimiter))
            if kind.format == "tar":
                count = 0
                with suppress(EOFError, tarfile.TarError):  # reading the shard reports it
                    for _ in itertools.groupby(TarReader(stream, 0).members(), lambda member: member.key):
                        count += 1
                return count
            return sum(len(starts) for starts in _record_starts(stream, kind.format, path, options.access))
    except (ShardError, ConfigError):
        raise
    except read_errors(path, kind) as error:
        raise ShardError(f"{path}: cannot be read: {described(error)}", path=path) from error


# --- cutting ----------------------------------------------------------------------------------------------------------
# Starts of records are int64 arrays of byte offsets, in order, one array per block of the file.


def _cuts(blocks: Iterable[npt.NDArray[np.int64]], size: int, parts: int) -> Iterator[tuple[int, int]]:
    """Index and offset of the first record in each of `parts` equal shares of the file's bytes, except the first."""
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
    """Index of the first row of the row groups nearest to the bounds between `parts` equal shares; the offset is 0."""
    ends = np.cumsum(file.sizes, dtype=np.float64)
    if len(ends) > 1:
        shares = ends[-1] * np.arange(1, parts) / parts
        for group in np.unique(np.abs(ends[:-1, None] - shares).argmin(axis=0)):
            yield file.first_rows[group + 1], 0


def _record_starts(stream: BinaryIO, kind: str, path: str, access: Access) -> Iterator[npt.NDArray[np.int64]]:
    if kind == "tar":
        tar = TarReader(stream, 0)
        # A broken tar is cut up to where it breaks; reading the last piece reports it.
        with suppress(EOFError, tarfile.TarError):
            for _, members in itertools.groupby(tar.members(), lambda member: member.key):
                if tar.pax_headers:  # global headers apply to all later members, in other pieces too
                    return
                yield np.array([next(members).info.offset])
        return
    quoted: Table | None = None
    if kind == "json":
        check_json_lines(stream, path)
    if (delimiter := DELIMITERS.get(kind)) is not None:
        table = Table(stream, path, access, delimiter)
        table.seek_rows()
        if table.quoted:
            if not table.one_byte_characters:
                return
            quoted = table
    elif stream.read(len(BOM)) != BOM:
        stream.seek(0)
    blanks = {"txt": None, "csv": b"\r", "tsv": b"\r"}.get(kind, BLANKS)
    yield from _line_starts(stream, quoted, blanks, access.max_record_bytes)


def _line_starts(
    stream: BinaryIO, quoted: Table | None, blanks: bytes | None, limit: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Starts of lines.

    Args:
        stream: at the first line.
        quoted: if quotes enclose fields, the table whose rows begin here: they end at newlines after an even number of
            quotes. No start is found beyond a row that only a full parse understands.
        blanks: what a line that is no record consists of; None counts empty lines too.
        limit: the most bytes of a row.
    """
    position = start = stream.tell()
    inside = 0  # 1 if the block begins inside quotes
    while block := stream.read(_BLOCK_BYTES):
        block += (rest := stream.readline(limit + 1))
        dropped = 0  # bytes of a line beyond the limit, which may be all of the file
        while rest and not rest.endswith(b"\n"):
            dropped += len(rest := stream.readline(limit + 1))
        if dropped and quoted is not None:
            return
        data = np.frombuffer(block if block.endswith(b"\n") else block + b"\n", np.uint8)
        ends = np.flatnonzero(data == ord("\n"))
        if quoted is not None:
            quotes = np.flatnonzero(data == ord('"'))
            if not _obeys_rfc_4180(data, quotes[inside::2], quotes[1 - inside :: 2], quoted.delimiter):
                return
            within = (np.searchsorted(quotes, ends) + inside) % 2 == 1
            if quoted.refuses_joined_rows and _may_join_rows(data, ends, within, quoted):
                return
            ends = ends[~within]
            inside = (inside + len(quotes)) % 2
        starts = np.concatenate([[start], position + ends + 1])
        if dropped:
            starts[-1] += dropped - 1  # the newline that `data` has instead is not in the file
        start = int(starts[-1])  # of a record in the next block
        lengths = np.diff(starts)
        if quoted is not None and len(lengths) and lengths.max() > limit:  # a broken row, and its lines are rows
            return
        if blanks is None:
            yield starts[:-1]
        else:
            yield starts[:-1][_hold_more(block, starts - position, blanks)]
        position += len(block) + dropped


def _hold_more(block: bytes, bounds: npt.NDArray[np.int64], blanks: bytes) -> npt.NDArray[np.bool_]:
    """Which of the lines, or rows, between bounds in a block hold more than blanks; the first may begin before it."""
    lengths = np.diff(bounds)
    firsts = np.frombuffer(block, np.uint8)[np.maximum(bounds[:-1], 0)]
    held = lengths > 1
    for i in np.flatnonzero(held & (bounds[:-1] >= 0) & np.isin(firsts, np.frombuffer(blanks, np.uint8))):
        held[i] = bool(block[bounds[i] : bounds[i + 1]].strip(blanks + b"\n"))
    return held


def _may_join_rows(
    data: npt.NDArray[np.uint8], ends: npt.NDArray[np.intp], within: npt.NDArray[np.bool_], table: Table
) -> bool:
    """Whether a quote may have joined whole rows, which `QuotedRows` refuses: it finds a row's two first lines full."""
    delimiters = np.flatnonzero(data == ord(table.delimiter))
    full = np.diff(np.searchsorted(delimiters, ends), prepend=0) == len(table.columns) - 1
    return len(table.columns) > 1 and bool((full[:-1] & full[1:] & within[:-1]).any() or (full[-1] and within[-1]))


def _obeys_rfc_4180(
    data: npt.NDArray[np.uint8], opening: npt.NDArray[np.intp], closing: npt.NDArray[np.intp], delimiter: str
) -> bool:
    """Whether quotes open and close in these whole lines where a full parse would see them do so.

    An opening quote follows a delimiter, the end of a line, or a closing quote (a doubled quote is one character of
    the field); a closing quote precedes one of these. A bare carriage return, and before Python 3.11 a NUL, would break
    the parse.
    """
    before = np.isin(data[opening - 1], np.frombuffer(f'{delimiter}\n"'.encode(), np.uint8))
    after = np.isin(data[closing + 1], np.frombuffer(f'{delimiter}\r\n"'.encode(), np.uint8))
    returns = np.flatnonzero(data == ord("\r"))
    return bool(before.all() and after.all() and (data[returns + 1] == ord("\n")).all() and data.all())
