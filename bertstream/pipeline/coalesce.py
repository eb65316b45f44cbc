"""Encodes several batches in one call: each distinct text once, and every batch gets its own rows back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from ..embeddings import Embeddings
from ..repeats import distinct_texts
from ..tokens import TokenBatch, cumulate


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
    first, slots = distinct_texts(whole) if once else (None, None)
    if first is None and len(batches) == 1:
        return [encode(whole)], 0
    found = encode(whole if first is None else whole.pick(first))
    bounds = pairwise(cumulate(np.array([len(batch) for batch in batches])).tolist())
    chosen = (slice(start, end) if slots is None else slots[start:end] for start, end in bounds)
    parts = [found.pick(texts, batch) for texts, batch in zip(chosen, batches, strict=True)]
    return parts, 0 if first is None else len(whole) - len(first)
