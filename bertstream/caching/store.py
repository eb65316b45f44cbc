"""Rows by key, in memory and on disk: one owner of both tiers, of their counts and of their lock."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import CacheError, ConfigError
from ..system.cuda import to_device
from ..tokens import Indices
from .disk import Bytes, DiskTier
from .memory import MemoryTier

logger = logging.getLogger(__name__)

_JUDGED_ROWS = 4096
"""Rows that must have been read, and computed, before the two are compared: a few seconds on a small CPU."""

_ASIDE_LOOKUPS = 1000
"""How many lookups skip a slow disk before it is measured again: by then its pages may be in memory."""


@dataclass
class _Counts:
    """Texts looked up in this process."""

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    repeats: int = 0
    off: int = 0


class Lookup(NamedTuple):
    """What a store holds of some texts.

    Attributes:
        found: for each tier that holds some of the texts, their indices and their rows [N, row_bytes], text by text.
        missing: indices of the other texts.
    """

    found: list[tuple[Indices, Tensor]]
    missing: Indices


class ComputedRows(NamedTuple):
    """Rows that were not in the store.

    Attributes:
        rows: [N, row_bytes] uint8 on the store's device.
        on_host: the same rows for the disk; None where there is no disk.
        seconds: how long computing them took.
    """

    rows: Tensor
    on_host: Bytes | None
    seconds: float

    def pick(self, rows: npt.NDArray[np.integer[Any]]) -> ComputedRows:
        """Some of the rows."""
        on_host = None if self.on_host is None else self.on_host[rows]
        return ComputedRows(self.rows[to_device(rows, self.rows.device)], on_host, self.seconds)


class RowStore:
    """Rows of texts by key, looked up in memory first, then on disk.

    Use it from any thread. A forked child finds an empty memory and opens the folder for itself.

    Args:
        memory_bytes: bytes in memory, index included; 0 for none.
        device: where the rows in memory are, and where all rows are returned.
        folder: the folder on disk; None for none.
        folder_bytes: bytes of the file in that folder at most.
        read_only: open the folder without ever writing to it.
    Raises:
        CacheError: the folder cannot be opened.
    """

    def __init__(
        self, *, memory_bytes: int, device: torch.device, folder: str | None, folder_bytes: int, read_only: bool
    ) -> None:
        self.device = device
        self._memory_bytes = memory_bytes
        self._folder = folder
        self._folder_bytes = folder_bytes
        self._read_only = read_only
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._counts = _Counts()
        self._judge = DiskJudge()
        self._memory: MemoryTier | None = None
        self._disk: DiskTier | None = None
        if self._folder is not None and not self._closed:
            self._disk = DiskTier(self._folder, limit_bytes=self._folder_bytes, read_only=self._read_only)

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: another process gets a store with an empty memory over the same folder, unless closed."""
        names = ("device", "_memory_bytes", "_folder", "_folder_bytes", "_read_only", "_closed")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def rows_on_host(self) -> bool:
        """Whether computed rows come to the host, which then waits for them."""
        return self.device.type == "cpu" or self._disk is not None

    @property
    def has_disk(self) -> bool:
        """Whether there is a disk tier; a forked child may have failed to open the folder."""
        self._check_process()
        return self._disk is not None

    @property
    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def reserve(self, row_bytes: int) -> None:
        """Take the memory for rows of this size, or check that it holds such rows.

        Raises:
            ConfigError: memory holds rows of another size.
        """
        self._check_process()
        with self._lock:
            self._memory_for(row_bytes)

    def gather(self, keys: Sequence[bytes], row_bytes: int) -> Tensor | None:
        """Get all rows of a batch from memory by one gather, and count them.

        Args:
            keys: one per text, repeats included.
            row_bytes: bytes of one row.
        Returns:
            [N, row_bytes] uint8, a copy, text by text; None where memory lacks any of the texts.
        """
        self._check_process()
        with self._lock:
            memory = self._memory_for(row_bytes)
            rows = None if memory is None else memory.gather(keys)
            if rows is not None:
                texts = len(set(keys))
                self._counts.memory_hits += texts
                self._counts.repeats += len(keys) - texts
        return rows

    def lookup(
        self, keys: Sequence[bytes], row_counts: npt.NDArray[Any], row_bytes: int, *, repeats: int = 0
    ) -> Lookup:
        """Look texts up in memory, then on disk, and count what is found; rows from disk are put into memory.

        Args:
            keys: one per text, none twice.
            row_counts: [B] rows of each text.
            row_bytes: bytes of one row.
            repeats: texts of the batch that are left out of `keys` because they repeat others; for the counts only.
        """
        self._check_process()
        found: list[tuple[Indices, Tensor]] = []
        missing = np.arange(len(keys))
        with self._lock:
            memory = self._memory_for(row_bytes)
            here = [] if memory is None else [i for i, key in enumerate(keys) if key in memory]
            if memory is not None and here:
                rows = memory.gather([keys[i] for i in here])
                assert rows is not None
                found.append((missing[here], rows))
                missing = np.delete(missing, here)
        in_memory = len(here)
        if self._disk is not None and len(missing) and self._judge.may_read():
            indices, rows = self._read(self._disk, [keys[i] for i in missing.tolist()], row_counts[missing], row_bytes)
            found.append((missing[indices], rows))
            missing = np.delete(missing, indices)
        with self._lock:
            self._counts.memory_hits += in_memory
            self._counts.disk_hits += len(keys) - in_memory - len(missing)
            self._counts.misses += len(missing)
            self._counts.repeats += repeats
        return Lookup(found, missing)

    def compute(self, make_rows: Callable[[], Tensor], *, hold_writes: bool) -> ComputedRows:
        """Compute rows, and measure how long that takes.

        Args:
            make_rows: returns [N, row_bytes] uint8 on any device.
            hold_writes: whether disk writes wait meanwhile; see `DiskTier.hold_writes`.
        """
        self._check_process()
        started = time.perf_counter()
        with self._disk.hold_writes() if self._disk is not None and hold_writes else nullcontext():
            rows = make_rows().to(self.device)
        on_host = None if self._disk is None else rows.cpu().numpy()  # waits for the device: the time is then right
        seconds = time.perf_counter() - started
        self._judge.computed(len(rows), seconds)
        return ComputedRows(rows, on_host, seconds)

    def add(
        self, keys: Sequence[bytes], row_counts: npt.NDArray[Any], computed: ComputedRows, *, wait: bool = False
    ) -> None:
        """Put texts into memory, and queue them for the disk.

        Args:
            keys: one per text, none twice.
            row_counts: [B] rows of each text.
            computed: the rows, text by text; do not change them afterwards.
            wait: wait for room in the disk's queue; otherwise texts that find none are dropped and counted.
        """
        self._check_process()
        self._remember(keys, row_counts, computed.rows)
        if self._disk is not None and computed.on_host is not None and (wait or not self._judge.skips_left):
            sizes = (row_counts * computed.rows.shape[1]).tolist()
            self._disk.write(keys, sizes, computed.on_host, wait=wait)

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """The indices of texts that the disk lacks and that no write waits for; without a disk, that memory lacks."""
        self._check_process()
        if self._disk is not None:
            return self._disk.missing(keys)
        with self._lock:
            memory = self._memory
            return [i for i, key in enumerate(keys) if memory is None or key not in memory]

    def keys_with_prefix(self, prefix: bytes = b"") -> Iterator[bytes]:
        """The keys on disk that begin with `prefix`; without a disk, those in memory."""
        self._check_process()
        if self._disk is not None:
            return self._disk.keys_with_prefix(prefix)
        with self._lock:
            held = [] if self._memory is None else self._memory.keys()
        return (key for key in held if key.startswith(prefix))

    def count_off(self, texts: int) -> bool:
        """Count texts that were encoded without a lookup; True the first time in this process."""
        self._check_process()
        with self._lock:
            first = not self._counts.off
            self._counts.off += texts
        return first

    def stats(self) -> dict[str, float]:
        """The counts, sizes and seconds that `EmbeddingCache.stats` describes."""
        self._check_process()
        with self._lock:
            stats: dict[str, float] = asdict(self._counts)
            memory = self._memory
            stats["memory_evictions"] = 0 if memory is None else memory.evictions
            stats["memory_texts"] = 0 if memory is None else len(memory)
            stats["memory_bytes"] = 0 if memory is None else memory.num_bytes
        stats["compute_s"] = self._judge.compute_s
        disk = self._disk
        if disk is not None:
            stats["disk_evictions"] = disk.evictions
            stats["disk_dropped_writes"] = disk.dropped_writes
            stats["disk_failed_writes"] = disk.failed_writes
            stats["disk_wrong"] = disk.wrong
            stats["disk_failures"] = disk.failures
            stats |= disk.sizes()
            stats["disk_read_s"] = self._judge.read_s
            stats["disk_aside"] = int(self._judge.skips_left > 0)
        return stats

    def drop(self, prefix: bytes) -> int:
        """Delete the texts whose keys begin with `prefix`, in memory and on disk.

        Returns:
            How many texts were deleted from disk; without a disk, from memory.
        Raises:
            CacheError: the folder is read-only, or cannot be written to.
        """
        self._check_process()
        with self._lock:
            in_memory = 0 if self._memory is None else self._memory.drop(prefix)
        return in_memory if self._disk is None else self._disk.drop(prefix)

    def verify(self) -> int:
        """Check every entry on disk; see `DiskTier.verify`."""
        self._check_process()
        return 0 if self._disk is None else self._disk.verify()

    def flush(self) -> None:
        """Wait until the rows that are queued for the disk are written."""
        self._check_process()
        if self._disk is not None:
            self._disk.flush()

    def close(self) -> None:
        """Write what is queued and close the folder; later lookups find nothing, and `add` keeps nothing."""
        self._check_process()
        with self._lock:
            self._memory, self._closed = None, True
        if self._disk is not None:
            self._disk.close()

    def _check_process(self) -> None:
        """Start over in a forked child: a lock may be held there forever, and LMDB must not be used across a fork."""
        if self._pid != os.getpid():
            if self._disk is not None:
                self._disk.leave_to_parent()
            try:
                self._start()
            except CacheError as error:
                logger.warning("this forked process uses the cache without its disk: %s", error)

    def _memory_for(self, row_bytes: int) -> MemoryTier | None:
        """The memory tier, made when it is first needed; hold the lock."""
        if self._memory is None and self._memory_bytes and not self._closed:
            self._memory = MemoryTier(self._memory_bytes, row_bytes, self.device)
        if self._memory is not None and self._memory.row_bytes != row_bytes:
            raise ConfigError(
                f"this cache holds rows of {self._memory.row_bytes} bytes in memory, this encoder's have "
                f"{row_bytes}: give it an EmbeddingCache of its own"
            )
        return self._memory

    def _read(
        self, disk: DiskTier, keys: Sequence[bytes], row_counts: npt.NDArray[Any], row_bytes: int
    ) -> tuple[list[int], Tensor]:
        """The indices of the texts that the disk holds, and their rows on `device`."""
        started = time.perf_counter()
        indices, data = disk.read(keys, (row_counts * row_bytes).tolist())
        rows = to_device(data, self.device).view(len(data) // row_bytes, row_bytes)
        self._judge.read(len(rows), time.perf_counter() - started)
        self._remember([keys[i] for i in indices], row_counts[indices], rows)
        return indices, rows

    def _remember(self, keys: Sequence[bytes], row_counts: npt.NDArray[Any], rows: Tensor) -> None:
        with self._lock:
            memory = self._memory_for(rows.shape[1])
            if memory is not None:
                memory.put(keys, row_counts.tolist(), rows)


class DiskJudge:
    """Decides whether the disk is worth reading: seconds per row read against seconds per row computed.

    Attributes:
        read_s: seconds of reading in total.
        compute_s: seconds of computing in total.
        skips_left: how many of the next lookups skip the disk.
    """

    def __init__(self) -> None:
        self.read_s = self.compute_s = 0.0
        self.skips_left = 0
        self._read = [0.0, 0.0]  # rows and seconds since the last comparison
        self._computed = [0.0, 0.0]

    def read(self, rows: int, seconds: float) -> None:
        """Count rows that were read."""
        self.read_s += seconds
        self._read = [self._read[0] + rows, self._read[1] + seconds]

    def computed(self, rows: int, seconds: float) -> None:
        """Count rows that were computed."""
        self.compute_s += seconds
        self._computed = [self._computed[0] + rows, self._computed[1] + seconds]

    def may_read(self) -> bool:
        """Whether to read now; ask once per lookup."""
        if self.skips_left:
            self.skips_left -= 1
            return False
        (read, read_s), (computed, compute_s) = self._read, self._computed
        if min(read, computed) < _JUDGED_ROWS:
            return True
        slower = read_s / read > compute_s / computed
        if slower:
            logger.warning(
                "reading from the cache's disk takes %.1f us per row, computing %.1f: the next %d lookups skip the "
                "disk",
                read_s / read * 1e6,
                compute_s / computed * 1e6,
                _ASIDE_LOOKUPS,
            )
            self.skips_left = _ASIDE_LOOKUPS
        self._read, self._computed = [0.0, 0.0], [0.0, 0.0]
        return not slower
