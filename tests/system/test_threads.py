"""Threads keep the order, stay within their limit, deliver errors, and always end."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from bertstream.system import threads
from bertstream.system.threads import BackgroundWorker, Prefetcher

WAIT_S = 10.0
"""Seconds a test waits for a thread before it fails."""

WEIGHTS = st.lists(st.integers(0, 9), max_size=20)


def ahead(source: Iterable[Any], *, limit: int = 4, weigh: Callable[[Any], int] = lambda item: 1) -> Prefetcher[Any]:
    worker = Prefetcher(iter(source), weigh=weigh, limit=lambda: limit, stage="encode")
    worker.start()
    return worker


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.001)


class Tracked:
    """A source that counts its items, may fail at the end, and remembers which threads ran and closed it."""

    def __init__(self, items: Iterable[Any], error: BaseException | None = None) -> None:
        self.given = 0
        self.threads: set[threading.Thread] = set()
        self.closed_in: list[threading.Thread] = []
        self._items = items
        self._error = error

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self._items:
                self.threads.add(threading.current_thread())
                self.given += 1
                yield item
            if self._error is not None:
                raise self._error
        finally:
            self.closed_in.append(threading.current_thread())


def endless() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


# --- order and limit --------------------------------------------------------------------------------------------------


@given(WEIGHTS, st.integers(0, 12))
def test_items_arrive_in_order_and_an_exhausted_prefetcher_stays_exhausted(weights: list[int], limit: int) -> None:
    worker = ahead(enumerate(weights), limit=limit, weigh=lambda item: item[1])
    assert list(worker) == list(enumerate(weights))
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(worker)


@given(WEIGHTS, st.integers(0, 12))
def test_the_queue_holds_items_up_to_the_limit_or_a_single_item(weights: list[int], limit: int) -> None:
    """Without a consumer, the thread stops at the first item that does not fit, and holds that item."""
    held = fitting = 0
    for weight in weights:
        if fitting and held + max(1, weight) > limit:
            break
        held += max(1, weight)
        fitting += 1
    source = Tracked(enumerate(weights))
    worker = ahead(source, limit=limit, weigh=lambda item: item[1])
    wait_until(lambda: source.given == min(fitting + 1, len(weights)) and worker.peak_weight == held)
    assert list(worker) == list(enumerate(weights))
    assert worker.peak_weight <= max([limit, *(max(1, weight) for weight in weights)])


def test_items_without_weight_do_not_make_the_queue_unbounded() -> None:
    source = Tracked(endless())
    weightless = ahead(source, limit=3, weigh=lambda item: 0)
    wait_until(lambda: source.given == 4)
    assert [next(weightless) for _ in range(10)] == list(range(10))
    weightless.close()
    assert source.given <= 14


def test_items_the_consumer_has_taken_are_freed() -> None:
    class Item:
        pass

    release = threading.Event()

    def source() -> Iterator[Item]:
        yield Item()
        release.wait()

    worker = ahead(source())
    seen = weakref.ref(next(worker))
    try:
        wait_until(lambda: seen() is None)
    finally:
        release.set()
        worker.close()


def test_the_time_spent_waiting_for_room_is_measured() -> None:
    """At least half of the sleep: the threads may start late."""
    source = Tracked(range(3))
    worker = ahead(source, limit=1)
    wait_until(lambda: source.given == 2)
    time.sleep(0.1)
    assert list(worker) == [0, 1, 2]
    assert worker.put_wait_s >= 0.05


def test_the_limit_is_asked_for_each_item() -> None:
    limits = [2]

    def source() -> Iterator[int]:
        for number in range(10):
            if number == 4:
                limits.append(5)  # as where a heavier group than ever is encoded
            yield number

    worker = Prefetcher(source(), weigh=lambda item: 1, limit=lambda: limits[-1], stage="encode")
    worker.start()
    wait_until(lambda: worker.peak_weight == 2)
    assert [next(worker), next(worker)] == [0, 1]
    wait_until(lambda: worker.peak_weight == 5)
    assert list(worker) == list(range(2, 10)) and worker.peak_weight == 5


def test_a_prefetcher_that_was_never_started_closes() -> None:
    """Ctrl-C may strike between the two."""
    worker = Prefetcher(iter([1]), weigh=lambda item: 1, limit=lambda: 1, stage="encode")
    assert worker.close() and worker.close(0.1)


def test_closing_waits_no_longer_than_the_timeout() -> None:
    release = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        release.wait(10)
        yield 1

    worker = ahead(source())
    next(worker)
    assert not worker.close(0.05)
    release.set()
    assert worker.close(10)


# --- errors (law 7) ---------------------------------------------------------------------------------------------------


class OwnError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)
        self.second = second


@given(st.integers(0, 6), st.integers(1, 4))
def test_an_error_arrives_once_as_itself_after_the_items_before_it(items: int, limit: int) -> None:
    error = OwnError("it broke", "here")
    source = Tracked(range(items), error)
    worker = ahead(source, limit=limit)
    assert [next(worker) for _ in range(items)] == list(range(items))
    with pytest.raises(OwnError) as caught:
        next(worker)
    assert caught.value is error
    if sys.version_info >= (3, 11):
        assert error.__notes__ == ["raised in bertstream's encode thread"]
    assert len(source.closed_in) == 1 and not worker._thread.is_alive()
    with pytest.raises(StopIteration):
        next(worker)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()], ids=repr)
def test_any_exception_of_the_source_reaches_the_consumer(error: BaseException) -> None:
    worker = ahead(Tracked([1], error))
    assert next(worker) == 1
    with pytest.raises(type(error)) as caught:
        next(worker)
    assert caught.value is error


def test_an_error_raised_by_weigh_reaches_the_consumer() -> None:
    worker = ahead(["a"], weigh=lambda item: item.weight)
    with pytest.raises(AttributeError, match="weight"):
        next(worker)


class BadlyClosed:
    """An iterator of two items whose close() fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self._items = iter([0, 1])
        self._error = error

    def __iter__(self) -> BadlyClosed:
        return self

    def __next__(self) -> int:
        for item in self._items:
            return item
        raise self._error or StopIteration

    def close(self) -> None:
        raise OSError("disk full")


