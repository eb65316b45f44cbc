"""What a loader reads: a DataLoader, an iterable of batches or a `TextStream`, and how far the loop over it is."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch.utils.data import DataLoader

from ..errors import BertstreamError, ConfigError, StateError, check_at_least
from ..reading.dataset import StreamItems, TextStream
from ..reading.lane_batches import LaneEnd
from ..reading.state import STATE_VERSION, epoch_of
from ..tokens import Cursor, ReadReport, TokenBatch
from .clocks import StageClocks
from .fields import Field

logger = logging.getLogger(__name__)

_WORKER_BATCHES = 16
"""Token batches that each worker process of a stream may have ready. Workers take turns, so one that is late for a
moment stops the others once their queues are full: with 8, two workers were 1.55 to 1.73 times as fast as one, with 16
1.86 times."""


def in_workers(stream: TextStream, num_workers: int) -> DataLoader[Any]:
    """A DataLoader over a stream's token batches, read by `num_workers` processes, or by its own process for 0."""
    ahead = _WORKER_BATCHES if num_workers else None
    return DataLoader(stream, batch_size=None, num_workers=num_workers, prefetch_factor=ahead)


def read_in_workers(stream: TextStream, num_workers: int) -> Iterator[TokenBatch]:
    """The stream's batches, read as by `in_workers`, with its progress in this process and errors with their fields."""
    progress = StreamLoop(in_workers(stream, num_workers), stream)
    items = iter(progress.begin())
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


class OwnLoader:
    """Base of `EmbeddingLoader`: a source that advances its progress itself when another loader wraps it."""

    @property
    def can_resume(self) -> bool:
        """Whether its `state_dict` works."""
        raise NotImplementedError


def text_stream(loader: Any) -> TextStream | None:
    """The `TextStream` that a loader reads, or is; None for any other, and for a loader that advances it itself."""
    dataset = getattr(loader, "dataset", loader)
    return dataset if isinstance(dataset, TextStream) and not isinstance(loader, OwnLoader) else None


def reading_items(loader: Any) -> Any:
    """A loader over a `TextStream`, or the stream, as one of `TextStream.items()`; the original is unchanged."""
    stream = text_stream(loader)
    assert stream is not None
    if loader is stream:
        return StreamItems(stream)
    reader = copy.copy(loader)
    # Around `DataLoader.__setattr__`, which refuses another dataset because workers may run already. A copy has none.
    vars(reader).update(dataset=StreamItems(stream), _iterator=None)
    return reader


@dataclass
class Entry:
    """What was read, and what is known about it.

    Attributes:
        item: a batch, or the `LaneEnd` of a lane that has just ended.
        cursors: by rank, the cursor of the batch that each yields in this step.
        source_state: the state of the wrapped DataLoader after this batch.
        number: of the batch in this iteration.
        texts: the batch's, as tokens, see `set_texts`; a `LaneEnd` has none.
        weight: tokens in all, at least one for a batch, so that any group is bounded; a `LaneEnd` has none.
    """

    item: Any
    cursors: Sequence[Cursor | None] = ()
    source_state: Any = None
    number: int = 0
    texts: Mapping[Field | None, TokenBatch] = field(default_factory=dict)
    weight: int = 0

    def set_texts(self, texts: Mapping[Field | None, TokenBatch]) -> None:
        """The batch's texts as tokens."""
        self.texts = texts
        self.weight = max(1, sum(batch.num_tokens for batch in texts.values()))

    @property
    def report(self) -> ReadReport | None:
        """What a stream's reading met up to here."""
        return self.item.report if isinstance(self.item, (TokenBatch, LaneEnd)) else None


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


