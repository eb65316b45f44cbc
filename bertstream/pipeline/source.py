"""One epoch on its way through a loader: what a training loop iterates, what is read, and what is known behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader

from ..reading.dataset import TextStream
from ..reading.window import Skip
from ..tokens import Cursor, TokenBatch
from .clocks import Stages
from .fields import Place

T = TypeVar("T")

_WORKER_BATCHES = 16
"""Token batches that each worker process of a stream may have ready. Batches are taken in turns, so a worker that is
behind for a moment stops the others once those have theirs: with 8, two workers were 1.55 to 1.73 times as fast as one,
with 16 1.86 times."""


def in_workers(stream: TextStream, num_workers: int) -> DataLoader[Any]:
    """A DataLoader of a stream's token batches, read by so many processes; by whoever iterates it where that is 0."""
    ahead = _WORKER_BATCHES if num_workers else None
    return DataLoader(stream, batch_size=None, num_workers=num_workers, prefetch_factor=ahead)


class Source(Generic[T]):
    """An iterator that times its waiting and lets what it reads go on `close()`.

    What it reads sits in an attribute, not in a local variable: the frames that an exception's traceback keeps alive
    would otherwise keep a DataLoader's worker processes alive.
    """

    def __init__(self, source: Iterator[T], state: Callable[[], Any] | None, stages: Stages) -> None:
        self._source: Iterator[T] | None = source
        self._state = state
        self._stages = stages
        self._first: list[tuple[T, Any]] = []
        self.state: Any = None
        """Where the source stood behind the item that came last, if it can say so."""

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._first:
            item, self.state = self._first.pop()
            return item
        if self._source is None:
            raise StopIteration
        with self._stages.run("read", 1):
            item = next(self._source)
        self.state = None if self._state is None else self._state()
        return item

    def read_first(self) -> None:
        """Advance the source once; the item comes with the next `next()`."""
        for item in self:
            self._first.append((item, self.state))
            return

    def close(self) -> None:
        """End the iteration, and the source with it."""
        source, self._source = self._source, None
        self._first.clear()
        close = getattr(source, "close", None)
        if close is None and not getattr(source, "_persistent_workers", False):
            # A DataLoader's iterator ends its workers when it is collected, which a kept traceback would put off.
            close = getattr(source, "_shutdown_workers", None)
        if close is not None:
            close()


@dataclass
class Entry:
    """What was read, and what is known behind it.

    Attributes:
        item: a batch, or the `Skip` of a lane that has just ended.
        cursors: by rank, the place of the batch that each hands out in this step.
        source_state: where the wrapped DataLoader stood.
        number: of the batch in the epoch.
        texts: the batch's, as tokens; a `Skip` has none.
    """

    item: Any
    cursors: Sequence[Cursor | None] = ()
    source_state: Any = None
    number: int = 0
    texts: Mapping[Place | None, TokenBatch] = field(default_factory=dict)

    @property
    def weight(self) -> int:
        """Tokens in all, and at least one, so that groups are bounded whatever comes; a `Skip` adds nothing."""
        return max(1, sum(batch.num_tokens for batch in self.texts.values())) if self.texts else 0


def located(source: Source[Any], stream: TextStream | None) -> Iterator[Entry]:
    """Batches, and `Skip`s of lanes that have just ended, each with the places behind them."""
    for item in source:
        cursors: list[Cursor | None] = []
        if stream is not None and isinstance(item, TokenBatch):
            cursors = [None] * stream.world_size
            cursors[stream.rank] = item.cursor
        if not isinstance(item, Skip) or item.lane is not None:
            yield Entry(item, cursors, source.state)
