"""One lane: read, tokenize, sort by length, cut into batches."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import BertstreamError, ShardError
from ..tokens import Cursor, ReadReport, Record, TokenizedText


@dataclass(frozen=True, slots=True)
class Skip:
    """What a worker yields in place of a batch for a lane that is exhausted, so that workers keep in step.

    Attributes:
        lane: the lane that has just ended; None for one that had ended before, or never was.
        report: what its reading met behind its last batch.
    """

    lane: int | None = None
    report: ReadReport | None = None


class Window:
    """Records of a lane that are sorted and cut into batches at once, as far as they have been read.

    Args:
        start: the lane's place before it.
        size: how many records it takes.
    """

    def __init__(self, start: Cursor, size: int) -> None:
        self.start = start
        self.size = size
        self.end = start
        """The lane's place behind it."""
        self.read = 0
        self.at_end = False
        self.records: list[Record] = []
        self.texts: list[TokenizedText] = []
        self.passed_over: list[ShardError] = []
        self.refused: list[ShardError] = []
        self.error: BertstreamError | None = None
