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
    """What a `TextTokenizer` asks of a tokenizer of the tokenizers library; light, and safe to send to workers.

    Args:
        tokenizer: a transformers tokenizer that is backed by that library. It is read, never changed.
        word_cache: bytes in each process for the ids of words; 0 keeps none.
    Attributes:
        content: all that its tokens depend on, apart from `splits_special` and `blanks`.
        splits_special: whether special tokens that are written out in a text are taken for text.
        blanks: which words of a list get a blank before them.
        special_of_pair: how many special tokens a pair gets.
    """

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
        """How many words were looked up in this process so far, and how many of them were found."""
        return WordCount() if self._built is None or self._built.process != os.getpid() else self._built.ids.count

    def framed(self, parts: Sequence[Any], texts: int, in_words: bool) -> Framed:
        """Strings, or lists of words, or pairs of either, with their special tokens.

        Args:
            parts: of B texts; of 2 B for pairs, each pair's one after the other.
            texts: 1, or 2 for pairs.
            in_words: whether they are lists.
        """
        built = self._build()
        if built.frame is not None:
            if in_words:
                return built.frame.lists(built.ids.lists(parts), texts)
            return built.frame.texts(built.ids.texts(parts), texts)
        inputs = [tuple(parts[i : i + texts]) for i in range(0, len(parts), texts)]
        encodings = built.backend.encode_batch([one if texts == 2 else one[0] for one in inputs], in_words)
        return Framed.of(encodings, [[len(part) for part in one] if in_words else [] for one in inputs])

    def ids(self, text: str) -> list[int]:
        """The ids of one string, with its special tokens."""
        ids: list[int] = self._build().backend.encode(text).ids
        return ids

    def with_blanks(self, words: list[str]) -> list[str]:
        """A list of words with the blanks that give it the tokens of the running text."""
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
