"""Several batches through the encoder at once: each distinct text a single time, and each batch gets its rows back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from ..embeddings import Embeddings
from ..tokens import TokenBatch, cumulate, distinct, text_bytes


def encode_together(
    encode: Callable[[TokenBatch], Embeddings], batches: Sequence[TokenBatch], *, once: bool = True
) -> tuple[list[Embeddings], int]:
    """What `encode` gives for each of the batches, by one call for all of them.

    Args:
        encode: from a batch to its embeddings.
        batches: one at least.
        once: whether texts that come several times are looked for, and encoded once.
    Returns:
        Each batch's embeddings, in memory of their own, and how many texts were repeats of another.
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
    """`text_bytes`, and which words were cut: the model does not see that, but `Embeddings.word_ids` say it of rows."""
    texts = text_bytes(batch)
    if batch.words_cut is None:
        return texts
    bounds = pairwise(cumulate(batch.num_words).tolist())
    return [text + batch.words_cut[a:b].tobytes() for text, (a, b) in zip(texts, bounds, strict=True)]
