"""A tokenizer of the tokenizers library: built once in each process, asked for as few words as possible.

It is kept as JSON and built on first use in each process: one that was used before a fork hangs, or loses its threads,
in the child.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from torch.utils.data import get_worker_info

from .frame import Frame, Framed
from .word_cache import WholeTexts, WordCache, WordCount
from .word_cuts import Cut, NoCutError, find_cut
from .words import AddedTokens, find_blanks

logger = logging.getLogger(__name__)

_IMPORTED_IN = os.getpid()


class TokenizersBackend:
    """The `Backend` of a tokenizer of the tokenizers library.

    Args:
        tokenizer: a transformers tokenizer that is backed by that library. It is read, never changed.
        word_cache: bytes in each process for the ids of words; 0 keeps none.
    """

    takes_texts = True

    def __init__(self, tokenizer: Any, word_cache: int) -> None:
        backend = tokenizer.backend_tokenizer
        self.splits_special = bool(getattr(tokenizer, "split_special_tokens", backend.encode_special_tokens))
        self.blanks = find_blanks(backend)
        self.special_of_pair: int = backend.num_special_tokens_to_add(is_pair=True)
        self.content: str = backend.to_str()
        self._word_cache = word_cache
        self._cut = _cut_of(backend, self.content) if word_cache else None
        self._added: AddedTokens | None = None
        self._built: _Built | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_built": None, "_added": None}

    @property
    def word_count(self) -> WordCount:
        """As `Backend.word_count`."""
        return WordCount() if self._built is None or self._built.process != os.getpid() else self._built.ids.count

    def framed(self, parts: Sequence[Any], texts: int, in_words: bool) -> Framed:
        """As `Backend.framed`."""
        built = self._build()
        if built.frame is None:
            return self.encoded(parts, texts, in_words)[1]
        if in_words:
            return built.frame.lists(built.ids.lists(parts), texts)
        return built.frame.texts(built.ids.texts(parts), texts)

    def encoded(self, parts: Sequence[Any], texts: int, in_words: bool) -> tuple[list[Any], Framed]:
        """The library's own encodings, which have offsets, and the same as arrays; arguments as for `framed`."""
        inputs = [tuple(parts[i : i + texts]) for i in range(0, len(parts), texts)]
        encodings = self._build().backend.encode_batch([one if texts == 2 else one[0] for one in inputs], in_words)
        return encodings, Framed.of(encodings, [[len(part) for part in one] if in_words else [] for one in inputs])

    def token(self, number: int) -> str:
        """The string of a token, such as "[CLS]"; "" if there is no token of this number."""
        return self._build().backend.id_to_token(number) or ""

    def ids(self, text: str) -> list[int]:
        """As `Backend.ids`."""
        ids: list[int] = self._build().backend.encode(text).ids
        return ids

    def with_blanks(self, words: list[str]) -> list[str]:
        """As `Backend.with_blanks`."""
        if not self.blanks.others:
            return words
        backend = self._build().backend
        if self._added is None or self._added.backend is not backend:
            self._added = AddedTokens(backend)
        return self.blanks.put(words, self._added.begin)

    def _build(self) -> _Built:
        if self._built is None or self._built.process != os.getpid():
            from tokenizers import Tokenizer

            if get_worker_info() is not None or os.getpid() != _IMPORTED_IN:
                # A forked process does not have its parent's Rust threads: with "true" it would wait for them forever.
                # And a DataLoader worker's siblings use the other cores.
                os.environ["TOKENIZERS_PARALLELISM"] = "false"
            backend = Tokenizer.from_str(self.content)
            backend.no_padding()
            backend.no_truncation()
            backend.encode_special_tokens = self.splits_special
            ids = WholeTexts(backend) if self._cut is None else WordCache(backend, self._cut, self._word_cache)
            self._built = _Built(os.getpid(), backend, Frame.find(backend), ids)
        return self._built


class _Built(NamedTuple):
    """What each process makes for itself.

    Attributes:
        process: its id.
        backend: the tokenizer, without truncation and padding.
        frame: its special tokens around texts; None if the library puts them there itself.
        ids: gives ids without them.
    """

    process: int
    backend: Any
    frame: Frame | None
    ids: WordCache | WholeTexts


def _cut_of(backend: Any, content: str) -> Cut | None:
    """The cut of a tokenizer, found once a process; None, and a line in the log, if it has none."""
    key = blake2b(content.encode()).digest()
    if key not in _CUTS:
        _CUTS[key] = _found_cut(backend, content)
    return _CUTS[key]


_CUTS: dict[bytes, Cut | None] = {}
"""Small, and as many as a process has tokenizers."""


def _found_cut(backend: Any, content: str) -> Cut | None:
    if backend.truncation is not None or backend.padding is not None:
        backend = type(backend).from_str(content)
        backend.no_truncation()
        backend.no_padding()
    try:
        return find_cut(backend, content)
    except NoCutError as reason:
        logger.info("no word cache, the tokenizer gets every text whole: %s", reason)
        return None
