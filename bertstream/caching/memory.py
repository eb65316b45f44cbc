"""The part of the cache that is in memory: rows in one arena, the texts that own them in order of use.

The unit of the arena is one row, so nothing fragments: a text owns any rows, and a batch is read by one gather.
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
"""What the index takes for a text, beside 4 bytes a row: key, entry, their headers and the dict's room; measured 250
to 310 on CPython 3.10 to 3.13, by how full the dict is."""

ROW_INDEX_BYTES = 8
"""What the index takes for a row: its number, with its text or among the free ones."""


_HOST = torch.device("cpu")


class MemoryTier:
    """Rows by text, the least recently used texts evicted; bounded in bytes, the index included.

    On the host the arena is memory that the system hands out as it is written to, so a large bound costs nothing until
    it is used; on another device all of it is taken at once. The index is on the host. For one thread at a time, on any
    CUDA stream.

    Args:
        limit_bytes: of rows and index together.
        row_bytes: bytes of one row.
        device: where the rows are.
    Attributes:
        evictions: texts that had to go.
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
        """The texts' keys, the least recently used first."""
        return list(self._texts)

    @property
    def num_bytes(self) -> int:
        """Bytes taken, rows and index."""
        return self._used * self._each + len(self._texts) * TEXT_BYTES

    def gather(self, keys: Sequence[bytes]) -> Tensor | None:
        """The rows of these texts on `device`, one text after the other, copied; None where one of them is not here."""
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

    def put(self, keys: Sequence[bytes], counts: Sequence[int], rows: Tensor) -> None:
        """Copy texts in, the last one as the most recently used.

        Args:
            keys: one a text, none twice; texts that are here already stay as they are.
            counts: rows of each text.
            rows: [sum of counts, row_bytes] uint8, on `device`.
        """
        chosen = self._fitting(keys, counts)
        if not chosen:
            return
        lengths = [counts[i] for i in chosen]
        places = self._take(sum(lengths), len(chosen))
        if len(chosen) < len(keys):
            rows = rows.index_select(
                0, to_device(rows_of(np.asarray(chosen), cumulate(np.asarray(counts))), self.device)
            )
        index = to_device(places.astype(np.int64), self.device)
        with self._turns.use(self.device, self._arena):
            self._arena.index_copy_(0, index, rows.view(self._arena.dtype))
        as_bytes, start = places.tobytes(), 0
        for i, length in zip(chosen, lengths, strict=True):
            end = start + 4 * length
            self._texts[keys[i]] = as_bytes[start:end]
            start = end

    def drop(self, prefix: bytes) -> int:
        """Forget the texts whose keys begin so; how many they were."""
        gone = [key for key in self._texts if key.startswith(prefix)]
        self._release([self._texts.pop(key) for key in gone])
        return len(gone)

    def _new_arena(self) -> Tensor:
        """In the widest words that rows are made of: CUDA and torch's `index_copy_` move one element at a time."""
        word = next(w for w in (torch.int64, torch.int32, torch.int16, torch.int8) if not self.row_bytes % w.itemsize)
        shape = (self.limit_bytes // self._each, self.row_bytes // word.itemsize)
        with torch.inference_mode(False):
            if self.device.type != "cpu":
                arena = torch.empty(shape, dtype=word, device=self.device)
                # Its first turn: what this stream still does with that memory is before.
                with self._turns.use(self.device, arena):
                    return arena
            # Of a bare storage, because `torch.empty` fills what it gives where torch is told to be deterministic. Not
            # of numpy, which asks for huge pages: to find some for 75 MB took from 16 to 160 ms, small ones 21.
            memory = torch.UntypedStorage(shape[0] * self.row_bytes)
            return torch.empty(0, dtype=word, device="cpu").set_(memory, 0, shape, (shape[1], 1))

    def _clear(self) -> None:
        self._texts: OrderedDict[bytes, bytes] = OrderedDict()  # the rows of each text, as bytes of an int32 array
        self._free: list[npt.NDArray[np.int32]] = []
        self._num_free = 0
        self._used = 0  # rows of the arena that were ever written to

    def _fitting(self, keys: Sequence[bytes], counts: Sequence[int]) -> list[int]:
        """The new texts that would be here if they came one by one: later ones evict earlier ones of the same batch."""
        chosen: list[int] = []
        rows = 0
        for i in reversed(range(len(keys))):
            taken = max(self._used, rows + counts[i]) * self._each + (len(chosen) + 1) * TEXT_BYTES
            if taken <= self.limit_bytes and keys[i] not in self._texts:
                chosen.append(i)
                rows += counts[i]
        return chosen[::-1]

    def _take(self, rows: int, texts: int) -> npt.NDArray[np.int32]:
        """Room for so many more rows and texts, made by eviction where there is none."""
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
            # Texts of few rows came after texts of many: the index wants the memory that the arena holds for nothing.
            self.evictions += len(self._texts)
            self._clear()
            if self.device.type == "cpu":
                self._arena = self._new_arena()  # the pages of the one before go back to the system
            growth = rows
        places = [np.arange(self._used, self._used + growth, dtype=np.int32)]
        self._used += growth
        missing = rows - growth
        while missing:
            block = self._free.pop()
            if len(block) > missing:
                self._free.append(block[missing:])
                block = block[:missing]
            places.append(block)
            missing -= len(block)
        self._num_free -= rows - growth
        return np.concatenate(places)

    def _release(self, texts: Sequence[bytes]) -> None:
        rows = np.frombuffer(b"".join(texts), np.int32)
        if len(rows):
            self._free.append(rows)
            self._num_free += len(rows)
