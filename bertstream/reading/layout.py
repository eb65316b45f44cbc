"""How the data is laid out: cut into pieces, shared out record by record where ranks need it, dealt to lanes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import ConfigError, counted
from .access import file_name, is_local
from .config import StreamConfig
from .faults import file_version
from .files import shard_size
from .options import ReadOptions
from .pieces import count_records, split_shard
from .rows import split_rows
from .shards import Piece, shard_kind

logger = logging.getLogger(__name__)

_MOST_LANES = 32
# About a bucket of records in a tar, where each takes at least 2 KiB; tokenizing as much text takes two seconds.
_LANE_BYTES = 4 << 20
_OPEN_SHARDS, _OPEN_IN_ALL = 4, 64
_ROW_BYTES = 256  # of a dataset that does not say how large its rows are
_SHARED_BYTES = 64 << 20
# Of a mixture: a lane that gets fewer bytes of a source might have no record of it.
_SOURCE_BYTES = 4 << 10
# Of a mixture: pieces open in all lanes, as many as a plain stream of 32 lanes has; and the most, of many sources.
_OPEN_IN_MIXTURE, _MOST_OPEN = 128, 512

# A shuffled stream over fewer pieces mixes too little, where one of them holds more than two buckets. Where records are
# not counted, each is taken for as long as the shortest in a tar, so that there is no warning without a need.
_FEW_PIECES, _RECORD_BYTES = 8, 2048
_SMALLER_GROUPS = "smaller row groups, as in to_parquet(row_group_size=1000)"


@dataclass(frozen=True)
class Layout:
    """The pieces of the data and how many lanes they are dealt to; a function of shards, settings and ranks.

    Attributes:
        pieces: each with its size in bytes as stored; in rows, of a dataset.
        lanes: how many there are.
        open_shards: how many pieces a lane reads in turn; in a mixture, of each source.
        sources: of how many they are; more than 1 in a mixture only.
        ranks: the number of ranks that it was made for, where it depends on that; else 1.
    """

    pieces: Sequence[tuple[Piece, int]]
    lanes: int
    open_shards: int
    ranks: int = 1
    sources: int = 1

    @cached_property
    def digest(self) -> str:
        """The number of shards and a digest of the pieces; the same after the corpus was moved to another folder."""
        pieces = [
            (file_name(piece.path), piece.start, piece.stop, size)
            + ((piece.share, piece.shares) if piece.shares > 1 else ())  # as before there were shares
            + ((piece.source,) if self.sources > 1 else ())
            for piece, size in self.pieces
        ]
        digest = hashlib.sha256(repr(pieces).encode()).hexdigest()[:16]
        return f"{len({piece.path for piece, _ in self.pieces})} by the digest {digest}"

    def deal(self, seed: int | None, epoch: int) -> list[list[Piece]]:
        """The pieces by lane, each dealt to the lane with the fewest bytes so far, of its source.

        Shares of a piece are dealt to the lanes of the rank of that number, so no rank reads a piece twice; those
        of a mixture to the lane that each is for.

        Args:
            seed: of the shuffle; None does not shuffle.
            epoch: which one.
        """
        order = range(len(self.pieces))
        if seed is not None:
            order = np.random.default_rng((seed, epoch)).permutation(len(self.pieces)).tolist()
        dealt: list[list[Piece]] = [[] for _ in range(self.lanes)]
        loads = [[0] * self.lanes for _ in range(self.sources)]
        for i in order:
            piece, size = self.pieces[i]
            load = loads[piece.source]
            lane = piece.lane
            if lane is None:
                lane = min(range(piece.share, self.lanes, piece.shares), key=load.__getitem__)
            dealt[lane].append(piece)
            load[lane] += max(1, size)
        return dealt

    def refusal(self, ranks: int, *, is_rows: bool) -> str | None:
        """Why these ranks cannot each have data of their own, with the way out; None if they can."""
        if ranks > self.lanes:
            return (
                f"{ranks} ranks cannot share {counted(self.lanes, 'lane')}: write "
                f"reading=StreamConfig(lanes={ranks}) or more, or leave lanes out"
            )
        count = len(self.pieces)
        if ranks <= count:
            return None
        name = self.pieces[0][0].path
        if is_rows:
            what, way = (
                ("row", "give it more rows")
                if self.pieces[0][0].stop is not None
                else ("shard", f"give it as many, as in to_iterable_dataset(num_shards={ranks})")
            )
            return f"{ranks} ranks cannot share {counted(count, what)} of {name}: {way}, or use fewer ranks"
        sizes = [size for _, size in self.pieces]
        if not any(sizes) and all(is_local(piece.path) for piece, _ in self.pieces):
            return f"{name}{' and the others' * (count > 1)}: no shard holds a record"
        total = f"{sum(sizes) / 2**20:,.1f} MiB" if all(sizes) else "an unknown number of bytes"
        return (
            f"{ranks} ranks cannot share {counted(count, 'piece')} of data, {total} in all: {name} "
            f"{'and the others ' * (count > 1)}cannot be cut further, and only up to {_SHARED_BYTES >> 20} MiB are "
            "shared out record by record, because each rank reads all of them. Write the data to at least "
            f"{ranks} shards (tools/make_shards.py), uncompressed, or as Parquet with a smaller row_group_size; "
            "StreamConfig(shard_cache=) makes remote shards local; or use fewer ranks"
        )

    def idle_workers(self, workers: int, busy: int, rank: int, ranks: int, *, lanes_by_user: bool) -> str | None:
        """What to write instead of a number of workers of which some have nothing to read; None where all have.

        Small data is told of no lanes: more of them would only make its batches smaller.

        Args:
            workers: how many read for the rank.
            busy: how many of its lanes have data.
            rank, ranks: which one of how many.
            lanes_by_user: whether the user chose the number of lanes.
        """
        if workers <= max(1, busy):
            return None
        where = f" on rank {rank}" if ranks > 1 else ""
        written, wanted = f"write num_workers={max(1, busy)}", workers * ranks
        if len(range(rank, self.lanes, ranks)) > busy:
            why = f"the data has only {counted(busy, 'piece')} for them{where} and cannot be cut further"
            more = f"write the data to at least {wanted} shards"
            if any(".parquet" in piece.path for piece, _ in self.pieces):
                more += f" or row groups ({_SMALLER_GROUPS})"
            return f"num_workers={workers}, but {why}: {written}, or {more}"
        if lanes_by_user or self.lanes >= _MOST_LANES:
            instead = f"reading=StreamConfig(lanes={wanted}), which changes the order of the batches"
            return (
                f"num_workers={workers}, but there {'is' if busy == 1 else 'are'} {counted(busy, 'lane')}{where} "
                f"for them: {written}, or {instead}"
            )
        return f"num_workers={workers}, but the data is enough for {busy} of them{where}: {written}"


def mixes_little(layout: Layout, files: Sequence[str], reading: StreamConfig) -> str | None:
    """Why a shuffled stream leaves records that follow each other together, with what to write; None if it does not.

    It is known without reading: of local Parquet by the number of rows, of other files by their size.

    Args:
        layout: of the stream.
        files: the shards that are no datasets of rows.
        reading: lanes, open shards and buckets.
    """
    if layout.lanes * layout.open_shards < 2 * _FEW_PIECES:  # as the user chose
        return None
    for source in range(layout.sources):
        pieces = {
            (piece.path, piece.start): (piece, size * piece.shares)
            for piece, size in layout.pieces
            if piece.source == source and piece.path in files
        }
        if len(pieces) >= _FEW_PIECES:
            continue
        for piece, size in pieces.values():
            records = size // _RECORD_BYTES
            is_parquet = shard_kind(piece.path, reading).format == "parquet"
            if is_parquet and is_local(piece.path):
                stop = piece.stop or count_records(piece.path, ReadOptions(access=reading)) or 0
                records = stop - piece.start
            if records > 2 * reading.bucket_size:
                way = _SMALLER_GROUPS if is_parquet else "it uncompressed, or to more shards (tools/make_shards.py)"
                if not is_parquet and "://" in piece.path:
                    way += ", or StreamConfig(shard_cache=), which makes it local"
                return (
                    f"a shuffled stream mixes the records of the pieces of its data, and {piece.path} has a large one "
                    f"that cannot be cut, of {counted(len(pieces), 'piece')} in all: if its records are sorted, those "
                    f"of a batch are much alike; write {way}"
                )
    return None


def lay_out(shards: Sequence[str], rows: Any, reading: StreamConfig, *, shuffle: bool, ranks: int) -> Layout:
    """Cut the data into pieces for lanes, at least one lane for each rank.

    Where there are fewer pieces than ranks and the data is small, every piece is shared out record by record. Otherwise
    some ranks have nothing: see `Layout.refusal`.

    Args:
        shards: paths, URLs and `pipe:` commands.
        rows: the dataset in place of shards, or None.
        reading: lanes and open shards, and how shards are opened.
        shuffle: whether more pieces are open at a time.
        ranks: how many share the data.
    Raises:
        ShardError: a shard is missing or cannot be read.
    """
    layout = _cut(shards, rows, reading, shuffle=shuffle, ranks=ranks)
    if not _may_be_shared(layout.pieces, rows) or not len(layout.pieces) < ranks <= layout.lanes:
        return layout
    logger.info("%d pieces are shared out record by record among %d ranks", len(layout.pieces), ranks)
    shared = [
        (replace(piece, share=number, shares=ranks), max(1, size // ranks))
        for piece, size in layout.pieces
        for number in range(ranks)
    ]
    return replace(layout, pieces=shared, ranks=ranks)


def lay_out_mixture(
    sources: Sequence[tuple[Sequence[str], Any]], reading: StreamConfig, *, shuffle: bool, ranks: int
) -> Layout:
    """Cut the sources of a mixture into pieces for lanes that each have a share of every source.

    A source of fewer pieces than lanes is shared out record by record if it is small. Otherwise there are fewer lanes.

    Args:
        sources: of each its shards and None, or its name and its dataset.
        reading, shuffle, ranks: as for `lay_out`.
    Raises:
        ConfigError: a source cannot be shared among as many ranks, or lanes where their number is given.
        ShardError: a shard is missing or cannot be read.
    """
    sizes = [_stored(shards, rows, reading) for shards, rows in sources]
    most = min(_MOST_LANES, _MOST_OPEN // len(sources), *(lanes for _, lanes in sizes))
    by_size = max(1, min(most, sum(size for size, _ in sizes) // _LANE_BYTES))
    lanes = reading.lanes or max(by_size, ranks)

    def open_in(lanes: int) -> int:
        return reading.open_shards or (max(1, _OPEN_IN_MIXTURE // (lanes * len(sources))) if shuffle else 1)

    cutting = replace(reading, lanes=lanes, open_shards=open_in(lanes))
    cut = [_cut(shards, rows, cutting, shuffle=shuffle, ranks=ranks).pieces for shards, rows in sources]
    depends = reading.lanes is None and lanes > by_size
    if reading.lanes is None:
        uncut = [
            len(pieces) for pieces, (_, rows) in zip(cut, sources, strict=True) if not _may_be_shared(pieces, rows)
        ]
        lanes = max(ranks, min(lanes, *uncut)) if uncut else lanes
    pieces: list[tuple[Piece, int]] = []
    for number, (own, (shards, rows)) in enumerate(zip(cut, sources, strict=True)):
        if len(own) < lanes and not _may_be_shared(own, rows):
            raise ConfigError(_refused_source(number, shards[0], rows, len(own), lanes, ranks))
        for i, (piece, size) in enumerate(own):
            piece = replace(piece, source=number)
            if len(own) >= lanes:
                pieces.append((piece, size))
                continue
            # Turned from piece to piece: the records of many small shards would all be in the first lanes.
            turned = i * lanes // len(own)
            pieces += [
                (replace(piece, share=(lane - turned) % lanes, shares=lanes, lane=lane), max(1, size // lanes))
                for lane in range(lanes)
            ]
    return Layout(pieces, lanes, open_in(lanes), ranks=ranks if depends else 1, sources=len(sources))


def _stored(shards: Sequence[str], rows: Any, reading: StreamConfig) -> tuple[int, int]:
    """About how many bytes a source of a mixture has, and how many lanes can each have a share of it."""
    if rows is not None:
        if hasattr(rows, "__len__"):
            return len(rows) * _ROW_BYTES, len(rows)
        return rows.num_shards * _LANE_BYTES, rows.num_shards
    if len(shards) >= _MOST_LANES:  # enough for each lane; asking a server for thousands of sizes would take long
        return _MOST_LANES * _LANE_BYTES, _MOST_LANES
    sizes = [shard_size(path, reading) for path in shards]
    return sum(sizes), sum(sizes) // _SOURCE_BYTES if all(sizes) else _MOST_LANES


def _may_be_shared(pieces: Sequence[tuple[Piece, int]], rows: Any) -> bool:
    """Whether lanes or ranks may each read all of these pieces for every n-th record."""
    sizes = [size for _, size in pieces]
    return rows is None and all(sizes) and sum(sizes) <= _SHARED_BYTES


def _refused_source(number: int, name: str, rows: Any, count: int, lanes: int, ranks: int) -> str:
    what = "piece" if rows is None else "row" if hasattr(rows, "__len__") else "shard"
    if ranks > count:
        way = {
            "piece": f"write it to at least {ranks} shards (tools/make_shards.py), uncompressed, or as Parquet with a "
            f"smaller row_group_size (only up to {_SHARED_BYTES >> 20} MiB are shared out record by record)",
            "row": "give it more rows",
            "shard": f"give it as many, as in to_iterable_dataset(num_shards={ranks})",
        }[what]
        return (
            f"source {number} of the mixture, {name}, has {counted(count, what)} for {ranks} ranks, each of which "
            f"takes a share of every source: {way}, or use fewer ranks"
        )
    return (
        f"source {number} of the mixture, {name}, has {counted(count, what)} for {lanes} lanes, each of which takes a "
        f"share of every source: write reading=StreamConfig(lanes={max(1, count)}), or leave lanes out"
    )


def _cut(shards: Sequence[str], rows: Any, reading: StreamConfig, *, shuffle: bool, ranks: int) -> Layout:
    most = reading.lanes or max(_MOST_LANES, ranks)
    open_shards = reading.open_shards or (_OPEN_SHARDS if shuffle else 1)
    pieces: list[tuple[Piece, int]] = []
    if rows is None and len(shards) >= most * open_shards:
        # Enough for each lane. Asking a server for thousands of sizes would take longer than it helps.
        pieces = [
            (Piece(path, version=file_version(path)), shard_size(path, reading)) if is_local(path) else (Piece(path), 1)
            for path in shards
        ]
        return Layout(pieces, most, open_shards, ranks=ranks if reading.lanes is None and most > _MOST_LANES else 1)
    sizes = [] if rows is not None else [shard_size(path, reading) for path in shards]
    if rows is None:
        by_size = sum(sizes) // _LANE_BYTES
    else:
        by_size = len(rows) * _ROW_BYTES // _LANE_BYTES if hasattr(rows, "__len__") else rows.num_shards
    by_size = reading.lanes or min(_MOST_LANES, max(1, by_size))
    lanes = reading.lanes or max(by_size, ranks)
    if shuffle and reading.open_shards is None:
        open_shards = max(open_shards, _OPEN_IN_ALL // lanes)
    wanted, total = lanes * open_shards, sum(sizes)
    if rows is not None:
        return Layout(split_rows(rows, wanted), lanes, open_shards, ranks=ranks if lanes > by_size else 1)
    for path, size in zip(shards, sizes, strict=True):
        parts = max(1, round(wanted * size / total)) if len(shards) < wanted and size else 1
        split = split_shard(path, parts, reading)
        if len(split) < parts:
            logger.info("%s is read in %d pieces where %d are its share: not cut further", path, len(split), parts)
        pieces += [(piece, size // len(split)) for piece in split]
    return Layout(pieces, lanes, open_shards, ranks=ranks if lanes > by_size else 1)
