"""What a loader reads: a DataLoader, an iterable of batches or a `TextStream`, as the iterator of one epoch."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..cursors import Cursor
from ..errors import BertstreamError
from ..reading.dataset import TextStream
from ..reading.lane_batches import LaneEnd
from ..reading.messages import StreamLoader
from ..tokens import TokenBatch
from .clocks import StageClocks
from .default_collate import explained
from .progress import Entry, Progress, ProgressInStream


def read_in_workers(stream: TextStream, num_workers: int) -> Iterator[TokenBatch]:
    """The stream's batches, with its progress in this process and errors with their fields."""
    progress = ProgressInStream(StreamLoader(stream, num_workers), stream)
    items = _start(progress)
    try:
        progress.begun(items)
        for item in items:
            if isinstance(item, BertstreamError):
                raise item
            progress.count(item.report)
            if isinstance(item, TokenBatch):
                stream.progress.advance(stream.on_this_rank(item.cursor))
                yield item
        stream.progress.end_reading()
    finally:
        _close(items)


@dataclass
class EpochStatus:
    """What the loop's thread and the stages of an epoch tell each other.

    Attributes:
        is_over: nobody wants another batch.
        closed_by: why the loader ended the epoch, for a `LoaderClosedError`; None where the loop left or finished.
        waits_since: by `time.monotonic()`, since when the loop waits for a batch; None while it is in its step.
        ranks_have_ended: all ranks agreed that the epoch has no more batches.
    """

    is_over: bool = False
    closed_by: str | None = None
    waits_since: float | None = None
    ranks_have_ended: bool = False


class Source:
    """The iterator of one epoch: it times its waiting, and closes what it reads.

    What it reads is in an attribute, not in a generator's local variable: frames that an exception's traceback keeps
    alive would keep a DataLoader's worker processes alive too.

    Args:
        progress: knows what is read, and from where.
        clocks: the "read" clock.
    """

    def __init__(self, progress: Progress, clocks: StageClocks) -> None:
        self._progress = progress
        self._clocks = clocks
        self._first: list[tuple[Any, Any]] = []
        self.state: Any = None
        """The state of what is read, after the item that came last."""
        self._iterator: Iterator[Any] | None = None
        self._closed_by: int | None = None

    def open(self) -> None:
        """Start the iteration and read the first item, which `next()` then returns."""
        # What an epoch draws from torch's global generator when it starts, seeds of a sampler and of workers, was drawn
        # before a state within the epoch was saved: it is not to be drawn again.
        with torch.random.fork_rng(devices=[], enabled=self._progress.resumes):
            self._iterator = _start(self._progress)
        self._progress.begun(self._iterator)
        for item in self:
            self._first.append((item, self.state))
            return

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._first:
            item, self.state = self._first.pop()
            return item
        if self._closed_by is not None or self._iterator is None:
            raise StopIteration
        with self._clocks.run("read", 1):
            try:
                item = next(self._iterator)
            except (KeyError, RuntimeError, TypeError) as error:
                if (explanation := explained(error)) is not None:
                    raise explanation from error
                raise
        self.state = self._progress.state_of_source()
        return item

    def close(self) -> None:
        """End the iteration, and with it what it reads."""
        this_thread = threading.get_ident()
        if self._closed_by not in (None, this_thread):
            return  # another thread is closing it
        self._closed_by = this_thread
        self._first.clear()
        _close(self._iterator)
        self._iterator = None  # last: Ctrl-C may strike before, and this is called again


def _start(progress: Progress) -> Iterator[Any]:
    reader = progress.begin()
    context = getattr(reader, "multiprocessing_context", None) or multiprocessing
    if not getattr(reader, "num_workers", 0) or context.get_start_method() == "fork":
        return iter(reader)
    progress.check_can_be_sent(failed=False)
    try:
        return iter(reader)
    except (AttributeError, TypeError, pickle.PicklingError):  # what pickle raises for a function of the user's
        progress.check_can_be_sent(failed=True)
        raise


def _close(iterator: Iterator[Any] | None) -> None:
    """End an iterator that has something to end."""
    close = getattr(iterator, "close", None)
    if close is None and not getattr(iterator, "_persistent_workers", False):
        # A DataLoader's iterator ends its workers when it is collected, which a kept traceback would delay.
        close = getattr(iterator, "_shutdown_workers", None)
    if close is not None:
        close()


def read(source: Source, stream: TextStream | None) -> Iterator[Entry]:
    """Batches, and `LaneEnd`s of lanes that have just ended, each with its cursor or its source's state.

    Args:
        source: what is read.
        stream: the `TextStream` in it, if it is one.
    """
    for item in source:
        cursors: Sequence[Cursor | None] = ()
        if stream is not None and isinstance(item, TokenBatch) and item.cursor is not None:
            cursors = stream.on_this_rank(item.cursor)
        if not isinstance(item, LaneEnd) or item.lane is not None:
            yield Entry(item, cursors, source.state)