def test_an_error_raised_by_the_sources_close_arrives_after_the_last_item() -> None:
    worker = ahead(BadlyClosed())
    assert [next(worker), next(worker)] == [0, 1]
    with pytest.raises(OSError, match="disk full"):
        next(worker)


def test_only_the_first_of_two_errors_arrives() -> None:
    worker = ahead(BadlyClosed(OwnError("first", "")))
    with pytest.raises(OwnError):
        list(worker)


def test_an_error_read_ahead_is_logged_when_closing_early(caplog: pytest.LogCaptureFixture) -> None:
    worker = ahead(BadlyClosed(), limit=1)
    assert next(worker) == 0
    with caplog.at_level(logging.WARNING, "bertstream.system.threads"):
        worker.close()
    assert "the encode thread had failed ahead of its consumer: OSError('disk full')" in caplog.text
    with pytest.raises(StopIteration):
        next(worker)


def test_a_handled_error_keeps_nothing_alive() -> None:
    """A cycle through its traceback would keep a batch, or a DataLoader's workers, until garbage is collected."""

    def source() -> Iterator[int]:
        yield 0
        raise OwnError("it broke", "")

    worker = ahead(source())
    gc.disable()
    try:
        error = None
        try:
            list(worker)
        except OwnError as caught:
            error = weakref.ref(caught)
        assert error is not None and error() is None
    finally:
        gc.enable()


# --- the end (law 6) --------------------------------------------------------------------------------------------------


