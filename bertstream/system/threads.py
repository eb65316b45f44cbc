"""The only owner of threads: one runs a generator ahead of its consumer, one works behind, both by a bounded weight."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

EXIT_WAIT_S = 30.0
"""How long the end of the process waits for an item in progress; a forward takes seconds at most."""

_alive: weakref.WeakSet[Prefetcher[Any] | BackgroundWorker[Any]] = weakref.WeakSet()


class Prefetcher(Generic[T]):
    """An iterator that works ahead in a thread of its own.

    Items arrive in order. An exception of the source arrives as the same object, after the items before it, with a
    note that names the stage. The source is advanced, and closed, by the thread alone.

    Args:
        source: the iterator to run; if it has a `close()`, the thread calls it at the end, however that comes.
        weigh: an item's weight; counted as at least 1, so that the queue is bounded in any case.
        limit: weight that may wait in the queue. One item is always let in, however heavy, so nothing blocks for good.
        stage: what the thread does, for its name and for the note on errors.
    """

    def __init__(self, source: Iterator[T], *, weigh: Callable[[T], int], limit: int, stage: str) -> None:
        self.stage = stage
        self.put_wait_s = 0.0
        """Seconds the thread waited for room."""
        self.peak_weight = 0
        """The heaviest the queue has been."""
        self._weigh = weigh
        self._limit = limit
        self._queue: deque[tuple[T, int]] = deque()
        self._weight = 0
        self._error: BaseException | None = None
        self._finished = False
        self._closing = False
        # `with` on the lock itself: entering a Condition runs Python code, where Ctrl-C can strike with the lock taken.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        # A daemon, so that a loop which nobody closes cannot keep the interpreter alive; atexit stops it first.
        self._thread = threading.Thread(target=self._run, args=(source,), name=f"bertstream-{stage}", daemon=True)
        _alive.add(self)
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        with self._lock:
            while not (self._queue or self._finished):
                self._changed.wait()
            if self._queue:
                item, weight = self._queue.popleft()
                self._weight -= weight
                self._changed.notify_all()
                return item
            error, self._error = self._error, None
        self.close()
        try:
            raise StopIteration if error is None else error
        finally:
            del error  # its traceback holds this frame: a circle would keep all that its frames hold alive

    def raise_limit(self, weight: int) -> None:
        """Let at least so much weight wait from now on."""
        with self._lock:
            self._limit = max(self._limit, weight)
            self._changed.notify_all()

    def close(self, patience_s: float | None = None) -> bool:
        """Stop the thread and wait for it: at most as long as the item in progress takes.

        What it read ahead is dropped, an error included: that is logged.

        Args:
            patience_s: leave it to end by itself after so long; None is never.
        Returns:
            Whether the thread has ended, as far as one can wait for that.
        """
        if sys.is_finalizing():
            return True  # threads stand still then, and one that stands still cannot be waited for
        self._stop()
        if self._thread is not threading.current_thread():
            while not self._ended_within(patience_s or 30):
                logger.warning("closing: the %s thread is still busy with the item in progress", self.stage)
                if patience_s is not None:
                    return False
            error, self._error = self._error, None
            if error is not None:
                logger.warning("closing: the %s thread had failed ahead of its consumer: %r", self.stage, error)
        _alive.discard(self)
        return True

    def _stop(self) -> None:
        with self._lock:
            self._closing = True
            self._queue.clear()
            self._weight = 0
            self._changed.notify_all()

    def _ended_within(self, seconds: float) -> bool:
        self._thread.join(timeout=seconds)
        return not self._thread.is_alive()

    def _run(self, source: Iterator[T]) -> None:
        for step in (self._pump, _close_source):
            try:
                step(source)
            except BaseException as error:  # whatever it is, it belongs to the consumer
                if self._error is None:
                    self._error = error
                    if hasattr(error, "add_note"):  # Python 3.11 and later
                        error.add_note(f"raised in bertstream's {self.stage} thread")
        with self._lock:
            self._finished = True
            self._changed.notify_all()

    def _pump(self, source: Iterator[T]) -> None:
        while True:
            try:
                item = next(source)
            except StopIteration:
                return
            weight = max(1, self._weigh(item))
            started = time.perf_counter()
            with self._lock:
                while self._queue and self._weight + weight > self._limit:  # closing empties the queue
                    self._changed.wait()
                self.put_wait_s += time.perf_counter() - started
                if self._closing:
                    return
                self._queue.append((item, weight))
                self._weight += weight
                self.peak_weight = max(self.peak_weight, self._weight)
                self._changed.notify_all()
            del item  # its memory is the consumer's now, not ours until the next item


class BackgroundWorker(Generic[T]):
    """Work that nobody waits for: a bounded queue before a thread that lives as long as there is something to do.

    What was offered when the process ends is still done, within `EXIT_WAIT_S`.

    Args:
        handle: called in the thread with all that waits, in order. Its errors are logged, and lose those items alone.
        weigh: an item's weight.
        limit: weight that may wait or be in progress. One item is always let in, however heavy.
        stage: what the thread does, for its name and for messages.
    """

    def __init__(self, handle: Callable[[list[T]], None], *, weigh: Callable[[T], int], limit: int, stage: str) -> None:
        self.stage = stage
        self._handle = handle
        self._weigh = weigh
        self._limit = limit
        self._queue: list[T] = []
        self._weight = 0
        self._closing = False
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        _alive.add(self)

    def offer(self, item: T, *, wait: bool = False) -> bool:
        """Queue an item.

        Args:
            item: what to handle.
            wait: whether to wait for room where there is none.
        Returns:
            False where there was no room, or it was closed, or the process is ending: the item is not taken.
        """
        weight = self._weigh(item)
        with self._lock:
            while wait and self._weight and self._weight + weight > self._limit and not self._closing:
                self._changed.wait()
            if self._closing or (self._weight and self._weight + weight > self._limit):
                return False
            self._queue.append(item)
            self._weight += weight
            if self._thread is None:
                name = f"bertstream-{self.stage}"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()
            return True

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was offered is done; False where that took longer than `timeout_s`."""
        with self._lock:
            return self._changed.wait_for(lambda: self._thread is None, timeout_s)

    def close(self, timeout_s: float | None = None) -> bool:
        """Take nothing more, and wait until all that was offered is done; False where that took longer."""
        self._stop()
        return self.flush(timeout_s)

    def _stop(self) -> None:
        with self._lock:
            self._closing = True
            self._changed.notify_all()

    def _ended_within(self, seconds: float) -> bool:
        return self.flush(seconds)

    def _run(self) -> None:
        while True:
            with self._lock:
                items, self._queue = self._queue, []
                if not items:
                    self._thread = None
                    self._changed.notify_all()
                    return
            weight = sum(map(self._weigh, items))
            try:
                self._handle(items)
            except Exception:
                logger.exception("the %s thread lost %d items", self.stage, len(items))
            del items
            with self._lock:
                self._weight -= weight
                self._changed.notify_all()


def _close_source(source: Iterator[Any]) -> None:
    close = getattr(source, "close", None)
    if close is not None:
        close()


@atexit.register
def _stop_all() -> None:
    prefetchers = list(_alive)
    for prefetcher in prefetchers:
        prefetcher._stop()
    deadline = time.monotonic() + EXIT_WAIT_S
    for prefetcher in prefetchers:
        if not prefetcher._ended_within(max(0.0, deadline - time.monotonic())):
            logger.warning("exiting: the %s thread is still busy and is left behind", prefetcher.stage)


# The threads do not exist in a forked child, and their locks may be held for good.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_alive.clear)