class Progress(Protocol):
    """How far the loop over a source is; its state is the place after the batch that the loop received last."""

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration reads."""

    def set_epoch(self, epoch: int) -> None:
        """Choose it."""

    def begin(self) -> Iterable[Any]:
        """What to iterate for an epoch, which starts where the progress is."""

    def begun(self, iterator: Iterator[Any]) -> None:
        """The iteration has started."""

    def state_of_source(self) -> Any:
        """The `Entry.source_state` of the item that was read last."""

    def count(self, report: ReadReport | None) -> None:
        """Count what reading met."""

    def received(self, entry: Entry) -> None:
        """The loop now has this batch, or has passed this `LaneEnd`."""

    def end_epoch(self, epoch: int) -> None:
        """The loop has received all of the epoch."""

    def state_dict(self) -> dict[str, Any]:
        """See `EmbeddingLoader.state_dict`."""

    def loading(self, state: Any) -> Callable[[], None]:
        """Check a state, StateError if it does not fit, and return what loads it."""


class StreamLoop:
    """Progress over a `TextStream`, alone or in somebody's DataLoader.

    Args:
        loader: the stream, or a DataLoader over it.
        stream: the stream, whose own progress is advanced here.
    """

    def __init__(self, loader: Any, stream: TextStream) -> None:
        self._reader = reading_items(loader)
        self._stream = stream
        self._say_if_workers_are_idle(getattr(loader, "num_workers", 0))
        self.knows_all_ranks = False
        """Whether entries carry the cursors of all ranks, so that every rank's state names all lanes."""

    @property
    def epoch(self) -> int:
        """The stream's."""
        return self._stream.epoch

    def _say_if_workers_are_idle(self, num_workers: int) -> None:
        busy, ranks = self._stream.lanes_with_data(), self._stream.world_size
        if num_workers > max(1, busy):
            logger.warning(
                "%d of the %d workers have nothing to read, because %s %d lanes with data: write num_workers=%d, or "
                "reading=StreamConfig(lanes=%d), which changes the order (data that cannot be cut, such as gz, also "
                "needs as many shards)",
                num_workers - busy,
                num_workers,
                "there are" if ranks == 1 else f"rank {self._stream.rank} has",
                busy,
                busy,
                num_workers * ranks,
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the next iteration's epoch."""
        self._stream.set_epoch(epoch)

    def begin(self) -> Iterable[Any]:
        """What yields the stream's items, here or in workers."""
        self._stream.progress.begin(self._stream.ranks if self.knows_all_ranks else [self._stream.rank])
        return self._reader  # type: ignore[no-any-return]

    def begun(self, iterator: Iterator[Any]) -> None:
        """Workers have taken the start with them: here the next iteration is not to find it."""
        self._stream.progress.take_start()

    def state_of_source(self) -> Any:
        """None: the batches carry cursors."""
        return None

    def count(self, report: ReadReport | None) -> None:
        """Count what was skipped; ShardError beyond the limit."""
        self._stream.progress.count(report)

    def received(self, entry: Entry) -> None:
        """Advance by a batch, or drop a lane that has ended."""
        if not isinstance(entry.item, LaneEnd):
            self._stream.progress.advance(entry.cursors)
        elif not self.knows_all_ranks and entry.item.lane is not None:
            # With the cursors of all ranks every rank has the same state, and `LaneEnd`s are not exchanged: there the
            # next batch drops the lanes ahead of its own.
            self._stream.progress.end_lane(entry.item.lane)

    def end_epoch(self, epoch: int) -> None:
        """Move to the next epoch; ShardError if none of this one's records was good."""
        self._stream.progress.end_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """See `EmbeddingLoader.state_dict`."""
        return self._stream.progress.state_dict(self._stream.settings)

    def loading(self, state: Any) -> Callable[[], None]:
        """See `EmbeddingLoader.load_state_dict`."""
        load = self._stream.loading(state)

        def load_here() -> None:
            load()
            # Workers that are kept between epochs hold the stream as it was; the next iteration starts new ones.
            kept = getattr(self._reader, "_iterator", None)
            if kept is not None:
                if hasattr(kept, "_shutdown_workers"):
                    kept._shutdown_workers()
                self._reader._iterator = None

        return load_here


class SourceLoop:
    """Progress over any other source: the source's own state, where it has one.

    Args:
        source: a DataLoader, or any iterable of batches.
    """

    def __init__(self, source: Iterable[Any]) -> None:
        self._source: Any = source
        self._state: Any = None
        self._was_read = False
        self._has_state = has_state(source)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the next iteration's epoch, also in every part of the source that has `set_epoch`."""
        check_at_least("epoch", epoch, 0)
        if epoch != self.epoch:
            self._state = None
        self.epoch = epoch
        parts: list[Any] = [self._source]
        parts += [getattr(self._source, name, None) for name in ("batch_sampler", "sampler", "dataset")]
        parts.append(getattr(parts[1], "sampler", None))
        for part in {id(part): part for part in parts}.values():
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)

    def begin(self) -> Iterable[Any]:
        """The source."""
        return self._source  # type: ignore[no-any-return]

    def begun(self, iterator: Iterator[Any]) -> None:
        """Remember a source that can be read only once.

        Raises:
            ConfigError: it was read before.
        """
        if iterator is self._source:
            if self._was_read:
                raise ConfigError(
                    f"the wrapped {type(self._source).__name__} can be read only once, and was: wrap something that "
                    "starts again at each iteration, such as a DataLoader or a list of batches"
                )
            self._was_read = True

    def state_of_source(self) -> Any:
        """The source's state now; None where it has none."""
        return self._source.state_dict() if self._has_state else None

    def count(self, report: ReadReport | None) -> None:
        """Nothing: only streams report."""

    def received(self, entry: Entry) -> None:
        """Remember the source's state after this batch."""
        self._state = entry.source_state

    def end_epoch(self, epoch: int) -> None:
        """Count the epoch, unless the loop has chosen another already."""
        self._state = None
        if self.epoch == epoch:
            self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """See `EmbeddingLoader.state_dict`."""
        self._check_has_state()
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "source": self._source.state_dict() if self._state is None else self._state,
        }

    def loading(self, state: Any) -> Callable[[], None]:
        """See `EmbeddingLoader.load_state_dict`."""
        epoch = epoch_of(state, "a loader around a DataLoader", ("source",))
        self._check_has_state()

        def load() -> None:
            self.epoch, self._state = epoch, None
            self._source.load_state_dict(state["source"])

        return load

    def _check_has_state(self) -> None:
        if not self._has_state:
            raise StateError(
                f"a {type(self._source).__name__} cannot say where it is, so this loader cannot resume: wrap "
                "torchdata's StatefulDataLoader, or read shards with bertstream.stream",
                key="source",
            )


def has_state(source: Any) -> bool:
    """Whether a source can say where it is."""
    if isinstance(source, OwnLoader):
        return source.can_resume
    return hasattr(source, "state_dict") and hasattr(source, "load_state_dict")


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
        self._iterator = iter(self._progress.begin())
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
            item = next(self._iterator)
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
