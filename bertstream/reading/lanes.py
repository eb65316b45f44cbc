"""Lanes: the independent sequences that share an epoch's shards, where each is, and the order of their turns.

A lane reads several pieces at a time, one record from each in turn. Its `Cursor` says where its current bucket starts
and how many of the bucket's batches the loop has received. What a stream yields next is a pure function of its settings
and of the queue of lanes with their cursors, so a checkpoint needs nothing else.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace

from ..cursors import Cursor, OpenPiece
from ..errors import ShardError
from ..tokens import Record
from .options import ReadOptions
from .record_columns import Gathering, RecordColumns
from .records import read_columns
from .shards import Piece


class LaneReader:
    """The records of a lane from a cursor on: `open_shards` pieces at a time, one record from each in turn.

    Args:
        pieces: the lane's, in order.
        options: how they are read.
        start: the cursor; its epoch, lane and batch are ignored.
        open_shards: how many pieces are open at a time.
        tolerant: whether to skip and report broken records, and give up a broken shard; otherwise they raise. Faults of
            the machine always do.
    Attributes:
        may_skip: how many more broken records and shards it skips. Below 0 nothing more is read: the limit of the epoch
            is exceeded by this lane alone, which its report says.
        dropped: how many records `keep=` and `map=` have dropped.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        options: ReadOptions,
        start: Cursor,
        *,
        open_shards: int,
        tolerant: bool,
    ) -> None:
        if not (start.next_piece or start.open or start.batch):
            # No place in a whole shard is known yet: it may be another file than in the last epoch.
            pieces = [
                piece if piece.start or piece.stop is not None else replace(piece, version=None) for piece in pieces
            ]
        self._pieces = pieces
        self._options = options
        self._tolerant = tolerant
        self.may_skip = math.inf
        self.dropped = 0
        self._next = start.next_piece
        self._open = deque(_Opened(*opened, start=pieces[opened.piece].start) for opened in start.open)
        self._bad: list[ShardError] = []
        while len(self._open) < open_shards and self._next < len(pieces):
            self._open.append(self._open_next())

    def read_columns(self, count: int) -> RecordColumns:
        """The next good records: this many, or as many as there are until none is `ready`.

        Raises:
            ShardError: as for `ready`.
        """
        records, found = Gathering(), 0
        while found < count and (ready := self.ready()):
            if self._open[0].record is not None:  # the same as below, in half the time
                self._give_record(found, records)
                found += 1
                continue
            end = min(count, found + ready)
            self.give(range(found, end), records)
            found = end
        return records.columns()

    def ready(self) -> int:
        """How many of the next good records can be given at once; 0 after the last, and once too much was skipped.

        Reads on where the next record is not read yet.

        Raises:
            ShardError: a record or shard is broken, unless `tolerant`.
        """
        while self._open and self.may_skip >= 0:
            due = self._open[0]
            if due.record is not None:
                return 1
            if due.left:  # all pieces take turns until one has no columns left
                return min(piece.left * len(self._open) + turn for turn, piece in enumerate(self._open))
            if not self._read_on(due):
                self._open.popleft()
                if self._next < len(self._pieces):
                    self._open.appendleft(self._open_next())
        return 0

    def give(self, places: Sequence[int], records: Gathering) -> None:
        """Put the next good records at these places of others, no more of them than are `ready`."""
        if not places:
            return
        if self._open[0].record is not None:
            self._give_record(places[0], records)
            return
        for turn, piece in enumerate(self._open):
            if own := places[turn :: len(self._open)]:
                records.parts.append((own, piece.give(len(own))))
        self._open.rotate(-len(places))

    def _give_record(self, place: int, records: Gathering) -> None:
        due = self._open[0]
        record, due.record = due.record, None
        assert record is not None
        due.records = record.index - due.start + 1
        due.offset = record.offset
        records.alone[place] = record
        self._open.rotate(-1)

    def cursor(self, lane: Cursor) -> Cursor:
        """After the last record read, where a bucket of this lane and epoch would start."""
        pieces = tuple(OpenPiece(opened.piece, opened.records, opened.offset) for opened in self._open)
        return replace(lane, next_piece=self._next, open=pieces, batch=0)

    def take_bad(self) -> tuple[ShardError, ...]:
        """The broken records and shards skipped since the last call."""
        bad = tuple(self._bad)
        self._bad.clear()  # in place: readers hold the list
        return bad

    def _drop(self) -> None:
        self.dropped += 1

    def _skip(self, error: ShardError) -> bool:
        self._bad.append(error)
        # A shard that is given up counts as one however many of its pieces are: those are not counted here.
        self.may_skip -= error.records or 0
        return self.may_skip < 0

    def close(self) -> None:
        """Close all files."""
        for opened in self._open:
            if opened.reader is not None:
                opened.reader.close()
                opened.reader = None

    def _open_next(self) -> _Opened:
        self._next += 1
        return _Opened(self._next - 1, start=self._pieces[self._next - 1].start)

    def _read_on(self, opened: _Opened) -> bool:
        """Read the next records of a piece; whether there are any."""
        try:
            if opened.reader is None:
                piece, skip = _rest(self._pieces[opened.piece], opened)
                on_bad = self._skip if self._tolerant else None
                opened.reader = read_columns(piece, self._options, skip=skip, on_bad=on_bad, on_drop=self._drop)
            item = next(opened.reader, None)
            if isinstance(item, RecordColumns):
                opened.columns, opened.given = item, 0
            else:
                opened.record = item
            return item is not None
        except ShardError as error:
            if not error.skippable:
                raise
            if not self._tolerant:
                if error.index is not None:  # one of the whole shard, such as a missing column, is the user's mistake
                    error.args = (f"{error}; reading=StreamConfig(max_bad_records=) skips and counts such records",)
                raise
            error.gives_up_shard = True
            self._skip(error)
            return False


