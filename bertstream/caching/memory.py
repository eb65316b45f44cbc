"""The memory tier: rows in one arena, and the texts that own them in order of use.

The unit of the arena is one row, so nothing fragments: a text may own any rows, and one gather reads a batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..system.cuda import InTurn, to_device
from ..tokens import cumulate, rows_of

TEXT_BYTES = 320
"""Bytes of the index per text, besides 4 per row: key, entry, their headers and the dict's slots. Measured 250 to 310
on CPython 3.10 to 3.13, depending on how full the dict is."""

ROW_INDEX_BYTES = 8
"""Bytes of the index per row: its number, with its text or among the free ones."""

_HOST = torch.device("cpu")


class MemoryTier:
    """Rows by key, bounded in bytes, index included; the least recently used texts are evicted.

    On the host the system provides the arena's pages as they are written to, so a large bound costs nothing until it is
    used; on another device all of it is allocated here. The index is on the host. Use it from one thread at a time, on
    any CUDA stream.

    Args:
        limit_bytes: of rows and index together.
        row_bytes: bytes of one row.
        device: where the rows are.
    Attributes:
        evictions: texts that were evicted.
    """

    def __init__(self, limit_bytes: int, row_bytes: int, device: torch.device = _HOST) -> None:
        self.limit_bytes = limit_bytes
        self.row_bytes = row_bytes
        self.device = device
        self.evictions = 0
        self._each = row_bytes + ROW_INDEX_BYTES
        self._turns = InTurn()
        self._arena = self._new_arena()
        self._clear()

    def __len__(self) -> int:
        return len(self._texts)

    def __contains__(self, key: bytes) -> bool:
        return key in self._texts

    def keys(self) -> list[bytes]:
        """All keys, the least recently used first."""
        return list(self._texts)

    @property
    def num_bytes(self) -> int:
        """Bytes in use, rows and index."""
        return self._used * self._each + len(self._texts) * TEXT_BYTES

    def gather(self, keys: Sequence[bytes]) -> Tensor | None:
        """Read texts; each counts as used.

        Args:
            keys: one per text, repeats included.
        Returns:
            [N, row_bytes] uint8 on `device`, a copy, text by text; None where any of the texts is missing.
        """
        texts = self._texts
        found = []
        for key in keys:
            rows = texts.get(key)
            if rows is None:
                return None
            found.append(rows)
        for key in keys:
            texts.move_to_end(key)
        index = to_device(np.frombuffer(bytearray().join(found), np.int32), self.device)
        with self._turns.use(self.device, self._arena):
            return self._arena.index_select(0, index).view(torch.uint8)

    def put(self, keys: Sequence[bytes], row_counts: Sequence[int], rows: Tensor) -> None:
        """Copy texts in; the last one becomes the most recently used.

        Args:
            keys: one per text, none twice; texts that are here already are skipped.
            row_counts: rows of each text.
            rows: [sum of row_counts, row_bytes] uint8 on `device`, text by text.
        """
        chosen = self._fitting(keys, row_counts)
        if not chosen:
            return
        lengths = [row_counts[i] for i in chosen]
        arena_rows = self._take(sum(lengths), len(chosen))
        if len(chosen) < len(keys):
            rows = rows.index_select(
                0, to_device(rows_of(np.asarray(chosen), cumulate(np.asarray(row_counts))), self.device)
            )
        index = to_device(arena_rows.astype(np.int64), self.device)
        with self._turns.use(self.device, self._arena):
            self._arena.index_copy_(0, index, rows.view(self._arena.dtype))
        as_bytes, start = arena_rows.tobytes(), 0
        for i, length in zip(chosen, lengths, strict=True):
            end = start + 4 * length
            self._texts[keys[i]] = as_bytes[start:end]
            start = end

    def drop(self, prefix: bytes) -> int:
        """Delete the texts whose keys begin with `prefix`.

        Returns:
            How many texts were deleted.
        """
        dropped = [key for key in self._texts if key.startswith(prefix)]
        self._release([self._texts.pop(key) for key in dropped])
        return len(dropped)

    def _new_arena(self) -> Tensor:
        """An arena of the widest words that divide a row: CUDA and torch's `index_copy_` move single elements."""
        word = next(w for w in (torch.int64, torch.int32, torch.int16, torch.int8) if not self.row_bytes % w.itemsize)
        shape = (self.limit_bytes // self._each, self.row_bytes // word.itemsize)
        with torch.inference_mode(False):
            if self.device.type != "cpu":
                arena = torch.empty(shape, dtype=word, device=self.device)
                # Its first turn, so that later ones wait for what this stream still does with that memory.
                with self._turns.use(self.device, arena):
                    return arena
            # A bare storage, because `torch.empty` fills its memory when deterministic algorithms are on. Not NumPy,
            # which asks for huge pages: finding some for 75 MB took 16 to 160 ms, small ones 21.
            memory = torch.UntypedStorage(shape[0] * self.row_bytes)
            return torch.empty(0, dtype=word, device="cpu").set_(memory, 0, shape, (shape[1], 1))

    def _clear(self) -> None:
        self._texts: OrderedDict[bytes, bytes] = OrderedDict()  # each text's rows, as bytes of an int32 array
        self._free: list[npt.NDArray[np.int32]] = []
        self._num_free = 0
        self._used = 0  # rows of the arena that have been written to

    def _fitting(self, keys: Sequence[bytes], row_counts: Sequence[int]) -> list[int]:
        """Which new texts to keep, as if they came one by one: later ones evict earlier ones of the same batch."""
        chosen: list[int] = []
        rows = 0
        for i in reversed(range(len(keys))):
            taken = max(self._used, rows + row_counts[i]) * self._each + (len(chosen) + 1) * TEXT_BYTES
            if taken <= self.limit_bytes and keys[i] not in self._texts:
                chosen.append(i)
                rows += row_counts[i]
        return chosen[::-1]

    def _take(self, rows: int, texts: int) -> npt.NDArray[np.int32]:
        """Allocate arena rows for so many more rows and texts; evict others until they fit."""
        evicted: list[bytes] = []
        num_free = self._num_free
        while True:
            growth = max(0, rows - num_free)
            taken = (self._used + growth) * self._each + (len(self._texts) + texts) * TEXT_BYTES
            if taken <= self.limit_bytes:
                break
            evicted.append(self._texts.popitem(last=False)[1])
            num_free += len(evicted[-1]) // 4
        self.evictions += len(evicted)
        self._release(evicted)
        if evicted and self._num_free - rows > self._used // 2:
            # Short texts came after long ones: the index needs the memory of arena rows that are no longer used.
            self.evictions += len(self._texts)
            self._clear()
            if self.device.type == "cpu":
                self._arena = self._new_arena()  # the old one's pages go back to the system
            growth = rows
        arena_rows = [np.arange(self._used, self._used + growth, dtype=np.int32)]
        self._used += growth
        missing = rows - growth
        while missing:
            block = self._free.pop()
            if len(block) > missing:
                self._free.append(block[missing:])
                block = block[:missing]
            arena_rows.append(block)
            missing -= len(block)
        self._num_free -= rows - growth
        return np.concatenate(arena_rows)

    def _release(self, texts: Sequence[bytes]) -> None:
        rows = np.frombuffer(b"".join(texts), np.int32)
        if len(rows):
            self._free.append(rows)
            self._num_free += len(rows)
