"""The user's cache: its settings, its checks and its maintenance, over a store of rows."""

from __future__ import annotations

import os
import re
from collections import Counter

import torch

from ..embeddings import SupportsCache, SupportsEncode
from ..errors import CacheError, ConfigError, check_choice, check_flag, shortened
from ..system.cuda import resolve_device
from .cached_encoder import PREFIX_BYTES, CachedEncoder
from .codec import Storage
from .folder import LEAST_BYTES
from .store import RowStore

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{unit}I": 1 << 10 * (i + 1) for i, unit in enumerate("KMGT")
}


class EmbeddingCache:
    """Vectors by the content of their texts, bounded in bytes: memory evicts the least recently used, disk the oldest.

    Pass it to `wrap`, `stream` or `warm`; several loaders and encoders whose rows have one size may share it. Batches
    are the same with and without it, up to the last bits, in which a row depends on the batch it was encoded in. It
    never returns stale vectors: another encoder, other weights or other settings make other keys (weights that are
    written to through `.data` count as other weights after `encoder.freeze()`). While a parameter of the encoder
    requires gradients the cache is off.

    Pickled, it carries its settings: another process gets an empty memory over the same folder.

    Args:
        memory: bytes in memory, index included: a number, or a string such as "2GiB" or "500MB"; 0 for none.
        disk: a folder on a local disk, shared by the processes of this machine; None for none. A background thread
            writes; when its queue is full, rows are dropped and counted.
        disk_limit: bytes of the file in that folder at most; entries fill 0.8 of them. Use the same limit in all
            processes that share the folder.
        dtype: how rows are stored. "auto" keeps them as the encoder returns them, bit for bit. "bfloat16" (relative
            error of a float32 row up to 0.4 %) and "int8" (one scale for 32 dimensions; for all-MiniLM-L6-v2 0.6 % on
            average, 1.3 % at most) take half and about a quarter of the bytes of float32; rows are rounded when they
            are computed, too, so an epoch's vectors do not depend on what was cached.
        device: where the rows in memory are (their index is on the host). `encoder.device` of an encoder on CUDA keeps
            them there: rows in memory then never cross to the host and back. Unless this is "cpu", all of the memory is
            taken when the cache is first used.
        read_only: read the folder and never write to it; an encoder that it holds nothing of is refused.
    Raises:
        ConfigError: an argument is out of range, or there is no such device.
        CacheError: the folder cannot be used: it is damaged, of another format, cannot be written to, or is already
            open in this process.
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
        check_flag("read_only", read_only)
        self.device = resolve_device(device)
        self.dtype: Storage = dtype
        self.memory_bytes = as_bytes("memory", memory)
        self.disk_bytes = as_bytes("disk_limit", disk_limit)
        self.disk = None if disk is None else os.path.expanduser(disk)
        self.read_only = read_only
        if disk is None and not self.memory_bytes:
            raise ConfigError("memory=0 without disk=: such a cache holds nothing; leave cache= out")
        if disk is None and read_only:
            raise ConfigError("read_only=True needs a folder: name one with disk=")
        if self.disk_bytes < LEAST_BYTES:
            raise ConfigError(f"disk_limit={disk_limit!r}: write at least {LEAST_BYTES >> 20} MiB")
        self._store = RowStore(
            memory_bytes=self.memory_bytes,
            device=self.device,
            folder=self.disk,
            folder_bytes=self.disk_bytes,
            read_only=read_only,
        )

    def __repr__(self) -> str:
        disk = f", disk={self.disk!r}, disk_limit={self.disk_bytes}" if self.disk is not None else ""
        device = f", device={str(self.device)!r}" if self.device.type != "cpu" else ""
        return f"EmbeddingCache(memory={self.memory_bytes}{disk}, dtype={self.dtype!r}{device})"

    def of(self, encoder: SupportsEncode) -> CachedEncoder:
        """Combine an encoder with this cache.

        Raises:
            ConfigError: the encoder lacks something that a cache needs, or its rows have another size than those of the
                encoder that this cache was used with before.
            CacheError: the cache is read-only and holds nothing of this encoder.
        """
        if not isinstance(encoder, SupportsCache):
            names = [name for protocol in (SupportsEncode, SupportsCache) for name in vars(protocol)]
            missing = [name for name in names if not name.startswith("_") and not hasattr(encoder, name)]
            kind = type(encoder).__name__
            raise ConfigError(f"cache= needs a bertstream.Encoder: this {kind} has no {', '.join(missing)}")
        cached = CachedEncoder(encoder, self._store, self.dtype)
        if self.read_only and self._store.has_disk:
            prefix = cached.prefix()
            if prefix is not None and next(self._store.keys_with_prefix(prefix), None) is None:
                raise CacheError(
                    f"{self.disk} is open read-only and holds nothing of this encoder ({prefix.hex()}), only of "
                    f"{', '.join(self.fingerprints()) or 'none'}: those come from other weights, settings or another "
                    "dtype",
                    path=self.disk,
                )
        return cached

    def stats(self) -> dict[str, float]:
        """Get what this process has looked up since the cache was made, and what the cache holds.

        In texts: `memory_hits`, `disk_hits`, `misses`, `repeats` (within a batch), `off` (encoded while a parameter
        required gradients), `memory_evictions`, `memory_texts`. In bytes: `memory_bytes`, index included. With a disk:
        `disk_evictions`, `disk_dropped_writes`, `disk_failed_writes` (of them; the disk was full or failed),
        `disk_wrong` (entries with a wrong checksum), `disk_failures` (reads that failed as a whole), `disk_texts`,
        `disk_bytes` (live data), and `disk_aside`: 1 while lookups skip the disk because reading takes longer than
        computing. What is still queued for the disk is not in them: call `flush` before. `disk_read_s` and `compute_s`
        are seconds.
        """
        return self._store.stats()

    def fingerprint(self, encoder: SupportsCache) -> str | None:
        """The name under which this cache keeps the encoder's vectors; None while a parameter requires gradients."""
        prefix = self.of(encoder).prefix()
        return None if prefix is None else prefix.hex()

    def fingerprints(self) -> dict[str, int]:
        """Count the texts on disk by fingerprint, or those in memory where there is no disk.

        Waits for this process's queued rows, as `flush` does, and reads all keys.
        """
        self._store.flush()
        return dict(Counter(key[:PREFIX_BYTES].hex() for key in self._store.keys_with_prefix()))

    def verify(self) -> int:
        """Check every page and entry on disk, and delete entries with wrong checksums unless the cache is read-only.

        Waits for this process's queued rows first. A large folder's pages are checked here alone, those of a smaller
        one also when it is opened.

        Returns:
            How many entries were wrong.
        Raises:
            CacheError: the folder itself is damaged; delete it.
        """
        return self._store.verify()

    def drop(self, fingerprint: str) -> int:
        """Delete one encoder's vectors, in memory and on disk.

        Returns:
            How many texts were deleted.
        Raises:
            ConfigError: that is no fingerprint; see `fingerprints()`.
            CacheError: the folder is read-only, or cannot be written to.
        """
        if not re.fullmatch(f"[0-9a-f]{{{2 * PREFIX_BYTES}}}", fingerprint):
            raise ConfigError(f"fingerprint={shortened(fingerprint)}: write one of those that fingerprints() names")
        return self._store.drop(bytes.fromhex(fingerprint))

    def flush(self) -> None:
        """Wait until the rows that are queued for the disk are written."""
        self._store.flush()

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, here or where it was pickled."""
        return self._store.is_closed

    def close(self) -> None:
        """Write what is queued and close the folder. Loaders over it then compute all vectors, and say so."""
        self._store.close()

    def __enter__(self) -> EmbeddingCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def as_bytes(name: str, value: int | str) -> int:
    """Read an argument that is a number of bytes, or a string such as "2GiB" or "500MB".

    Args:
        name: the argument, as the user writes it.
        value: what the user wrote.
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
