"""One epoch on its way through a loader: what is read, in step with other ranks, gathered to be encoded together."""

from __future__ import annotations

import hashlib
import inspect
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader

from .dataset import Skip, TextStream
from .distributed import Peers
from .errors import BertstreamError, ConfigError, LoaderClosedError
from .lanes import LaneQueue, cursor_from_json, cursor_to_json
from .places import Place
from .prefetch import Prefetcher
from .stages import Stages
from .types import Cursor, SupportsEncode, TokenBatch

T = TypeVar("T")

logger = logging.getLogger(__name__)

_WORKER_BATCHES = 16
"""Token batches that each worker process of a stream may have ready. Batches are taken in turns, so a worker that is
behind for a moment stops the others once those have theirs: with 8, two workers were 1.55 to 1.73 times as fast as one,
with 16 1.86 times."""

_GROUP_FORWARDS = {"cpu": 8}
"""Forwards' worth of tokens that are gathered to be encoded together, else one. A CPU's forwards are small, so that
they stay in its caches; out of many texts each gets some of about one length."""

_GROUP_S = 0.5
"""Seconds that encoding a group should take at most: a loop that is left waits for the group in progress, and behind an
epoch's last group there is nothing left to encode while its steps run. A quarter, a half and one were equally fast."""


def in_workers(stream: TextStream, num_workers: int) -> DataLoader[Any]:
    """A DataLoader of a stream's token batches, read by so many processes; by whoever iterates it where that is 0."""
    ahead = _WORKER_BATCHES if num_workers else None
    return DataLoader(stream, batch_size=None, num_workers=num_workers, prefetch_factor=ahead)


@dataclass
class Run:
    """What an iteration and whoever ends it both know of it."""

    worker: Prefetcher[Any] | None = None
    ended_by: str | None = None
    is_over: bool = False
    waits_since: float | None = None


class Iteration(Iterator[Any]):
    """What a training loop iterates. Dropping it ends the worker: it holds the only reference to the generator."""

    def __init__(self, batches: Generator[Any, None, None], run: Run, stages: Stages) -> None:
        self._batches = batches
        self._run = run
        self._stages = stages
        self._handed_out_at: float | None = None

    def __next__(self) -> Any:
        if self._handed_out_at is not None:
            self._stages.add("step", self._handed_out_at, 1)
            self._handed_out_at = None
        started = time.perf_counter()
        self._run.waits_since = time.monotonic()
        for batch in self._batches:
            self._run.waits_since = None
            self._stages.add("wait", started, 1)
            self._handed_out_at = time.perf_counter()
            return batch
        if self._run.ended_by is not None:
            raise LoaderClosedError(self._run.ended_by)
        raise StopIteration

    def end(self, reason: str) -> None:
        """Stop the worker, from whatever thread; the next `next()` says why."""
        if inspect.getgeneratorstate(self._batches) == inspect.GEN_CLOSED:
            return
        self._run.ended_by = reason
        self._run.is_over = True
        if self._run.worker is not None:
            self._run.worker.close()
        # A loop that waits in another thread has the generator running: it wakes up, and ends it there.
        with suppress(ValueError):
            self._batches.close()


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
        if isinstance(item, BertstreamError):
            raise item
        cursors: list[Cursor | None] = []
        if stream is not None and isinstance(item, TokenBatch):
            cursors = [None] * stream.world_size
            cursors[stream.rank] = item.cursor
        if not isinstance(item, Skip) or item.lane is not None:
            yield Entry(item, cursors, source.state)


def agreed(
    groups: Groups[Entry],
    stream: TextStream,
    peers: Peers,
    run: Run,
    about: Mapping[str, Any],
    count_left: Callable[[int], None],
) -> Generator[list[Entry], None, None]:
    """The groups, each with as many batches on every rank.

    A rank offers what it has gathered, and all take as many batches as the smallest offer has; the others' come again
    in their next group. So no batch that was agreed on waits for a rank to read on: that one's loop may wait for the
    step that this batch is for.

    Args:
        groups: this rank's, of what `located` gives.
        stream: what they are read from; `uneven` says what happens where a rank has no more.
        peers: the other ranks.
        run: whether the iteration is over is asked while waiting for them.
        about: what must be the same on every rank.
        count_left: told the texts of each batch that is not handed out because another rank is through.
    Raises:
        ConfigError: it is not.
    """
    pad, epoch = stream.uneven == "pad", stream.epoch
    last: TokenBatch | None = None
    agreed_on = 0
    reason = "it stopped iterating"
    gathered = iter(groups)

    def exchange(message: Any) -> list[Any] | None:
        return peers.exchange(message, agreed_on, lambda: run.is_over, lambda: run.waits_since)

    try:
        everybody = exchange(dict(about))
        if everybody is None:
            return
        _refuse_differences(about, everybody)
        while True:
            group = next(gathered, [])
            if run.is_over:
                return
            batches = [entry for entry in group if isinstance(entry.item, TokenBatch)]
            if group and not batches:
                yield group
                continue
            offer = [None if e.item.cursor is None else cursor_to_json(e.item.cursor) for e in batches]
            offers: list[list[Any]] | None = exchange(offer)
            if offers is None:
                return
            if not (any(offers) if pad else all(offers)):
                reason = ""
                groups.put_back(group)
                _count_rest(gathered, stream, run, count_left)
                return
            count = min(len(offered) for offered in offers if offered)
            is_through = not batches
            if is_through:
                if last is None:  # it went on from a place behind its last batch, or no lane is its own
                    last = stream.any_batch()
                    assert last is not None  # another rank has one
                group = batches = [Entry(last) for _ in range(count)]
            elif len(batches) > count:
                end = next(place for place, entry in enumerate(group) if entry is batches[count])
                groups.put_back(group[end:])
                del group[end:], batches[count:]
            for step, entry in enumerate(batches):
                places = [offered[step] if offered else None for offered in offers]
                entry.cursors = [None if place is None else cursor_from_json(place, epoch) for place in places]
                entry.number = agreed_on + step
                last = entry.item
                if pad:
                    entry.item = _marked(last, repeated=is_through)
                    entry.texts = {None: entry.item}
            agreed_on += count
            del batches, entry, offer, offers  # their memory is the consumer's from now on
            # The others' batches may be light and one that is repeated heavy: together they could be of any size.
            yield from [[entry] for entry in group] if is_through else [group]
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else reason
        raise
    finally:
        if reason:
            with suppress(Exception):  # the store may be gone with the rank that held it
                peers.leave(reason)


