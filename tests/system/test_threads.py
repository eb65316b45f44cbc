"""The one owner of a thread: keeps order, stays within its bound, hands errors on, and always ends."""

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

from bertstream.system import threads as prefetch
from bertstream.system.threads import BackgroundWorker, Prefetcher

WAIT_S = 10.0
"""How long a test waits for a thread before it fails."""

WEIGHTS = st.lists(st.integers(0, 9), max_size=20)


def ahead(source: Iterable[Any], *, limit: int = 4, weigh: Callable[[Any], int] = lambda item: 1) -> Prefetcher[Any]:
    return Prefetcher(iter(source), weigh=weigh, limit=limit, stage="encode")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


class Tracked:
    """A source that counts what it gave, may fail at the end, and remembers which threads ran and closed it."""

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


# Order, and the bound.


@given(WEIGHTS, st.integers(0, 12))
def test_items_arrive_in_order_and_the_end_stays_the_end(weights: list[int], limit: int) -> None:
    worker = ahead(enumerate(weights), limit=limit, weigh=lambda item: item[1])
    assert list(worker) == list(enumerate(weights))
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(worker)


@given(WEIGHTS, st.integers(0, 12))
def test_the_queue_holds_as_much_as_the_limit_or_one_item(weights: list[int], limit: int) -> None:
    """With nobody taking, the thread stops exactly where the next item no longer fits, with that item in its hand."""
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


def test_weightless_items_do_not_make_the_queue_endless() -> None:
    source = Tracked(endless())
    with_nothing = ahead(source, limit=3, weigh=lambda item: 0)
    wait_until(lambda: source.given == 4)
    assert [next(with_nothing) for _ in range(10)] == list(range(10))
    with_nothing.close()
    assert source.given <= 14


def test_what_was_handed_out_is_not_kept() -> None:
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


def test_waiting_for_room_is_timed() -> None:
    """Half of what was slept at least: the threads may start late."""
    source = Tracked(range(3))
    worker = ahead(source, limit=1)
    wait_until(lambda: source.given == 2)
    time.sleep(0.1)
    assert list(worker) == [0, 1, 2]
    assert worker.put_wait_s >= 0.05


def test_who_closes_may_have_no_patience() -> None:
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


# Errors (law 7).


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
def test_whatever_the_source_raises_reaches_the_consumer(error: BaseException) -> None:
    worker = ahead(Tracked([1], error))
    assert next(worker) == 1
    with pytest.raises(type(error)) as caught:
        next(worker)
    assert caught.value is error


def test_an_error_of_weighing_is_an_error_too() -> None:
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


def test_an_error_of_the_sources_own_close_arrives_after_the_last_item() -> None:
    worker = ahead(BadlyClosed())
    assert [next(worker), next(worker)] == [0, 1]
    with pytest.raises(OSError, match="disk full"):
        next(worker)


def test_the_first_of_two_errors_arrives() -> None:
    worker = ahead(BadlyClosed(OwnError("first", "")))
    with pytest.raises(OwnError):
        list(worker)


def test_an_error_behind_an_early_close_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    worker = ahead(BadlyClosed(), limit=1)
    assert next(worker) == 0
    with caplog.at_level(logging.WARNING, "bertstream.system.threads"):
        worker.close()
    assert "the encode thread had failed ahead of its consumer: OSError('disk full')" in caplog.text
    with pytest.raises(StopIteration):
        next(worker)


def test_an_error_that_was_handled_keeps_nothing_alive() -> None:
    """A circle through its traceback would keep a batch, or a DataLoader's workers, until the collector runs."""

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


# The end (law 6).


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
    wait_until(lambda: source.given == 2)  # one in the queue, one in the hand
    worker.close()
    assert source.given == 2 and source.closed_in == [worker._thread]


def test_closing_before_anything_was_taken_ends_the_thread() -> None:
    started, release = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        started.set()
        release.wait(WAIT_S)
        yield 0

    worker = ahead(source())
    assert started.wait(WAIT_S)
    threading.Timer(0.05, release.set).start()
    worker.close()
    assert release.is_set() and not worker._thread.is_alive(), "it waits for the item in progress"


def test_a_consumer_that_waits_is_let_go_when_another_thread_closes() -> None:
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


def test_the_source_itself_may_close_its_prefetcher() -> None:
    box: list[Prefetcher[int]] = []
    ready = threading.Event()

    def source() -> Iterator[int]:
        ready.wait(WAIT_S)
        box[0].close()
        yield 0

    box.append(ahead(source()))
    ready.set()
    assert list(box[0]) == []


# The end of the process.

