"""Texts -> token ids, in chunks, in whatever process asks.

The Rust tokenizer is kept as its JSON and built on first use in each process: one that was used before a fork hangs or
loses its threads in the child.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from torch.utils.data import get_worker_info

from .errors import ConfigError, EncoderError
from .types import Text, TokenBatch, TokenizedText

Overflow: TypeAlias = Literal["error", "truncate"]


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
        if max_length < 1:
            raise ConfigError(f"max_length={max_length}: a text needs room for at least one token")
        self.max_length = max_length
        self.overflow = overflow
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
        """
        backend = self._backend()
        kinds = [_kind(text, i) for i, text in enumerate(texts)]
        out: list[TokenizedText | None] = [None] * len(texts)
        for kind in set(kinds):
            places = [i for i, other in enumerate(kinds) if other == kind]
            encodings = backend.encode_batch([texts[i] for i in places], is_pretokenized=kind == "words")
            for i, encoding in zip(places, encodings, strict=True):
                out[i] = self._text(encoding, kind, texts[i], i)
        return out  # type: ignore[return-value]  # every kind has filled its places

    def batch(self, texts: Sequence[Text]) -> TokenBatch:
        """Tokenize texts into one batch, in their order."""
        return TokenBatch.from_texts(self(texts))

    def _backend(self) -> Any:
        if self._built is None or self._built[0] != os.getpid():
            from tokenizers import Tokenizer

            if get_worker_info() is not None:
                # This process is a DataLoader worker's own, and its neighbours use the other cores.
                os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            backend = Tokenizer.from_str(self._json)
            backend.no_padding()
            backend.no_truncation()
            if self.overflow == "truncate":
                backend.enable_truncation(self.max_length)
            self._built = (os.getpid(), backend)
        return self._built[1]

    def _text(self, encoding: Any, kind: str, text: Text, place: int) -> TokenizedText:
        ids = np.array(encoding.ids, np.int32)
        if len(ids) > self.max_length:
            raise EncoderError(
                f"text {place} has {len(ids)} tokens, the model takes {self.max_length}: {_shortened(text)!r}; "
                "overflow='truncate' cuts such texts and counts what it cut",
                records=(place,),
            )
        return TokenizedText(
            ids,
            token_type_ids=np.array(encoding.type_ids, np.int32) if kind == "pair" else None,
            word_ids=_word_ids(encoding) if kind == "words" else None,
            num_words=len(text) if kind == "words" else 0,
            cut_tokens=sum(_content_tokens(part) for part in encoding.overflowing),
        )


def _kind(text: Any, place: int) -> str:
    if isinstance(text, str):
        return "text"
    if isinstance(text, list) and all(isinstance(word, str) for word in text):
        return "words"
    if isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text):
        return "pair"
    raise EncoderError(
        f"text {place} is {_shortened(text)!r}, a {type(text).__name__}: a text is a string, a list of words, or a "
        "tuple of two strings",
        records=(place,),
    )


def _word_ids(encoding: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array([-1 if word is None else word for word in encoding.word_ids], np.int32)


def _content_tokens(encoding: Any) -> int:
    return len(encoding.ids) - sum(encoding.special_tokens_mask)


def _shortened(text: Any) -> str:
    shown = text if isinstance(text, str) else repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."
