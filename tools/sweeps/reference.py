"""What is right: plain transformers, one text at a time, and plain Python for all that comes after it.

Slow and obvious on purpose. Shapes: T tokens of a text, H hidden size, K layers.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bertstream.tokens import Text


class NoAnswerError(Exception):
    """There is no right answer: the encoder has to refuse this, in words of its own."""


@dataclass
class Tokens:
    """One text, or one window of it, as transformers tokenizes it.

    Attributes:
        ids: [T] token ids, special tokens included.
        types: [T] segment ids, or None where the model gets none.
        parts: [T] which text of a pair a token is of, None for tokens that frame the texts.
        words: [T] the word of each token, those of a pair counted through both, None for none; empty for a string.
        owned: [T] whether this window gives the token its vector.
        num_words: words of the whole text, those that truncation cut included.
    """

    ids: list[int]
    types: list[int] | None
    parts: list[int | None]
    words: list[int | None]
    owned: list[bool]
    num_words: int

    def at(self, indices: Sequence[int], owned: Sequence[bool]) -> Tokens:
        """A window that holds these of its tokens."""
        return Tokens(
            [self.ids[i] for i in indices],
            None if self.types is None else [self.types[i] for i in indices],
            [self.parts[i] for i in indices],
            [self.words[i] for i in indices] if self.words else [],
            list(owned),
            self.num_words,
        )


@torch.no_grad()
def plain_states(
    pristine: nn.Module, ids: Sequence[int], types: Sequence[int] | None = None, *, fresh: bool = True
) -> list[Tensor | None]:
    """The hidden states of one text by plain transformers.

    Args:
        pristine: a model as it was made.
        ids: [T].
        types: [T] segment ids, or None.
        fresh: whether to run a copy of the model, because some models change themselves in a forward.
    Returns:
        L + 1 tensors [T, H], the embeddings first; None for a layer that transformers does not give.
    Raises:
        Exception: whatever the model raises; AttributeError if it gives no `last_hidden_state`.
    """
    model: Any = copy.deepcopy(pristine) if fresh else pristine
    inputs = {"input_ids": torch.tensor([list(ids)])}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if types is not None:
        inputs["token_type_ids"] = torch.tensor([list(types)])
    out = model(**inputs, output_hidden_states=True)
    last = out.last_hidden_state
    if last.shape[:2] != (1, len(ids)):
        raise AttributeError(f"last_hidden_state is {list(last.shape)} for {len(ids)} tokens")
    if not last.isfinite().all():
        raise ValueError("last_hidden_state is not finite")
    count = model.config.num_hidden_layers
    states = getattr(out, "hidden_states", None)
    if states is None or len(states) != count + 1:
        states = (None,) * (count + 1)
    return [*(_of_tokens(state, last) for state in states[:-1]), last[0]]


def _of_tokens(state: Tensor | None, last: Tensor) -> Tensor | None:
    """[T, H] of one text's hidden states, which some models (big_bird) pad to whole blocks; None if they are others."""
    if state is None or state.dim() != 3:
        return None
    fits = state.shape[0] == 1 and state.shape[1] >= last.shape[1] and state.shape[2] == last.shape[2]
    return state[0, : last.shape[1]] if fits else None


def tokenize(tokenizer: Any, text: Text, *, for_lists: Any = None, max_length: int | None = None) -> Tokens:
    """One text by transformers' own tokenizer, which truncates it if `max_length` is given.

    Args:
        tokenizer: of transformers.
        text: a string, a list of words, or a pair of either.
        for_lists: the tokenizer that transformers asks for with lists of words (`add_prefix_space=True`), if another.
        max_length: tokens that truncation leaves; None for all.
    """
    several = text if isinstance(text, tuple) else (text,)
    in_words = isinstance(several[0], list)
    options: dict[str, Any] = {"is_split_into_words": in_words}
    if max_length is not None:
        options |= {"truncation": True, "max_length": max_length}
    # In a batch of one: of a single pair it would take an empty second text for none.
    used = for_lists if in_words and for_lists is not None else tokenizer
    found = used(*[[part] for part in several], **options).encodings[0]
    ahead = [0, len(several[0])]
    words = [
        None if word is None or part is None else word + ahead[part]
        for word, part in zip(found.word_ids, found.sequence_ids, strict=True)
    ]
    segments = len(several) == 2 and "token_type_ids" in tokenizer.model_input_names
    return Tokens(
        list(found.ids),
        list(found.type_ids) if segments else None,
        list(found.sequence_ids),
        words if in_words else [],
        [True] * len(found.ids),
        sum(map(len, several)) if in_words else 0,
    )


