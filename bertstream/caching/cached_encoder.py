"""An encoder that looks texts up before it computes them.

A text's key is a hash of the encoder's fingerprint and of everything that enters the model for that text, so a lookup
never returns stale rows. Hits and misses are stored and decoded identically, so results never depend on a hit.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..embeddings import Embeddings, SupportsCache
from ..encoding.attention import plain_mode
from ..encoding.finite import named, texts_not_finite
from ..errors import ConfigError, EncoderError
from ..repeats import distinct, text_bytes
from ..system.cuda import to_device
from ..tokens import TokenBatch, cumulate, rows_of
from .codec import Codec, Storage
from .store import RowStore

logger = logging.getLogger(__name__)

PREFIX_BYTES = 8
"""The first bytes of a key tell whose vectors these are; 16 bytes follow, a hash over that and the text."""


class _Identity(NamedTuple):
    """Whose vectors these are: what goes into the hash of each text, and what its key begins with."""

    fingerprint: bytes
    prefix: bytes


class CachedEncoder:
    """Encodes batches with a cache; `EmbeddingCache.of` makes it.

    Args:
        encoder: computes the rows that are missing.
        store: holds the others.
        storage: how rows are stored.
    Attributes:
        compute_s: seconds in the encoder; the rest of `encode` is lookup.
        encode_calls: calls of the encoder.
        encoded_tokens: tokens of the texts in those calls.
    Raises:
        ConfigError: the store holds rows of another size in memory.
    """

    def __init__(self, encoder: SupportsCache, store: RowStore, storage: Storage) -> None:
        self._encoder = encoder
        self._store = store
        self._codec = Codec(storage, encoder.row_shape, encoder.output_dtype)
        self._known: _Identity | None = None
        self._warned_of_not_finite = False
        self.compute_s = 0.0
        self.encode_calls = self.encoded_tokens = 0
        store.reserve(self._codec.row_bytes)

    def prefix(self) -> bytes | None:
        """What this encoder's keys begin with; None while one of its parameters requires gradients."""
        identity = self._identity()
        return None if identity is None else identity.prefix

    def encode(self, batch: TokenBatch, *, max_forward_tokens: int | None = None) -> Embeddings:
        """Encode a batch; each distinct text that the cache lacks is computed once.

        Args:
            batch: the texts.
            max_forward_tokens: the size of this call's forwards alone; None for the encoder's own.
        Raises:
            EncoderError: as the encoder raises it.
        """
        if not len(batch):
            return self._encode(batch, max_forward_tokens)
        identity = self._identity()
        if identity is None:
            if self._store.count_off(len(batch)):
                logger.warning(
                    "the cache is off while parameters of the encoder require gradients, or its model has a hook, a "
                    "patched forward or a module in train mode; encoder.freeze(), or removing the hook, turns it on "
                    "again"
                )
            return self._encode(batch, max_forward_tokens)
        keys = text_keys(batch, identity.prefix, identity.fingerprint)
        with plain_mode(self._encoder.device):
            rows = self._store.gather(keys, self._codec.row_bytes)
            if rows is None:
                try:
                    rows = self._rows(batch, keys, identity, max_forward_tokens)
                except EncoderError:
                    # It names indices among the missing texts; encoding the whole batch raises it with the batch's.
                    return self._encode(batch, max_forward_tokens)
            values = self._codec.unpack(to_device(rows, self._encoder.device))  # moved as stored: fewer bytes
            return self._encoder.assemble(values, batch)

    def fill(self, batch: TokenBatch) -> int:
        """Compute the texts that the cache lacks, and wait for room to write them.

        Returns:
            How many texts were computed.
        Raises:
            EncoderError: as the encoder raises it.
            ConfigError: the cache is off, because parameters of the encoder require gradients.
        """
        identity = self._identity()
        if identity is None:
            raise ConfigError(
                "the cache is off while parameters of the encoder require gradients, or its model has a hook, a "
                "patched forward or a module in train mode: call encoder.freeze(), or remove the hook, first"
            )
        keys = text_keys(batch, identity.prefix, identity.fingerprint)
        first, _ = distinct(keys)
        texts = first[self._store.missing([keys[i] for i in first])]
        if len(texts):
            row_counts = self._encoder.row_counts(batch)[texts]
            self._compute(batch, texts, [keys[i] for i in texts], row_counts, identity, wait=True)
        return len(texts)

    def _identity(self) -> _Identity | None:
        fingerprint = self._encoder.fingerprint()
        if fingerprint is None:
            return None
        known = self._known
        if known is None or known.fingerprint != fingerprint:
            named = fingerprint + self._codec.name.encode()
            known = self._known = _Identity(fingerprint, blake2b(named, digest_size=PREFIX_BYTES).digest())
        return known

    def _encode(self, batch: TokenBatch, max_forward_tokens: int | None) -> Embeddings:
        self.encode_calls += 1
        self.encoded_tokens += batch.num_tokens
        if max_forward_tokens is None:
            return self._encoder.encode(batch)
        return self._encoder.encode(batch, max_forward_tokens=max_forward_tokens)

    def _rows(
        self, batch: TokenBatch, keys: Sequence[bytes], identity: _Identity, max_forward_tokens: int | None
    ) -> Tensor:
        """The rows of a batch that is not all in memory."""
        first, slot_of_text = distinct(keys)
        wanted = [keys[i] for i in first]
        row_counts = self._encoder.row_counts(batch)[first]
        found, missing = self._store.lookup(wanted, row_counts, self._codec.row_bytes, repeats=len(keys) - len(wanted))
        if len(missing):
            computed = [wanted[i] for i in missing.tolist()]
            rows = self._compute(batch, first[missing], computed, row_counts[missing], identity, max_forward_tokens)
            found.append((missing, rows))
        parts = [rows for _, rows in found if len(rows)] or [found[0][1]]
        pool = parts[0] if len(parts) == 1 else torch.cat(parts)
        slots_in_pool = np.concatenate([slots for slots, _ in found])
        positions = np.empty(len(wanted), np.int64)
        positions[slots_in_pool] = np.arange(len(wanted))
        index = rows_of(positions[slot_of_text], cumulate(row_counts[slots_in_pool]))
        return pool.index_select(0, to_device(index, pool.device))

    def _compute(
        self,
        batch: TokenBatch,
        texts: npt.NDArray[Any],
        keys: list[bytes],
        row_counts: npt.NDArray[Any],
        identity: _Identity,
        max_forward_tokens: int | None = None,
        *,
        wait: bool = False,
    ) -> Tensor:
        """Encode these texts and add their rows to the store."""
        made: list[Embeddings] = []

        def make_rows() -> Tensor:
            made.append(self._encode(batch.pick(texts), max_forward_tokens))
            return self._codec.pack(made[0].values)

        computed = self._store.compute(make_rows, hold_writes=self._encoder.device.type == "cpu")
        self.compute_s += computed.seconds
        # If training started meanwhile, the rows may mix old and new weights: return them and keep none.
        if self._identity() == identity:
            kept = computed
            # Elsewhere the host would wait for the vectors.
            if self._store.rows_on_host and (wrong := texts_not_finite(made[0].values, row_counts)):
                self._warn_of_not_finite(wrong, made[0].tokens)
                right = np.delete(np.arange(len(keys)), wrong)
                kept = computed.pick(rows_of(right, cumulate(row_counts)))
                keys, row_counts = [keys[i] for i in right], row_counts[right]
            self._store.add(keys, row_counts, kept, wait=wait)
        return computed.rows

    def _warn_of_not_finite(self, texts: list[int], batch: TokenBatch) -> None:
        if not self._warned_of_not_finite:
            self._warned_of_not_finite = True
            logger.warning(
                "the cache keeps no vectors that are not finite, and computes them again each time (said once): %s",
                named(texts, batch),
            )


def text_keys(batch: TokenBatch, prefix: bytes, fingerprint: bytes) -> list[bytes]:
    """One key per text: the prefix, and a hash of the fingerprint and of everything that enters the model for it."""
    return [prefix + blake2b(text, digest_size=16, key=fingerprint).digest() for text in text_bytes(batch)]
