"""Texts to token ids, in chunks and in any process; windows over texts that are too long."""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np

from ..errors import ConfigError, EncoderError, check_at_least, check_choice, shortened
from ..tokens import BoolArray, Int32Array, Text, TokenBatch, TokenizedText, cumulate
from .backend import find_backend
from .cutting import kept, windowed
from .frame import Framed
from .given_ids import GivenIds, sequence_ids_of
from .texts import text_list
from .word_cache import LIMIT, WordCount

logger = logging.getLogger(__name__)

Overflow: TypeAlias = Literal["error", "truncate", "windows"]
WordSplitter: TypeAlias = Callable[[str], Sequence[str]]
Framing: TypeAlias = Callable[[Sequence[Any], int, bool], Framed]
"""With the arguments of `Backend.framed`."""


def check_cutting(
    output: str,
    word_splitter: WordSplitter | None,
    overflow: Overflow,
    stride: int,
    max_length: int | None,
    prompt: str | None = None,
    word_cache: int = LIMIT,
) -> None:
    """Check, before a tokenizer is there, the arguments of `Encoder` that are for tokenizing.

    Raises:
        ConfigError: one is out of range, or has no effect beside the others.
    """
    if word_splitter is not None and not callable(word_splitter):
        raise ConfigError(f"word_splitter={shortened(word_splitter)}: pass a function from a string to its words")
    if word_splitter is not None and output != "words":
        raise ConfigError(f"word_splitter= has no effect on output={output!r}: it is for word vectors")
    if prompt is not None and not isinstance(prompt, str):
        raise ConfigError(f"prompt={shortened(prompt)}: pass a string")
    if prompt and output != "sentence":
        raise ConfigError(f"prompt={prompt!r} has no effect on output={output!r}: it is for sentence vectors")
    check_choice("overflow", overflow, Overflow)
    check_at_least("stride", stride, 0)
    if stride and overflow != "windows":
        raise ConfigError(f"stride={stride} has no effect with overflow={overflow!r}: only windows overlap")
    if max_length is not None:
        check_at_least("max_length", max_length, 1)
    if word_cache is not False:
        check_at_least("word_cache", word_cache, 0)


def renamed_splitter(word_splitter: WordSplitter | None, split: WordSplitter | None) -> WordSplitter | None:
    """`word_splitter`, or its deprecated alias `split` with a warning at the caller's caller."""
    if split is None:
        return word_splitter
    if word_splitter is not None:
        raise ConfigError("split= is the old name of word_splitter=: leave it out")
    warnings.warn("split= is now word_splitter=; the next version drops the old name", FutureWarning, stacklevel=3)
    return split


