"""The disk tier returns what was written, whatever happens to the folder, its processes and the disk."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import random
import re
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lmdb
import numpy as np
import pytest

from bertstream import CacheError
from bertstream.caching import disk
from bertstream.caching.disk import Bytes, DiskTier

KILLS = int(os.environ.get("CACHE_KILLS", "3"))
"""How many writers are killed; 20 before a release."""

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="its children are forked")


def key(text: int) -> bytes:
    return b"prefix.." + text.to_bytes(16, "big")


def rows(text: int, size: int = 3000) -> Bytes:
    """Bytes that differ from text to text."""
    return np.resize(np.frombuffer(f"{text},".encode(), np.uint8), size)


def write(tier: DiskTier, *texts: int, size: int = 3000, wait: bool = True) -> None:
    tier.write([key(t) for t in texts], [size] * len(texts), np.concatenate([rows(t, size) for t in texts]), wait=wait)


def held(tier: DiskTier, texts: range, size: int = 3000) -> list[int]:
    """Which of these texts are there; their rows must be right."""
    indices, data = tier.read([key(t) for t in texts], [size] * len(texts))
    found = [texts[i] for i in indices]
    assert (data == np.concatenate([np.zeros(0, np.uint8), *(rows(t, size) for t in found)])).all()
    return found


@contextmanager
def opened(path: Path, limit: int = 16 * MIB, read_only: bool = False) -> Iterator[DiskTier]:
    tier = DiskTier(path, limit_bytes=limit, read_only=read_only)
    try:
        yield tier
    finally:
        tier.close()


def forked(work: Callable[[], None]) -> int:
    """Fork a child that does this work and exits with 0 if it succeeds."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def ended_well(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- what is read -----------------------------------------------------------------------------------------------------


def test_rows_are_the_same_bit_for_bit_before_and_after_reopening(tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "cache") as tier:
        write(tier, *range(50))
        tier.flush()
        assert held(tier, range(60)) == [*range(50)]
        assert tier.sizes()["disk_texts"] == 50
    with opened(tmp_path / "a" / "cache") as tier:
        assert held(tier, range(60)) == [*range(50)]
        assert tier.missing([key(49), key(50), key(0)]) == [1]


