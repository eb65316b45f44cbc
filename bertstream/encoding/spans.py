"""Which characters a row is of: its text is tokenized again, with the offsets that nobody needs while vectors are made.

The ids are compared with those that were encoded, so characters are right or there is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..embeddings import Embeddings
from ..errors import ConfigError, EncoderError, shortened
from ..tokens import BoolArray, Indices, Int32Array, Text, TokenBatch, cumulate, steps
from .frame import Framed
from .tokenizer import TextTokenizer
from .tokenizers_backend import TokenizersBackend


class SpanFinder:
    """Finds the characters of rows, for `Embeddings.spans`.

    Args:
        tokenizer: what made the tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def spans(self, rows: Embeddings) -> Indices:
        """[N, 4] as `Embeddings.spans` describes them."""
        tokenizer, texts = self._text_tokenizer(), _texts(rows.tokens)
        units = _Units.of(tokenizer, texts)
        if rows.output != "words":
            return np.asarray(_token_places(tokenizer, rows.tokens, units)[_tokens_of(rows)], np.int64)
        _check_same(rows.tokens, tokenizer.batch(texts))
        if rows.tokens.words_cut is not None:
            units.places[rows.tokens.words_cut, 1:] = -1
        return units.places

    def strings(self, rows: Embeddings) -> list[str]:
        """N strings as `Embeddings.strings` describes them."""
        found = self.spans(rows).tolist()
        if rows.output == "words":
            words, names = steps(rows.tokens.num_words), [""] * len(found)
        else:
            words = np.zeros(len(found), np.int32) if rows.word_ids is None else rows.word_ids
            names = list(map(_library(self._text_tokenizer()).token, rows.tokens.input_ids[_tokens_of(rows)].tolist()))
        texts = _texts(rows.tokens)
        return [
            _source(texts[text], part, word)[start:end] if start >= 0 else name
            for (text, part, start, end), word, name in zip(found, words.tolist(), names, strict=True)
        ]

    def _text_tokenizer(self) -> TextTokenizer:
        if isinstance(self._tokenizer, TextTokenizer):
            return self._tokenizer
        raise ConfigError(
            f"{type(self._tokenizer).__name__} does not say which characters a token is: spans need the encoder's own "
            "tokenizer"
        )


def _library(tokenizer: TextTokenizer) -> TokenizersBackend:
    """The part of a tokenizer that has offsets.

    Raises:
        ConfigError: it is written in Python, and has none.
    """
    if isinstance(tokenizer.backend, TokenizersBackend):
        return tokenizer.backend
    raise ConfigError(
        "a tokenizer that is written in Python does not say which characters a token is: words have characters, with "
        "output='words'"
    )


def _token_places(tokenizer: TextTokenizer, batch: TokenBatch, units: _Units) -> Indices:
    """[N, 4] of each token of a batch."""
    notes = _Notes(_library(tokenizer))
    again = tokenizer.batch(_texts(batch), notes.framed)
    numbers, again.input_ids = again.input_ids, np.concatenate(notes.ids)[again.input_ids]
    _check_same(batch, again)
    parts, starts, ends = np.concatenate(notes.places)[numbers].T
    texts = np.repeat(np.arange(len(batch)), batch.lengths)
    in_text = np.where(units.in_words[texts], again.word_of_token, parts)
    out = np.full((len(texts), 4), -1, np.int64)
    out[:, 0] = texts
    rows = np.flatnonzero((parts >= 0) & (in_text >= 0))
    unit = units.bounds[:-1][texts[rows]] + in_text[rows]
    # The tokenizer may see a prompt, or a blank, before the user's characters.
    start, end = starts[rows] - units.ahead[unit], ends[rows] - units.ahead[unit]
    own = ~units.prompted[unit] | (end > 0)
    rows, unit, start, end = (array[own] for array in (rows, unit, start, end))
    begin = units.places[unit, 2]
    out[rows, 1:] = np.column_stack([parts[rows], np.maximum(start, 0) + begin, np.maximum(end, 0) + begin])
    return out


class _Notes:
    """Tokenizes with offsets. A token's id is the number of its note instead, which cutting a text carries along.

    Attributes:
        ids: [n] of each call, the real ids.
        places: [n, 3] of each call: the part of a pair (-1 for special tokens), and the first character and one past
            the last, of the string or word that the tokenizer saw.
    """

    def __init__(self, library: TokenizersBackend) -> None:
        self._library = library
        self._count = 0
        self.ids = [np.zeros(0, np.int32)]
        self.places = [np.zeros((0, 3), np.int64)]

    def framed(self, parts: Sequence[Any], texts: int, in_words: bool) -> Framed:
        """As `TokenizersBackend.framed`, but for the ids."""
        encodings, framed = self._library.encoded(parts, texts, in_words)
        offsets = [offset for encoding in encodings for offset in encoding.offsets]
        self.ids.append(framed.tokens.input_ids)
        self.places.append(np.column_stack([framed.sequence_ids, np.array(offsets, np.int64).reshape(-1, 2)]))
        framed.tokens.input_ids = np.arange(self._count, self._count + len(offsets), dtype=np.int32)
        self._count += len(offsets)
        return framed


