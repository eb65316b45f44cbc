"""Several batches through the encoder at once: each distinct text a single time, and each batch gets its rows back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch

from ..embeddings import Embeddings
from ..system.cuda import to_device
from ..tokens import Indices, TokenBatch, cumulate, distinct, join, rows_of, text_bytes


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
    whole = batches[0] if len(batches) == 1 else join(batches)
    slots = np.arange(len(whole))
    first = slots
    if once:
        first, slots = distinct(_rows_bytes(whole))
    repeats = len(slots) - len(first)
    if not repeats and len(batches) == 1:
        return [encode(whole)], 0
    found = encode(whole.picked(first) if repeats else whole)
    bounds = pairwise(cumulate(np.array([len(batch) for batch in batches])).tolist())
    parts = [_picked(found, slots[start:end], batch) for (start, end), batch in zip(bounds, batches, strict=True)]
    return parts, repeats


def _rows_bytes(batch: TokenBatch) -> list[bytes]:
    """`text_bytes`, and which words were cut: the model does not see that, but `Embeddings.word_ids` say it of rows."""
    texts = text_bytes(batch)
    if batch.words_cut is None:
        return texts
    bounds = pairwise(cumulate(batch.num_words).tolist())
    return [text + batch.words_cut[a:b].tobytes() for text, (a, b) in zip(texts, bounds, strict=True)]


def _picked(found: Embeddings, texts: Indices, tokens: TokenBatch) -> Embeddings:
    """The rows of these texts, as the embeddings of `tokens`; a text may come several times."""
    lengths = found.lengths.numpy()
    device = found.values.device
    rows = rows_of(texts, cumulate(lengths))
    index = to_device(rows, device)
    keeps_words = found.word_ids is not None and (tokens.word_ids is not None or found.output == "words")
    return dataclasses.replace(
        found,
        values=found.values.index_select(0, index),
        cu_seqlens=to_device(cumulate(lengths[texts]), device),
        lengths=torch.from_numpy(lengths[texts]),
        tokens=tokens,
        word_ids=found.word_ids[rows] if found.word_ids is not None and keeps_words else None,
        present=None if found.present is None else found.present.index_select(0, index),
    )