@given(st.integers(0, 8), st.integers(0, 8), st.integers(1, 4))
def test_closing_anywhere_ends_the_thread_and_closes_the_source_in_it(items: int, taken: int, limit: int) -> None:
    source = Tracked(range(items))
    worker = ahead(source, limit=limit)
    for _ in range(min(taken, items)):
        next(worker)
    worker.close()
    worker.close()
    assert not worker._thread.is_alive()
    assert source.closed_in == [worker._thread] and source.threads <= {worker._thread}
    with pytest.raises(StopIteration):
        next(worker)


def test_closing_while_the_thread_waits_for_room_ends_it() -> None:
    source = Tracked(endless())
    worker = ahead(source, limit=1)
    wait_until(lambda: source.given == 2)  # one in the queue, one held by the thread
    worker.close()
    assert source.given == 2 and source.closed_in == [worker._thread]


def test_closing_before_the_first_item_ends_the_thread() -> None:
    started, release = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        started.set()
        release.wait(WAIT_S)
        yield 0

    worker = ahead(source())
    assert started.wait(WAIT_S)
    threading.Timer(0.05, release.set).start()
    worker.close()
    assert release.is_set() and not worker._thread.is_alive(), "close() waits for the item in progress"


def test_a_waiting_consumer_returns_when_another_thread_closes() -> None:
    release = threading.Event()

    def source() -> Iterator[int]:
        release.wait(WAIT_S)
        yield 0

    worker, found = ahead(source()), []
    consumer = threading.Thread(target=lambda: found.extend(worker))
    consumer.start()
    threading.Timer(0.05, release.set).start()
    worker.close()
    consumer.join(WAIT_S)
    assert not consumer.is_alive() and found in ([], [0])


def test_a_source_may_close_its_own_prefetcher() -> None:
    box: list[Prefetcher[int]] = []
    ready = threading.Event()

    def source() -> Iterator[int]:
        ready.wait(WAIT_S)
        box[0].close()
        yield 0

    box.append(ahead(source()))
    ready.set()
    assert list(box[0]) == []


# --- the end of the process -------------------------------------------------------------------------------------------

MODULE_ALONE = f"""
import contextlib, importlib.util, os, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of a fork with running threads
spec = importlib.util.spec_from_file_location("threads", {threads.__file__!r})
threads = sys.modules["threads"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(threads)
assert "torch" not in sys.modules, "the module must not import torch"

def ahead(source):
    worker = threads.Prefetcher(source, weigh=lambda item: 1, limit=lambda: 2, stage="encode")
    worker.start()
    return worker

@contextlib.contextmanager
def lock_held(worker):
    held, done = threading.Event(), threading.Event()

    def hold():
        with worker._changed:
            held.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    yield
    done.set()
    holder.join()
"""


