"""Lanes: the independent streams that share out an epoch's shards, the place of each, and the order they take turns in.

A lane reads its pieces, several of them open at once, a record each in turn. Its place (`Cursor`) is where its current
window of records starts and how many of the window's batches were handed out. What comes next of a stream is a pure
function of its settings and of the queue of lanes with their places, which is all that a checkpoint has to hold.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import ShardError, StateError, shortened
from .shards import Piece, ReadOptions, read_records
from .types import Cursor, OpenPiece, ReadReport, Record

logger = logging.getLogger(__name__)

_MOST_NAMED = 10


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


@dataclass
class BadRecords:
    """Counts broken records and shards, names them in the log, and stops at a limit.

    Attributes:
        limit: how many may be passed over; below 1 a fraction of the records read, judged once 1,000 were read.
        read: records that were read, broken ones included.
        records: broken records that were passed over.
        given_up: broken shards whose rest, or the rest of some of their parts, was passed over.
        first: messages of the first ten.
    """

    limit: float
    read: int = 0
    records: int = 0
    given_up: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)

    def reset(self) -> None:
        """Begin to count anew: an epoch meets what the one before it met."""
        self.read = self.records = 0
        self.given_up, self.first = [], []

    def add(self, report: ReadReport) -> None:
        """Count what a window's reading met.

        Raises:
            ShardError: the limit is passed; it names the first ones.
        """
        self.read += report.read
        for error in report.bad:
            if not error.gives_up_shard:
                self.records += 1
            elif error.path not in self.given_up:
                self.given_up.append(str(error.path))
            logger.warning("%s %s", "gave up a shard:" if error.gives_up_shard else "passed over a record:", error)
            if len(self.first) < _MOST_NAMED:
                self.first.append(str(error))
        bad = self.records + len(self.given_up)
        allowed = self.limit if self.limit >= 1 or not self.limit else self.limit * max(self.read, 1000)
        if bad > allowed:
            last = report.bad[-1] if report.bad else None
            raise ShardError(
                f"{self.records} broken records and {len(self.given_up)} broken shards among {self.read} records read "
                f"are more than max_bad_records={self.limit:g} allows; the first: " + "; ".join(self.first),
                path=last.path if last else None,
                index=last.index if last else None,
                field=last.field if last else None,
            )

    def check_some_were_good(self) -> None:
        """At the end of an epoch.

        Raises:
            ShardError: everything was passed over: a fraction of nothing would be kept to, and an epoch be empty.
        """
        if self.first and self.read == self.records:
            raise ShardError("no record of the epoch was good, so this is no stray fault: " + "; ".join(self.first))

    def to_json(self) -> dict[str, Any]:
        """The counts."""
        return {"read": self.read, "records": self.records, "given_up": self.given_up, "first": self.first}

    def load(self, counts: dict[str, Any]) -> None:
        """Go on counting from `to_json`'s."""
        self.read, self.records = counts["read"], counts["records"]
        self.given_up, self.first = list(counts["given_up"]), list(counts["first"])


STATE_VERSION = 1


def pack_state(
    settings: dict[str, Any], epoch: int, queues: Sequence[Sequence[Cursor] | None], bad: BadRecords
) -> dict[str, Any]:
    """A stream's place as plain JSON.

    Args:
        settings: what the order of batches depends on.
        epoch: counted from 0.
        queues: the lanes of each rank, the next one first; None for a rank whose lanes are not known here.
        bad: what was passed over.
    """
    return {
        "version": STATE_VERSION,
        "settings": settings,
        "epoch": epoch,
        "queues": [None if queue is None else [cursor_to_json(cursor) for cursor in queue] for queue in queues],
        "bad": bad.to_json(),
    }


def epoch_of(state: Any, owner: str, parts: Sequence[str]) -> int:
    """The epoch of a state, once it is known for one that can be read.

    Args:
        state: whatever was loaded.
        owner: what it should be of, for the message.
        parts: what it must have beside its version and epoch.
    Raises:
        StateError: it is none, or of another version.
    """
    for part in ("version", "epoch", *parts):
        if not isinstance(state, dict) or part not in state:
            kind = f"it has no {part!r}" if isinstance(state, dict) else type(state).__name__
            raise StateError(f"this is no state of {owner}: {kind}", key=part)
        if part == "version" and state[part] != STATE_VERSION:
            raise StateError(
                f"the state is of version {state[part]}, this bertstream reads version {STATE_VERSION}", key="version"
            )
    epoch = state["epoch"]
    if type(epoch) is not int or epoch < 0:
        raise StateError(f"the state has epoch={shortened(epoch)}, where a number from 0 belongs", key="epoch")
    return epoch


def unpack_state(state: Any, settings: dict[str, Any]) -> tuple[int, list[list[Cursor] | None], dict[str, Any]]:
    """The epoch, the lanes of each rank, and the counts of broken records of a packed state.

    Raises:
        StateError: the state is none, of another version, or of a stream with other settings.
    """
    parts = ("settings", "queues", "bad")
    epoch = epoch_of(state, "a stream", parts)
    for part in parts:
        if not state[part]:
            raise StateError(f"this is no state of a stream: its {part!r} is empty", key=part)
    for name, value in settings.items():
        saved = state["settings"].get(name)
        if saved != value:
            raise StateError(
                f"the state was saved with {name}={saved!r}, this stream has {name}={value!r}: make the stream as it "
                "was, or start an epoch anew without the state",
                key=name,
            )
    queues = [
        None if queue is None else [cursor_from_json(entry, epoch) for entry in queue] for queue in state["queues"]
    ]
    return epoch, queues, state["bad"]


def deal(queues: Sequence[list[Cursor] | None], rank: int, world_size: int) -> list[list[Cursor] | None]:
    """The lanes of each rank: its own where the number of ranks is what it was, else all of them dealt anew.

    Raises:
        StateError: lanes that `rank` needs are not in the state.
    """
    if len(queues) == world_size and queues[rank] is not None:
        return list(queues)
    known = [queue for queue in queues if queue is not None]
    if len(known) < len(queues):
        missing = [other for other, queue in enumerate(queues) if queue is None]
        raise StateError(
            f"the state was saved by one of {len(queues)} ranks and lacks the lanes of ranks {missing}: save each "
            "rank's, load it on as many ranks, or let torch.distributed be initialised before the loader is iterated",
            key="queues",
        )
    longest = max(map(len, known))
    turns = [queue[turn] for turn in range(longest) for queue in known if turn < len(queue)]
    return [turns[other::world_size] for other in range(world_size)]


def cursor_to_json(cursor: Cursor) -> list[Any]:
    """A lane's place as JSON holds it; the epoch is said once for all."""
    return [cursor.lane, cursor.next_piece, [list(place) for place in cursor.open], cursor.batch]


def cursor_from_json(entry: list[Any], epoch: int) -> Cursor:
    """What `cursor_to_json` was given."""
    lane, next_piece, places, batch = entry
    return Cursor(epoch, lane, next_piece, tuple(OpenPiece(*place) for place in places), batch)
