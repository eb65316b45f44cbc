"""Drawn texts as tokens, so few of them that equal ones are common."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from bertstream.tokens import TokenizedText


@st.composite
def tokenized(draw: st.DrawFn, special: bool) -> TokenizedText:
    """A text of few tokens with few ids, so texts repeat often; every optional part may be absent."""
    length = draw(st.integers(0, 4))

    def maybe(values: st.SearchStrategy[Any], dtype: Any) -> Any:
        column = st.lists(values, min_size=length, max_size=length)
        return draw(st.none() | column.map(lambda drawn: np.array(drawn, dtype)))

    text = TokenizedText(np.array(draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)), np.int32))
    if special:
        text.special = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)), np.bool_)
    text.token_type_ids = maybe(st.integers(0, 1), np.int32)
    text.owned = maybe(st.booleans(), np.bool_)
    text.cut_tokens = draw(st.integers(0, 2))
    text.num_words = draw(st.integers(0, 2))
    if text.num_words:
        text.word_ids = maybe(st.integers(-1, text.num_words - 1), np.int32)
        if draw(st.booleans()):
            text.words_cut = np.array(draw(st.lists(st.booleans(), min_size=text.num_words, max_size=text.num_words)))
    if length > 1 and draw(st.booleans()):
        cut = draw(st.integers(1, length - 1))
        text.window_lengths = np.array([cut, length - cut], np.int32)
    return text
