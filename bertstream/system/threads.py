"""Threads: `Prefetcher` runs an iterator ahead of its consumer, `BackgroundWorker` does work that nobody waits for.

The queues are bounded by the weight of their items, and the threads end with the process. This file imports nothing
but the standard library.
"""

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
"""How long a process that ends waits for items in progress; a forward takes seconds at most."""

_alive: weakref.WeakSet[Prefetcher[Any] | BackgroundWorker[Any]] = weakref.WeakSet()


class Prefetcher(Generic[T]):
    """Run an iterator ahead of its consumer, in a thread.

    Items arrive in order. An exception of the source arrives as the same object, after the items before it, with a
    note that names the stage. Only the thread advances and closes the source.

    Args:
        source: the iterator to run. If it has `close()`, the thread calls it when it ends, for whatever reason.
        weigh: gives an item's weight. Less than 1 counts as 1, which keeps the queue bounded.
        limit: gives the most weight that may wait in the queue. An empty queue takes any item, so nothing blocks
            forever.
        stage: what the thread does; part of its name and of the note on errors.
    Attributes:
        stage: see Args.
        put_wait_s: seconds the thread has waited for room in the queue.
        peak_weight: the most weight the queue has held.
    """

    def __init__(self, source: Iterator[T], *, weigh: Callable[[T], int], limit: Callable[[], int], stage: str) -> None:
        self.stage = stage
        self.put_wait_s = 0.0
        self.peak_weight = 0
        self._weigh = weigh
        self._limit = limit
        self._queue: deque[tuple[T, int]] = deque()
        self._weight = 0
        self._error: BaseException | None = None
        self._finished = False
        self._closing = False
        self._is_parents = False
        self._make_lock()
        # A daemon: a loop that is never closed must not keep the interpreter alive. `_stop_all` stops it before that.
        self._thread = threading.Thread(target=self._run, args=(source,), name=f"bertstream-{stage}", daemon=True)

    def _make_lock(self) -> None:
        # Methods take the lock itself: entering a Condition runs Python code, and Ctrl-C there would leave it locked.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    def start(self) -> None:
        """Begin to run ahead: apart from the constructor, so that Ctrl-C never leaves a thread without an owner."""
        _alive.add(self)
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        if self._is_parents:
            raise RuntimeError(
                f"this process was forked from one whose {self.stage} thread it does not have: begin an iteration of "
                "its own, with iter(loader)"
            )
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
            del error  # its traceback refers to this frame: the cycle would keep all objects of its frames alive

    def close(self, timeout_s: float | None = None) -> bool:
        """Stop the thread, and wait until it has finished the item in progress.

        Items read ahead are dropped. An error among them is logged.

        Args:
            timeout_s: seconds to wait for the thread, which then ends on its own; None waits as long as it takes.
        Returns:
            False if the thread is still running.
        """
        if sys.is_finalizing():
            return True  # the interpreter has frozen its threads: joining one would hang
        self._stop()
        if self._thread is not threading.current_thread():
            while not self._ended_within(timeout_s or 30):
                logger.warning("closing: the %s thread is still busy with the item in progress", self.stage)
                if timeout_s is not None:
                    return False
            error, self._error = self._error, None
            if error is not None:
                logger.warning("closing: the %s thread had failed ahead of its consumer: %r", self.stage, error)
        _alive.discard(self)
        return True

    def _end_in_child(self) -> None:
        self._make_lock()
        self._is_parents = True  # and so are its items: a child cannot free what they hold on a GPU

    def _stop(self) -> None:
        with self._lock:
            self._closing = True
            self._queue.clear()
            self._weight = 0
            self._changed.notify_all()

    def _ended_within(self, seconds: float) -> bool:
        if self._thread.ident is not None:  # it was started
            self._thread.join(timeout=seconds)
        return not self._thread.is_alive()

    def _run(self, source: Iterator[T]) -> None:
        for step in (self._pump, _close_source):
            try:
                step(source)
            except BaseException as error:  # any error goes to the consumer
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
                while (
                    self._queue and self._weight + weight > self._limit()
                ):  # closing empties the queue, which ends this
                    self._changed.wait()
                self.put_wait_s += time.perf_counter() - started
                if self._closing:
                    return
                self._queue.append((item, weight))
                self._weight += weight
                self.peak_weight = max(self.peak_weight, self._weight)
                self._changed.notify_all()
            del item  # the consumer owns it: do not keep its memory until the next item is ready


class BackgroundWorker(Generic[T]):
    """Handle items in a background thread that runs only while there are any.

    A process that ends still handles the queued items, for up to `EXIT_WAIT_S`.

    Args:
        handle: called in the thread with all queued items, in order. An error is logged, and only those items are lost.
        weigh: gives an item's weight.
        limit: the most weight that may be queued or in progress. An idle worker takes any item, however heavy.
        stage: what the thread does; part of its name and of messages.
    Attributes:
        stage: see Args.
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
            wait: wait for room if the queue is full.
        Returns:
            False if the item was refused: the queue is full, or the worker is closed, or the process is ending.
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
        """Wait until all queued items are handled; False if that takes longer than `timeout_s`."""
        with self._lock:
            return self._changed.wait_for(lambda: self._thread is None, timeout_s)

    def close(self, timeout_s: float | None = None) -> bool:
        """Refuse new items and wait until all queued ones are handled; False if that takes longer than `timeout_s`."""
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
    owners = list(_alive)
    for owner in owners:
        owner._stop()
    deadline = time.monotonic() + EXIT_WAIT_S
    for owner in owners:
        if not owner._ended_within(max(0.0, deadline - time.monotonic())):
            logger.warning("exiting: the %s thread is still busy, and the process ends without it", owner.stage)


def _after_fork() -> None:
    """In a forked child, which has none of these threads, while a lock that one of them held stays locked."""
    for owner in list(_alive):
        if isinstance(owner, Prefetcher):
            owner._end_in_child()
    _alive.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
