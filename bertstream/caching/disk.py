"""The part of the cache that is on disk: an LMDB folder that several processes read, and one at a time writes.

Writing happens in a thread behind, which is dropped from rather than waited for. Every entry has a checksum, and LMDB
commits whole transactions only, so a process that is killed loses what it had not yet written and nothing else.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, cast

import lmdb
import numpy as np
import numpy.typing as npt

from ..errors import CacheError
from ..system.threads import BackgroundWorker

logger = logging.getLogger(__name__)

Bytes: TypeAlias = npt.NDArray[np.uint8]

FORMAT = b"bertstream embedding cache 1"
LEAST_BYTES = 1 << 20

_LIVE = 0.8
"""Of the map, what live data may fill. A full map cannot even delete; at 0.8 many turnovers pass."""

_PATIENCE_S = 1.0
"""How long writing stands back from a forward at most."""

_QUEUE_BYTES = 64 << 20
"""Of rows that wait to be written: about 40,000 tokens of 384 float32 dimensions."""

# One table for all: to open a second one, LMDB would wait for whoever is writing.
_ABOUT, _ORDER, _ROWS = b"format", b"o", b"r"  # by what keys begin with; sorted
_HEADER = struct.Struct("<IIQ")  # checksum, bytes of the rows, number of the entry: entries are evicted by number
_NUMBER = struct.Struct(">Q")  # such keys sort as the numbers do


@dataclass
class _Write:
    """Texts to write, or to delete where there are no rows."""

    keys: Sequence[bytes]
    sizes: Sequence[int]
    rows: Bytes | None

    @property
    def num_bytes(self) -> int:
        return 100 * len(self.keys) + (0 if self.rows is None else self.rows.nbytes)


class DiskTier:
    """Rows by text in an LMDB folder; the oldest entries are evicted.

    Use it from any thread; not across a fork (LMDB forbids it): make a new one in the child.

    Args:
        path: the folder; made where it is missing.
        limit_bytes: the file never grows beyond; entries fill 0.8 of it.
        read_only: open the folder without ever writing to it.
    Attributes:
        dropped_writes: texts that were not written: the queue was full, they were too large, or writing failed.
        evictions: texts that had to go.
        wrong: entries whose checksum or size was wrong; they count as absent, and are deleted.
        failures: readings that failed as a whole.
    Raises:
        CacheError: the folder cannot be opened, is damaged, of another format, or open in this process already.
    """

    def __init__(self, path: str | os.PathLike[str], *, limit_bytes: int, read_only: bool) -> None:
        self.path = os.path.abspath(path)
        self.read_only = read_only
        self.dropped_writes = self.evictions = self.wrong = self.failures = 0
        self._limit_bytes = limit_bytes
        # Pages that a transaction frees can be had again two transactions later, so each is a small part of the rest.
        self._transaction_bytes = min(32 << 20, limit_bytes // 20)
        self._warned: set[str] = set()
        self._waiting: set[bytes] = set()  # texts that are queued or being written
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._no_forward = threading.Event()
        self._no_forward.set()
        self._env: lmdb.Environment | None = self._open()
        try:
            self._check_format(self._env)
            if not read_only:
                self._env.reader_check()  # of processes that were killed: their place would keep old pages alive
        except CacheError:
            self._env.close()
            raise
        except (lmdb.Error, OSError) as error:
            self._env.close()
            raise self._cannot_open(error) from error
        self._behind: BackgroundWorker[_Write] = BackgroundWorker(
            self._handle, weigh=lambda item: item.num_bytes, limit=_QUEUE_BYTES, stage="cache-write"
        )

    def close(self, timeout_s: float = 60.0) -> None:
        """Write what waits, and let the folder go."""
        written = self._behind.close(timeout_s)
        with self._lock:
            env, self._env = self._env, None
        if not written:
            # Its transaction cannot be ended from here, and closing under it would crash the process.
            logger.warning("%s: the cache is still being written to, or locked by another process", self.path)
        elif env is not None:
            env.close()

    @contextmanager
    def standing_back(self) -> Iterator[None]:
        """No writing is begun meanwhile, for a second at most.

        For forwards on a CPU, whose threads wait for one another at every operation: what another thread takes of one
        core is lost on all of them. Behind a forward there is time enough, where one thread alone has something to do.
        """
        self._no_forward.clear()
        try:
            yield
        finally:
            self._no_forward.set()

    def leave_to_parent(self) -> None:
        """In a forked child: let go of what is the parent's, so that the folder can be opened anew."""
        # Without the lock, which may be held for good. LMDB knows by its process id that locks are not this process's.
        env, self._env = self._env, None
        # A transaction that was open would be waited for, and the thread that would end it is not here.
        if env is not None and not self._write_lock.locked():
            env.close()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was queued is written or dropped; False where that took longer."""
        return self._behind.flush(timeout_s)

    def read(self, keys: Sequence[bytes], sizes: Sequence[int]) -> tuple[list[int], Bytes]:
        """Look texts up.

        Args:
            keys: one a text.
            sizes: the bytes that each text's rows must have.
        Returns:
            The places of those found, and their rows, one after the other, copied and checked: [sum of their sizes].
        """
        found: list[int] = []
        parts: list[bytes] = []
        wrong: list[bytes] = []
        with self._lock:
            if self._env is None:
                return found, np.zeros(0, np.uint8)
            try:
                with self._env.begin(buffers=True) as transaction:
                    for i, (key, size) in enumerate(zip(keys, sizes, strict=True)):
                        entry = transaction.get(_ROWS + key)
                        if entry is None:
                            continue
                        rows = _checked_rows(key, entry)
                        if rows is not None and len(rows) == size:
                            found.append(i)
                            parts.append(rows)
                        else:
                            wrong.append(key)
            except (lmdb.Error, OSError) as error:
                self.failures += 1
                self._warn_once("reading", error)
                return [], np.zeros(0, np.uint8)
        self._discard(wrong)
        return found, np.frombuffer(bytearray().join(parts), np.uint8)

    def absent(self, keys: Sequence[bytes]) -> list[int]:
        """The places of texts that have no entry and wait for none; entries are not checked."""
        # Before the transaction sees what is there.
        places = [i for i, key in enumerate(keys) if key not in self._waiting]
        with self._reading() as transaction:
            return [i for i in places if transaction.get(_ROWS + keys[i]) is None]

    def write(self, keys: Sequence[bytes], sizes: Sequence[int], rows: Bytes, *, wait: bool = False) -> None:
        """Queue texts for writing; where there is no room they are dropped and counted, or waited for.

        Args:
            keys: one a text.
            sizes: bytes of each text's rows.
            rows: them all, one after the other; not to be changed any more.
            wait: whether to wait for room.
        """
        if self.read_only or not keys:
            return
        self._waiting.update(keys)
        if not self._behind.offer(_Write(keys, sizes, rows), wait=wait):
            self._waiting.difference_update(keys)
            self.dropped_writes += len(keys)

    def sizes(self) -> dict[str, float]:
        """`disk_texts`, the entries, and `disk_bytes`, of the pages that hold live data; none once it is closed."""
        with self._lock:
            if self._env is None:
                return {}
            stat = self._env.stat()
            # Each text is two entries, and one tells the format.
            return {"disk_texts": stat["entries"] // 2, "disk_bytes": _live(stat)}

    def keys_from(self, prefix: bytes = b"") -> Iterator[bytes]:
        """The keys of all entries that begin so, sorted."""
        with self._reading() as transaction, transaction.cursor() as cursor:
            if cursor.set_range(_ROWS + prefix):
                for key in cursor.iternext(keys=True, values=False):
                    if not key.startswith(_ROWS + prefix):
                        return
                    yield key[1:]

    def verify(self) -> int:
        """Check every entry; wrong ones are deleted where the folder is not read-only. How many they were."""
        wrong = []
        with self._reading(buffers=True) as transaction, transaction.cursor() as cursor:
            if cursor.set_range(_ROWS):
                entries = ((bytes(key[1:]), entry) for key, entry in cursor)
                wrong = [key for key, entry in entries if _checked_rows(key, entry) is None]
        self._discard(wrong)
        self.flush()
        return len(wrong)

    def drop(self, prefix: bytes) -> int:
        """Delete the entries whose keys begin so; how many they were."""
        if self.read_only:
            raise CacheError(f"{self.path}: the cache is open read-only, so nothing can be dropped", path=self.path)
        self.flush()
        gone = 0
        while keys := list(islice(self.keys_from(prefix), 10_000)):
            try:
                with self._writing() as transaction:
                    gone += sum(_delete(transaction, key) for key in keys)
            except (lmdb.Error, OSError) as error:
                raise CacheError(
                    f"dropping from the cache {self.path} failed behind {gone} texts "
                    f"({type(error).__name__}: {error}): where the disk is full make room on it, where the folder is "
                    "damaged delete it",
                    path=self.path,
                ) from error
        return gone

    # --- opening ------------------------------------------------------------------------------------------------------

    def _open(self) -> lmdb.Environment:
        options: dict[str, Any] = {"map_size": self._limit_bytes, "max_readers": 1024, "metasync": False}
        try:
            if not self.read_only:
                os.makedirs(self.path, exist_ok=True)
                return self._mended(lmdb.open(self.path, **options))
            try:
                return self._mended(lmdb.open(self.path, readonly=True, create=False, **options))
            except (lmdb.ReadonlyError, lmdb.LockError, PermissionError):
                # Where not even the lock file may be written. A writer elsewhere could change pages under us; every
                # entry is checked as it is read.
                return self._mended(lmdb.open(self.path, readonly=True, create=False, lock=False, **options))
        except (lmdb.Error, OSError) as error:
            raise self._cannot_open(error) from error

    def _cannot_open(self, error: Exception) -> CacheError:
        shown = f"{type(error).__name__}: {error}"
        if "already open in this process" in str(error):
            way_out = (
                "give that EmbeddingCache to all that use the folder, or close it first (a process that is forked "
                "while its parent writes to the folder cannot open it)"
            )
        elif isinstance(error, (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError, lmdb.PanicError)):
            way_out = "the folder is damaged or no cache: delete it, or name another"
        elif isinstance(error, (lmdb.ReadonlyError, lmdb.LockError, PermissionError)) and not self.read_only:
            way_out = "the folder cannot be written to: name another, or open this one with read_only=True"
        else:
            way_out = "name a folder on a local disk that can be used"
        return CacheError(f"the cache {self.path} cannot be opened ({shown}): {way_out}", path=self.path)

    def _mended(self, env: lmdb.Environment) -> lmdb.Environment:
        """To read pages that a file was cut off before would kill the process; as zeros they are no entries."""
        file = Path(self.path, "data.mdb")
        needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if file.stat().st_size >= needed:
            return env
        message = f"{file} has {file.stat().st_size} bytes where {needed} are in use: the file was cut off"
        if self.read_only:
            env.close()
            raise CacheError(f"{message}; copy it again", path=self.path)
        logger.warning("%s; what is lost is computed again", message)
        os.truncate(file, needed)
        return env

    def _check_format(self, env: lmdb.Environment) -> None:
        """Refuse what is no cache of this format; mark a new folder as one."""
        with env.begin() as transaction:
            about = transaction.get(_ABOUT)
        if about is None and not self.read_only and not env.stat()["entries"]:
            with env.begin(write=True) as transaction:
                transaction.put(_ABOUT, FORMAT)
        elif about != FORMAT:
            seen = "another kind of LMDB folder, or empty"
            if about is not None:
                seen = f"a cache of the format {about.decode(errors='replace')!r}"
            raise CacheError(
                f"{self.path} is {seen}, and this version reads {FORMAT.decode()!r}: name another folder, or delete "
                "this one",
                path=self.path,
            )

    @contextmanager
    def _reading(self, *, buffers: bool = False) -> Iterator[Any]:
        """A transaction for those who want an error rather than nothing found."""
        if self._env is None:
            raise self._was_closed()
        try:
            with cast(Any, self._env).begin(buffers=buffers) as transaction:
                yield transaction
        except (lmdb.Error, OSError) as error:
            if self._env is None:
                raise self._was_closed() from error
            raise CacheError(
                f"reading the cache {self.path} failed ({type(error).__name__}: {error}): where the folder is damaged, "
                "delete it",
                path=self.path,
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        """A transaction that writes; `_write_lock` says in a forked child that there was one."""
        env = self._env
        if env is None:
            raise self._was_closed()
        with self._write_lock, env.begin(write=True) as transaction:
            yield transaction

    def _was_closed(self) -> CacheError:
        return CacheError(f"the cache {self.path} was closed", path=self.path)

    # --- writing, in the thread behind --------------------------------------------------------------------------------

    def _handle(self, items: list[_Write]) -> None:
        self._no_forward.wait(_PATIENCE_S)
        try:
            self._write_all(items)
        finally:
            for item in items:
                self._waiting.difference_update(item.keys)

    def _write_all(self, items: list[_Write]) -> None:
        group: list[tuple[bytes, memoryview | None]] = []
        held = 0
        for key, rows in _texts(items):
            size = 0 if rows is None else _page_bytes(len(rows))
            if size > self._transaction_bytes:
                self.dropped_writes += 1
                continue
            if held + size > self._transaction_bytes:
                self._commit(group)
                group, held = [], 0
            group.append((key, rows))
            held += size
        self._commit(group)

    def _commit(self, group: list[tuple[bytes, memoryview | None]]) -> None:
        """One transaction; where the map is full after all, again behind larger and larger evictions."""
        if not group:
            return
        for transactions in (0, 4, 8, 12):
            try:
                if transactions:
                    self._evict(transactions * self._transaction_bytes)
                self._put(group)
                return
            except lmdb.MapFullError as error:  # of free pages, too few stand side by side
                failed: Exception = error
            except (lmdb.Error, OSError, CacheError) as error:
                failed = error
                break
        self.dropped_writes += sum(rows is not None for _, rows in group)
        self._warn_once("writing", failed)

    def _put(self, group: list[tuple[bytes, memoryview | None]]) -> None:
        evicted = 0
        with self._writing() as transaction:
            number = _next_number(transaction)
            for key, rows in group:
                if rows is None:
                    _delete(transaction, key)
                    continue
                evicted += self._make_room(transaction, _page_bytes(len(rows)))
                header = _HEADER.pack(zlib.crc32(rows, zlib.crc32(key)), len(rows), number)
                if transaction.put(_ROWS + key, b"".join((header, rows)), overwrite=False):
                    transaction.put(_ORDER + _NUMBER.pack(number), key)
                    number += 1
        self.evictions += evicted

    def _evict(self, room: int) -> None:
        with self._writing() as transaction:
            evicted = self._make_room(transaction, room)
        self.evictions += evicted
        for _ in range(2):  # what a transaction frees can be had again two transactions later
            with self._writing() as transaction:
                transaction.put(_ABOUT, FORMAT)

    def _make_room(self, transaction: Any, room: int) -> int:
        """Delete the oldest entries until so many bytes fit; how many they were."""
        evicted = 0
        with transaction.cursor() as cursor:
            while _live(transaction.stat()) + room > _LIVE * self._limit_bytes:
                if not (cursor.set_range(_ORDER) and cursor.key().startswith(_ORDER)):
                    break
                key = cursor.value()
                cursor.delete()
                transaction.delete(_ROWS + key)
                evicted += 1
        return evicted

    def _discard(self, wrong: list[bytes]) -> None:
        if not wrong:
            return
        self.wrong += len(wrong)
        if "entries" not in self._warned:
            self._warned.add("entries")
            logger.warning("the cache %s holds entries with wrong checksums: they are computed again", self.path)
        if not self.read_only:
            self._behind.offer(_Write(wrong, [0] * len(wrong), None))

    def _warn_once(self, what: str, error: Exception) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning(
                "%s the cache %s failed, what is missing is computed (said once): %s: %s",
                what,
                self.path,
                type(error).__name__,
                error,
            )


def _texts(items: list[_Write]) -> Iterator[tuple[bytes, memoryview | None]]:
    for item in items:
        if item.rows is None:
            yield from ((key, None) for key in item.keys)
            continue
        data = memoryview(cast(Any, item.rows)).cast("B") if len(item.rows) else memoryview(b"")
        start = 0
        for key, size in zip(item.keys, item.sizes, strict=True):
            yield key, data[start : start + size]
            start += size


def _live(stat: Any) -> int:
    """Bytes of the pages that hold data."""
    return int((stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]) * stat["psize"])


def _next_number(transaction: Any) -> int:
    with transaction.cursor() as cursor:
        if not (cursor.prev() if cursor.set_range(_ROWS) else cursor.last()) or not cursor.key().startswith(_ORDER):
            return 0
        return int(_NUMBER.unpack(cursor.key()[1:])[0]) + 1


def _delete(transaction: Any, key: bytes) -> bool:
    """Delete a text, and its place in the order; whether it was there."""
    entry = transaction.get(_ROWS + key)
    if entry is None:
        return False
    if len(entry) >= _HEADER.size:
        place = _ORDER + _NUMBER.pack(_HEADER.unpack_from(entry)[2])
        if transaction.get(place) == key:  # in a damaged entry the number may be another's
            transaction.delete(place)
    return bool(transaction.delete(_ROWS + key))


def _page_bytes(size: int) -> int:
    """What an entry takes at most: whole pages where it is large, and some of the index."""
    return -(-(size + _HEADER.size + 16) // 4096) * 4096 + 128


def _checked_rows(key: bytes, entry: Any) -> bytes | None:
    """The rows of an entry, copied; None where anything about them is wrong."""
    if len(entry) < _HEADER.size:
        return None
    checksum, size, _ = _HEADER.unpack_from(entry)
    rows = bytes(entry[_HEADER.size :])
    return rows if len(rows) == size and zlib.crc32(rows, zlib.crc32(key)) == checksum else None
