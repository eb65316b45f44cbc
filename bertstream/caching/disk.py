"""The disk tier: an LMDB folder that several processes read, and one at a time writes.

A background thread writes; when its queue is full, rows are dropped. Every entry has a checksum, and LMDB commits whole
transactions only, so a process that is killed loses what it had not yet written and nothing else.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias, cast

import lmdb
import numpy as np
import numpy.typing as npt

from ..errors import CacheError
from ..system.threads import BackgroundWorker
from .folder import (
    FORMAT,
    FORMAT_KEY,
    ROWS,
    bytes_in_pages,
    check_pages,
    checked_rows,
    delete_oldest,
    delete_text,
    free_room,
    has_no_room,
    live_bytes,
    next_number,
    open_folder,
    put_text,
)

logger = logging.getLogger(__name__)

Bytes: TypeAlias = npt.NDArray[np.uint8]

_LIVE = 0.8
"""The share of the map that live data may fill. A full map cannot even delete; at 0.8 many turnovers succeed."""

_PATIENCE_S = 1.0
"""How long writing waits for a forward at most."""

_QUEUE_BYTES = 64 << 20
"""Bytes of rows that wait to be written: about 40,000 tokens of 384 float32 dimensions."""


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
    """Rows by key in an LMDB folder; the oldest texts are evicted.

    Use it from any thread, but not across a fork, which LMDB forbids: make a new one in the child.

    Args:
        path: the folder; made where it is missing.
        limit_bytes: the file never grows beyond; entries fill 0.8 of it.
        read_only: open the folder without ever writing to it.
    Attributes:
        dropped_writes: texts that were not written: the queue was full, they were too large, or writing failed.
        failed_writes: those of them that the disk failed to write, or had no room for.
        evictions: texts that were evicted.
        wrong: entries whose checksum or size was wrong; they count as missing and are deleted.
        failures: reads that failed as a whole.
    Raises:
        CacheError: the folder cannot be opened, is damaged, of another format, or already open in this process.
    """

    def __init__(self, path: str | os.PathLike[str], *, limit_bytes: int, read_only: bool) -> None:
        self.path = os.path.abspath(path)
        self.read_only = read_only
        self.dropped_writes = self.failed_writes = self.evictions = self.wrong = self.failures = 0
        self._limit_bytes = limit_bytes
        # Pages that a transaction frees are reusable two transactions later, so each takes a small part of the limit.
        self._transaction_bytes = min(32 << 20, limit_bytes // 20)
        self._warned: set[str] = set()
        self._waiting: set[bytes] = set()  # texts that are queued or being written
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._may_write = threading.Event()
        self._may_write.set()
        self._env: lmdb.Environment | None = open_folder(self.path, limit_bytes=limit_bytes, read_only=read_only)
        self._writer: BackgroundWorker[_Write] = BackgroundWorker(
            self._handle, weigh=lambda item: item.num_bytes, limit=_QUEUE_BYTES, stage="cache-write"
        )

    def close(self, timeout_s: float = 60.0) -> None:
        """Write what is queued, and close the folder."""
        written = self._writer.close(timeout_s)
        with self._lock:
            env, self._env = self._env, None
        if not written:
            # Its transaction cannot be ended from here, and closing the folder under it would crash the process.
            logger.warning("%s: the cache is still being written to, or locked by another process", self.path)
        elif env is not None:
            env.close()

    @contextmanager
    def hold_writes(self) -> Iterator[None]:
        """Start no write meanwhile, for a second at most.

        For forwards on a CPU: OpenMP threads synchronise at every op, so one busy core slows all of them. Between
        forwards, where only one thread has work, there is time enough to write.
        """
        self._may_write.clear()
        try:
            yield
        finally:
            self._may_write.set()

    def leave_to_parent(self) -> None:
        """In a forked child: drop what belongs to the parent, so that the folder can be opened again."""
        # Without the lock, which may be held forever. LMDB knows by its process id that its locks are the parent's.
        env, self._env = self._env, None
        # Closing waits for an open transaction, and the thread that would end it does not exist here.
        if env is not None and not self._write_lock.locked():
            env.close()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was queued is written or dropped; False where that takes longer."""
        return self._writer.flush(timeout_s)

    def read(self, keys: Sequence[bytes], sizes: Sequence[int]) -> tuple[list[int], Bytes]:
        """Look texts up.

        Args:
            keys: one per text.
            sizes: the bytes that each text's rows must have.
        Returns:
            The indices of the texts found, and a copy of their rows, checked, text by text: [sum of their sizes].
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
                        entry = transaction.get(ROWS + key)
                        if entry is None:
                            continue
                        rows = checked_rows(key, entry)
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

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """The indices of texts that have no entry and are not queued; entries are not checked."""
        # Before the transaction: a text that leaves the queue now is then in the folder.
        unqueued = [i for i, key in enumerate(keys) if key not in self._waiting]
        with self._reading() as transaction:
            return [i for i in unqueued if transaction.get(ROWS + keys[i]) is None]

    def write(self, keys: Sequence[bytes], sizes: Sequence[int], rows: Bytes, *, wait: bool = False) -> None:
        """Queue texts for writing.

        Args:
            keys: one per text.
            sizes: bytes of each text's rows.
            rows: all of them, text by text; do not change them afterwards.
            wait: wait for room in the queue; otherwise texts that find none are dropped and counted.
        """
        if self.read_only or not keys:
            return
        self._waiting.update(keys)
        if not self._writer.offer(_Write(keys, sizes, rows), wait=wait):
            self._waiting.difference_update(keys)
            self.dropped_writes += len(keys)

    def sizes(self) -> dict[str, float]:
        """`disk_texts`, and `disk_bytes` of the pages that hold live data; empty once it is closed."""
        with self._lock:
            if self._env is None:
                return {}
            stat = self._env.stat()
            # Each text is two entries, and one more holds the format.
            return {"disk_texts": stat["entries"] // 2, "disk_bytes": live_bytes(stat)}

    def keys_with_prefix(self, prefix: bytes = b"") -> Iterator[bytes]:
        """The keys that begin with `prefix`, sorted."""
        with self._reading() as transaction, transaction.cursor() as cursor:
            if cursor.set_range(ROWS + prefix):
                for key in cursor.iternext(keys=True, values=False):
                    if not key.startswith(ROWS + prefix):
                        return
                    yield key[1:]

    def verify(self) -> int:
        """Check every page and every entry, and delete wrong entries unless the folder is read-only.

        Returns:
            How many entries were wrong.
        Raises:
            CacheError: a page of LMDB is damaged.
        """
        self.flush()
        wrong = []
        with self._reading(buffers=True) as transaction, transaction.cursor() as cursor:
            check_pages(cast(lmdb.Environment, self._env), self.path)
            if cursor.set_range(ROWS):
                entries = ((bytes(key[1:]), entry) for key, entry in cursor)
                wrong = [key for key, entry in entries if checked_rows(key, entry) is None]
        self._discard(wrong)
        self.flush()
        return len(wrong)

    def drop(self, prefix: bytes) -> int:
        """Delete the texts whose keys begin with `prefix`.

        Returns:
            How many texts were deleted.
        Raises:
            CacheError: the folder is read-only, or deleting failed.
        """
        if self.read_only:
            raise CacheError(f"{self.path}: the cache is open read-only, so nothing can be dropped", path=self.path)
        self.flush()
        dropped = 0
        while keys := list(islice(self.keys_with_prefix(prefix), 10_000)):
            try:
                with self._writing() as transaction:
                    dropped += sum(delete_text(transaction, key) for key in keys)
            except (lmdb.Error, OSError) as error:
                raise CacheError(
                    f"dropping from the cache {self.path} failed after {dropped} texts "
                    f"({type(error).__name__}: {error}): if the disk is full make room on it, if the folder is "
                    "damaged delete it",
                    path=self.path,
                ) from error
        return dropped

    @contextmanager
    def _reading(self, *, buffers: bool = False) -> Iterator[Any]:
        """A transaction for reads whose failure is the caller's error; `read` finds nothing instead."""
        if self._env is None:
            raise self._was_closed()
        try:
            with cast(Any, self._env).begin(buffers=buffers) as transaction:
                yield transaction
        except (lmdb.Error, OSError) as error:
            if self._env is None:
                raise self._was_closed() from error
            raise CacheError(
                f"reading the cache {self.path} failed ({type(error).__name__}: {error}): if the folder is damaged, "
                "delete it",
                path=self.path,
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        """A transaction that writes; in a forked child, a held `_write_lock` tells that one was open."""
        env = self._env
        if env is None:
            raise self._was_closed()
        with self._write_lock, env.begin(write=True) as transaction:
            yield transaction

    def _was_closed(self) -> CacheError:
        return CacheError(f"the cache {self.path} was closed", path=self.path)

    # --- writing, in the background thread ----------------------------------------------------------------------------

    def _handle(self, items: list[_Write]) -> None:
        self._may_write.wait(_PATIENCE_S)
        try:
            self._write_all(items)
        finally:
            for item in items:
                self._waiting.difference_update(item.keys)

    def _write_all(self, items: list[_Write]) -> None:
        group: list[tuple[bytes, memoryview | None]] = []
        group_bytes = 0
        for key, rows in _texts(items):
            size = 0 if rows is None else bytes_in_pages(len(rows))
            if size > self._transaction_bytes:
                self.dropped_writes += 1
                continue
            if group_bytes + size > self._transaction_bytes:
                self._commit(group)
                group, group_bytes = [], 0
            group.append((key, rows))
            group_bytes += size
        self._commit(group)

    def _commit(self, group: list[tuple[bytes, memoryview | None]]) -> None:
        """Write one transaction; while the map is full, try again after larger and larger evictions."""
        if not group:
            return
        for transactions in (0, 4, 8, 12):
            try:
                if transactions:
                    self._evict(transactions * self._transaction_bytes)
                self._put(group)
                return
            except lmdb.MapFullError as error:  # too few of the free pages are adjacent
                failed: Exception = error
            except (lmdb.Error, OSError, CacheError) as error:
                failed = error
                break
        dropped = sum(rows is not None for _, rows in group)
        self.dropped_writes += dropped
        if not isinstance(failed, lmdb.MapFullError):
            self.failed_writes += dropped
        self._warn_once("writing", failed)

    def _put(self, group: list[tuple[bytes, memoryview | None]]) -> None:
        evicted = 0
        with self._writing() as transaction:
            number = next_number(transaction)
            for key, rows in group:
                if rows is None:
                    delete_text(transaction, key)
                    continue
                evicted += self._make_room(transaction, bytes_in_pages(len(rows)))
                number += put_text(transaction, key, rows, number)
        self.evictions += evicted

    def _evict(self, room: int) -> None:
        with self._writing() as transaction:
            evicted = self._make_room(transaction, room)
        self.evictions += evicted
        for _ in range(2):  # pages that a transaction frees are reusable two transactions later
            with self._writing() as transaction:
                transaction.put(FORMAT_KEY, FORMAT)

    def _make_room(self, transaction: Any, room: int) -> int:
        """Delete the oldest texts until `room` bytes fit; returns how many were deleted."""
        evicted = 0
        with transaction.cursor() as cursor:
            while live_bytes(transaction.stat()) + room > _LIVE * self._limit_bytes:
                if not delete_oldest(transaction, cursor):
                    break
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
            self._writer.offer(_Write(wrong, [0] * len(wrong), None))

    def _warn_once(self, what: str, error: Exception) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning(
                "%s the cache %s failed; missing texts are computed (said once): %s: %s%s",
                what,
                self.path,
                type(error).__name__,
                error,
                f"; {free_room(self.path)}" if what == "writing" and has_no_room(error) else "",
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
