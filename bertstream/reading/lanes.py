"""Lanes: the independent streams that share out an epoch's shards, the place of each, and the order they take turns in.

A lane reads its pieces, several of them open at once, a record each in turn. Its place (`Cursor`) is where its current
window of records starts and how many of the window's batches were handed out. What comes next of a stream is a pure
function of its settings and of the queue of lanes with their places, which is all that a checkpoint has to hold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace

from ..errors import ShardError
from ..tokens import Cursor, OpenPiece, Record
from .options import ReadOptions
from .records import read_records
from .shards import Piece


class LaneReader:
    """The records of a lane's pieces from a place on, `open_shards` pieces at a time, a record of each in turn.

    Args:
        pieces: the lane's, in order.
        options: how they are read.
        start: the place; its epoch, lane and batch are left alone.
        open_shards: how many pieces are open at once.
        tolerant: whether broken records are passed over and reported, and a broken shard given up; else they raise.
    """

    def __init__(
        self, pieces: Sequence[Piece], options: ReadOptions, start: Cursor, *, open_shards: int, tolerant: bool
    ) -> None:
        self._pieces = pieces
        self._options = options
        self._tolerant = tolerant
        self._next = start.next_piece
        self._open = deque(_Opened(*place, start=pieces[place.piece].start) for place in start.open)
        self._bad: list[ShardError] = []
        while len(self._open) < open_shards and self._next < len(pieces):
            self._open.append(self._opened_next())

    def read(self) -> Record | None:
        """The next good record; None behind the last.

        Raises:
            ShardError: a record or shard is broken, unless `tolerant`.
        """
        while self._open:
            opened = self._open[0]
            record = self._next_of(opened)
            if record is not None:
                opened.records = record.index - opened.start + 1
                opened.offset = record.offset
                self._open.rotate(-1)
                return record
            self._open.popleft()
            if self._next < len(self._pieces):
                self._open.appendleft(self._opened_next())
        return None

    def place(self, start: Cursor) -> Cursor:
        """Behind the record read last, at the beginning of a window of the lane and epoch of `start`."""
        places = tuple(OpenPiece(opened.piece, opened.records, opened.offset) for opened in self._open)
        return replace(start, next_piece=self._next, open=places, batch=0)

    def take_bad(self) -> tuple[ShardError, ...]:
        """The broken records and shards that were passed over since the last call."""
        bad = tuple(self._bad)
        self._bad.clear()  # readers hold the list
        return bad

    def close(self) -> None:
        """Close all files."""
        for opened in self._open:
            if opened.reader is not None:
                opened.reader.close()
                opened.reader = None

    def _opened_next(self) -> _Opened:
        self._next += 1
        return _Opened(self._next - 1, start=self._pieces[self._next - 1].start)

    def _next_of(self, opened: _Opened) -> Record | None:
        try:
            if opened.reader is None:
                piece, skip = _rest(self._pieces[opened.piece], opened)
                on_bad = self._bad.append if self._tolerant else None
                opened.reader = read_records(piece, self._options, skip=skip, on_bad=on_bad)
            return next(opened.reader, None)
        except ShardError as error:
            if not self._tolerant:
                raise
            error.gives_up_shard = True
            self._bad.append(error)
            return None


@dataclass(slots=True)
class _Opened:
    """An `OpenPiece` while it is read, and where in its shard the piece starts."""

    piece: int
    records: int = 0
    offset: int = 0
    start: int = 0
    reader: Generator[Record, None, None] | None = None


def _rest(piece: Piece, place: _Opened) -> tuple[Piece, int]:
    """Where to read on: a piece and how many of its records to leap over, one where the last one's place is known."""
    if not place.offset:
        return piece, place.records
    return replace(piece, start=piece.start + place.records - 1, offset=place.offset), 1


class LaneQueue:
    """The lanes in the order of their turns, the next one first, each with its place.

    Args:
        cursors: a lane each.
    """

    def __init__(self, cursors: Iterable[Cursor]) -> None:
        self._cursors = deque(cursors)

    def hand_out(self, cursor: Cursor) -> None:
        """A batch with this cursor was handed out: its lane goes to the end. Lanes before it had none any more."""
        while self._cursors and self._cursors.popleft().lane != cursor.lane:
            pass
        self._cursors.append(cursor)

    def drop(self, lane: int) -> None:
        """This lane has no batch any more."""
        self._cursors = deque(cursor for cursor in self._cursors if cursor.lane != lane)

    def end(self) -> None:
        """No lane has a batch any more."""
        self._cursors.clear()

    @property
    def cursors(self) -> list[Cursor]:
        """The lanes' places, the next one first."""
        return list(self._cursors)
