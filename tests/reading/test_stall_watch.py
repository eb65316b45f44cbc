"""A read that waits is named while it waits, as often as its time doubles, and no thread outlives the last watch."""

from __future__ import annotations

import logging
import os
import threading
import time

import pytest

from bertstream.reading.stall_watch import Watch


def wait_until(count: int, caplog: pytest.LogCaptureFixture) -> None:
    deadline = time.monotonic() + 20
    while len(caplog.records) < count and time.monotonic() < deadline:
        time.sleep(0.005)


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "bertstream-stall-watch"]


def test_a_read_that_waits_is_named_each_time_its_wait_has_doubled(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch("a.txt", 0.04)
    started = time.monotonic()
    with watch:
        wait_until(3, caplog)
    watch.close()
    assert time.monotonic() - started > 4 * 0.04
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert all(record.getMessage().startswith("a.txt: one read has been waiting for 0.") for record in caplog.records)


def test_only_the_time_within_reads_counts_and_each_read_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch("a.txt", 0.2)
    time.sleep(0.3)
    for _ in range(10):
        with watch:
            time.sleep(0.03)
    assert caplog.records == []
    with watch:
        wait_until(1, caplog)
    watch.close()
    assert len(caplog.records) == 1


def test_several_watches_share_a_thread_that_ends_with_the_last_of_them(caplog: pytest.LogCaptureFixture) -> None:
    watches = [Watch(name, 0.04) for name in "abc"]
    assert len(thread_names()) == 1
    watches[0].close()
    with watches[1], watches[2]:
        wait_until(2, caplog)
    assert {record.getMessage()[0] for record in caplog.records} == {"b", "c"}
    watches[1].close()
    assert len(thread_names()) == 1
    watches[2].close()
    watches[2].close()
    deadline = time.monotonic() + 20
    while thread_names() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert thread_names() == []
    again = Watch("d", 0.04)
    assert len(thread_names()) == 1
    again.close()


def test_a_watch_without_a_limit_starts_nothing() -> None:
    watch = Watch("a", None)
    with watch:
        assert thread_names() == []
    watch.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_watches_its_own_reads() -> None:
    watch = Watch("parent", 60)
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of pytest may run on here
        try:
            handler = logging.StreamHandler(os.fdopen(sender, "w"))
            logging.getLogger("bertstream.reading.stall_watch").addHandler(handler)
            watch.close()
            own = Watch("child", 0.05)
            with own:
                time.sleep(0.5)
        finally:
            os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as file:
        assert file.readline().startswith("child: one read has been waiting for 0.")
    os.waitpid(child, 0)
    watch.close()
