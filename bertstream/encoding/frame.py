"""The special tokens around a text or a pair: found once, put around a chunk's ids that come without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..tokens import Int32Array, TokenBatch, batch_of_ids, steps


class Framed(NamedTuple):
    """Texts or pairs of one kind, of any length, with their special tokens.

    Attributes:
        tokens: their tokens, with segment ids.
        sequence_ids: [N] int32, which text of a pair a token belongs to, -1 for special tokens.
    """

    tokens: TokenBatch
    sequence_ids: Int32Array

    @classmethod
    def of(cls, encodings: Sequence[Any], words: Sequence[Sequence[int]]) -> Framed:
        """Encodings of the tokenizers library.

        Args:
            encodings: B of one kind.
            words: for each, how many words each of its texts has; B empty lists for strings.
        """
        joined = {
            name: _joined([getattr(encoding, name) for encoding in encodings])
            for name in ("ids", "special_tokens_mask", "type_ids", "word_ids", "sequence_ids")
        }
        lengths = np.array([len(encoding.ids) for encoding in encodings], np.int32)
        second = np.repeat(np.array([counts[0] if counts else 0 for counts in words], np.int32), lengths)
        second[joined["sequence_ids"] != 1] = 0
        special = joined["special_tokens_mask"] != 0
        tokens = batch_of_ids(joined["ids"], lengths, special=special, token_type_ids=joined["type_ids"])
        if any(words):
            tokens.word_ids = joined["word_ids"] + second
            tokens.num_words = np.array([sum(counts) for counts in words], np.int32)
        return cls(tokens, joined["sequence_ids"])

    def pick(self, text: int) -> Framed:
        """One of the texts."""
        start, end = self.tokens.cu_seqlens[text : text + 2]
        return Framed(self.tokens.pick(np.array([text])), self.sequence_ids[start:end])


def _joined(columns: Sequence[Sequence[int | None]]) -> Int32Array:
    return np.array([-1 if entry is None else entry for column in columns for entry in column], np.int32)


class _Slot(NamedTuple):
    """One part of a frame: a special token, or the place of a text (`sequence` is its number, `ids` empty)."""

    ids: bytes
    type_id: int
    sequence: int = -1


class Frame:
    """The special tokens that a tokenizer puts around a text, and around the two of a pair."""

    def __init__(self, single: Sequence[_Slot], pair: Sequence[_Slot]) -> None:
        self._slots = {1: single, 2: pair}

    @classmethod
    def find(cls, backend: Any) -> Frame | None:
        """The frame of a tokenizer; None if it is not this simple: each text once, in order, in one segment.

        Args:
            backend: a tokenizer of the tokenizers library, without truncation and padding.
        """
        bare = backend.encode("a", add_special_tokens=False).ids
        single = _slots(Framed.of([backend.encode("a")], [[]]), bare, 1)
        pair = _slots(Framed.of([backend.encode("a", "a")], [[]]), bare, 2)
        return None if single is None or pair is None else cls(single, pair)

    def texts(self, rows: Sequence[bytes], texts: int) -> Framed:
        """Strings, or pairs of strings, with their special tokens.

        Args:
            rows: the ids of B strings, int32 as bytes; of 2 B for pairs, each pair's one after the other.
            texts: 1, or 2 for pairs.
        """
        slots = self._slots[texts]
        count = len(rows) // texts
        sizes = np.ones((count, len(slots)), np.int64)
        parts = [slot.ids for slot in slots] * count
        for number, place in enumerate(number for number, slot in enumerate(slots) if slot.sequence >= 0):
            own = rows[number::texts]
            parts[place :: len(slots)] = own
            sizes[:, place] = np.fromiter(map(len, own), np.int64, count) // 4

        def for_each(values: Sequence[int]) -> Int32Array:
            return np.repeat(np.tile(np.array(values, np.int32), count), sizes.ravel())

        sequence_ids = for_each([slot.sequence for slot in slots])
        ids = np.frombuffer(bytearray().join(parts), np.int32)
        types = for_each([slot.type_id for slot in slots])
        lengths = sizes.sum(1, dtype=np.int32)
        return Framed(batch_of_ids(ids, lengths, special=sequence_ids < 0, token_type_ids=types), sequence_ids)

    def lists(self, rows: Sequence[list[bytes]], texts: int) -> Framed:
        """Lists of words, or pairs of lists, with their special tokens.

        Args:
            rows: the ids of each word of B lists, or of 2 B.
            texts: as for `texts`.
        """
        framed = self.texts([b"".join(row) for row in rows], texts)
        counts = np.fromiter(map(len, rows), np.int32, len(rows)).reshape(-1, texts).sum(1, dtype=np.int32)
        sizes = np.fromiter((len(word) // 4 for row in rows for word in row), np.int64, counts.sum())
        word_ids = np.full(framed.tokens.num_tokens, -1, np.int32)
        word_ids[framed.sequence_ids >= 0] = np.repeat(steps(counts, np.int32), sizes)
        framed.tokens.word_ids, framed.tokens.num_words = word_ids, counts
        return framed


def _slots(framed: Framed, text: list[int], texts: int) -> list[_Slot] | None:
    """The frame in an encoding that has the same text once, or as both of a pair."""
    tokens, (ids, types) = framed.tokens, (framed.tokens.input_ids, framed.tokens.token_type_ids)
    assert types is not None
    slots: list[_Slot] = []
    end = 0
    for number in range(texts):
        own = np.flatnonzero(framed.sequence_ids == number)
        if not len(own) or ids[own].tolist() != text or own[0] < end or len(set(types[own].tolist())) > 1:
            return None
        slots += [_Slot(ids[i].tobytes(), int(types[i])) for i in range(end, own[0])]
        slots.append(_Slot(b"", int(types[own[0]]), number))
        end = own[-1] + 1
    return [*slots, *(_Slot(ids[i].tobytes(), int(types[i])) for i in range(end, tokens.num_tokens))]