class TextTokenizer:
    """Texts to token ids, special tokens included; light, and safe to send to worker processes.

    An encoder's is `encoder.tokenizer`. Called with texts it gives a `TokenizedText` for each; `batch(texts)` gives all
    of them as one `TokenBatch`, which the encoder takes in place of texts. `identity` is equal for tokenizers that make
    the same tokens.

    Args:
        tokenizer: a transformers tokenizer, backed by the `tokenizers` library or written in Python (slower). It is
            read, never changed. None for ids alone: every text is refused.
        max_length: tokens of the longest text the model takes, special tokens included.
        overflow: for a longer text: "error" raises; "truncate" drops its end (its start, with the tokenizer's
            `truncation_side="left"`) and counts the dropped tokens; "windows" covers it with overlapping windows. Of a
            pair the second text is windowed, the first repeated.
        stride: tokens by which windows overlap, as transformers counts them.
        word_splitter: splits strings into words, for word vectors; None leaves strings whole.
        segments: whether the model tells the texts of a pair apart by segment ids.
        prompt: is put before each text, before the first one of a pair; of no word.
        prompt_counts: whether sentences are pooled over the prompt's tokens too.
        limit: whose limit `max_length` is, for messages; None is the model's.
        word_cache: bytes in each process for the ids of words that come again; False or 0 keeps none. Tokens are the
            same. A tokenizer for which no cut of texts is known to be exact gets every text whole; the log says so.
        vocab_size: how many ids the model knows, to check texts that come as ids.
        split: deprecated alias of `word_splitter`, removed in the next version.
    Raises:
        ConfigError: an argument is out of range, or has no effect without a tokenizer.
    """

    _padding: tuple[int, str] | None = None  # of the class: tokenizers that were pickled before have none
    _saw_words = False

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        overflow: Overflow = "error",
        stride: int = 0,
        word_splitter: WordSplitter | None = None,
        segments: bool = True,
        prompt: str = "",
        prompt_counts: bool = True,
        limit: str | None = None,
        word_cache: int = LIMIT,
        vocab_size: int | None = None,
        split: WordSplitter | None = None,
    ) -> None:
        word_splitter = renamed_splitter(word_splitter, split)
        check_cutting("words", word_splitter, overflow, stride, max_length, word_cache=word_cache)
        self.backend = find_backend(tokenizer, int(word_cache))
        for name, value in (("prompt", prompt), ("word_splitter", word_splitter)):
            if value and tokenizer is None:
                raise ConfigError(f"{name}={shortened(value)} has no effect without a tokenizer")
        least = max(1, self.backend.special_of_pair)
        if max_length < least:
            raise ConfigError(f"max_length={max_length}: a pair's special tokens alone take {least}")
        room = max_length - least
        if overflow == "windows" and not room:
            raise ConfigError(f"max_length={max_length}: beside a pair's special tokens no window has room for a text")
        if overflow == "windows" and stride >= room:
            raise ConfigError(f"stride={stride}: windows of {max_length} tokens overlap by 0 to {room - 1}")
        self.max_length = max_length
        self.overflow = overflow
        self.stride = stride
        self.word_splitter = word_splitter
        self.segments = segments
        self.prompt = prompt
        self.prompt_counts = prompt_counts
        self.vocab_size = vocab_size
        self.limit = limit or f"the model takes {max_length}"
        side = getattr(tokenizer, "truncation_side", "right")
        check_choice("tokenizer.truncation_side", side, Literal["right", "left"])
        self._keeps_end = overflow == "truncate" and side == "left"
        self._special_ids = frozenset(getattr(tokenizer, "all_special_ids", ()) if prompt else ())
        self._warned = False
        self._ids: GivenIds | None = None
        if (padding := getattr(tokenizer, "pad_token_id", None)) is not None:
            self._padding = (int(padding), str(tokenizer.pad_token))

    @property
    def takes_texts(self) -> bool:
        """Whether there is a tokenizer; an encoder without one takes ids alone."""
        return self.backend.takes_texts

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for two tokenizers that make the same tokens of a text; a word splitter counts by its name.

        Saved states and caches depend on it: another order or spelling refuses all of them.
        """
        splitter = getattr(self.word_splitter, "__qualname__", type(self.word_splitter).__name__)
        rare = {
            "prompt": (self.prompt, self.prompt_counts) if self.prompt else None,
            "truncation_side": "left" if self._keeps_end else None,
            "split_special_tokens": self.backend.splits_special or None,
        }
        others = tuple((name, value) for name, value in rare.items() if value is not None)
        settings = (self.backend.content, self.max_length, self.overflow, self.stride, self.segments, splitter)
        return *settings, *self.backend.blanks.news, *others

    def __repr__(self) -> str:
        return f"TextTokenizer(max_length={self.max_length}, overflow={self.overflow!r})"

    def __call__(self, texts: Sequence[Text]) -> list[TokenizedText]:
        """Tokenize a chunk of texts.

        Args:
            texts: strings, lists of words, or pairs of either as tuples; the kinds may be mixed.
        Returns:
            One `TokenizedText` a text, in order.
        Raises:
            EncoderError: a text is of another type, or too long where overflow is "error"; `.records` names it.
            ConfigError: `texts` is no list of texts.
        """
        out: dict[int, TokenizedText] = {}
        for indices, batch in self._tokenized(texts, self.backend.framed):
            out |= dict(zip(indices, batch.apart(), strict=True))
        return [out[i] for i in range(len(texts))]

    def batch(self, texts: Sequence[Text], framing: Framing | None = None) -> TokenBatch:
        """Tokenize texts into one batch, in their order: like `__call__`, without an object for each text.

        Args:
            texts: as for `__call__`.
            framing: gives the tokens in place of `backend.framed`; None is that.
        """
        return _in_order(self._tokenized(texts, framing or self.backend.framed))

    def ids(self, texts: Sequence[TokenizedText] | TokenBatch) -> TokenBatch:
        """Texts that are ids already as one batch, in their order, as if they were tokenized here.

        Args:
            texts: whole, with special tokens; which ones these are is found by their ids where a text does not say it.
        Raises:
            EncoderError: an id is not in the vocabulary, a text has no ids, has padding, or no words where they are
                needed, or is too long where overflow is "error"; `.records` names it.
        """
        tokens = self._own_ids.batch(texts, self.vocab_size, in_words=self.word_splitter is not None)
        if not self.segments and self.takes_texts:
            tokens.token_type_ids = None
        return _in_order(self._fitted(tokens, list(range(len(texts))), partial(self._cut_ids, tokens)))

    def special_among(self, ids: Int32Array) -> BoolArray:
        """[N] which of these ids are of tokens that frame texts; the same token may be written out in a text."""
        return self._own_ids.special_among(ids)

    @property
    def _own_ids(self) -> GivenIds:
        if self._ids is None:
            self._ids = GivenIds(self.whole().batch if self.takes_texts else None, self._padding)
        return self._ids

    @property
    def ids_identity(self) -> dict[str, Any] | None:
        """Equal for two tokenizers whose ids of a text are the same before it is cut, with a name for each difference.

        Parquet files of `bertstream.tokenize` hold it: another name or spelling refuses all of them. None without a
        tokenizer.
        """
        if not self.takes_texts:
            return None
        content = (self.backend.content, *self.backend.blanks.news, self.backend.splits_special)
        digest = hashlib.sha256(repr(content).encode()).hexdigest()
        return {"vocabulary": digest[:16], "segments": self.segments, "prompt": self.prompt}

    def whole(self) -> TextTokenizer:
        """A tokenizer like this one that cuts no text."""
        other = copy.copy(self)
        other.max_length, other.overflow, other.stride = np.iinfo(np.int32).max, "error", 0
        other._keeps_end, other.prompt_counts = False, True
        return other

    @property
    def word_count(self) -> WordCount:
        """How many words were looked up in this process so far, and how many of them were found."""
        return self.backend.word_count

    def _tokenized(self, texts: Sequence[Text], framing: Framing) -> Iterator[tuple[list[int], TokenBatch]]:
        """The texts of each kind, those that fit and those that are cut, with their indices."""
        parts = [_parts(text, i) for i, text in enumerate(text_list(texts))]
        if self.word_splitter is not None:
            parts = [[self.words_of(part, i) for part in text] for i, text in enumerate(parts)]
        if self.prompt:
            parts = [[self._prompted(text[0]), *text[1:]] for text in parts]
        kinds: dict[tuple[int, bool], list[int]] = {}
        for i, text in enumerate(parts):
            kinds.setdefault((len(text), isinstance(text[0], list)), []).append(i)
        for (count, in_words), indices in kinds.items():
            if in_words and self.word_splitter is None and not self._saw_words:
                self._saw_words = True
                _warn_of_long_words(parts, indices)
            try:
                framed = framing([self.with_blanks(part) for i in indices for part in parts[i]], count, in_words)
            except EncoderError as error:
                records = [indices[i] for i in error.records]
                raise EncoderError(f"text {records[0]}: {error}" if records else str(error), records=records) from error
            tokens = framed.tokens
            if count == 1 or not self.segments:
                tokens.token_type_ids = None
            if tokens.word_ids is not None and self.prompt:
                words = np.int32(len(self.prompt.split()))
                tokens.word_ids = np.maximum(tokens.word_ids - words, np.int32(-1))
                tokens.num_words -= words
            yield from self._fitted(tokens, indices, partial(self._cut_framed, framed, parts, indices))

    def _cut_framed(self, framed: Framed, parts: list[Any], indices: list[int], number: int) -> TokenizedText:
        return self._cut_text(framed.pick(number), parts[indices[number]], indices[number])

    def _cut_ids(self, tokens: TokenBatch, number: int) -> TokenizedText:
        text = tokens.pick(np.array([number]))
        sequence_ids = sequence_ids_of(text)
        if (special := np.count_nonzero(sequence_ids < 0)) >= self.max_length:
            raise EncoderError(f"text {number} has {special} special tokens, {self.limit} in all", records=(number,))
        return self._cut_text(Framed(text, sequence_ids), [text.input_ids.tolist()], number)

    def _fitted(
        self, tokens: TokenBatch, indices: list[int], cut: Callable[[int], TokenizedText]
    ) -> Iterator[tuple[list[int], TokenBatch]]:
        """The texts that fit, and those that are cut, with their indices."""
        fits = tokens.lengths <= self.max_length
        if fits.all():
            yield indices, self._without_prompt(tokens)
            return
        short, long = np.flatnonzero(fits), np.flatnonzero(~fits).tolist()
        yield [indices[i] for i in short], self._without_prompt(tokens.pick(short))
        yield [indices[i] for i in long], self._without_prompt(TokenBatch.from_texts([cut(i) for i in long]))

    def _prompted(self, part: str | list[str]) -> str | list[str]:
        return self.prompt + part if isinstance(part, str) else self.prompt.split() + part

    def _without_prompt(self, tokens: TokenBatch) -> TokenBatch:
        """Mark the prompt's tokens, and the special ones before it, as not used where the prompt does not count."""
        if self.prompt and not self.prompt_counts:
            prompt = self.backend.ids(self.prompt)  # as sentence-transformers counts them
            count = len(prompt) - (prompt[-1:] != [] and prompt[-1] in self._special_ids)
            owned = np.ones(tokens.num_tokens, np.bool_) if tokens.owned is None else tokens.owned
            used = cumulate(owned)
            tokens.owned = owned & (used[1:] - np.repeat(used[tokens.cu_seqlens[:-1]], tokens.lengths) > count)
        return tokens

    def words_of(self, part: str | list[str], index: int) -> list[str]:
        """The words of a text, or of one of a pair, as the splitter makes them of a string.

        Raises:
            ConfigError: the splitter returned something else; the message names the text by its index.
        """
        if isinstance(part, list):
            return part
        assert self.word_splitter is not None
        words = self.word_splitter(part)
        if isinstance(words, str) or not all(isinstance(word, str) for word in words):
            raise ConfigError(f"word_splitter returned {shortened(words)} for text {index}: return a list of words")
        return list(words)

    def with_blanks(self, part: str | list[str]) -> str | list[str]:
        """A list of words with the blanks that give it the tokens of the running text; a string as it is."""
        if isinstance(part, str):
            return part
        unlike = self.backend.blanks.unlike
        if unlike and not self._warned:
            self._warned = True
            logger.warning(
                "a list of words does not have the tokens of the running text, as in %r: with this tokenizer, word "
                "vectors are of words that were tokenized one by one",
                unlike,
            )
        return self.backend.with_blanks(part)

    def _cut_text(self, framed: Framed, parts: list[Any], index: int) -> TokenizedText:
        """A text that is too long, cut as `overflow` says."""
        length = len(framed.sequence_ids)
        if self.overflow == "error":
            raise EncoderError(
                f"text {index} has {length} tokens, {self.limit}: "
                f"{shortened(parts[0] if len(parts) == 1 else tuple(parts))}; make the encoder with "
                "overflow='truncate' to cut such texts and count what is cut, or with overflow='windows' to cover them "
                "with several windows",
                records=(index,),
            )
        [out] = framed.tokens.apart()
        if self.overflow == "truncate":
            left = kept(framed.sequence_ids, self.max_length, self._keeps_end)
            short = out.pick(left)
            short.cut_tokens = length - self.max_length
            if out.word_ids is not None and out.num_words:  # other texts of its batch may have words
                numbers = np.arange(out.num_words)
                short.words_cut = np.isin(numbers, out.word_ids) & ~np.isin(numbers, out.word_ids[left])
            return short
        return windowed(out, framed.sequence_ids, index, max_length=self.max_length, stride=self.stride)


