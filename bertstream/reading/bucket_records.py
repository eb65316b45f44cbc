"""The records of a bucket with their tokens: joined once, whatever shards and columns they came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ..columns import picked_fields
from ..tokens import Indices, Int32Array, Text, TokenBatch, TokenizedText, cumulate
from .batch_fields import add_fields
from .raw import values_of
from .record_columns import MISSING

# Arrays that a batch need not have because other texts of its bucket do.
_OF_LONG_TEXTS = frozenset(("words_cut", "window_lengths", "owned"))
_OF_SOME_KINDS = frozenset(("word_ids", "token_type_ids"))


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedRecords:
    """Records that were tokenized together.

    Attributes:
        tokens: of B texts.
        fields: by name, B entries each, as `fields_of` makes them.
        kinds: of the texts, see `kinds_of`.
    """

    tokens: TokenBatch
    fields: dict[str, Any]
    kinds: frozenset[Any]


def kinds_of(texts: Sequence[Text | TokenizedText] | TokenBatch, tokens: TokenBatch) -> frozenset[Any]:
    """Whether texts are strings, lists of words, pairs of either, or ids, and with what; as far as tokens differ by it.

    Args:
        texts: as they were read.
        tokens: of them.
    """
    if tokens.word_ids is None and tokens.token_type_ids is None:
        return frozenset((None,))
    if not isinstance(texts, TokenBatch):
        return frozenset(map(_kind, texts))
    segments = [False]
    if texts.token_type_ids is not None:
        segments = (np.diff(cumulate(texts.token_type_ids != 0)[texts.cu_seqlens]) > 0).tolist()
    return frozenset((texts.word_ids is not None, has_segments) for has_segments in segments)


def _kind(text: Text | TokenizedText) -> tuple[Any, ...]:
    if isinstance(text, TokenizedText):
        return text.word_ids is not None, text.token_type_ids is not None
    return (type(text), type(text[0])) if isinstance(text, tuple) else (type(text),)


class BucketRecords:
    """The records of a bucket, in the order in which they were read."""

    def __init__(self) -> None:
        self._parts: dict[int, _Part] = {}
        self._turns: list[Indices] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, parts: Iterable[tuple[TokenizedRecords, int, int]]) -> int:
        """Append records: one of each part in turn; the earlier parts may have one more than the later.

        Args:
            parts: records with the first and the last + 1 of those that are appended. They come after all of these
                records that were appended before.
        Returns:
            How many these are.
        """
        numbers = []
        count = 0
        for records, start, stop in parts:
            part = self._parts.setdefault(id(records), _Part(records, len(self._parts), start))
            part.stop = stop
            numbers.append(part.number)
            count += stop - start
        self._turns.append(np.array(numbers)[np.arange(count) % len(numbers)])
        self._count += count
        return count

    def join(self) -> JoinedRecords:
        """All of them; what was appended is forgotten."""
        parts, turns = [*self._parts.values()], self._turns
        self._parts, self._turns = {}, []
        if not parts:
            return JoinedRecords(TokenBatch.from_texts([]), {}, np.zeros(0, np.int64), several_kinds=False)
        places = np.empty(self._count, np.int64)
        places[np.argsort(np.concatenate(turns), kind="stable")] = np.arange(self._count)
        return JoinedRecords(
            TokenBatch.concat([part.tokens() for part in parts]),
            _joined_fields(parts),
            places,
            several_kinds=len(frozenset().union(*(part.records.kinds for part in parts))) > 1,
        )


@dataclass(slots=True)
class _Part:
    """Those of some records that a bucket has, and where among the bucket's parts they are."""

    records: TokenizedRecords
    number: int
    start: int
    stop: int = 0

    def __len__(self) -> int:
        return self.stop - self.start

    def tokens(self) -> TokenBatch:
        whole = self.records.tokens
        return whole if len(self) == len(whole) else whole.pick(np.arange(self.start, self.stop))

    def column(self, name: str) -> Any:
        column = self.records.fields.get(name)
        return [MISSING] * len(self) if column is None else column[self.start : self.stop]


def _joined_fields(parts: Sequence[_Part]) -> dict[str, Any]:
    return {name: _joined([part.column(name) for part in parts]) for name in _names(parts)}


def _names(parts: Sequence[_Part]) -> dict[str, None]:
    return dict.fromkeys(chain.from_iterable(part.records.fields for part in parts))


def _joined(columns: Sequence[Any]) -> Any:
    kinds = {column.dtype if isinstance(column, np.ndarray) else list for column in columns}
    if len(kinds) == 1 and list not in kinds:
        return np.concatenate(columns)
    return list(chain.from_iterable(map(values_of, columns)))  # which numbers share a column is decided by batch


class JoinedRecords:
    """All records of a bucket, of which batches are made.

    Args:
        tokens: of B texts.
        fields: by name, B entries each.
        places: [B] where each record is among these.
        several_kinds: whether the texts are of several kinds.
    """

    def __init__(self, tokens: TokenBatch, fields: dict[str, Any], places: Indices, *, several_kinds: bool) -> None:
        self._tokens = tokens
        self._fields = fields
        self._places = places
        self._may_be_idle = _OF_LONG_TEXTS | _OF_SOME_KINDS if several_kinds else _OF_LONG_TEXTS

    def __len__(self) -> int:
        return len(self._places)

    @property
    def lengths(self) -> Int32Array:
        """[B] int32, tokens of each record, in the order in which they were read."""
        return self._tokens.lengths[self._places]

    def batch(self, chosen: Indices, *, keep_text_as: str | None) -> TokenBatch:
        """A batch of these records.

        Args:
            chosen: in the order in which they were read, counted from 0.
            keep_text_as: the field that holds the raw texts, or None.
        """
        places = self._places[chosen]
        batch = self._tokens.pick(places)
        batch.drop_idle(self._may_be_idle)
        add_fields(batch, picked_fields(self._fields, places), keep_text_as=keep_text_as)
        return batch
