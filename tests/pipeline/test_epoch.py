"""One epoch: whatever ends it, and wherever that strikes, nothing is left running."""

from __future__ import annotations

import inspect
import linecache
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from fork_server import RANKS

import bertstream
from bertstream.testing import FakeEncoder, write_shards

# A strike within a generator that is being freed is reported, not raised.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PACKAGE = str(Path(bertstream.__file__).parent)


class Batches:
    """Batches of one text each, and how many of its iterators are open."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.open = 0

    def __iter__(self) -> Iterator[list[str]]:
        self.open += 1
        try:
            for number in range(self.count):
                yield [f"number {number}"]
        finally:
            self.open -= 1


class Strike:
    """Raises KeyboardInterrupt at the n-th line (or call) of the package that this thread reaches.

    Only where a signal can be handled: not at a `with` line, which is traced again before the block is left, not at a
    `try:`, which calls nothing and is not inside it yet, and not where a generator begins or is resumed.
    """

    def __init__(self, number: int, within: str = PACKAGE) -> None:
        self.left = number
        self.within = within
        self.where = ""

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        file, line = frame.f_code.co_filename, frame.f_lineno
        if not file.startswith(PACKAGE):
            return None
        if not file.startswith(self.within):
            return self
        resumed = event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR
        at_block = linecache.getline(file, line).lstrip().startswith(("with ", "try:"))
        if event in ("call", "line") and not resumed and not at_block:
            self.left -= 1
            if self.left == 0:
                self.where = f"{Path(file).name}:{line} ({frame.f_code.co_name}, {event})"
                raise KeyboardInterrupt
        return self


def next_struck(iteration: Iterator[Any], strike: Strike) -> None:
    """Take a batch while Ctrl-C may strike."""
    sys.settrace(strike)
    try:
        next(iteration)
    finally:
        sys.settrace(None)


def loop_struck_at(number: int, prefetch: int) -> tuple[str, int, int]:
    """Where Ctrl-C struck, and the threads and iterators that are left while it is handled."""
    source = Batches(5)
    loader = bertstream.wrap(source, FakeEncoder(), prefetch=prefetch, deterministic=True)
    iteration = iter(loader)
    strike = Strike(number)
    before = threading.active_count()
    left = (0, 0)
    try:
        for _ in range(3):
            next_struck(iteration, strike)
    except KeyboardInterrupt:
        left = threading.active_count() - before, source.open
    else:
        del iteration
    loader.close()
    return strike.where, *left


@pytest.mark.parametrize("prefetch", [0, 2])
def test_ctrl_c_at_any_line_leaves_nothing_running_while_it_is_handled(prefetch: int) -> None:
    found = []
    for number in range(1, 5000):
        where, *left = loop_struck_at(number, prefetch)
        if not where:
            break
        found.append((where, left))
    assert len(found) > 250, "not all of the path was struck"
    assert [(where, left) for where, left in found if left != [0, 0]] == []


@pytest.mark.parametrize("prefetch", [0, 2])
def test_ctrl_c_while_an_epoch_is_closed_leaves_nothing_running(prefetch: int) -> None:
    for number in range(1, 1000):
        source = Batches(6)
        loader = bertstream.wrap(source, FakeEncoder(), prefetch=prefetch, deterministic=True)
        before = threading.active_count()
        iteration = iter(loader)
        next(iteration)
        strike = Strike(number)
        sys.settrace(strike)
        try:
            iteration.close()  # type: ignore[attr-defined]
        except KeyboardInterrupt:
            sys.settrace(None)
            assert (threading.active_count() - before, source.open) == (0, 0), strike.where
        finally:
            sys.settrace(None)
        loader.close()
        if not strike.where:
            break
    assert number > 10


@pytest.mark.parametrize("prefetch", [0, 2])
def test_ctrl_c_in_an_epoch_of_n_steps_leaves_nothing_running_while_it_is_handled(
    tmp_path: Path, prefetch: int
) -> None:
    """At any line of what takes steps from passes; a pass of two batches ends within the first epoch."""
    shards = write_shards(tmp_path, ["a"] * 2)
    struck = []
    for number in range(1, 1000):
        loader = bertstream.stream(shards, FakeEncoder(), batch_size=1, steps_per_epoch=3, prefetch=prefetch)
        strike = Strike(number, f"{PACKAGE}/pipeline/steps.py")
        before, left = threading.active_count(), 0
        try:
            for _ in range(2):
                iteration = iter(loader)
                for _ in range(3):
                    next_struck(iteration, strike)
        except KeyboardInterrupt:
            left = threading.active_count() - before
        loader.close()
        if not strike.where:
            break
        struck.append((strike.where, left))
    assert len(struck) > 80, "not all of the path was struck"
    assert [(where, left) for where, left in struck if left] == []


def test_a_loop_that_ends_by_itself_stays_ended() -> None:
    source = Batches(3)
    iteration = iter(bertstream.wrap(source, FakeEncoder()))
    assert len(list(iteration)) == 3 and source.open == 0
    assert next(iteration, None) is None


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_of_the_source_arrives_once_as_its_own_object(prefetch: int) -> None:
    error = ZeroDivisionError("theirs")

    class Broken(Batches):
        def __iter__(self) -> Iterator[list[str]]:
            yield from super().__iter__()
            raise error

    source = Broken(3)
    received = []
    iteration = iter(bertstream.wrap(source, FakeEncoder(), prefetch=prefetch))
    with pytest.raises(ZeroDivisionError) as caught:
        for batch in iteration:
            received.append(batch)
    assert caught.value is error and len(received) == 3 and source.open == 0
    assert next(iteration, None) is None


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("received", [0, 1])
def test_a_loop_whose_loader_was_closed_hears_it_and_starts_nothing(prefetch: int, received: int) -> None:
    source, before = Batches(6), threading.active_count()
    loader = bertstream.wrap(source, FakeEncoder(), prefetch=prefetch)
    iteration = iter(loader)
    for _ in range(received):
        next(iteration)
    loader.close()
    for error in (bertstream.LoaderClosedError, StopIteration):
        with pytest.raises(error):
            next(iteration)
        assert (source.open, threading.active_count()) == (0, before)


def test_a_batch_that_cannot_be_made_is_not_counted_as_received(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, ["a", "b b", "c c c"])
    loader = bertstream.stream(shards, FakeEncoder(), batch_size=1, into="id")
    before = loader.state_dict()
    with pytest.raises(bertstream.ConfigError, match="into="):
        next(iter(loader))
    assert loader.state_dict()["queues"] == before["queues"] and loader.stats()["batches"] == 0


def test_a_worker_that_is_not_waited_for_closes_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertstream.pipeline.epoch._LEFT_WAIT_S", 0.05)
    encoding, go_on = threading.Event(), threading.Event()

    class Stuck(FakeEncoder):
        def encode(self, batch: bertstream.TokenBatch) -> bertstream.Embeddings:
            if encoding.is_set() is False and batch.num_tokens > 1:
                encoding.set()
                go_on.wait(20)
            return super().encode(batch)

    class Source:
        """Like a DataLoader's iterator, it has to be closed by name."""

        closed = False

        def __iter__(self) -> Any:
            self.items = iter([["a"], ["b b"], ["c c"], ["d d"]])
            return self

        def __next__(self) -> Any:
            return next(self.items)

        def close(self) -> None:
            self.closed = True

    source = Source()
    iteration = iter(bertstream.wrap(source, Stuck(), prefetch=1, deterministic=True))
    next(iteration)
    assert encoding.wait(10)
    del iteration
    assert not source.closed
    go_on.set()
    wait_until(lambda: source.closed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused_its_parents_iteration_and_leaves_its_workers_alone() -> None:
    program = """
import os, signal
from torch.utils.data import DataLoader
import bertstream
from bertstream.testing import FakeEncoder

signal.alarm(30)
batches = DataLoader(["a b"] * 40, batch_size=2, num_workers=1, multiprocessing_context="fork")
iteration = iter(bertstream.wrap(batches, FakeEncoder(), prefetch=1))
next(iteration)
child = os.fork()
if not child:
    try:
        next(iteration)
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(sum(1 for _ in iteration))
"""
    process = RANKS.start(program)
    assert process.wait() == 0
    refusal, rest = process.out.read_text().splitlines()
    assert "forked from one whose encode thread it does not have" in refusal and rest == "19"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()
