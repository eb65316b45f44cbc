"""Vectors that were computed once are not computed again: in memory, then on disk, in front of an encoder.

A text's key is a hash of the encoder's fingerprint and of all that enters the model for it, so nothing stale is ever
found. What is found and what is computed go through the same bytes, so a text's vectors do not depend on which it was.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..embeddings import Embeddings, SupportsCache, SupportsEncode
from ..encoding.attention import plain_mode
from ..errors import CacheError, ConfigError, EncoderError, check_choice, shortened
from ..system.cuda import resolve_device, to_device
from ..tokens import SupportsTokenize, TokenBatch, cumulate, distinct, rows_of, text_bytes
from .codec import Codec, Storage
from .disk import LEAST_BYTES, DiskTier
from .memory import MemoryTier

logger = logging.getLogger(__name__)

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{unit}I": 1 << 10 * (i + 1) for i, unit in enumerate("KMGT")
}

_PREFIX_BYTES = 8
"""Of a key, what says whose vectors these are; the rest is 16 bytes of hash over that and the text."""

_JUDGED_ROWS = 4096
"""Rows that must have been read and computed before the two are compared: some seconds of a small CPU."""

_ASIDE_BATCHES = 1000
"""How long the disk stands aside before it is measured anew: its pages may be in memory by then."""


@dataclass
class _Counts:
    """What was looked up, in texts, over the cache's life in this process."""

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    repeats: int = 0
    off: int = 0


