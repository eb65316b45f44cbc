"""Which texts of a batch are equal: hashes find those that may be, bytes decide."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise

import numpy as np

from .tokens import Indices, TokenBatch, cumulate, hash_texts


def distinct_texts(batch: TokenBatch) -> tuple[Indices, Indices] | tuple[None, None]:
    """Index of the first of each distinct text, ascending, and for each text which of these it equals.

    Only texts whose hashes meet are compared, in full.

    Returns:
        None and None if no text comes twice.
    """
    hashes = hash_texts(batch) if batch.hashes is None else batch.hashes
    ordered = np.sort(hashes)
    if not (ordered[1:] == ordered[:-1]).any():
        return None, None
    _, kinds, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    met = np.flatnonzero(counts[kinds] > 1)
    first, slots = distinct(_whole_bytes(batch.pick(met)))
    if len(first) == len(met):
        return None, None
    owners = np.arange(len(batch))
    owners[met] = met[first[slots]]
    return np.unique(owners, return_inverse=True)


def _whole_bytes(batch: TokenBatch) -> list[bytes]:
    """`text_bytes` plus which words were cut: the model does not see that, but `Embeddings.word_ids` depends on it."""
    texts = text_bytes(batch)
    if batch.words_cut is None:
        return texts
    bounds = pairwise(cumulate(batch.num_words).tolist())
    return [text + batch.words_cut[a:b].tobytes() for text, (a, b) in zip(texts, bounds, strict=True)]


def distinct(texts: Sequence[Hashable]) -> tuple[Indices, Indices]:
    """Index of the first of each distinct entry, ascending, and for each entry which of these it equals."""
    slots: dict[Hashable, int] = {}
    slot_of_text = np.fromiter((slots.setdefault(text, len(slots)) for text in texts), np.int64, len(texts))
    return np.unique(slot_of_text, return_index=True)[1], slot_of_text


def text_bytes(batch: TokenBatch) -> list[bytes]:
    """All that enters the model for each text, as bytes: the same for the same text in any batch.

    That is its token ids, segment ids, words, special tokens and windows; a missing array counts as its default.
    """
    starts = batch.cu_seqlens[:-1] + np.arange(len(batch))  # an extra row before each text
    rows = np.zeros((batch.num_tokens + len(batch), 4), np.int32)
    tokens = np.ones(len(rows), np.bool_)
    tokens[starts] = False
    flags = np.zeros(batch.num_tokens, np.int32)
    if batch.special is not None:
        flags += batch.special
    if batch.owned is not None:
        flags += 2 * ~batch.owned
    if batch.window_lengths is not None:
        windows = np.cumsum(batch.window_lengths) - batch.window_lengths
        flags[windows[batch.window_lengths > 0]] += 4
        # A text in one window is the same text in a batch without windows.
        flags[batch.cu_seqlens[:-1][batch.lengths > 0]] &= ~4
    rows[tokens, 0] = batch.input_ids
    if batch.token_type_ids is not None:
        rows[tokens, 1] = batch.token_type_ids
    rows[tokens, 2] = -1 if batch.word_ids is None else batch.word_ids
    rows[tokens, 3] = flags
    rows[starts, 0] = batch.num_words
    data = rows.tobytes()
    bounds = (16 * np.append(starts, len(rows))).tolist()
    return [data[start:end] for start, end in pairwise(bounds)]
