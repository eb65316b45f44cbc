"""The only owner of a thread: runs a generator ahead of its consumer, by a bounded weight."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)

_alive: weakref.WeakSet[Prefetcher[object]] = weakref.WeakSet()


class Prefetcher(Generic[T]):
    """An iterator that works ahead in a thread of its own.

    Items arrive in order. An exception of the source arrives as the same object, after the items before it, with a
    note that names the stage. The source is advanced, and closed, by the thread alone.

    Args:
        source: the iterator to run; if it has a `close()`, the thread calls it at the end, however that comes.
        weigh: an item's weight.
        limit: weight that may wait in the queue. One item is always let in, however heavy, so nothing blocks for good.
        stage: what the thread does, for its name and for the note on errors.
    """

    def __init__(self, source: Iterator[T], *, weigh: Callable[[T], int], limit: int, stage: str) -> None:
        self.stage = stage
        self.source_s = 0.0
        """Seconds the thread spent in the source."""
        self.put_wait_s = 0.0
        """Seconds the thread waited for room."""
        self.get_wait_s = 0.0
        """Seconds the consumer waited for an item."""
        self.peak_weight = 0
        """The heaviest the queue has been."""
        self._weigh = weigh
        self._limit = limit
        self._queue: deque[tuple[T, int]] = deque()
        self._weight = 0
        self._error: BaseException | None = None
        self._finished = False
        self._closing = False
        self._changed = threading.Condition()
        # A daemon, so that a loop which nobody closes cannot keep the interpreter alive; atexit closes it first.
        self._thread = threading.Thread(target=self._run, args=(source,), name=f"bertstream-{stage}", daemon=True)
        _alive.add(self)
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        started = time.perf_counter()
        with self._changed:
            while not (self._queue or self._finished):
                self._changed.wait()
            self.get_wait_s += time.perf_counter() - started
            if self._queue:
                item, weight = self._queue.popleft()
                self._weight -= weight
                self._changed.notify_all()
                return item
            error, self._error = self._error, None
        self.close()
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it: at most as long as the item in progress takes."""
        with self._changed:
            self._closing = True
            self._queue.clear()
            self._weight = 0
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            while self._thread.is_alive():
                self._thread.join(timeout=30)
                if self._thread.is_alive():
                    logger.warning("closing: the %s thread is still busy with the item in progress", self.stage)
        _alive.discard(self)

    def _run(self, source: Iterator[T]) -> None:
        error: BaseException | None = None
        try:
            self._pump(source)
        except BaseException as caught:  # whatever it is, it belongs to the consumer
            if hasattr(caught, "add_note"):  # Python 3.11 and later
                caught.add_note(f"raised in bertstream's {self.stage} thread")
            error = caught
        try:
            close = getattr(source, "close", None)
            if close is not None:
                close()
        except BaseException as caught:
            error = error or caught
        del source
        with self._changed:
            self._error = error
            self._finished = True
            self._changed.notify_all()

    def _pump(self, source: Iterator[T]) -> None:
        while True:
            started = time.perf_counter()
            try:
                item = next(source)
            except StopIteration:
                return
            finally:
                self.source_s += time.perf_counter() - started
            weight = self._weigh(item)
            started = time.perf_counter()
            with self._changed:
                while self._queue and self._weight + weight > self._limit and not self._closing:
                    self._changed.wait()
                self.put_wait_s += time.perf_counter() - started
                if self._closing:
                    return
                self._queue.append((item, weight))
                self._weight += weight
                self.peak_weight = max(self.peak_weight, self._weight)
                self._changed.notify_all()


@atexit.register
def _close_all() -> None:
    for prefetcher in list(_alive):
        prefetcher.close()