class EmbeddingCache:
    """Vectors by content, bounded in bytes: the least recently used leave memory, the oldest leave the disk.

    Hand it to `wrap`, `stream` or `warm`; several loaders and encoders whose rows have one size may share it. Batches
    are the same with and without it, up to the last bits, in which a row depends on the batch it was encoded in. It
    holds nothing stale: another encoder, other weights or other settings make other keys (for weights that are written
    to through `.data`, once `encoder.freeze()` was called), and while a parameter of the encoder requires a gradient
    the cache is off.

    Args:
        memory: bytes in memory, index included: a number, or a string such as "2GiB" or "500MB"; 0 for none.
        disk: a folder on a local disk, shared by the processes of this machine; None for none. Rows are written by a
            thread behind; what it cannot keep up with is dropped, and counted.
        disk_limit: bytes of the file in that folder at most; entries fill 0.8 of them. The same for all that share it.
        dtype: how rows are stored. "auto" as the encoder gives them, bit for bit. "bfloat16" (relative error of a
            float32 row up to 0.4 %) and "int8" (one scale for 32 dimensions; for all-MiniLM-L6-v2 0.6 % on average,
            1.3 % at most) take a half and about a quarter of the room of float32; rows are then rounded when they are
            computed, too, so that an epoch's vectors do not depend on what was cached.
        device: where the rows in memory are (their index is on the host). `encoder.device` of an encoder on CUDA keeps
            them there: what memory holds then never crosses to the host and back. All of the memory is taken when the
            cache is first used, where this is not "cpu".
        read_only: the folder is read and never written; an encoder that it holds nothing of is refused.
    Raises:
        ConfigError: an argument is out of range, or there is no such device.
        CacheError: the folder cannot be used: it is damaged, of another format, cannot be written to, or is open in
            this process already.
    """

    def __init__(
        self,
        memory: int | str = "2GiB",
        disk: str | os.PathLike[str] | None = None,
        disk_limit: int | str = "100GiB",
        *,
        dtype: Storage = "auto",
        device: torch.device | str = "cpu",
        read_only: bool = False,
    ) -> None:
        check_choice("dtype", dtype, Storage)
        self.device = resolve_device(device)
        self.dtype: Storage = dtype
        self.memory_bytes = as_bytes("memory", memory)
        self.disk_bytes = as_bytes("disk_limit", disk_limit)
        self.disk = None if disk is None else os.fspath(disk)
        self.read_only = read_only
        if disk is None and not self.memory_bytes:
            raise ConfigError("memory=0 without disk=: such a cache holds nothing, leave cache= out")
        if disk is None and read_only:
            raise ConfigError("read_only=True is for disk=, and none is named")
        if self.disk_bytes < LEAST_BYTES:
            raise ConfigError(f"disk_limit={disk_limit!r}: write at least {LEAST_BYTES >> 20} MiB")
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._counts = _Counts()
        self._memory: MemoryTier | None = None
        self._disk = None
        self._clock = _Clock()
        self._said_off = False
        if self.disk is not None and not self._closed:
            self._disk = DiskTier(self.disk, limit_bytes=self.disk_bytes, read_only=self.read_only)

    def __repr__(self) -> str:
        disk = f", disk={self.disk!r}, disk_limit={self.disk_bytes}" if self.disk is not None else ""
        device = f", device={str(self.device)!r}" if self.device.type != "cpu" else ""
        return f"EmbeddingCache(memory={self.memory_bytes}{disk}, dtype={self.dtype!r}{device})"

    def of(self, encoder: SupportsEncode) -> CachedEncoder:
        """The encoder with this cache in front of it.

        Raises:
            ConfigError: the encoder cannot say what its vectors depend on, or its rows are of another size than those
                of the encoder that this cache was used with before.
            CacheError: the cache is read-only, and holds nothing of this encoder.
        """
        asked = ("fingerprint", "row_shape", "output_dtype", "row_counts", "assemble")
        missing = [name for name in asked if not hasattr(encoder, name)]
        if missing:
            kind = type(encoder).__name__
            raise ConfigError(f"cache= needs a bertstream.Encoder: this {kind} has no {', '.join(missing)}")
        self._check_process()
        cached = CachedEncoder(cast(SupportsCache, encoder), self)
        if self._disk is not None and self.read_only:
            prefix = cached.prefix()
            if prefix is not None and next(self._disk.keys_from(prefix), None) is None:
                raise CacheError(
                    f"{self.disk} is open read-only and holds nothing of this encoder ({prefix.hex()}), only of "
                    f"{', '.join(self.fingerprints()) or 'none'}: other weights, other settings or another dtype made "
                    "it",
                    path=self.disk,
                )
        return cached

    def stats(self) -> dict[str, float]:
        """What was looked up since the cache was made, in this process, and what is held.

        In texts: `memory_hits`, `disk_hits`, `misses`, `repeats` (within a batch), `off` (encoded while a parameter
        required a gradient), `memory_evictions`, `memory_texts`. In bytes: `memory_bytes`, index included. With a
        disk: `disk_evictions`, `disk_dropped_writes`, `disk_wrong` (entries with a wrong checksum), `disk_failures`
        (readings that failed as a whole), `disk_texts`, `disk_bytes` (live), and `disk_aside`: 1 while reading takes
        longer than computing, so that the disk is left alone. `disk_read_s` and `compute_s` are seconds.
        """
        self._check_process()
        with self._lock:
            stats: dict[str, float] = asdict(self._counts)
            memory = self._memory
            stats["memory_evictions"] = 0 if memory is None else memory.evictions
            stats["memory_texts"] = 0 if memory is None else len(memory)
            stats["memory_bytes"] = 0 if memory is None else memory.num_bytes
        stats["compute_s"] = self._clock.compute_s
        disk = self._disk
        if disk is not None:
            for name in ("evictions", "dropped_writes", "wrong", "failures"):
                stats[f"disk_{name}"] = getattr(disk, name)
            stats |= disk.sizes()
            stats["disk_read_s"] = self._clock.read_s
            stats["disk_aside"] = int(self._clock.aside > 0)
        return stats

    def fingerprint(self, encoder: SupportsCache) -> str | None:
        """The name under which this cache keeps the encoder's vectors; None while a parameter requires a gradient."""
        prefix = self.of(encoder).prefix()
        return None if prefix is None else prefix.hex()

    def fingerprints(self) -> dict[str, int]:
        """Texts on disk of each fingerprint, or in memory where there is no disk. Reads all keys."""
        self._check_process()
        if self._disk is not None:
            return dict(Counter(key[:_PREFIX_BYTES].hex() for key in self._disk.keys_from()))
        with self._lock:
            keys = [] if self._memory is None else self._memory.keys()
        return dict(Counter(key[:_PREFIX_BYTES].hex() for key in keys))

    def verify(self) -> int:
        """Check every entry on disk against its checksum; how many were wrong. They are deleted, unless read-only."""
        self._check_process()
        return 0 if self._disk is None else self._disk.verify()

    def drop(self, fingerprint: str) -> int:
        """Forget one encoder's vectors, in memory and on disk; how many texts it were.

        Raises:
            ConfigError: that is no fingerprint; see `fingerprints()`.
            CacheError: the folder is read-only, or cannot be written to.
        """
        self._check_process()
        if not re.fullmatch(f"[0-9a-f]{{{2 * _PREFIX_BYTES}}}", fingerprint):
            raise ConfigError(f"fingerprint={shortened(fingerprint)}: write one of those that fingerprints() names")
        prefix = bytes.fromhex(fingerprint)
        with self._lock:
            in_memory = 0 if self._memory is None else self._memory.drop(prefix)
        return in_memory if self._disk is None else self._disk.drop(prefix)

    def flush(self) -> None:
        """Wait until the rows that were queued for the disk are written."""
        self._check_process()
        if self._disk is not None:
            self._disk.flush()

    def close(self) -> None:
        """Write what is queued and let the folder go. Loaders that still hold the cache compute on without it."""
        self._check_process()
        with self._lock:
            self._memory, self._closed = None, True
        if self._disk is not None:
            self._disk.close()

    def __enter__(self) -> EmbeddingCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Another process gets a cache of the same settings, empty in memory, over the same folder, unless closed."""
        own = ("memory_bytes", "disk", "disk_bytes", "dtype", "device", "read_only", "_closed")
        return {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _check_process(self) -> None:
        """In a forked child start anew: locks may be held there for good, and LMDB must not be used across a fork."""
        if self._pid != os.getpid():
            if self._disk is not None:
                self._disk.leave_to_parent()
            try:
                self._start()
            except CacheError as error:
                logger.warning("this forked process goes on without the cache's disk: %s", error)

    def _memory_for(self, row_bytes: int) -> MemoryTier | None:
        with self._lock:
            if self._memory is None and self.memory_bytes and not self._closed:
                self._memory = MemoryTier(self.memory_bytes, row_bytes, self.device)
            if self._memory is not None and self._memory.row_bytes != row_bytes:
                raise ConfigError(
                    f"this cache holds rows of {self._memory.row_bytes} bytes in memory, this encoder's have "
                    f"{row_bytes}: give it an EmbeddingCache of its own"
                )
            return self._memory


class _Identity(NamedTuple):
    """Whose vectors these are: what goes into the hash of each text, and what its key begins with."""

    fingerprint: bytes
    prefix: bytes


class CachedEncoder:
    """An encoder with a cache in front of it, for a loader to use in its place; made by `EmbeddingCache.of`.

    Args:
        encoder: what computes the rows that are missing.
        cache: where the others are.
    """

    def __init__(self, encoder: SupportsCache, cache: EmbeddingCache) -> None:
        self._encoder = encoder
        self._cache = cache
        self._codec = Codec(cache.dtype, encoder.row_shape, encoder.output_dtype)
        self._memory()  # which checks the size of the rows
        self._known: _Identity | None = None
        self.compute_s = 0.0
        """Seconds in the encoder; the rest of `encode` is looking up."""
        self.encode_calls = self.encoded_tokens = 0
        """Calls of the encoder, and the tokens of the texts that it was given."""

    @property
    def tokenizer(self) -> SupportsTokenize:
        """The encoder's."""
        return self._encoder.tokenizer

    @property
    def device(self) -> torch.device:
        """The encoder's."""
        return self._encoder.device

    @property
    def max_forward_tokens(self) -> int:
        """The encoder's."""
        return self._encoder.max_forward_tokens

    def prefix(self) -> bytes | None:
        """What this encoder's keys begin with; None while one of its parameters requires a gradient."""
        identity = self._identity()
        return None if identity is None else identity.prefix

    def _identity(self) -> _Identity | None:
        fingerprint = self._encoder.fingerprint()
        if fingerprint is None:
            return None
        known = self._known
        if known is None or known.fingerprint != fingerprint:
            named = fingerprint + self._codec.name.encode()
            known = self._known = _Identity(fingerprint, blake2b(named, digest_size=_PREFIX_BYTES).digest())
        return known

    def encode(self, batch: TokenBatch) -> Embeddings:
        """What the encoder gives for this batch; only texts that the cache does not hold are computed, each once.

        Raises:
            EncoderError: as the encoder does.
        """
        cache = self._cache
        cache._check_process()
        identity = self._identity()
        if identity is None:
            with cache._lock:
                cache._counts.off += len(batch)
                say, cache._said_off = not cache._said_off, True
            if say:
                logger.warning(
                    "the cache is off: parameters of the encoder require gradients, so its weights may change at any "
                    "step; encoder.requires_grad_(False) freezes them"
                )
            return self._encoded(batch)
        if not len(batch):
            return self._encoded(batch)
        keys = text_keys(batch, identity.prefix, identity.fingerprint)
        counts = self._encoder.row_counts(batch)
        with plain_mode(self.device):
            rows = self._from_memory(keys)
            if rows is None:
                try:
                    rows = self._rows(batch, keys, counts, identity)
                except EncoderError:
                    # Its places are those of the texts that were missing; the whole batch has the same fault.
                    return self._encoded(batch)
            values = self._codec.unpack(to_device(rows, self.device))  # on the way they are smaller
            return self._encoder.assemble(values, batch)

    def _encoded(self, batch: TokenBatch) -> Embeddings:
        self.encode_calls += 1
        self.encoded_tokens += batch.num_tokens
        return self._encoder.encode(batch)

    def fill(self, batch: TokenBatch) -> int:
        """Compute what the cache does not hold of this batch, and wait for room to write it; how many texts it were.

        Raises:
            EncoderError: as the encoder does.
            ConfigError: the cache is off, because a parameter requires a gradient.
        """
        cache = self._cache
        cache._check_process()
        identity = self._identity()
        if identity is None:
            raise ConfigError("the encoder's parameters require gradients: encoder.requires_grad_(False) freezes them")
        keys = text_keys(batch, identity.prefix, identity.fingerprint)
        texts = list({key: i for i, key in reversed(list(enumerate(keys)))}.values())[::-1]
        if cache._disk is not None:
            absent = cache._disk.absent([keys[i] for i in texts])
            texts = [texts[i] for i in absent]
        else:
            memory = self._memory()
            with cache._lock:
                texts = [i for i in texts if memory is None or keys[i] not in memory]
        if texts:
            counts = self._encoder.row_counts(batch)[texts]
            self._computed(batch, np.array(texts), [keys[i] for i in texts], counts, identity, wait=True)
        return len(texts)

    def _from_memory(self, keys: Sequence[bytes]) -> Tensor | None:
        """The rows of the whole batch, by one gather, where memory holds all of it."""
        cache, memory = self._cache, self._memory()
        with cache._lock:
            rows = None if memory is None else memory.gather(keys)
            if rows is not None:
                texts = len(set(keys))
                cache._counts.memory_hits += texts
                cache._counts.repeats += len(keys) - texts
        return rows

    def _rows(self, batch: TokenBatch, keys: Sequence[bytes], counts: npt.NDArray[Any], identity: _Identity) -> Tensor:
        """The rows of the batch, each text's from the first place that has it."""
        cache = self._cache
        first, slot_of_text = distinct(keys)
        sought = [keys[i] for i in first]
        sizes = counts[first]

        left = np.arange(len(sought))
        order: list[npt.NDArray[Any]] = []
        parts: list[Tensor] = []

        def found(places: Sequence[int], rows: Tensor) -> None:
            nonlocal left
            order.append(left[places])
            parts.append(rows)
            left = np.delete(left, places)

        memory = self._memory()
        with cache._lock:
            if memory is not None:
                here = [i for i, key in enumerate(sought) if key in memory]
                rows = memory.gather([sought[i] for i in here])
                assert rows is not None
                found(here, rows)
        in_memory = len(sought) - len(left)
        before = len(left)
        if cache._disk is not None and before and cache._clock.may_read():
            found(*self._from_disk([sought[i] for i in left], sizes[left]))
        on_disk = before - len(left)
        with cache._lock:
            cache._counts.memory_hits += in_memory
            cache._counts.disk_hits += on_disk
            cache._counts.misses += len(left)
            cache._counts.repeats += len(keys) - len(sought)
        if len(left):
            missing = [sought[i] for i in left]
            rows = self._computed(batch, first[left], missing, sizes[left], identity)
            found(list(range(len(left))), rows)
        parts = [rows for rows in parts if len(rows)] or parts[:1]
        pool = parts[0] if len(parts) == 1 else torch.cat(parts)
        # Where each slot's rows begin in the pool.
        slots_in_pool = np.concatenate(order)
        places = np.empty(len(sought), np.int64)
        places[slots_in_pool] = np.arange(len(sought))
        index = rows_of(places[slot_of_text], cumulate(sizes[slots_in_pool]))
        return pool.index_select(0, to_device(index, pool.device))

    def _from_disk(self, keys: Sequence[bytes], counts: npt.NDArray[Any]) -> tuple[list[int], Tensor]:
        cache, row_bytes = self._cache, self._codec.row_bytes
        assert cache._disk is not None
        started = time.perf_counter()
        found, data = cache._disk.read(keys, (counts * row_bytes).tolist())
        rows = to_device(data, cache.device).view(len(data) // row_bytes, row_bytes)
        cache._clock.read(len(rows), time.perf_counter() - started)
        self._remember([keys[i] for i in found], counts[found].tolist(), rows)
        return found, rows

    def _computed(
        self,
        batch: TokenBatch,
        texts: npt.NDArray[Any],
        keys: list[bytes],
        counts: npt.NDArray[Any],
        identity: _Identity,
        *,
        wait: bool = False,
    ) -> Tensor:
        """Encode these texts, and put them into memory and behind the disk's writer."""
        cache = self._cache
        started = time.perf_counter()
        on_cpu = self.device.type == "cpu"
        with cache._disk.standing_back() if cache._disk is not None and on_cpu else nullcontext():
            rows = self._codec.pack(self._encoded(batch.picked(texts)).values).to(cache.device)
        on_host = None if cache._disk is None else rows.cpu().numpy()  # waits for them, so that the time is right
        seconds = time.perf_counter() - started
        self.compute_s += seconds
        cache._clock.computed(len(rows), seconds)
        if self._identity() != identity:
            return rows  # somebody began to train the encoder meanwhile: these may be of other weights
        self._remember(keys, counts.tolist(), rows)
        if cache._disk is not None and on_host is not None and (wait or not cache._clock.aside):
            cache._disk.write(keys, (counts * self._codec.row_bytes).tolist(), on_host, wait=wait)
        return rows

    def _remember(self, keys: Sequence[bytes], counts: Sequence[int], rows: Tensor) -> None:
        memory = self._memory()
        with self._cache._lock:
            if memory is not None:
                memory.put(keys, counts, rows)

    def _memory(self) -> MemoryTier | None:
        return self._cache._memory_for(self._codec.row_bytes)


class _Clock:
    """Whether the disk is worth reading: seconds for a row read against seconds for a row computed."""

    def __init__(self) -> None:
        self.read_s = self.compute_s = 0.0
        self.aside = 0
        """For how many look-ups the disk is left alone."""
        self._read = [0.0, 0.0]  # rows, seconds since it was last measured anew
        self._computed = [0.0, 0.0]

    def read(self, rows: int, seconds: float) -> None:
        self.read_s += seconds
        self._read = [self._read[0] + rows, self._read[1] + seconds]

    def computed(self, rows: int, seconds: float) -> None:
        self.compute_s += seconds
        self._computed = [self._computed[0] + rows, self._computed[1] + seconds]

    def may_read(self) -> bool:
        """Whether to read now; one question a look-up."""
        if self.aside:
            self.aside -= 1
            return False
        (read, read_s), (computed, compute_s) = self._read, self._computed
        if min(read, computed) < _JUDGED_ROWS:
            return True
        slower = read_s / read > compute_s / computed
        if slower:
            logger.warning(
                "reading from the cache's disk takes %.1f us a row, computing %.1f: for the next %d look-ups the disk "
                "stands aside",
                read_s / read * 1e6,
                compute_s / computed * 1e6,
                _ASIDE_BATCHES,
            )
            self.aside = _ASIDE_BATCHES
        self._read, self._computed = [0.0, 0.0], [0.0, 0.0]
        return not slower


def text_keys(batch: TokenBatch, prefix: bytes, fingerprint: bytes) -> list[bytes]:
    """One key a text: the prefix, and a hash of the fingerprint and of all that enters the model for the text."""
    return [prefix + blake2b(text, digest_size=16, key=fingerprint).digest() for text in text_bytes(batch)]


def as_bytes(name: str, value: int | str) -> int:
    """A number of bytes from an argument: one that is given as such, or a string such as "2GiB" or "500MB".

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(value, str):
        matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", value.upper())
        if matched is not None and matched[2] in _UNITS:
            return int(float(matched[1]) * _UNITS[matched[2]])
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ConfigError(f'{name}={value!r}: write bytes, or a string such as "2GiB" or "500MB"')
