"""Texts to token ids, in chunks and in any process; windows over texts that are too long.

The Rust tokenizer is kept as JSON and built on first use in each process: one that was used before a fork hangs, or
loses its threads, in the child.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from torch.utils.data import get_worker_info

from ..errors import ConfigError, EncoderError, check_at_least, check_choice, shortened
from ..tokens import Int32Array, Text, TokenBatch, TokenizedText
from .cutting import kept, owners
from .texts import check_texts
from .words import AddedTokens, find_blanks

logger = logging.getLogger(__name__)

Overflow: TypeAlias = Literal["error", "truncate", "windows"]
WordSplitter: TypeAlias = Callable[[str], Sequence[str]]

_IMPORTED_IN = os.getpid()


def check_cutting(
    output: str,
    word_splitter: WordSplitter | None,
    overflow: Overflow,
    stride: int,
    max_length: int | None,
    prompt: str | None = None,
) -> None:
    """Check, before a tokenizer is there, the arguments of `Encoder` that say how texts are cut.

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

    Args:
        tokenizer: a transformers tokenizer that is backed by the `tokenizers` library. It is read, never changed.
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
        split: deprecated alias of `word_splitter`, removed in the next version.
    Raises:
        ConfigError: the tokenizer has no Rust backend, or an argument is out of range.
    """

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
        split: WordSplitter | None = None,
    ) -> None:
        word_splitter = renamed_splitter(word_splitter, split)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"{type(tokenizer).__name__} is not backed by the tokenizers library: pass a fast tokenizer "
                "(AutoTokenizer gives one for every BERT family)"
            )
        check_cutting("words", word_splitter, overflow, stride, max_length)
        least = max(1, backend.num_special_tokens_to_add(is_pair=True))
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
        self.limit = limit or f"the model takes {max_length}"
        side = getattr(tokenizer, "truncation_side", "right")
        check_choice("tokenizer.truncation_side", side, Literal["right", "left"])
        self._keeps_end = overflow == "truncate" and side == "left"
        self._splits_special = bool(getattr(tokenizer, "split_special_tokens", backend.encode_special_tokens))
        self._special_ids = frozenset(getattr(tokenizer, "all_special_ids", ()) if prompt else ())
        self._blanks = find_blanks(backend)
        self._added: AddedTokens | None = None
        self._warned = False
        self._json: str = backend.to_str()
        self._built: tuple[int, Any] | None = None
        self._framed: tuple[tuple[int, int] | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_built": None, "_added": None}

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for two tokenizers that make the same tokens of a text; a word splitter counts by its name.

        Saved states and caches depend on it: another order or spelling refuses all of them.
        """
        splitter = getattr(self.word_splitter, "__qualname__", type(self.word_splitter).__name__)
        rare = {
            "prompt": (self.prompt, self.prompt_counts) if self.prompt else None,
            "truncation_side": "left" if self._keeps_end else None,
            "split_special_tokens": self._splits_special or None,
        }
        others = tuple((name, value) for name, value in rare.items() if value is not None)
        settings = (self._json, self.max_length, self.overflow, self.stride, self.segments, splitter)
        return *settings, *self._blanks.news, *others

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
        if not isinstance(texts, (list, tuple)):
            check_texts(texts)
        backend = self._backend()
        parts = [_parts(text, i) for i, text in enumerate(texts)]
        if self.word_splitter is not None:
            parts = [[self._words(part, i) for part in text] for i, text in enumerate(parts)]
        if self.prompt:
            parts = [[self._prompted(text[0]), *text[1:]] for text in parts]
        if all(len(text) == 1 and isinstance(text[0], str) for text in parts):
            plain = self._plain(backend.encode_batch_fast([text[0] for text in parts]))
            if plain is not None:
                return self._without_prompt(plain)
        out: list[TokenizedText | None] = [None] * len(texts)
        for in_words in (False, True):
            indices = [i for i, text in enumerate(parts) if isinstance(text[0], list) is in_words]
            inputs = [
                tuple(self._marked(part) for part in parts[i]) if len(parts[i]) == 2 else self._marked(parts[i][0])
                for i in indices
            ]
            # The fast method keeps no offsets and no words, and takes a seventh less time.
            encode = backend.encode_batch if in_words else backend.encode_batch_fast
            for i, encoding in zip(indices, encode(inputs, is_pretokenized=in_words) if indices else (), strict=True):
                out[i] = self._text(encoding, parts[i], i)
        return self._without_prompt(out)  # type: ignore[arg-type]  # both kinds together fill all of it

    def _plain(self, encodings: Sequence[Any]) -> list[TokenizedText] | None:
        """The common case, single strings that are short enough: one array for all, in a fifth of the time.

        Returns:
            None if one of them is too long, or special tokens are not only at the ends.
        """
        ids = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        frame = self._frame()
        if frame is None or lengths.max(initial=0) > self.max_length:
            return None
        flat = np.fromiter(chain.from_iterable(ids), np.int32, lengths.sum())
        ends = np.cumsum(lengths)
        special = np.zeros(len(flat), np.bool_)
        for offset in range(frame[0]):
            special[ends - lengths + offset] = True
        for offset in range(frame[1]):
            special[ends - 1 - offset] = True
        bounds = [0, *ends.tolist()]
        return [TokenizedText(flat[start:end], special[start:end]) for start, end in pairwise(bounds)]

    def _frame(self) -> tuple[int, int] | None:
        """How many special tokens come before and after a single text; None if there are others inside it."""
        if self._framed is None:
            mask = self._backend().encode("a").special_tokens_mask
            text = [i for i, special in enumerate(mask) if not special]
            count = self._backend().num_special_tokens_to_add(is_pair=False)
            whole = bool(text) and len(mask) - count == text[-1] - text[0] + 1
            self._framed = ((text[0], len(mask) - 1 - text[-1]) if whole else None,)
        return self._framed[0]

    def batch(self, texts: Sequence[Text]) -> TokenBatch:
        """Tokenize texts into one batch, in their order."""
        return TokenBatch.from_texts(self(texts))

    def _backend(self) -> Any:
        if self._built is None or self._built[0] != os.getpid():
            from tokenizers import Tokenizer

            if get_worker_info() is not None or os.getpid() != _IMPORTED_IN:
                # A forked process does not have its parent's Rust threads: with "true" it would wait for them forever.
                # And a DataLoader worker's siblings use the other cores.
                os.environ["TOKENIZERS_PARALLELISM"] = "false"
            backend = Tokenizer.from_str(self._json)
            backend.no_padding()
            backend.no_truncation()
            backend.encode_special_tokens = self._splits_special
            self._built = (os.getpid(), backend)
        return self._built[1]

    def _prompted(self, part: str | list[str]) -> str | list[str]:
        return self.prompt + part if isinstance(part, str) else self.prompt.split() + part

    def _without_prompt(self, texts: list[TokenizedText]) -> list[TokenizedText]:
        """Mark the prompt's tokens, and the special ones before it, as not used where the prompt does not count."""
        if self.prompt and not self.prompt_counts:
            prompt = self._backend().encode(self.prompt).ids  # as sentence-transformers counts them
            count = len(prompt) - (prompt[-1:] != [] and prompt[-1] in self._special_ids)
            for text in texts:
                if text.owned is None:
                    text.owned = np.ones(len(text.input_ids), np.bool_)
                text.owned[np.flatnonzero(text.owned)[:count]] = False
        return texts

    def _words(self, part: str | list[str], index: int) -> list[str]:
        if isinstance(part, list):
            return part
        assert self.word_splitter is not None
        words = self.word_splitter(part)
        if isinstance(words, str) or not all(isinstance(word, str) for word in words):
            raise ConfigError(f"word_splitter returned {shortened(words)} for text {index}: return a list of words")
        return list(words)

    def _marked(self, part: str | list[str]) -> str | list[str]:
        if isinstance(part, str):
            return part
        if self._blanks.unlike and not self._warned:
            self._warned = True
            logger.warning(
                "a list of words does not have the tokens of the running text, as in %r: with this tokenizer, word "
                "vectors are of words that were tokenized one by one",
                self._blanks.unlike,
            )
        if not self._blanks.others:
            return part
        backend = self._backend()
        if self._added is None or self._added.backend is not backend:
            self._added = AddedTokens(backend)
        return self._blanks.put(part, self._added.begin)

    def _text(self, encoding: Any, parts: list[Any], index: int) -> TokenizedText:
        in_words = isinstance(parts[0], list)
        out = TokenizedText(
            np.array(encoding.ids, np.int32),
            special=np.array(encoding.special_tokens_mask, bool),
            token_type_ids=np.array(encoding.type_ids, np.int32) if len(parts) == 2 and self.segments else None,
            word_ids=_or_minus_one(encoding.word_ids) if in_words else None,
            num_words=sum(map(len, parts)) if in_words else 0,
        )
        sequence_ids = None
        if out.word_ids is not None and len(parts) == 2:
            sequence_ids = _or_minus_one(encoding.sequence_ids)
            out.word_ids[sequence_ids == 1] += len(parts[0])
        if out.word_ids is not None and self.prompt:
            words = len(self.prompt.split())
            out.word_ids = np.maximum(out.word_ids - np.int32(words), np.int32(-1))
            out.num_words -= words
        length = len(out.input_ids)
        if length <= self.max_length:
            return out
        if self.overflow == "error":
            raise EncoderError(
                f"text {index} has {length} tokens, {self.limit}: "
                f"{shortened(parts[0] if len(parts) == 1 else tuple(parts))}; make the encoder with "
                "overflow='truncate' to cut such texts and count what is cut, or with overflow='windows' to cover them "
                "with several windows",
                records=(index,),
            )
        sequence_ids = _or_minus_one(encoding.sequence_ids)
        if self.overflow == "truncate":
            left = kept(sequence_ids, self.max_length, self._keeps_end)
            short = out.pick(left)
            short.cut_tokens = length - self.max_length
            if out.word_ids is not None:
                numbers = np.arange(out.num_words)
                short.words_cut = np.isin(numbers, out.word_ids) & ~np.isin(numbers, out.word_ids[left])
            return short
        return self._windowed(out, sequence_ids, index)

    def _windowed(self, text: TokenizedText, sequence_ids: Int32Array, index: int) -> TokenizedText:
        """The text as windows: each repeats the special tokens and a pair's first text."""
        content = np.flatnonzero(sequence_ids == sequence_ids.max())  # contiguous, and too long for one window
        before, after = np.arange(content[0]), np.arange(content[-1] + 1, len(sequence_ids))
        room = self.max_length - len(before) - len(after)
        if room <= self.stride:
            raise EncoderError(
                f"text {index}: beside its first text a window has room for {max(room, 0)} tokens of the second, and "
                f"windows overlap by stride={self.stride}",
                records=(index,),
            )
        count = len(content)
        # The last window is as full as the others, so its tokens see as much context.
        starts = np.minimum(np.arange(0, count - self.stride, room - self.stride), count - room)
        inside = starts[:, None] + np.arange(room)
        windows = np.arange(len(starts))[:, None]
        owner = owners(np.arange(count) if text.word_ids is None else text.word_ids[content], starts, room)

        def side_by_side(*parts: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.concatenate([np.broadcast_to(x, (len(starts), x.shape[-1])) for x in parts], 1).ravel()

        out = text.pick(side_by_side(before, content[inside], after))
        out.window_lengths = np.full(len(starts), self.max_length, np.int32)
        # The first window owns the repeated tokens, but the last one owns those after the text.
        first, last = windows == 0, windows == len(starts) - 1
        out.owned = side_by_side(first.repeat(len(before), 1), owner[inside] == windows, last.repeat(len(after), 1))
        return out


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


def _or_minus_one(ids: list[int | None]) -> Int32Array:
    return np.array([-1 if i is None else i for i in ids], np.int32)