def test_a_text_without_rows_is_found(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        tier.write([key(1), key(2)], [0, 5], rows(2, 5))
        tier.flush()
        indices, data = tier.read([key(1), key(2), key(3)], [0, 5, 0])
        assert indices == [0, 1] and (data == rows(2, 5)).all()


def test_an_entry_of_another_size_counts_as_wrong(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        write(tier, 1)
        tier.flush()
        assert held(tier, range(1, 2), size=2999) == [] and tier.wrong == 1


def test_texts_with_a_prefix_can_be_dropped(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        write(tier, 1, 2)
        tier.write([b"another." + key(3)[8:]], [10], rows(3, 10))
        tier.flush()
        assert tier.drop(b"prefix..") == 2
        assert list(tier.keys_with_prefix()) == [b"another." + key(3)[8:]]
        write(tier, 1)
        tier.flush()
        assert held(tier, range(5)) == [1]


# --- the bound --------------------------------------------------------------------------------------------------------


def test_the_oldest_texts_are_evicted_and_the_file_stays_within_its_limit(tmp_path: Path) -> None:
    with opened(tmp_path, limit=4 * MIB) as tier:
        for start in range(0, 5000, 50):  # more than four times what fits
            write(tier, *range(start, start + 50))
        tier.flush()
        here = held(tier, range(5000))
        assert here == [*range(here[0], 5000)] and len(here) > 500
        assert tier.evictions == here[0] and tier.dropped_writes == 0
        assert tier.sizes()["disk_bytes"] <= 0.8 * 4 * MIB
    assert (tmp_path / "data.mdb").stat().st_size <= 4 * MIB


def test_entries_of_all_sizes_turn_over_without_filling_the_map(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    sizes = np.exp(draw.uniform(3, 12, 3000)).astype(int).tolist()
    with opened(tmp_path, limit=8 * MIB) as tier:
        for text, size in enumerate(sizes):
            write(tier, text, size=size)
            if draw.random() < 0.01:
                tier.flush()
        tier.flush()
        assert tier.dropped_writes == 0 and tier.evictions > 1000
        assert tier.sizes()["disk_bytes"] > 2 * MIB
        last = [key(2999)], [sizes[2999]]
        assert tier.read(*last)[0] == [0]


def test_a_full_map_evicts_and_writes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, limit=4 * MIB) as tier:
        write(tier, *range(100))
        tier.flush()
        put, calls = tier._put, []

        def full_once(group: object) -> None:
            calls.append(group)
            if len(calls) == 1:
                raise lmdb.MapFullError("mdb_put: MDB_MAP_FULL")
            put(group)  # type: ignore[arg-type]

        monkeypatch.setattr(tier, "_put", full_once)
        write(tier, 100)
        tier.flush()
        assert len(calls) == 2 and held(tier, range(100, 101)) == [100] and tier.dropped_writes == 0


def test_a_text_that_is_too_large_is_dropped_and_counted(tmp_path: Path) -> None:
    with opened(tmp_path, limit=4 * MIB) as tier:
        write(tier, 1, size=MIB)
        write(tier, 2)
        tier.flush()
        assert tier.dropped_writes == 1 and held(tier, range(3)) == [2]


# --- the background writer --------------------------------------------------------------------------------------------


def test_a_full_queue_drops_and_counts_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, limit=64 * MIB) as tier:
        go_on = threading.Event()
        monkeypatch.setattr(tier, "_put", lambda group: go_on.wait(30))
        monkeypatch.setattr(tier._writer, "_limit", 100_000)
        started = time.perf_counter()
        for start in range(0, 1000, 10):
            write(tier, *range(start, start + 10), wait=False)
        assert time.perf_counter() - started < 5
        go_on.set()
        tier.flush()
        assert 900 <= tier.dropped_writes < 1000


def test_closing_writes_what_is_queued_and_drops_what_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as tier:
        put, writing, go_on = tier._put, threading.Event(), threading.Event()

        def slow(group: object) -> None:
            writing.set()
            go_on.wait(30)
            put(group)  # type: ignore[arg-type]

        monkeypatch.setattr(tier, "_put", slow)
        write(tier, 1)
        writing.wait(30)
        closing = threading.Thread(target=tier.close)
        closing.start()
        closing.join(0.2)  # by now it is waiting for the writer
        write(tier, 2)
        assert tier.dropped_writes == 1
        go_on.set()
        closing.join()
        assert tier.dropped_writes == 1 and not tier._warned
    with opened(tmp_path) as tier:
        assert held(tier, range(5)) == [1]


def test_a_queued_text_is_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as tier:
        put, go_on = tier._put, threading.Event()
        monkeypatch.setattr(tier, "_put", lambda group: (go_on.wait(30), put(group)))
        write(tier, 1, 2)
        assert tier.missing([key(1), key(2), key(3)]) == [2]
        go_on.set()
        tier.flush()
        assert tier.missing([key(1), key(2), key(3)]) == [2] and not tier._waiting
        monkeypatch.setattr(tier, "_put", lambda group: 1 / 0)  # lost
        write(tier, 3)
        tier.flush()
        assert tier.missing([key(3)]) == [0]
        tier._writer.close()
        write(tier, 4)  # refused
        assert tier.missing([key(4)]) == [0]


def test_a_child_forked_while_its_parent_writes_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as tier:
        make_room, writing, go_on = tier._make_room, threading.Event(), threading.Event()

        def slow(transaction: object, room: int) -> int:
            writing.set()
            go_on.wait(30)
            return make_room(transaction, room)

        monkeypatch.setattr(tier, "_make_room", slow)
        write(tier, 1)
        writing.wait(30)

        def work() -> None:
            signal.alarm(20)
            tier.leave_to_parent()
            with pytest.raises(CacheError, match="forked while its parent writes"):
                DiskTier(tmp_path, limit_bytes=16 * MIB, read_only=False)

        child = forked(work)
        assert ended_well(child)
        go_on.set()
        tier.flush()
        assert held(tier, range(3)) == [1]


def test_a_write_lock_of_another_process_does_not_block_reading(tmp_path: Path) -> None:
    ready, release = os.pipe(), os.pipe()

    def hold() -> None:
        env = lmdb.open(str(tmp_path), map_size=16 * MIB)
        with env.begin(write=True):
            os.write(ready[1], b".")
            os.read(release[0], 1)

    with opened(tmp_path) as tier:
        write(tier, 1)
        tier.flush()
    child = forked(hold)
    os.close(release[0])
    os.read(ready[0], 1)
    with opened(tmp_path) as tier:
        started = time.perf_counter()
        write(tier, 2, wait=False)
        assert held(tier, range(3)) == [1]
        assert not tier.flush(0.2) and time.perf_counter() - started < 5
        os.write(release[1], b".")
        assert tier.flush(30) and held(tier, range(3)) == [1, 2]
    assert ended_well(child)


def test_two_processes_write_to_one_folder(tmp_path: Path) -> None:
    def work(own: range) -> None:
        with opened(tmp_path) as tier:
            for text in own:
                write(tier, text)
            tier.flush()

    with opened(tmp_path):
        pass  # make it before both open it
    children = [forked(lambda own=own: work(own)) for own in (range(200), range(150, 400))]  # type: ignore[misc]
    assert [ended_well(child) for child in children] == [True, True]
    with opened(tmp_path) as tier:
        assert held(tier, range(400)) == [*range(400)]


def test_a_folder_can_be_open_only_once_per_process(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(CacheError, match="share one EmbeddingCache") as caught:
        DiskTier(tmp_path, limit_bytes=16 * MIB, read_only=False)
    assert caught.value.path == str(tmp_path)


# --- what breaks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_killed_writer_leaves_only_valid_entries(tmp_path: Path, kill: int) -> None:
    ready = os.pipe()

    def work() -> None:
        tier = DiskTier(tmp_path, limit_bytes=4 * MIB, read_only=False)
        for text in range(10**6):
            write(tier, text)
            if text % 100 == 0:
                tier.flush()
                os.write(ready[1], text.to_bytes(4, "big"))

    child = forked(work)
    written = 0
    while written < 2000:  # by then it evicts as well
        written = int.from_bytes(os.read(ready[0], 4), "big")
    time.sleep(0.05 * kill / KILLS)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with opened(tmp_path, limit=4 * MIB) as tier:
        assert tier.verify() == 0
        here = held(tier, range(written + 5000))
        # Everything flushed and not evicted is there, and what follows has no gap.
        assert len(here) > 400 and here == [*range(here[0], here[-1] + 1)] and here[-1] >= written
        write(tier, 10**6 + 1)
        tier.flush()
        assert held(tier, range(10**6 + 1, 10**6 + 2)) == [10**6 + 1]


def damage(path: Path, text: int, times: int = 1) -> None:
    """Change a byte in the middle of a text's rows."""
    data = bytearray((path / "data.mdb").read_bytes())
    place = -1
    for _ in range(times):
        place = data.index(bytes(rows(text, 1000)), place + 1)
    data[place + 500] ^= 0x40
    (path / "data.mdb").write_bytes(data)


def test_a_damaged_entry_counts_as_missing_and_is_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path) as tier:
        write(tier, *range(100, 110))
    damage(tmp_path, 104)
    with opened(tmp_path) as tier:
        assert held(tier, range(100, 110)) == [100, 101, 102, 103, *range(105, 110)]
        assert tier.wrong == 1 and "wrong checksums" in caplog.text
        tier.flush()
        assert tier.sizes()["disk_texts"] == 9
        write(tier, 104)
        tier.flush()
        assert held(tier, range(100, 110)) == [*range(100, 110)]


def test_verify_finds_damaged_entries(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        write(tier, *range(100, 110))
    damage(tmp_path, 107)
    with opened(tmp_path, read_only=True) as tier:
        assert tier.verify() == 1 and tier.sizes()["disk_texts"] == 10
    with opened(tmp_path) as tier:
        assert tier.verify() == 1 and tier.verify() == 0 and tier.sizes()["disk_texts"] == 9


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, read_only: bool) -> None:
    with opened(tmp_path) as tier:
        for start in range(0, 1000, 100):
            write(tier, *range(start, start + 100))
            tier.flush()
    size = (tmp_path / "data.mdb").stat().st_size
    os.truncate(tmp_path / "data.mdb", size // 2)
    with pytest.raises(CacheError, match=f"has {size // 2} bytes, but {size} are in use: the file was cut off"):
        DiskTier(tmp_path, limit_bytes=16 * MIB, read_only=read_only)
    assert (tmp_path / "data.mdb").stat().st_size == size // 2


def noise(page: bytearray, draw: random.Random) -> None:
    page[:] = draw.randbytes(len(page))


def zeros(page: bytearray, draw: random.Random) -> None:
    page[:] = bytes(len(page))


def flipped(page: bytearray, draw: random.Random) -> None:
    for _ in range(4):
        page[draw.randrange(64)] ^= 1 << draw.randrange(8)


@pytest.mark.parametrize("damage_page", [noise, zeros, flipped])
def test_a_damaged_page_is_refused_or_does_no_harm(
    tmp_path: Path, damage_page: Callable[[bytearray, random.Random], None]
) -> None:
    texts = [text * 7919 % 100_003 for text in range(600)]  # so that pages come in no order
    with opened(tmp_path / "whole") as tier:
        for start in range(0, 600, 100):
            write(tier, *texts[start : start + 100], size=1500)
            tier.flush()
    whole = (tmp_path / "whole" / "data.mdb").read_bytes()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    draw = random.Random(0)
    refused = 0

    def work() -> None:
        signal.alarm(20)
        logging.disable()
        try:
            tier = DiskTier(damaged, limit_bytes=16 * MIB, read_only=False)
        except CacheError:
            os._exit(3)
        tier.read([key(text) for text in texts], [1500] * len(texts))
        tier.verify()
        write(tier, *range(300), size=1500)
        tier.flush()
        assert tier.failures == tier.dropped_writes == 0
        tier.close()

    for page in (0, 1, *(draw.randrange(len(whole) >> 12) for _ in range(10))):
        data = bytearray(whole)
        view = data[page << 12 : (page + 1) << 12]
        damage_page(view, draw)
        data[page << 12 : (page + 1) << 12] = view
        (damaged / "data.mdb").write_bytes(data)
        (damaged / "lock.mdb").unlink(missing_ok=True)
        status = os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])
        assert status in (0, 3), page
        refused += status == 3
    assert refused > 6


def test_pages_of_a_large_folder_are_checked_by_verify_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as tier:
        write(tier, *range(20), size=1500)
    data = bytearray((tmp_path / "data.mdb").read_bytes())
    place = data.index(bytes(rows(7, 1500)))
    data[place - place % 4096 + 12] ^= 0x40  # where the page's free room begins
    (tmp_path / "data.mdb").write_bytes(data)
    with pytest.raises(CacheError, match="is damaged .*delete the folder"):
        DiskTier(tmp_path, limit_bytes=16 * MIB, read_only=True)
    monkeypatch.setattr("bertstream.caching.folder._CHECKED_ITEMS", 0)
    with opened(tmp_path, read_only=True) as tier, pytest.raises(CacheError, match="is damaged .*delete the folder"):
        tier.verify()


def test_a_folder_that_another_process_writes_to_is_not_taken_for_damaged(tmp_path: Path) -> None:
    with opened(tmp_path, limit=2 * MIB):
        pass
    release = os.pipe()

    def work() -> None:
        os.set_blocking(release[0], False)
        with opened(tmp_path, limit=2 * MIB) as tier:
            for text in range(10**6):
                write(tier, text, size=1500)
                if text % 10 == 0:
                    tier.flush()
                with suppress(BlockingIOError):
                    os.read(release[0], 1)
                    return

    child = forked(work)
    for _ in range(50):
        with opened(tmp_path, limit=2 * MIB, read_only=True):
            pass
    os.write(release[1], b".")
    assert ended_well(child)


def test_anything_but_a_cache_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.mdb").write_bytes(b"no database " * 2000)
    with pytest.raises(CacheError, match="damaged or no cache: delete it"):
        DiskTier(tmp_path / "text", limit_bytes=16 * MIB, read_only=False)
    (tmp_path / "file").write_text("a file where a folder should be")
    with pytest.raises(CacheError, match="name a folder"):
        DiskTier(tmp_path / "file", limit_bytes=16 * MIB, read_only=False)
    with lmdb.open(str(tmp_path / "other")) as env, env.begin(write=True) as transaction:
        transaction.put(b"somebody", b"else's")
    with pytest.raises(CacheError, match="another kind of LMDB folder"):
        DiskTier(tmp_path / "other", limit_bytes=16 * MIB, read_only=False)
    with pytest.raises(CacheError, match="cannot be opened"):
        DiskTier(tmp_path / "missing", limit_bytes=16 * MIB, read_only=True)
    assert not (tmp_path / "missing").exists()


def test_another_format_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        write(tier, 1)
    with lmdb.open(str(tmp_path)) as env, env.begin(write=True) as transaction:
        transaction.put(b"format", b"bertstream embedding cache 99")
    before = (tmp_path / "data.mdb").read_bytes()
    for read_only in (False, True):
        with pytest.raises(CacheError, match=r"format 'bertstream embedding cache 99'.*cache 1'.*delete this one"):
            DiskTier(tmp_path, limit_bytes=16 * MIB, read_only=read_only)
    assert (tmp_path / "data.mdb").read_bytes() == before


def test_a_read_only_folder_is_never_written_to(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        write(tier, 1, 2)
    before = (tmp_path / "data.mdb").read_bytes()
    with opened(tmp_path, read_only=True) as tier:
        write(tier, 3)
        tier.flush()
        assert held(tier, range(5)) == [1, 2] and tier.dropped_writes == 0
        with pytest.raises(CacheError, match="read-only"):
            tier.drop(b"prefix..")
    assert (tmp_path / "data.mdb").read_bytes() == before


def test_a_folder_without_write_permission_can_be_opened_read_only() -> None:
    with tempfile.TemporaryDirectory() as above:  # pytest's own folders are closed to other users
        folder = Path(above, "cache")
        with opened(folder) as tier:
            write(tier, 1, 2)
        modes = {folder / "data.mdb": 0o444, folder / "lock.mdb": 0o444, folder: 0o555, Path(above): 0o755}
        for path, mode in modes.items():
            path.chmod(mode)

        def work() -> None:
            if os.geteuid() == 0:  # root ignores modes
                os.setuid(65534)
            with pytest.raises(CacheError, match="read_only=True"):
                DiskTier(folder, limit_bytes=16 * MIB, read_only=False)
            with opened(folder, read_only=True) as tier:
                assert held(tier, range(5)) == [1, 2]

        try:
            assert ended_well(forked(work))
        finally:
            folder.chmod(0o755)


def test_of_a_file_system_that_is_mounted_read_only_the_error_says_how_to_open_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path):
        pass

    def refuse(path: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr("bertstream.caching.folder._take_lock_file", refuse)
    with pytest.raises(CacheError, match="read_only=True"):
        DiskTier(tmp_path, limit_bytes=16 * MIB, read_only=False)
    with opened(tmp_path, read_only=True):
        pass


def test_an_empty_file_is_a_new_cache_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path) as tier:
        write(tier, 1)
    assert not caplog.records
    os.truncate(tmp_path / "data.mdb", 0)
    with opened(tmp_path) as tier:
        write(tier, 2)
        tier.flush()
        assert held(tier, range(3)) == [2]
    assert f"{tmp_path / 'data.mdb'} is empty" in caplog.text


def test_an_empty_file_that_is_opened_read_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").touch()
    with pytest.raises(CacheError, match="cannot be opened"):
        DiskTier(tmp_path, limit_bytes=16 * MIB, read_only=True)
    assert not (tmp_path / "data.mdb").stat().st_size


def test_a_full_disk_drops_and_counts_while_reading_still_works(tmp_path: Path) -> None:
    def work() -> None:
        logging.disable()
        with opened(tmp_path, limit=64 * MIB) as tier:
            write(tier, *range(100))
            tier.flush()
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, resource.RLIM_INFINITY))
            for start in range(100, 2000, 100):
                write(tier, *range(start, start + 100))
                tier.flush()
            here = held(tier, range(2000))
            assert here[:100] == [*range(100)] and len(here) < 1000
            assert tier.dropped_writes == 2000 - len(here)
            assert tier._warned == {"writing"}
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            write(tier, 5000)
            tier.flush()
            assert held(tier, range(5000, 5001)) == [5000]
            assert tier.verify() == 0

    assert ended_well(forked(work))