HOUSE = f"""
import importlib.util, os, sys, threading, time
spec = importlib.util.spec_from_file_location("prefetch", {prefetch.__file__!r})
prefetch = sys.modules["prefetch"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prefetch)
assert "torch" not in sys.modules, "this module knows no torch"

def ahead(source):
    return prefetch.Prefetcher(source, weigh=lambda item: 1, limit=2, stage="encode")
"""


def process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has the module alone."""
    command = [sys.executable, "-c", HOUSE + dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


def test_a_process_that_closes_nothing_ends_in_silence_and_closes_the_source(tmp_path: Path) -> None:
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


def test_a_source_that_is_stuck_does_not_keep_the_process() -> None:
    """A loop that is still open closes its prefetcher once more, when the interpreter clears the script's names.

    It clears them only if the thread, which never ends, refers to none of the script's functions.
    """
    code = """
    from itertools import chain

    prefetch.EXIT_WAIT_S = 0.2

    def loop(write=os.write):
        stuck = chain(["item"], iter(threading.Event().wait, None))
        worker = prefetch.Prefetcher(stuck, weigh=len, limit=2, stage="encode")
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
    assert done.stderr.strip() == "exiting: the encode thread is still busy and is left behind"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_ends_although_the_lock_was_held_at_the_fork() -> None:
    code = """
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of a fork beside threads: the point here

    def source():
        while True:
            time.sleep(0.01)
            yield 0

    worker, held, done = ahead(source()), threading.Event(), threading.Event()

    def hold():
        with worker._changed:
            held.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    child = os.fork()
    if child == 0:
        sys.exit(7)
    _, status = os.waitpid(child, 0)
    done.set()
    holder.join()
    sys.exit(os.waitstatus_to_exitcode(status))
    """
    done = process(code)
    assert (done.returncode, done.stderr) == (7, "")


# --- work behind ------------------------------------------------------------------------------------------------------


def test_what_is_offered_is_done_in_order_and_the_thread_ends_when_idle() -> None:
    done: list[int] = []
    behind: BackgroundWorker[int] = BackgroundWorker(done.extend, weigh=lambda item: 1, limit=1000, stage="test")
    for start in range(0, 100, 10):
        assert all(behind.offer(item) for item in range(start, start + 10))
        assert behind.flush(10) and done == [*range(start + 10)]
    assert not [thread for thread in threading.enumerate() if thread.name == "bertstream-test"]


def test_a_full_queue_takes_nothing_and_waiting_for_room_takes_all() -> None:
    go_on = threading.Event()
    done: list[int] = []

    def handle(items: list[int]) -> None:
        go_on.wait(10)
        done.extend(items)

    behind: BackgroundWorker[int] = BackgroundWorker(handle, weigh=lambda item: item, limit=10, stage="test")
    assert behind.offer(100)  # one is always let in
    assert not behind.offer(1)
    assert not behind.flush(0.05)
    threading.Timer(0.05, go_on.set).start()
    for _ in range(50):
        assert behind.offer(6, wait=True)
    assert behind.flush(10) and done == [100] + [6] * 50


def test_an_error_loses_its_items_alone(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []

    def handle(items: list[int]) -> None:
        if 1 in items:
            raise OSError("full")
        done.extend(items)

    behind: BackgroundWorker[int] = BackgroundWorker(handle, weigh=lambda item: 1, limit=10, stage="test")
    for item in range(3):
        behind.offer(item)
        behind.flush()
    assert done == [0, 2] and "the test thread lost 1 items" in caplog.text


def test_closed_it_does_what_was_offered_and_takes_nothing_more() -> None:
    go_on = threading.Event()
    done: list[int] = []

    def handle(items: list[int]) -> None:
        go_on.wait(10)
        done.extend(items)

    behind: BackgroundWorker[int] = BackgroundWorker(handle, weigh=lambda item: 1, limit=10, stage="test")
    assert behind.offer(1) and not behind.close(0.01)
    assert not behind.offer(2) and not behind.offer(2, wait=True)
    go_on.set()
    assert behind.close(10) and done == [1]


def test_what_was_offered_is_still_done_when_the_process_ends() -> None:
    code = """
import time
from bertstream.system.threads import BackgroundWorker
def handle(items):
    time.sleep(0.3)
    print(*items, flush=True)
behind = BackgroundWorker(handle, weigh=lambda item: 1, limit=10, stage="test")
for item in range(5):
    behind.offer(item)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["0", "1", "2", "3", "4"] and done.stderr == ""


def test_room_can_be_made_while_the_thread_waits_for_it() -> None:
    worker = ahead(range(10), limit=2)
    wait_until(lambda: worker.peak_weight == 2)
    worker.raise_limit(5)
    wait_until(lambda: worker.peak_weight == 5)
    worker.raise_limit(1)
    assert list(worker) == list(range(10)) and worker.peak_weight == 5
