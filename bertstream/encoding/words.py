"""Blanks before the words of a list, so that it gives the tokens of the running text whatever the tokenizer is."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

_ADDS_BLANKS = re.compile(r"ByteLevel\(add_prefix_space=False|prepend_scheme=never")
"""Pre-tokenizers that could add the blanks but do not. Made for words, transformers has them add one before the first
word too."""

_SAMPLES = (
    ("the", "river", "did", "not", "rise"),
    ("deux", "grands", "ponts"),
    ("hundert", "alte", "Uhren"),
    ("in", "1999", "or", "2024"),
    ("мост", "через", "реку"),
    ("ποτάμι", "και", "γη"),
    ("נהר", "גדול"),
    ("نهر", "كبير"),
    ("नदी", "का"),
    ("강", "위의", "다리"),
    ("東京", "夜"),
)
_SAMPLE_TOKENS = 64  # no sample has more


class Blanks(NamedTuple):
    """Which words of a list get a blank before them.

    Attributes:
        first: the first word.
        others: all other words.
        unlike: a sample text whose tokens a list of its words does not give, if most samples are like that; else "".
        news: how these blanks differ from those of version 0.1.0; empty if they do not.
    """

    first: bool = False
    others: bool = False
    unlike: str = ""
    news: tuple[str, ...] = ()

    def put(self, words: Sequence[str], is_added: Callable[[str], bool] = lambda word: False) -> list[str]:
        """The words with their blanks; empty words and those that begin with a blank stay as they are.

        Args:
            words: the whole list, because its first word may differ.
            is_added: whether a word begins with an added token, which takes no blank: it would be a token of its own.
        """
        if not self.others:
            return list(words)
        out = [f" {word}" if word and word[0] != " " and not is_added(word) else word for word in words]
        if not self.first:
            out[:1] = words[:1]
        return out


def find_blanks(backend: Any) -> Blanks:
    """Find by trying which words need a blank: a list of words should have the tokens of the running text.

    The mark of a blank may come from a pre-tokenizer (RoBERTa, SentencePiece), a normalizer (Gemma) or the model, or
    there is none (WordPiece).

    Args:
        backend: a tokenizer of the tokenizers library. It is read, never changed.
    """
    if (backend.truncation or {}).get("max_length", _SAMPLE_TOKENS) < _SAMPLE_TOKENS:
        backend = type(backend).from_str(backend.to_str())
        backend.no_truncation()
    adds_blanks = _ADDS_BLANKS.search(repr(backend.pre_tokenizer)) is not None
    before = Blanks(adds_blanks, adds_blanks)  # as in 0.1.0, which judged by the name alone; it wins if both are right
    other = Blanks() if adds_blanks else Blanks(others=True)
    found = better_blanks(
        (before, other),
        of_text=lambda text: backend.encode(text, add_special_tokens=False).ids,
        of_words=lambda words: backend.encode(words, is_pretokenized=True, add_special_tokens=False).ids,
    )
    news = [] if found._replace(unlike="") == before else ["found by trying"]
    if found.others and any(_is_odd(token, backend) for token in backend.get_added_tokens_decoder().values()):
        news.append("added tokens as they match")
    return found._replace(news=tuple(news))


def better_blanks(
    ways: Sequence[Blanks], of_text: Callable[[str], list[Any]], of_words: Callable[[list[str]], list[Any]]
) -> Blanks:
    """The way in which more samples have the tokens of the running text, the first of equals.

    Args:
        ways: to put blanks before words.
        of_text: gives the tokens of a string, without special ones.
        of_words: gives those of a list of words, which have their blanks.
    """

    def is_like_text(way: Blanks, words: Sequence[str]) -> bool:
        text = " ".join(["", *words] if way.first else words)
        return of_words(way.put(words)) == of_text(text)

    wrong = {way: [words for words in _SAMPLES if not is_like_text(way, words)] for way in ways}
    found = min(wrong, key=lambda way: len(wrong[way]))
    return found._replace(unlike=" ".join(wrong[found][0]) if 2 * len(wrong[found]) > len(_SAMPLES) else "")


def _is_odd(token: Any, backend: Any) -> bool:
    """Whether words that begin like the added token may not hold it, or hold it and begin otherwise."""
    if token.single_word or not token.normalized or backend.normalizer is None:
        return bool(token.single_word)
    return bool(backend.normalizer.normalize_str(token.content) != token.content)


class AddedTokens:
    """The added tokens of a tokenizer, found at the beginning of words as the tokenizer finds them.

    Their own rules decide (`single_word`, `normalized`), not their spelling alone.

    Args:
        backend: a tokenizer of the tokenizers library.
    Attributes:
        backend: the same.
        begin: whether an added token is at the beginning of a word.
    """

    def __init__(self, backend: Any) -> None:
        from tokenizers import models

        self.backend = backend
        # A model without a vocabulary has no other tokens.
        alone = self._alone = type(backend)(models.BPE())
        if backend.normalizer is not None:
            alone.normalizer = backend.normalizer
        tokens = list(backend.get_added_tokens_decoder().values())
        alone.add_special_tokens([token for token in tokens if token.special])
        alone.add_tokens([token for token in tokens if not token.special])
        alone.encode_special_tokens = backend.encode_special_tokens
        self.begin: Callable[[str], bool] = lru_cache(1 << 16)(self._begin)

    def _begin(self, word: str) -> bool:
        offsets = self._alone.encode(word, add_special_tokens=False).offsets
        return bool(offsets) and offsets[0][0] == 0