def _in_order(groups: Iterable[tuple[list[int], TokenBatch]]) -> TokenBatch:
    """Texts of several kinds, with their indices, as one batch."""
    groups = list(groups)
    if not groups:
        return TokenBatch.from_texts([])
    if len(groups) == 1:
        return groups[0][1]
    order = np.argsort(np.concatenate([indices for indices, _ in groups]))
    return TokenBatch.concat([batch for _, batch in groups]).pick(order)


def _warn_of_long_words(texts: Sequence[Any], indices: Sequence[int]) -> None:
    """Warn if the words of one of these look like texts: several in a record are easily passed as a list."""
    for i in indices:
        for words in texts[i]:
            if any(" " in word.strip() for word in words):
                logger.warning(
                    "text %d is a list of words, but some look like texts: %s. It is encoded as one text. If a record "
                    "has several texts, join those of all records into one list, in a collate_fn for example (only "
                    "the first lists are looked at)",
                    i,
                    shortened(words),
                )
                return


def _parts(text: Any, index: int) -> list[Any]:
    """A text as its one or two parts, strings or lists of strings."""
    if type(text) is str and text.isascii():  # the common case; the rest costs microseconds
        return [text]
    parts = list(text) if isinstance(text, tuple) else [text]
    lists = [isinstance(part, list) for part in parts]
    strings = [string for part in parts for string in (part if isinstance(part, list) else [part])]
    well_formed = all(isinstance(string, str) for string in strings) and len(set(lists)) == 1
    if not well_formed or (isinstance(text, tuple) and len(parts) != 2):
        raise EncoderError(
            f"text {index} is {shortened(text)} ({type(text).__name__}): a text is a string, a list of words, or a "
            "tuple of two of either",
            records=(index,),
        )
    if not all(map(_is_unicode, strings)):
        raise EncoderError(
            f"text {index} holds half of a surrogate pair, which is no character: {shortened(text)}; "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') replaces it",
            records=(index,),
        )
    return parts


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