class _Units(NamedTuple):
    """The strings that the tokenizer sees one by one: strings, the two of a pair, or words.

    Attributes:
        bounds: [B + 1] text i has the units bounds[i]:bounds[i + 1].
        in_words: [B] bool, whether they are words.
        places: [U, 4] text, part, and where in the text as it was given: first character and one past the last.
        ahead: [U] how many characters the tokenizer sees before its first one.
        prompted: [U] bool, whether these are a prompt.
    """

    bounds: Int32Array
    in_words: BoolArray
    places: Indices
    ahead: Indices
    prompted: BoolArray

    @classmethod
    def of(cls, tokenizer: TextTokenizer, texts: Sequence[Text]) -> _Units:
        """Those of these texts.

        Raises:
            ConfigError: the place of a word in the string that was split is not clear.
        """
        rows: list[tuple[int, int, int, int]] = []
        ahead: list[int] = []
        prompted: list[bool] = []
        counts, in_words = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.bool_)
        for i, text in enumerate(texts):
            before = len(rows)
            for number, part in enumerate(text if isinstance(text, tuple) else (text,)):
                prompt = tokenizer.prompt if number == 0 else ""
                if isinstance(part, str) and tokenizer.word_splitter is None:
                    rows.append((i, number, 0, len(part)))
                    ahead.append(len(prompt))
                    prompted.append(bool(prompt))
                    continue
                in_words[i] = True
                words = tokenizer.words_of(part, i)
                begins = [0] * len(words) if isinstance(part, list) else _begins(words, part, i)
                rows += [(i, number, at, at + len(word)) for at, word in zip(begins, words, strict=True)]
                first = prompt.split()
                seen = tokenizer.with_blanks([*first, *words])[len(first) :]
                ahead += [len(mark) - len(word) for mark, word in zip(seen, words, strict=True)]
                prompted += [False] * len(words)
            counts[i] = len(rows) - before
        places = np.array(rows, np.int64).reshape(-1, 4)
        return cls(cumulate(counts), in_words, places, np.array(ahead, np.int64), np.array(prompted, np.bool_))


def _begins(words: Sequence[str], text: str, index: int) -> list[int]:
    """Where each word begins in the string that was split, if there is only one way to find all of them in order."""
    begins: list[int] = []
    end = 0
    for word in words:
        begins.append(text.find(word, end))
        end = begins[-1] + len(word)
    clear = -1 not in begins
    end = len(text)
    for word, begin in zip(reversed(words), reversed(begins), strict=True):
        clear = clear and (not word or text.rfind(word, 0, end) == begin)
        end = begin
    if clear:
        return begins
    raise ConfigError(
        f"word_splitter made {shortened(list(words))} of text {index}, {shortened(text)}: where each word is in it is "
        "not clear; split texts before you pass them, as lists of words, and spans are within the words"
    )


def _texts(batch: TokenBatch) -> list[Text]:
    texts = batch.texts
    if texts is None or len(texts) != len(batch):
        raise ConfigError(f"tokens.texts holds {0 if texts is None else len(texts)} texts, the batch {len(batch)}")
    return texts


def _check_same(batch: TokenBatch, again: TokenBatch) -> None:
    """Refuse texts that have other tokens or words than those that were encoded."""
    if all(_equal(batch, again)):
        return
    pairs = [(batch.pick(np.array([i])), again.pick(np.array([i]))) for i in range(len(batch))]
    changed = [i for i, (old, new) in enumerate(pairs) if not all(_equal(old, new))]
    raise EncoderError(
        f"text {changed[0]} of the batch has other tokens now than when it was encoded, so their places are unknown: "
        f"{shortened(_texts(batch)[changed[0]])}; leave texts and tokenizer unchanged until spans() or strings()",
        records=changed,
    )


def _equal(old: TokenBatch, new: TokenBatch) -> Iterator[bool]:
    yield np.array_equal(old.cu_seqlens, new.cu_seqlens)
    yield np.array_equal(old.input_ids, new.input_ids)
    yield np.array_equal(old.num_words, new.num_words)
    yield np.array_equal(old.word_of_token, new.word_of_token)


def _tokens_of(rows: Embeddings) -> BoolArray:
    """[tokens] bool, whose rows token output has."""
    batch = rows.tokens
    kept: npt.NDArray[Any] = np.ones(batch.num_tokens, np.bool_)
    # Each of these is part of the one before, so the one of as many tokens as there are rows is the right one.
    if len(rows.values) < np.count_nonzero(kept) and batch.owned is not None:
        kept = batch.owned
    if len(rows.values) < np.count_nonzero(kept) and batch.special is not None:
        kept = kept & ~batch.special
    return kept


def _source(text: Text, part: int, word: int) -> str:
    """The string in which a row's characters are; words are counted through both texts of a pair."""
    parts = text if isinstance(text, tuple) else (text,)
    own = parts[part]
    if isinstance(own, str):
        return own
    return own[word - (len(parts[0]) if part else 0)]
