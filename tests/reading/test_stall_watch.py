"""A read that stalls is named in warnings, and the thread ends with the last watch."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from pathlib import Path

import pytest
from servers import Server

from bertstream.reading.access import Access
from bertstream.reading.files import open_bytes
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


def test_only_time_within_a_read_counts_and_each_read_starts_at_zero(caplog: pytest.LogCaptureFixture) -> None:
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


def test_watches_share_a_thread_that_ends_with_the_last_one(caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_watch_without_a_limit_starts_no_thread() -> None:
    watch = Watch("a", None)
    with watch:
        assert thread_names() == []
    watch.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_watches_its_own_reads() -> None:
    watch = Watch("parent", 60)
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:  # pytest must not continue in the child
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


# --- shards that stall ------------------------------------------------------------------------------------------------


def content(path: str, access: Access) -> bytes:
    with open_bytes(path, access) as stream:
        return stream.read()


def stalls(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "bertstream.reading.stall_watch"]


def test_a_server_that_stalls_is_named_while_it_stalls(caplog: pytest.LogCaptureFixture) -> None:
    with Server({"a.txt": b"a\n"}, stalls=[60]) as server:
        reader = threading.Thread(target=content, args=(f"{server.url}/a.txt", Access(stall_warning_s=0.1)))
        reader.start()
        deadline = time.monotonic() + 20
        while not stalls(caplog) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert re.fullmatch(rf"{server.url}/a.txt: one read has been waiting for 0\.\d s", stalls(caplog)[0])
        assert reader.is_alive()
        server.released.set()
        reader.join()


def test_a_command_that_stalls_is_named(caplog: pytest.LogCaptureFixture) -> None:
    access = Access(allow_pipe=True, stall_warning_s=0.1)
    assert content("pipe:sleep 0.5; echo a # .txt", access) == b"a\n"
    assert stalls(caplog) and stalls(caplog)[0].startswith("pipe:sleep 0.5; echo a # .txt: one read")


def test_reads_that_do_not_stall_are_not_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Server({"a.txt": b"a\n"}) as server:
        assert content(f"{server.url}/a.txt", Access(stall_warning_s=10)) == b"a\n"
    assert stalls(caplog) == []


def test_local_files_start_no_thread(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\n")
    before = threading.enumerate()
    with open_bytes(str(tmp_path / "a.txt"), Access()):
        assert threading.enumerate() == before
    with open_bytes("pipe:echo a", Access(allow_pipe=True, stall_warning_s=None)):
        assert threading.enumerate() == before
