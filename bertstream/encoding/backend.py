"""What a `TextTokenizer` asks of a tokenizer, and which kind of it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..errors import ConfigError
from .frame import Framed
from .python_backend import PythonBackend
from .tokenizers_backend import TokenizersBackend
from .word_cache import WordCount
from .words import Blanks


class Backend(Protocol):
    """A tokenizer without limit of length, the same in every process; light, and safe to send to workers.

    Attributes:
        takes_texts: whether there is a tokenizer at all.
        splits_special: whether special tokens that are written out in a text are taken for text.
        blanks: which words of a list get a blank before them.
        special_of_pair: how many special tokens a pair gets.
    """

    takes_texts: bool
    splits_special: bool
    blanks: Blanks
    special_of_pair: int

    @property
    def content(self) -> str:
        """All that its tokens depend on, apart from the attributes."""

    @property
    def word_count(self) -> WordCount:
        """How many words were looked up in this process so far, and how many of them were found."""

    def framed(self, parts: Sequence[Any], texts: int, in_words: bool) -> Framed:
        """Strings, or lists of words, or pairs of either, with their special tokens.

        Args:
            parts: of B texts; of 2 B for pairs, each pair's one after the other.
            texts: 1, or 2 for pairs.
            in_words: whether they are lists.
        Raises:
            EncoderError: a text cannot be tokenized; `.records` is its number, from 0 to B - 1.
            ConfigError: there is no tokenizer.
        """

    def ids(self, text: str) -> list[int]:
        """The ids of one string, with its special tokens."""

    def with_blanks(self, words: list[str]) -> list[str]:
        """A list of words with the blanks that give it the tokens of the running text."""


def find_backend(tokenizer: Any, word_cache: int) -> Backend:
    """The backend of a transformers tokenizer.

    Args:
        tokenizer: backed by the tokenizers library, or written in Python; None for ids alone.
        word_cache: bytes in each process for the ids of words; 0 keeps none.
    Raises:
        ConfigError: it is no tokenizer of texts.
    """
    if tokenizer is None:
        return NoBackend()
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        return TokenizersBackend(tokenizer, word_cache)
    return PythonBackend(tokenizer)


class NoBackend:
    """Takes the place of a tokenizer where there is none: an encoder of ids alone."""

    takes_texts = splits_special = False
    blanks = Blanks()
    special_of_pair = 0
    content = "no tokenizer"
    word_count = WordCount()

    def framed(self, parts: Sequence[Any], texts: int, in_words: bool) -> Framed:
        """Refuse a text.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "this encoder was made without a tokenizer and takes ids alone: pass padded ids with their attention_mask, "
            "or a TokenBatch; or make it with its model's tokenizer, Encoder(model, tokenizer)"
        )

    def ids(self, text: str) -> list[int]:
        """As `framed`."""
        raise AssertionError("there is no prompt without a tokenizer")

    def with_blanks(self, words: list[str]) -> list[str]:
        """The words."""
        return words
