"""Records with their tokens, as a bucket holds them and batches are picked from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..columns import picked_fields
from ..tokens import Indices, Text, TokenBatch, TokenizedText, cumulate
from .batch_fields import add_fields
from .record_columns import joined_columns

# Arrays that a batch need not have because other texts of its bucket do.
_OF_LONG_TEXTS = frozenset(("words_cut", "window_lengths", "owned"))
_OF_SOME_KINDS = frozenset(("word_ids", "token_type_ids"))


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedRecords:
    """B records with their tokens.

    Attributes:
        tokens: of B texts.
        fields: by name, B entries each, as `fields_of` makes them.
        kinds: of the texts, see `kinds_of`.
    """

    tokens: TokenBatch
    fields: dict[str, Any]
    kinds: frozenset[Any]

    @classmethod
    def concat(cls, parts: Sequence[TokenizedRecords]) -> TokenizedRecords:
        """The records of all parts, one part after the other."""
        return cls(
            tokens=TokenBatch.concat([part.tokens for part in parts]) if parts else TokenBatch.from_texts([]),
            fields=joined_columns([part.fields for part in parts], list(map(len, parts))),
            kinds=frozenset().union(*(part.kinds for part in parts)),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, chosen: Indices, *, keep_text_as: str | None) -> TokenBatch:
        """A batch of these of the records.

        Args:
            chosen: counted from 0.
            keep_text_as: the field that holds the raw texts, or None.
        """
        batch = self.tokens.pick(chosen)
        batch.drop_idle(_OF_LONG_TEXTS | _OF_SOME_KINDS if len(self.kinds) > 1 else _OF_LONG_TEXTS)
        add_fields(batch, picked_fields(self.fields, chosen), keep_text_as=keep_text_as)
        return batch


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
