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


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a lane is: what it yields next is a pure function of this and of the stream's settings.

    Attributes:
        epoch: counted from 0.
        lane: which lane of the stream.
        next_piece: the first of the lane's pieces that was not begun before the bucket.
        open: the pieces that were open at the start of the bucket, the next one to read first.
        batch: how many of the bucket's batches the loop has received.
    """

    epoch: int
    lane: int
    next_piece: int = 0
    open: tuple[OpenPiece, ...] = ()
    batch: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """As numbers: the loop's thread unpickles one for each batch, and those of a bucket have the same pieces."""
        return _cursor, (self.epoch, self.lane, self.next_piece, tuple(chain.from_iterable(self.open)), self.batch)


def _cursor(epoch: int, lane: int, next_piece: int, numbers: tuple[int, ...], batch: int) -> Cursor:
    return Cursor(epoch, lane, next_piece, _open_pieces(numbers), batch)


@lru_cache(64)
def _open_pieces(numbers: tuple[int, ...]) -> tuple[OpenPiece, ...]:
    return tuple(map(OpenPiece, numbers[::3], numbers[1::3], numbers[2::3]))