def process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that imports this one module of the package."""
    command = [sys.executable, "-c", MODULE_ALONE + dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


def test_a_process_that_never_closes_ends_silently_and_closes_the_source(tmp_path: Path) -> None:
    code = """
    def source():
        try:
            while True:
                time.sleep(0.01)
                yield 0
        finally:
            open(sys.argv[1], "w").close()

    worker = ahead(source())
    next(worker)
    """
    done = process(code, str(tmp_path / "closed"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "closed").exists()


def test_a_stuck_source_does_not_keep_the_process_alive() -> None:
    """A loop that is still open closes its prefetcher again when the interpreter clears the script's names.

    The names are cleared only if the thread, which never ends, refers to none of the script's functions.
    """
    code = """
    from itertools import chain

    threads.EXIT_WAIT_S = 0.2

    def loop(write=os.write):
        stuck = chain(["item"], iter(threading.Event().wait, None))
        worker = threads.Prefetcher(stuck, weigh=len, limit=int, stage="encode")
        worker.start()
        try:
            yield from worker
        finally:
            worker.close()
            write(1, b"closed")

    batches = loop()
    next(batches)
    """
    done = process(code)
    assert (done.returncode, done.stdout) == (0, "closed")
    assert done.stderr.strip() == "exiting: the encode thread is still busy, and the process ends without it"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_exits_even_if_the_lock_was_held_at_the_fork() -> None:
    code = """
    def source():
        while True:
            time.sleep(0.01)
            yield 0

    worker = ahead(source())
    with lock_held(worker):
        child = os.fork()
        if child == 0:
            sys.exit(7)
        _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))
    """
    done = process(code)
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told_that_the_thread_is_its_parents_also_if_the_lock_was_held() -> None:
    """And the fork frees none of the items, which may hold memory of a GPU."""
    code = """
    worker = ahead(iter(range(5)))
    assert next(worker) == 0
    while not worker._queue:
        time.sleep(0.001)
    with lock_held(worker):
        child = os.fork()
        if child == 0:
            assert worker._queue
            try:
                next(worker)
            except RuntimeError as error:
                print(error, flush=True)
            worker.close()
            os._exit(7)
        _, status = os.waitpid(child, 0)
    assert [*worker] == [1, 2, 3, 4]
    sys.exit(os.waitstatus_to_exitcode(status))
    """
    done = process(code)
    assert (done.returncode, done.stderr) == (7, "") and "whose encode thread it does not have" in done.stdout


# --- background work --------------------------------------------------------------------------------------------------


def test_offered_items_are_handled_in_order_and_an_idle_thread_ends() -> None:
    done: list[int] = []
    worker: BackgroundWorker[int] = BackgroundWorker(done.extend, weigh=lambda item: 1, limit=1000, stage="test")
    for start in range(0, 100, 10):
        assert all(worker.offer(item) for item in range(start, start + 10))
        assert worker.flush(10) and done == [*range(start + 10)]
    assert not [thread for thread in threading.enumerate() if thread.name == "bertstream-test"]


def test_a_full_queue_refuses_items_unless_the_caller_waits() -> None:
    go_on = threading.Event()
    done: list[int] = []

    def handle(items: list[int]) -> None:
        go_on.wait(10)
        done.extend(items)

    worker: BackgroundWorker[int] = BackgroundWorker(handle, weigh=lambda item: item, limit=10, stage="test")
    assert worker.offer(100)  # an idle worker takes any item
    assert not worker.offer(1)
    assert not worker.flush(0.05)
    threading.Timer(0.05, go_on.set).start()
    for _ in range(50):
        assert worker.offer(6, wait=True)
    assert worker.flush(10) and done == [100] + [6] * 50


def test_an_error_loses_only_the_items_being_handled(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []

    def handle(items: list[int]) -> None:
        if 1 in items:
            raise OSError("full")
        done.extend(items)

    worker: BackgroundWorker[int] = BackgroundWorker(handle, weigh=lambda item: 1, limit=10, stage="test")
    for item in range(3):
        worker.offer(item)
        worker.flush()
    assert done == [0, 2] and "the test thread lost 1 items" in caplog.text


def test_a_closed_worker_handles_queued_items_and_refuses_new_ones() -> None:
    go_on = threading.Event()
    done: list[int] = []

    def handle(items: list[int]) -> None:
        go_on.wait(10)
        done.extend(items)

    worker: BackgroundWorker[int] = BackgroundWorker(handle, weigh=lambda item: 1, limit=10, stage="test")
    assert worker.offer(1) and not worker.close(0.01)
    assert not worker.offer(2) and not worker.offer(2, wait=True)
    go_on.set()
    assert worker.close(10) and done == [1]


def test_queued_items_are_handled_when_the_process_ends() -> None:
    code = """
import time
from bertstream.system.threads import BackgroundWorker
def handle(items):
    time.sleep(0.3)
    print(*items, flush=True)
worker = BackgroundWorker(handle, weigh=lambda item: 1, limit=10, stage="test")
for item in range(5):
    worker.offer(item)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["0", "1", "2", "3", "4"] and done.stderr == ""
