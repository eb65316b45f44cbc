"""Several batches through the encoder at once: each distinct text a single time, and each batch gets its rows back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .cuda import to_device
from .types import Embeddings, TokenBatch, cumulate, rows_of

Places = npt.NDArray[np.int64]


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


def join(batches: Sequence[TokenBatch]) -> TokenBatch:
    """The batches one after the other, without fields and cursors; what one lacks and others have is filled in.

    But for the special tokens: where one batch does not say which they are, it is not known of the whole.
    """
    texts = [len(batch) for batch in batches]
    tokens = [batch.num_tokens for batch in batches]
    words = [int(batch.num_words.sum()) for batch in batches]

    def lay_out(name: str, absent: Any, sizes: Sequence[int]) -> Any:
        parts = [getattr(batch, name) for batch in batches]
        if all(part is None for part in parts):
            return None
        return np.concatenate(
            [np.full(n, absent) if part is None else part for part, n in zip(parts, sizes, strict=True)]
        )

    unknown = any(batch.special is None and batch.num_tokens for batch in batches)
    windows = None
    if any(batch.window_lengths is not None for batch in batches):
        windows = np.concatenate([b.lengths if b.window_lengths is None else b.window_lengths for b in batches])
    return TokenBatch(
        input_ids=lay_out("input_ids", np.int32(0), tokens),
        cu_seqlens=cumulate(np.concatenate([batch.lengths for batch in batches])),
        special=None if unknown else lay_out("special", False, tokens),
        token_type_ids=lay_out("token_type_ids", np.int32(0), tokens),
        word_ids=lay_out("word_ids", np.int32(-1), tokens),
        num_words=lay_out("num_words", np.int32(0), texts),
        cut_tokens=lay_out("cut_tokens", np.int32(0), texts),
        words_cut=lay_out("words_cut", False, words),
        window_lengths=windows,
        owned=lay_out("owned", True, tokens),
    )


def distinct(texts: Sequence[Hashable]) -> tuple[Places, Places]:
    """Where each distinct text comes first, and which of these each text is."""
    slots: dict[Hashable, int] = {}
    slot_of_text = np.fromiter((slots.setdefault(text, len(slots)) for text in texts), np.int64, len(texts))
    return np.unique(slot_of_text, return_index=True)[1], slot_of_text


def text_bytes(batch: TokenBatch) -> list[bytes]:
    """All that enters the model for each text, as bytes: the same for the same text, in whatever batch it comes.

    That is its token ids, segment ids, words, special tokens and windows; what is not said is said as its default.
    """
    starts = batch.cu_seqlens[:-1] + np.arange(len(batch))  # one row more before each text
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
        # A text in one window is the same text where no other has several.
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


def _rows_bytes(batch: TokenBatch) -> list[bytes]:
    """`text_bytes`, and which words were cut: the model does not see that, but `Embeddings.word_ids` say it of rows."""
    texts = text_bytes(batch)
    if batch.words_cut is None:
        return texts
    bounds = pairwise(cumulate(batch.num_words).tolist())
    return [text + batch.words_cut[a:b].tobytes() for text, (a, b) in zip(texts, bounds, strict=True)]


def _picked(found: Embeddings, texts: Places, tokens: TokenBatch) -> Embeddings:
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