@dataclass(slots=True)
class _Opened:
    """An `OpenPiece` while it is read, where in its shard the piece starts, and what was read but not given yet.

    Attributes:
        record: that is given next, where records come one by one.
        columns: records that are given next, all but the first `given` of them.
    """

    piece: int
    records: int = 0
    offset: int = 0
    start: int = 0
    reader: Generator[Record | RecordColumns, None, None] | None = None
    record: Record | None = None
    columns: RecordColumns | None = None
    given: int = 0

    @property
    def left(self) -> int:
        """Records of the columns that are not given yet."""
        return 0 if self.columns is None else len(self.columns) - self.given

    def give(self, count: int) -> RecordColumns:
        """The next ones of the columns."""
        assert self.columns is not None
        given = self.columns.part(self.given, self.given + count)
        self.given += count
        self.records = int(given.indices[-1]) - self.start + 1
        self.offset = 0
        return given


def _rest(piece: Piece, opened: _Opened) -> tuple[Piece, int]:
    """What is left of a piece, and how many of its records to skip: one where the last one's offset is known."""
    if not opened.offset:
        return piece, opened.records
    return replace(piece, start=piece.start + opened.records - 1, offset=opened.offset), 1


class LaneQueue:
    """The lanes in the order of their turns, the next one first, each with its cursor.

    Args:
        cursors: one for each lane.
    """

    def __init__(self, cursors: Iterable[Cursor]) -> None:
        self._cursors = deque(cursors)

    def advance(self, cursor: Cursor) -> None:
        """A batch with this cursor was received: its lane moves to the end. Lanes ahead of it were exhausted."""
        while self._cursors and self._cursors.popleft().lane != cursor.lane:
            pass
        self._cursors.append(cursor)

    def drop(self, lane: int) -> None:
        """This lane is exhausted."""
        self._cursors = deque(cursor for cursor in self._cursors if cursor.lane != lane)

    def clear(self) -> None:
        """All lanes are exhausted."""
        self._cursors.clear()

    @property
    def cursors(self) -> list[Cursor]:
        """The lanes' cursors, the next one first."""
        return list(self._cursors)
