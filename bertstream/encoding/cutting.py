"""Which tokens of a text that is too long are kept, and which window each token's vector is taken from."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EncoderError
from ..tokens import BoolArray, Int32Array, TokenizedText

logger = logging.getLogger(__name__)


def _owners(words: npt.NDArray[Any], starts: npt.NDArray[Any], room: int) -> npt.NDArray[Any]:
    """Which window each sliding token's vector is taken from.

    It is the window in which the token's word is farthest from an edge beyond which the text continues, the earlier of
    two equals. All tokens of a word have one owner, unless no window holds the whole word: then each has its own.

    Args:
        words: [n] the word of each token, ascending; -1 for a token of no word (a prompt's), which is on its own.
        starts: [W] the first token of each window, ascending, from 0 to n - room.
        room: tokens of each window.
    Returns:
        [n] ascending, so that owned tokens keep their order.
    """
    # Window i + 1 beats window i for a word whose middle comes after the middle of both windows together. The same is
    # true at the text's ends, where one edge does not count: the other edge decides alone, at the same point.
    middles = starts[:-1] + starts[1:] + room - 1
    first = np.flatnonzero((np.diff(words, prepend=-1) != 0) | (words < 0))
    last = np.append(first[1:], len(words)) - 1
    owner = np.searchsorted(middles, first + last)
    whole = (starts[owner] <= first) & (last < starts[owner] + room)
    by_token = np.searchsorted(middles, 2 * np.arange(len(words)))
    return np.where(np.repeat(whole, last - first + 1), np.repeat(owner, last - first + 1), by_token)


def kept(sequence_ids: Int32Array, max_length: int, keeps_end: bool) -> BoolArray:
    """[L] the tokens that truncation keeps: special ones, and the text's first, or its last.

    Each text of a pair keeps half of the room, and more if the other needs less: transformers' "longest_first".

    Args:
        sequence_ids: [L] which text of the pair a token belongs to, -1 for special tokens.
        max_length: how many tokens are kept, fewer than L.
        keeps_end: whether the last tokens are kept.
    """
    first, second = (np.flatnonzero(sequence_ids == text) for text in (0, 1))
    room = max_length - np.count_nonzero(sequence_ids < 0)
    shorter = min(len(first), len(second), room // 2)
    chosen = sequence_ids < 0
    counts = (shorter, room - shorter) if len(first) <= len(second) else (room - shorter, shorter)
    for part, count in zip((first, second), counts, strict=True):
        chosen[part[max(0, len(part) - count) :] if keeps_end else part[:count]] = True
    return chosen


def windowed(
    text: TokenizedText, sequence_ids: Int32Array, index: int, *, max_length: int, stride: int
) -> TokenizedText:
    """A text that is too long as windows: each repeats the special tokens and a pair's first text.

    Args:
        text: of more than `max_length` tokens.
        sequence_ids: [L] which text of a pair a token belongs to, -1 for special tokens.
        index: of the text, for the message.
        max_length: tokens of each window.
        stride: tokens of the text by which windows overlap.
    Raises:
        EncoderError: beside a pair's first text a window has no room for more of the second than the overlap.
    """
    content = np.flatnonzero(sequence_ids == sequence_ids.max())  # contiguous, and too long for one window
    before, after = np.arange(content[0]), np.arange(content[-1] + 1, len(sequence_ids))
    room = max_length - len(before) - len(after)
    if room <= stride:
        raise EncoderError(
            f"text {index}: beside its first text a window has room for {max(room, 0)} tokens of the second, and "
            f"windows overlap by stride={stride}: shorten the first text, or make the encoder with a smaller "
            "stride= or with overflow='truncate', which cuts the longer text",
            records=(index,),
        )
    count = len(content)
    # The last window is as full as the others, so its tokens see as much context.
    starts = np.minimum(np.arange(0, count - stride, room - stride), count - room)
    inside = starts[:, None] + np.arange(room)
    windows = np.arange(len(starts))[:, None]
    owner = _owners(np.arange(count) if text.word_ids is None else text.word_ids[content], starts, room)

    def side_by_side(*parts: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.concatenate([np.broadcast_to(x, (len(starts), x.shape[-1])) for x in parts], 1).ravel()

    out = text.pick(side_by_side(before, content[inside], after))
    out.window_lengths = np.full(len(starts), max_length, np.int32)
    # The first window owns the repeated tokens, but the last one owns those after the text.
    first, last = windows == 0, windows == len(starts) - 1
    out.owned = side_by_side(first.repeat(len(before), 1), owner[inside] == windows, last.repeat(len(after), 1))
    return out


def warn_of_cut(where: str, cut_texts: int, texts: int, words: int, tokens: int) -> None:
    """Log how many of these texts truncation cut, and by how much in all; `where` is "in this epoch", for example."""
    logger.warning(
        "truncation cut %d of %d texts %s, by %d words and %d tokens in all: overflow='windows' keeps them",
        cut_texts,
        texts,
        where,
        words,
        tokens,
    )
