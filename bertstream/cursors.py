"""Where a stream is: the cursor of a lane, which rides on its batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple


class OpenPiece(NamedTuple):
    """How far a lane has read one of its pieces.

    Attributes:
        piece: which of the lane's pieces.
        records: how many of its records were read, broken ones included.
        offset: byte of the shard at which the last of these begins; 0 if reading cannot start there.
    """

    piece: int
    records: int = 0
    offset: int = 0


class SourcePlace(NamedTuple):
    """How far a lane of a mixture has read one of its sources.

    Attributes:
        drawn: how many good records it took of the source since the start of the epoch.
        passes: how many times it had read all of its share before.
        next_piece, open: as of a `Cursor`, in the pass that is running.
    """

    drawn: int = 0
    passes: int = 0
    next_piece: int = 0
    open: tuple[OpenPiece, ...] = ()


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a lane is: what it yields next is a pure function of this and of the stream's settings.

    Attributes:
        epoch: counted from 0.
        lane: which lane of the stream.
        next_piece: the first of the lane's pieces that was not begun before the bucket.
        open: the pieces that were open at the start of the bucket, the next one to read first.
        batch: how many of the bucket's batches the loop has received.
        sources: of a mixture, where the lane was in each source at the start of the bucket; `next_piece` and `open` are
            then unused. Empty at the start of an epoch.
    """

    epoch: int
    lane: int
    next_piece: int = 0
    open: tuple[OpenPiece, ...] = ()
    batch: int = 0
    sources: tuple[SourcePlace, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """As numbers: the loop's thread unpickles one for each batch, and those of a bucket have the same pieces."""
        numbers = tuple(chain.from_iterable(self.open))
        sources = (self.sources,) if self.sources else ()
        return _cursor, (self.epoch, self.lane, self.next_piece, numbers, self.batch, *sources)


def _cursor(
    epoch: int,
    lane: int,
    next_piece: int,
    numbers: tuple[int, ...],
    batch: int,
    sources: tuple[SourcePlace, ...] = (),
) -> Cursor:
    return Cursor(epoch, lane, next_piece, _open_pieces(numbers), batch, sources)


@lru_cache(64)
def _open_pieces(numbers: tuple[int, ...]) -> tuple[OpenPiece, ...]:
    return tuple(map(OpenPiece, numbers[::3], numbers[1::3], numbers[2::3]))