def on_a_disk_of_its_own(room: int, work: Callable[[Path], None]) -> None:
    """Do this work in a child, in a folder of a small disk that nobody else sees."""

    def apart() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        new_mounts, recursive_private = 0x20000, 0x44000
        folder = tempfile.mkdtemp()
        if (
            libc.unshare(new_mounts)
            or libc.mount(None, b"/", None, recursive_private, None)
            or libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={room}".encode())
        ):
            os._exit(77)
        logging.disable()
        work(Path(folder))

    status = os.waitstatus_to_exitcode(os.waitpid(forked(apart), 0)[1])
    if status == 77:
        pytest.skip("needs the right to mount")
    assert status == 0


def fill(disk_folder: Path) -> None:
    with suppress(OSError), open(disk_folder / "fill", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@pytest.mark.parametrize("blocks_left", [0, 1, 3, 17, 18, 19])
def test_a_folder_on_a_full_disk_is_refused(blocks_left: int) -> None:
    def work(disk_folder: Path) -> None:
        fill(disk_folder)
        os.truncate(disk_folder / "fill", (disk_folder / "fill").stat().st_size - 4096 * blocks_left)
        for _ in range(2):  # the second finds what the first left
            with pytest.raises(CacheError, match="make room on the disk"):
                DiskTier(disk_folder / "cache", limit_bytes=16 * MIB, read_only=False)
        (disk_folder / "fill").unlink()
        with opened(disk_folder / "cache") as tier:
            write(tier, 1)
            tier.flush()
            assert held(tier, range(3)) == [1]

    on_a_disk_of_its_own(256 << 10, work)


def test_a_lock_file_without_blocks_is_refused_on_a_full_disk() -> None:
    def work(disk_folder: Path) -> None:
        with opened(disk_folder / "cache") as tier:
            write(tier, 1)
        os.truncate(disk_folder / "cache" / "lock.mdb", 0)
        os.truncate(disk_folder / "cache" / "lock.mdb", 65_792)  # as earlier versions made it
        fill(disk_folder)
        with pytest.raises(CacheError, match="make room on the disk"):
            DiskTier(disk_folder / "cache", limit_bytes=16 * MIB, read_only=False)
        with opened(disk_folder / "cache", read_only=True) as tier:
            assert held(tier, range(3)) == [1]

    on_a_disk_of_its_own(256 << 10, work)


def test_a_disk_that_fills_up_drops_and_counts() -> None:
    def work(disk_folder: Path) -> None:
        logging.disable(logging.NOTSET)
        said: list[str] = []
        disk.logger.addFilter(lambda record: said.append(record.getMessage()))  # type: ignore[arg-type,return-value]
        with opened(disk_folder / "cache") as tier:
            for start in range(0, 1000, 50):
                write(tier, *range(start, start + 50))
                tier.flush()
            here = held(tier, range(1000))
            assert 100 < len(here) == 1000 - tier.dropped_writes
            assert tier.failed_writes == tier.dropped_writes
            assert len(said) == 1 and re.search(
                r"its disk has [\d,]+ bytes free: if it is full, make room on it", said[0]
            )
        with opened(disk_folder / "cache") as tier:  # which is full
            assert held(tier, range(1000)) == here and tier.verify() == 0

    on_a_disk_of_its_own(1 << 20, work)


def test_failed_reads_are_counted_and_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        def begin(self, *arguments: object, **options: object) -> None:
            raise lmdb.CorruptedError("mdb_get: MDB_CORRUPTED")

        def close(self) -> None: ...

    with opened(tmp_path) as tier:
        write(tier, 1)
        tier.flush()
        env, tier._env = tier._env, Failing()  # type: ignore[assignment]
        assert held(tier, range(3)) == held(tier, range(3)) == []
        with pytest.raises(CacheError, match=r"MDB_CORRUPTED.*delete it"):
            tier.missing([key(1)])
        tier._env = env
        assert tier.failures == 2 and caplog.text.count("MDB_CORRUPTED") == 1


def test_a_failed_drop_and_a_read_after_close_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as tier:
        write(tier, *range(10))
        tier.flush()

        def full(*arguments: object) -> bool:
            raise lmdb.MapFullError("mdb_del: MDB_MAP_FULL")

        with monkeypatch.context() as patched:
            patched.setattr("bertstream.caching.disk.delete_text", full)
            with pytest.raises(CacheError, match="failed after 0 texts.*MDB_MAP_FULL"):
                tier.drop(b"prefix..")
        keys = tier.keys_with_prefix()
        assert next(keys) == key(0)
        tier.close()
        with pytest.raises(CacheError, match="was closed"):
            list(keys)


def test_a_closed_tier_finds_nothing_and_raises_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        write(tier, 1)
    assert held(tier, range(3)) == [] and tier.sizes() == {}
    write(tier, 2)
    tier.flush()
    tier.close()
    assert tier.dropped_writes == 1


def test_writes_wait_for_a_forward_but_not_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as tier:
        with tier.hold_writes():
            write(tier, 1)
            assert not tier.flush(0.2)
            assert held(tier, range(3)) == []
        assert tier.flush(30)
        assert held(tier, range(3)) == [1]
        monkeypatch.setattr(disk, "_PATIENCE_S", 0.0)
        with tier.hold_writes():
            write(tier, 2)
            assert tier.flush(30)
        assert held(tier, range(3)) == [1, 2]