def _count_rest(
    gathered: Iterator[list[Entry]], stream: TextStream, run: Run, count_left: Callable[[int], None]
) -> None:
    """Count what nobody gets, without keeping the others, who are in the next epoch, from going on."""
    until = time.monotonic() + stream.rank_timeout_s / 4
    try:
        for group in gathered:
            if run.is_over:
                return
            if time.monotonic() > until:
                logger.warning("the rest of the epoch, which no rank gets, takes long to read: left_texts is too low")
                return
            count_left(sum(len(entry.item) for entry in group if isinstance(entry.item, TokenBatch)))
    except Exception as error:
        logger.warning("the rest of the epoch, which no rank gets, is broken, and left_texts too low: %s", error)


def same_on_every_rank(stream: TextStream, queues: Sequence[LaneQueue | None] | None) -> dict[str, Any]:
    """What the ranks of a stream must have in common, or some records would come twice and others never."""
    about = stream.settings | {"epoch": stream.epoch, "uneven": stream.uneven}
    if queues is None or None in queues:
        return about
    places = [[cursor_to_json(cursor) for cursor in queue.cursors] for queue in queues if queue is not None]
    return about | {"state": hashlib.sha256(repr(places).encode()).hexdigest()[:16]}


def _refuse_differences(own: Mapping[str, Any], everybody: Sequence[Mapping[str, Any]]) -> None:
    for rank, theirs in enumerate(everybody):
        for name in own:
            if name in theirs and theirs[name] != own[name]:
                raise ConfigError(
                    f"rank {rank} streams with {name}={theirs[name]!r}, this rank with {name}={own[name]!r}: give them "
                    "the same shards, settings and state, and they deal the records among themselves"
                )


def _marked(batch: TokenBatch, *, repeated: bool) -> TokenBatch:
    """The batch with `__repeated__` among its fields; a repeated one reports nothing again."""
    marked = replace(batch, fields=batch.fields | {"__repeated__": repeated})
    if repeated:
        marked.report = marked.cursor = None
    return marked


def group_tokens(encoder: SupportsEncode) -> int:
    """The limit of `Groups` for an encoder: tokens that are encoded together at most."""
    return encoder.max_forward_tokens * _GROUP_FORWARDS.get(encoder.device.type, 1)


class Groups(Generic[T]):
    """Gathers items into groups of a bounded weight, to be encoded together.

    The first group is the first item alone, so that the loop need not wait for more; each later one may weigh twice as
    much as the one before might have, up to the limit. By the clock too, unless that is to have no say: a group is
    closed when gathering it took longer than the last one's encoding (then reading is what holds the loop up, and
    waiting for more would not help), and none may weigh more than half a second encodes.

    Args:
        items: what to gather.
        weigh: an item's weight. A single one may be heavier than the limit.
        limit: weight of a group at most.
        by_the_clock: whether groups depend on how long things take.
    """

    def __init__(self, items: Iterator[T], *, weigh: Callable[[T], int], limit: int, by_the_clock: bool) -> None:
        self._items = items
        self._weigh = weigh
        self._limit = limit
        self._by_the_clock = by_the_clock
        self._budget = 1
        self._encode_s = 0.0
        self._waiting: deque[T] = deque()

    def __iter__(self) -> Generator[list[T], None, None]:
        """Groups; an error of the items comes behind the group that was gathered before it."""
        error: Exception | None = None
        try:
            while error is None or self._waiting:
                group: list[T] = []
                weight, started = 0, time.perf_counter()
                while True:
                    if not self._waiting and error is None:
                        try:
                            self._waiting.append(next(self._items))
                        except Exception as raised:
                            error = raised
                    if not self._waiting:
                        break
                    own = self._weigh(self._waiting[0])
                    if group and weight + own > self._budget:
                        break
                    group.append(self._waiting.popleft())
                    weight += own
                    is_late = self._by_the_clock and time.perf_counter() - started > self._encode_s
                    if weight >= self._budget or is_late:
                        break
                if group:
                    yield group
            if not isinstance(error, StopIteration):
                raise error
        finally:
            del error  # its traceback holds this frame: a circle would keep all that its frames hold alive

    def put_back(self, items: Sequence[T]) -> None:
        """Items of the last group that come first in the next."""
        self._waiting.extendleft(reversed(items))

    def encoded(self, weight: int, seconds: float) -> None:
        """Say how long a group took to be encoded."""
        if not weight:
            return
        self._encode_s = seconds
        # By the budget, which batches of unequal weight never fill, but not far beyond what was ever seen.
        grown = min(self._limit, max(2 * weight, min(2 * self._budget, 4 * weight)))
        self._budget = max(self._budget, grown)
        if self._by_the_clock and seconds > 0:
            self._budget = max(1, min(self._budget, int(weight * _GROUP_S / seconds)))