def tokenize_running(tokenizer: Any, text: Any, *, max_length: int | None = None) -> Tokens:
    """A list of words, or a pair of two, as the running text that they make.

    A token is of the word in which its last character is; the blank before a word is the word's.
    """
    several: list[list[str]] = list(text) if isinstance(text, tuple) else [text]
    options: dict[str, Any] = {} if max_length is None else {"truncation": True, "max_length": max_length}
    found = tokenizer(*[[" ".join(part)] for part in several], return_offsets_mapping=True, **options).encodings[0]
    word_of_character: list[list[int]] = []
    count = 0
    for part in several:
        lengths = [len(word) + (i > 0) for i, word in enumerate(part)]
        word_of_character.append([count + i for i, length in enumerate(lengths) for _ in range(length)])
        count += len(part)
    numbered: list[int | None] = [
        None if part is None else word_of_character[part][end - 1]
        for (_, end), part in zip(found.offsets, found.sequence_ids, strict=True)
    ]
    return Tokens(list(found.ids), None, list(found.sequence_ids), numbered, [True] * len(found.ids), count)


def windows(text: Tokens, max_length: int, stride: int) -> list[Tokens]:
    """A text that is too long, as overlapping windows; the second text of a pair slides, the first is repeated.

    Each window but the last begins `stride` tokens before the end of the one before; the last ends with the text. A
    token has its vector from the window in which it, or its word where words are known, is farthest from an edge
    beyond which the text continues: the earliest of equals. The tokens of a word that no window holds are on their
    own. Tokens before the sliding text are owned by the first window, those after it by the last.

    Raises:
        NoAnswerError: beside what is repeated, a window has no room for more than the stride.
    """
    sliding = max(part for part in text.parts if part is not None)
    content = [i for i, part in enumerate(text.parts) if part == sliding]
    before, after = list(range(content[0])), list(range(content[-1] + 1, len(text.ids)))
    room = max_length - len(before) - len(after)
    if room <= stride:
        raise NoAnswerError(f"a window has room for {room} tokens, and overlaps by {stride}")
    starts = []
    start = 0
    while start + room < len(content):
        starts.append(start)
        start += room - stride
    starts.append(len(content) - room)
    spans = [range(start, start + room) for start in starts]

    def distance(unit: range, span: range) -> float:
        left = math.inf if span.start == 0 else unit.start - span.start
        right = math.inf if span.stop == len(content) else span.stop - unit.stop
        return min(left, right)

    owner: dict[int, int] = {}
    for unit in units(text, content):
        held = any(unit.start in span and unit.stop - 1 in span for span in spans)
        for part in [unit] if held else [range(i, i + 1) for i in unit]:
            distances = [distance(part, span) for span in spans]
            for i in part:
                owner[i] = distances.index(max(distances))
    out = []
    for number, span in enumerate(spans):
        indices = [*before, *[content[i] for i in span], *after]
        mine = [owner[i] == number for i in span]
        ends = [number == 0] * len(before), [number == len(spans) - 1] * len(after)
        out.append(text.at(indices, [*ends[0], *mine, *ends[1]]))
    return out


def units(text: Tokens, content: Sequence[int]) -> list[range]:
    """Runs of sliding tokens that have one window: a word's, or each token by itself."""
    out: list[range] = []
    for i, token in enumerate(content):
        word = text.words[token] if text.words else None
        if out and word is not None and text.words[content[i - 1]] == word:
            out[-1] = range(out[-1].start, i + 1)
        else:
            out.append(range(i, i + 1))
    return out


def combined(layers: Sequence[Tensor], how: str) -> Tensor:
    """One token's vectors of K layers, each [H], as one."""
    if how == "concat":
        return torch.cat(list(layers))
    if how == "stack":
        return torch.stack(list(layers))
    total = torch.zeros_like(layers[0])
    for layer in layers:
        total = total + layer
    return total / len(layers) if how == "mean" else total


def pooled(rows: Sequence[Tensor], how: str, empty: Tensor) -> Tensor:
    """One vector of several, by its name; `empty` if there are none."""
    if how == "first_last":
        return torch.cat([pooled(rows, "first", empty), pooled(rows, "last", empty)], -1)
    if not rows:
        return empty
    if how in ("first", "cls"):
        return rows[0]
    if how == "last":
        return rows[-1]
    if how == "max":
        out = rows[0]
        for row in rows[1:]:
            out = torch.maximum(out, row)
        return out
    weights = [number + 1 if how == "weighted_mean" else 1 for number in range(len(rows))]
    total = torch.zeros_like(empty)
    for row, weight in zip(rows, weights, strict=True):
        total = total + row * weight
    return total / (math.sqrt(len(rows)) if how == "mean_sqrt_len" else sum(weights))


def relative_error(found: Tensor, right: Tensor) -> float:
    """Relative L2 error of one text's rows; infinite for another shape or for what is not finite."""
    if found.shape != right.shape or not bool(found.isfinite().all()):
        return math.inf
    size = float(right.double().norm())
    difference = float((found.double() - right.double()).norm())
    return difference / size if size else difference
