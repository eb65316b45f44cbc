"""Encodes several batches in one call: each distinct text once, and every batch gets its own rows back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from ..embeddings import Embeddings
from ..tokens import TokenBatch, cumulate, distinct, text_bytes


def encode_together(
    encode: Callable[[TokenBatch], Embeddings], batches: Sequence[TokenBatch], *, once: bool = True
) -> tuple[list[Embeddings], int]:
    """Encode all batches in one call of `encode`, and return what each would give alone.

    Args:
        encode: from a batch to its embeddings.
        batches: at least one.
        once: whether to find repeated texts and encode each once.
    Returns:
        Each batch's embeddings, none sharing memory with another's, and the number of repeated texts.
    """
    whole = batches[0] if len(batches) == 1 else TokenBatch.concat(batches)
    slots = np.arange(len(whole))
    first = slots
    if once:
        first, slots = distinct(_rows_bytes(whole))
    repeats = len(slots) - len(first)
    if not repeats and len(batches) == 1:
        return [encode(whole)], 0
    found = encode(whole.pick(first) if repeats else whole)
    bounds = pairwise(cumulate(np.array([len(batch) for batch in batches])).tolist())
    parts = [found.pick(slots[start:end], batch) for (start, end), batch in zip(bounds, batches, strict=True)]
    return parts, repeats


def _rows_bytes(batch: TokenBatch) -> list[bytes]:
    """`text_bytes` plus which words were cut: the model does not see that, but `Embeddings.word_ids` depends on it."""
    texts = text_bytes(batch)
    if batch.words_cut is None:
        return texts
    bounds = pairwise(cumulate(batch.num_words).tolist())
    return [text + batch.words_cut[a:b].tobytes() for text, (a, b) in zip(texts, bounds, strict=True)]
