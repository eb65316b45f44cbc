"""Texts -> token ids, in chunks, in whatever process asks; windows over texts that are too long.

The Rust tokenizer is kept as its JSON and built on first use in each process: one that was used before a fork hangs or
loses its threads in the child.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from torch.utils.data import get_worker_info

from ..errors import ConfigError, EncoderError, check_choice, shortened
from ..tokens import BoolArray, Int32Array, Text, TokenBatch, TokenizedText

Overflow: TypeAlias = Literal["error", "truncate", "windows"]
Split: TypeAlias = Callable[[str], Sequence[str]]

_BLANK_BEGINS_WORDS = re.compile(r"ByteLevel\(add_prefix_space=False|prepend_scheme=never")

_IMPORTED_IN = os.getpid()


class TextTokenizer:
    """Texts to token ids, special tokens included; light, and safe to send to worker processes.

    Args:
        tokenizer: a transformers tokenizer that is backed by the `tokenizers` library. It is read, never changed.
        max_length: tokens of the longest text the model takes, special tokens included.
        overflow: what to do with a longer text: "error" raises; "truncate" drops its end and counts what it dropped;
            "windows" covers it with overlapping windows. Of a pair the second text is windowed, the first repeated.
        stride: tokens by which windows overlap, as transformers counts it.
        split: splits strings into words, for word vectors; None leaves strings whole.
        segments: whether the model tells the texts of a pair apart by segment ids.
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
        split: Split | None = None,
        segments: bool = True,
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"{type(tokenizer).__name__} is not backed by the tokenizers library: pass a fast tokenizer "
                "(AutoTokenizer gives one for every BERT family)"
            )
        check_choice("overflow", overflow, Overflow)
        least = max(1, backend.num_special_tokens_to_add(is_pair=True))
        if max_length < least:
            raise ConfigError(f"max_length={max_length}: the special tokens of a pair of texts alone take {least}")
        room = max_length - least
        if overflow == "windows" and not room:
            raise ConfigError(f"max_length={max_length}: beside a pair's special tokens no window has room for a text")
        if stride < 0 or (overflow == "windows" and stride >= room):
            raise ConfigError(f"stride={stride}: windows of {max_length} tokens overlap by 0 to {room - 1}")
        if stride and overflow != "windows":
            raise ConfigError(f"stride={stride} has no effect with overflow={overflow!r}: windows alone overlap")
        self.max_length = max_length
        self.overflow = overflow
        self.stride = stride
        self.split = split
        self.segments = segments
        # Such a tokenizer knows that a word begins by the blank before it: without one, a list's words would be glued.
        # A blank before one of its added tokens would be a token of its own.
        self._blank_before_words = _BLANK_BEGINS_WORDS.search(repr(backend.pre_tokenizer)) is not None
        self._no_blank_before = (" ", *(token.content for token in backend.get_added_tokens_decoder().values()))
        self._json: str = backend.to_str()
        self._built: tuple[int, Any] | None = None
        self._framed: tuple[tuple[int, int] | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_built": None}

    @property
    def identity(self) -> tuple[Any, ...]:
        """Two tokenizers with equal ones make the same tokens of a text (a function for `split` goes by its name)."""
        split = getattr(self.split, "__qualname__", type(self.split).__name__)
        return self._json, self.max_length, self.overflow, self.stride, self.segments, split

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
            ConfigError: `texts` is one string.
        """
        if isinstance(texts, str):
            raise ConfigError(f"texts={shortened(texts)}, one string: pass a list of texts, [text] for a single one")
        backend = self._backend()
        parts = [_parts(text, i) for i, text in enumerate(texts)]
        if self.split is not None:
            parts = [[self._words(part, i) for part in text] for i, text in enumerate(parts)]
        if all(len(text) == 1 and isinstance(text[0], str) for text in parts):
            plain = self._plain(backend.encode_batch_fast([text[0] for text in parts]))
            if plain is not None:
                return plain
        out: list[TokenizedText | None] = [None] * len(texts)
        for in_words in (False, True):
            places = [i for i, text in enumerate(parts) if isinstance(text[0], list) is in_words]
            inputs = [
                tuple(self._marked(part) for part in parts[i]) if len(parts[i]) == 2 else self._marked(parts[i][0])
                for i in places
            ]
            # The fast one keeps no offsets and no words, and takes a seventh less time.
            encode = backend.encode_batch if in_words else backend.encode_batch_fast
            for i, encoding in zip(places, encode(inputs, is_pretokenized=in_words) if places else (), strict=True):
                out[i] = self._text(encoding, parts[i], i)
        return out  # type: ignore[return-value]  # every kind has filled its places

    def _plain(self, encodings: Sequence[Any]) -> list[TokenizedText] | None:
        """Single strings that are short enough, as nearly all are: one array for all of them, in a fifth of the time.

        None where one of them is too long, or special tokens stand elsewhere than at the ends.
        """
        ids = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        frame = self._frame()
        if frame is None or lengths.max(initial=0) > self.max_length:
            return None
        flat = np.fromiter(chain.from_iterable(ids), np.int32, lengths.sum())
        ends = np.cumsum(lengths)
        special = np.zeros(len(flat), np.bool_)
        for place in range(frame[0]):
            special[ends - lengths + place] = True
        for place in range(frame[1]):
            special[ends - 1 - place] = True
        bounds = [0, *ends.tolist()]
        return [TokenizedText(flat[start:end], special[start:end]) for start, end in pairwise(bounds)]

    def _frame(self) -> tuple[int, int] | None:
        """How many special tokens stand before and behind a single text; None where that cannot be said."""
        if self._framed is None:
            mask = self._backend().encode("a").special_tokens_mask
            text = [place for place, special in enumerate(mask) if not special]
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
                # Of a forked process the Rust threads stayed behind: to call on them, as "true" does, hangs for good.
                # And a DataLoader worker's neighbours use the other cores.
                os.environ["TOKENIZERS_PARALLELISM"] = "false"
            backend = Tokenizer.from_str(self._json)
            backend.no_padding()
            backend.no_truncation()
            self._built = (os.getpid(), backend)
        return self._built[1]

    def _words(self, part: str | list[str], place: int) -> list[str]:
        if isinstance(part, list):
            return part
        assert self.split is not None
        words = self.split(part)
        if isinstance(words, str) or not all(isinstance(word, str) for word in words):
            raise ConfigError(f"split made {shortened(words)} of text {place}: it must give a list of words")
        return list(words)

    def _marked(self, part: str | list[str]) -> str | list[str]:
        if isinstance(part, str) or not self._blank_before_words:
            return part
        return [f" {word}" if word and not word.startswith(self._no_blank_before) else word for word in part]

    def _text(self, encoding: Any, parts: list[Any], place: int) -> TokenizedText:
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
        length = len(out.input_ids)
        if length <= self.max_length:
            return out
        if self.overflow == "error":
            raise EncoderError(
                f"text {place} has {length} tokens, the model takes {self.max_length}: "
                f"{shortened(parts[0] if len(parts) == 1 else tuple(parts))}; an encoder made with "
                "overflow='truncate' cuts such texts and counts what it cut, one with overflow='windows' covers them "
                "with several windows",
                records=(place,),
            )
        sequence_ids = _or_minus_one(encoding.sequence_ids)
        if self.overflow == "truncate":
            kept = _kept(sequence_ids, self.max_length)
            short = _picked(out, kept)
            short.cut_tokens = length - self.max_length
            if out.word_ids is not None:
                numbers = np.arange(out.num_words)
                short.words_cut = np.isin(numbers, out.word_ids) & ~np.isin(numbers, out.word_ids[kept])
            return short
        return self._windowed(out, sequence_ids, place)

    def _windowed(self, text: TokenizedText, sequence_ids: Int32Array, place: int) -> TokenizedText:
        """The text as windows: each repeats what does not slide, special tokens and a pair's first text."""
        content = np.flatnonzero(sequence_ids == sequence_ids.max())  # neighbours, and more than fit into one window
        before, after = np.arange(content[0]), np.arange(content[-1] + 1, len(sequence_ids))
        room = self.max_length - len(before) - len(after)
        if room <= self.stride:
            raise EncoderError(
                f"text {place}: beside its first text a window has room for {max(room, 0)} tokens of the second, and "
                f"windows overlap by stride={self.stride}",
                records=(place,),
            )
        count = len(content)
        # The last window is as full as the others: the tokens at the end see as much before them as any.
        starts = np.minimum(np.arange(0, count - self.stride, room - self.stride), count - room)
        inside = starts[:, None] + np.arange(room)
        windows = np.arange(len(starts))[:, None]
        owner = _owners(np.arange(count) if text.word_ids is None else text.word_ids[content], starts, room)

        def side_by_side(*parts: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.concatenate([np.broadcast_to(x, (len(starts), x.shape[-1])) for x in parts], 1).ravel()

        out = _picked(text, side_by_side(before, content[inside], after))
        out.window_lengths = np.full(len(starts), self.max_length, np.int32)
        # What is repeated belongs to the first window, but what ends the text to the last.
        first, last = windows == 0, windows == len(starts) - 1
        out.owned = side_by_side(first.repeat(len(before), 1), owner[inside] == windows, last.repeat(len(after), 1))
        return out


def _owners(words: npt.NDArray[Any], starts: npt.NDArray[Any], room: int) -> npt.NDArray[Any]:
    """Which window each sliding token's vector is taken from.

    That is the one in which its word stands farthest from an edge beyond which the text goes on, the earlier of two
    that are as good. A word's tokens have one owner, unless no window holds the word whole: then each has its own.

    Args:
        words: [n] the word of each token, ascending.
        starts: [W] the first token of each window, ascending, from 0 to n - room.
        room: tokens of each window.
    Returns:
        [n] ascending, so that owned tokens keep their order.
    """
    # Window i + 1 beats window i for a word whose middle lies behind the middle of both taken together. That is also
    # so at the text's ends, where an edge does not count: there the other edge alone decides, at the same point.
    middles = starts[:-1] + starts[1:] + room - 1
    first = np.flatnonzero(np.diff(words, prepend=-1))
    last = np.append(first[1:], len(words)) - 1
    owner = np.searchsorted(middles, first + last)
    whole = (starts[owner] <= first) & (last < starts[owner] + room)
    by_token = np.searchsorted(middles, 2 * np.arange(len(words)))
    return np.where(np.repeat(whole, last - first + 1), np.repeat(owner, last - first + 1), by_token)


def _picked(text: TokenizedText, tokens: npt.NDArray[Any]) -> TokenizedText:
    """The text with these of its tokens alone."""

    def pick(array: Any) -> Any:
        return None if array is None else array[tokens]

    return TokenizedText(
        text.input_ids[tokens],
        special=pick(text.special),
        token_type_ids=pick(text.token_type_ids),
        word_ids=pick(text.word_ids),
        num_words=text.num_words,
    )


def _kept(sequence_ids: Int32Array, max_length: int) -> BoolArray:
    """[L] the tokens that truncation keeps: special ones, and the text's first.

    Of a pair both keep half of the room, and more where the other needs less: transformers' "longest_first".

    Args:
        sequence_ids: [L] which text of the pair a token belongs to, -1 for special tokens.
        max_length: how many tokens are kept, fewer than L.
    """
    first, second = (np.flatnonzero(sequence_ids == text) for text in (0, 1))
    room = max_length - np.count_nonzero(sequence_ids < 0)
    shorter = min(len(first), len(second), room // 2)
    kept = sequence_ids < 0
    kept[first[: shorter if len(first) <= len(second) else room - shorter]] = True
    kept[second[: shorter if len(first) > len(second) else room - shorter]] = True
    return kept


def _parts(text: Any, place: int) -> list[Any]:
    """A text as its one or two parts, strings or lists of strings."""
    if type(text) is str and text.isascii():  # nearly all are: the rest costs microseconds
        return [text]
    parts = list(text) if isinstance(text, tuple) else [text]
    lists = [isinstance(part, list) for part in parts]
    strings = [string for part in parts for string in (part if isinstance(part, list) else [part])]
    well_formed = all(isinstance(string, str) for string in strings) and len(set(lists)) == 1
    if not well_formed or (isinstance(text, tuple) and len(parts) != 2):
        raise EncoderError(
            f"text {place} is {shortened(text)} ({type(text).__name__}): a text is a string, a list of words, or a "
            "tuple of two of either",
            records=(place,),
        )
    if not all(map(_is_unicode, strings)):
        raise EncoderError(
            f"text {place} holds half of a surrogate pair, which is no character: {shortened(text)}; "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') replaces it",
            records=(place,),
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
