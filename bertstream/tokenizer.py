"""Texts -> token ids, in chunks, in whatever process asks.

The Rust tokenizer is kept as its JSON and built on first use in each process: one that was used before a fork hangs or
loses its threads in the child.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from torch.utils.data import get_worker_info

from .errors import ConfigError, EncoderError
from .types import Int32Array, Text, TokenBatch, TokenizedText

Overflow: TypeAlias = Literal["error", "truncate"]

_IMPORTED_IN = os.getpid()


class TextTokenizer:
    """Texts to token ids, special tokens included; light, and safe to send to worker processes.

    Args:
        tokenizer: a transformers tokenizer that is backed by the `tokenizers` library. It is read, never changed.
        max_length: tokens of the longest text the model takes, special tokens included.
        overflow: what to do with a longer text: "error" raises, "truncate" drops its end and counts what it dropped.
    Raises:
        ConfigError: the tokenizer has no Rust backend, or an argument is out of range.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, overflow: Overflow = "error") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"{type(tokenizer).__name__} is not backed by the tokenizers library: pass a fast tokenizer "
                "(AutoTokenizer gives one for every BERT family)"
            )
        if overflow not in ("error", "truncate"):
            raise ConfigError(f"overflow={overflow!r}: write 'error' or 'truncate'")
        least = max(1, backend.num_special_tokens_to_add(is_pair=True))
        if max_length < least:
            raise ConfigError(f"max_length={max_length}: the special tokens of a pair of texts alone take {least}")
        self.max_length = max_length
        self.overflow = overflow
        # Such a tokenizer knows that a word begins by the blank before it: without one, a list's words would be glued.
        self._blank_before_words = "ByteLevel(add_prefix_space=False" in repr(backend.pre_tokenizer)
        self._json: str = backend.to_str()
        self._built: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_built": None}

    def __repr__(self) -> str:
        return f"TextTokenizer(max_length={self.max_length}, overflow={self.overflow!r})"

    def __call__(self, texts: Sequence[Text]) -> list[TokenizedText]:
        """Tokenize a chunk of texts.

        Args:
            texts: strings, lists of words, or pairs of strings as tuples; the kinds may be mixed.
        Returns:
            One `TokenizedText` a text, in order.
        Raises:
            EncoderError: a text is of another type, or too long where overflow is "error"; `.records` names it.
            ConfigError: `texts` is one string.
        """
        if isinstance(texts, str):
            raise ConfigError(f"texts={_shortened(texts)}, one string: pass a list of texts, [text] for a single one")
        backend = self._backend()
        kinds = [_kind(text, i) for i, text in enumerate(texts)]
        out: list[TokenizedText | None] = [None] * len(texts)
        for kind in set(kinds):
            places = [i for i, other in enumerate(kinds) if other == kind]
            if kind == "words":
                words = [self._marked(list(texts[i])) for i in places]
                encodings = backend.encode_batch(words, is_pretokenized=True)
            else:
                # It keeps no offsets and no words, and takes a seventh less time.
                encodings = backend.encode_batch_fast([texts[i] for i in places])
            for i, encoding in zip(places, encodings, strict=True):
                out[i] = self._text(encoding, kind, texts[i], i)
        return out  # type: ignore[return-value]  # every kind has filled its places

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

    def _marked(self, words: list[str]) -> list[str]:
        if not self._blank_before_words:
            return words
        return [f" {word}" if word and word[0] != " " else word for word in words]

    def _text(self, encoding: Any, kind: str, text: Text, place: int) -> TokenizedText:
        out = TokenizedText(
            np.array(encoding.ids, np.int32),
            token_type_ids=np.array(encoding.type_ids, np.int32) if kind == "pair" else None,
            word_ids=_or_minus_one(encoding.word_ids) if kind == "words" else None,
            num_words=len(text) if kind == "words" else 0,
        )
        length = len(out.input_ids)
        if length > self.max_length:
            if self.overflow == "error":
                raise EncoderError(
                    f"text {place} has {length} tokens, the model takes {self.max_length}: {_shortened(text)}; "
                    "overflow='truncate' cuts such texts and counts what it cut",
                    records=(place,),
                )
            kept = _kept(_or_minus_one(encoding.sequence_ids), self.max_length)
            out.input_ids = out.input_ids[kept]
            out.token_type_ids = None if out.token_type_ids is None else out.token_type_ids[kept]
            out.word_ids = None if out.word_ids is None else out.word_ids[kept]
            out.cut_tokens = length - self.max_length
        return out


def _kept(sequence_ids: Int32Array, max_length: int) -> npt.NDArray[np.bool_]:
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


def _kind(text: Any, place: int) -> str:
    parts = list(text) if isinstance(text, (list, tuple)) else [text]
    if not all(isinstance(part, str) for part in parts) or (isinstance(text, tuple) and len(parts) != 2):
        raise EncoderError(
            f"text {place} is {_shortened(text)}, a {type(text).__name__}: a text is a string, a list of words, or a "
            "tuple of two strings",
            records=(place,),
        )
    if not all(map(_is_unicode, parts)):
        raise EncoderError(
            f"text {place} holds half of a surrogate pair, which is no character: {_shortened(text)}; "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') replaces it",
            records=(place,),
        )
    return "words" if isinstance(text, list) else "pair" if isinstance(text, tuple) else "text"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _or_minus_one(ids: list[int | None]) -> Int32Array:
    return np.array([-1 if i is None else i for i in ids], np.int32)


def _shortened(text: Any) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."
