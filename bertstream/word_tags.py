"""One number a word, laid out like the rows of a batch: what `Embeddings.align` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import ConfigError, shortened
from .labels import NumberOf, UnknownLabelError
from .tokens import Int32Array, TokenBatch


def align_tags(
    tags: Sequence[Sequence[float | str] | Tensor],
    pad: float,
    lengths: npt.NDArray[np.int64],
    word_ids: Int32Array | None,
    tokens: TokenBatch,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Lay one number a word out like rows.

    Args:
        tags: for each text, one number for each word of the original text.
        pad: the number of rows without one.
        lengths: [B] rows of each text.
        word_ids: [N] the word of each row, -1 for none; None if no text is a list of words.
        tokens: the texts.
        names: the labels, where `tags` are labels instead of numbers.
    Returns:
        [B, T] on the CPU: int64 if all numbers, `pad` included, are whole, else float32.
    Raises:
        ConfigError: the texts were not lists of words, or a text has another number of words than of tags, or a tag
            is none of the labels.
    """
    if names is not None:
        tags = _numbered(tags, names, tokens)
    if word_ids is None and not any(map(len, tags)):
        word_ids = np.full(lengths.sum(), -1, np.int32)  # lists without a word
    if word_ids is None:
        raise ConfigError("align needs texts that are lists of words; these were plain strings")
    if len(tags) != len(lengths):
        raise ConfigError(f"{len(tags)} rows of tags for {len(lengths)} texts")
    rows_of_tags = [_numbers(row, text) for text, row in enumerate(tags)]
    counts = np.fromiter(map(len, rows_of_tags), np.int64, len(lengths))
    wrong = np.flatnonzero(counts != tokens.num_words)
    if len(wrong):
        i = int(wrong[0])
        padded = (counts >= tokens.num_words).all() and len(set(counts.tolist())) == 1 < len(counts)
        way_out = ": padded tags? Pass each text's own tags only" if padded else ""
        words = tokens.num_words[i]
        raise ConfigError(f"{_text(i, tokens)} has {words} words but {counts[i]} tags{way_out}")
    # An empty list becomes float32, which would turn the other texts' integers into floats.
    flat = torch.cat([row for row in rows_of_tags if len(row)] or [torch.zeros(0, dtype=torch.int64)])
    whole = not flat.is_floating_point() and float(pad).is_integer()
    flat = flat.to(torch.int64 if whole else torch.float32)
    texts = np.repeat(np.arange(len(lengths)), lengths)
    word_of_row = np.where(word_ids < 0, -1, word_ids + (np.cumsum(counts) - counts)[texts])
    first = word_of_row != np.concatenate([[-1], word_of_row[:-1]])
    rows = np.flatnonzero(first & (word_of_row >= 0))
    out = flat.new_full((len(lengths), lengths.max(initial=0)), pad)
    steps = rows - (np.cumsum(lengths) - lengths)[texts[rows]]
    out[torch.from_numpy(texts[rows]), torch.from_numpy(steps)] = flat[torch.from_numpy(word_of_row[rows])]
    return out


def _numbered(tags: Sequence[Any], names: Sequence[str], tokens: TokenBatch) -> list[list[int]]:
    number_of = NumberOf(names, "names")
    numbered = []
    for i, row in enumerate(tags):
        try:
            numbered.append([number_of(tag) for tag in row])
        except UnknownLabelError as error:
            raise ConfigError(f"the tags of {_text(i, tokens)}: {error}") from None
    return numbered


def _text(i: int, tokens: TokenBatch) -> str:
    """How a message names a text of the batch."""
    fields = tokens.fields
    known = {"__shard__", "__index__"} <= fields.keys()
    source = f" (record {fields['__index__'][i]} of {fields['__shard__'][i]})" if known else ""
    return f"text {i} of the batch{source}"


def _numbers(row: Any, text: int) -> Tensor:
    try:
        numbers = torch.as_tensor(row, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        numbers = None
    if numbers is None or numbers.dim() != 1:
        raise ConfigError(
            f"tags of text {text} are {shortened(row)}: give a list of numbers, one a word, or labels with names="
        )
    return numbers
