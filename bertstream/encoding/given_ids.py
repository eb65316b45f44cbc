"""Texts that come as ids: checked, and completed to what the tokenizer would have made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import EncoderError
from ..tokens import BoolArray, Int32Array, Text, TokenBatch, TokenizedText, cumulate


class GivenIds:
    """Ids that a tokenizer may have made, and how they are checked.

    Args:
        tokenize: texts as one batch, none of them cut; None if there is no tokenizer, so that nothing is known of them.
        padding: id and name of the token that fills texts up to one length; None if there is none.
    """

    def __init__(
        self, tokenize: Callable[[Sequence[Text]], TokenBatch] | None, padding: tuple[int, str] | None = None
    ) -> None:
        self._framing: Int32Array | None = None
        self._padding: tuple[int, str] | None = None
        self._least = 1
        self._of_prompt = 0
        if tokenize is not None:
            example = tokenize(["", "a", ("a", "a")])
            special = np.zeros(example.num_tokens, np.bool_) if example.special is None else example.special
            self._framing = np.unique(example.input_ids[special])
            self._least = int(example.lengths[0])
            self._of_prompt = int((~special[: self._least]).sum())
            if padding is not None and special[: self._least].any() and padding[0] not in self._framing:
                self._padding = padding

    def batch(
        self, texts: Sequence[TokenizedText] | TokenBatch, vocab_size: int | None, *, in_words: bool
    ) -> TokenBatch:
        """Texts that are ids, of any length, as one batch.

        Args:
            texts: where one does not say which of its tokens are special, those that frame texts are, by their ids.
                A batch may be changed.
            vocab_size: ids that the model knows; None checks only that they are not negative.
            in_words: whether each token, but those of the prompt, is needed with its word.
        Raises:
            EncoderError: a text has an unknown id, padding, no ids, or no words; `.records` names all of these.
        """
        if isinstance(texts, TokenBatch):
            tokens, said = texts, [texts.special is not None]
        else:
            tokens, said = TokenBatch.from_texts(texts), [text.special is not None for text in texts]
        if self._least and (lacking := np.flatnonzero(tokens.lengths == 0)).size:
            raise EncoderError(
                "the list of ids is empty: special tokens belong to the ids, also to those of an empty text",
                records=lacking.tolist(),
            )
        ids = tokens.input_ids
        unknown = ids < 0 if vocab_size is None else (ids < 0) | (ids >= vocab_size)
        if unknown.any():
            known = "ids begin at 0" if vocab_size is None else f"the model knows 0 to {vocab_size - 1}"
            raise EncoderError(f"the token id {ids[unknown][0]}: {known}", records=_texts_with(unknown, tokens))
        self._check_padding(tokens, said)
        if not all(said) and self._framing is None:
            tokens.special = None
        elif not all(said):
            found = self.special_among(ids)
            if tokens.special is not None and any(said):
                found = np.where(np.repeat(said, tokens.lengths), tokens.special, found)
            tokens.special = found
        if in_words:
            loose = np.ones(len(ids), np.bool_) if tokens.word_ids is None else tokens.word_ids < 0
            if tokens.special is not None:
                loose &= ~tokens.special
            loose &= np.repeat(np.diff(cumulate(loose)[tokens.cu_seqlens]) > self._of_prompt, tokens.lengths)
            if loose.any():
                raise EncoderError(
                    f"the token id {ids[loose][self._of_prompt]} is of no word: word vectors need word_ids beside the "
                    "ids, as bertstream.tokenize writes them for an encoder of word vectors",
                    records=_texts_with(loose, tokens),
                )
        return tokens

    def _check_padding(self, tokens: TokenBatch, said: Sequence[bool]) -> None:
        """Refuse texts that begin or end with padding, which their framing tokens would be around.

        Args:
            tokens: none is empty where an empty text has framing tokens.
            said: of each text, or of all, whether it is known which tokens are special: one that is not is no padding.
        """
        if self._padding is None or not len(tokens):
            return
        number, name = self._padding
        padding = tokens.input_ids == number
        if tokens.special is not None:
            padding &= tokens.special | ~np.repeat(np.broadcast_to(said, len(tokens)), tokens.lengths)
        ends, starts = padding[tokens.cu_seqlens[1:] - 1], padding[tokens.cu_seqlens[:-1]]
        if not (wrong := np.flatnonzero(ends | starts)).size:
            return
        first = wrong[0]
        others = np.flatnonzero(~padding[slice(*tokens.cu_seqlens[first : first + 2])])
        length = int(tokens.lengths[first])
        if not len(others):
            seen = f"are {length}"
        else:
            seen = f"end with {length - 1 - others[-1]}" if ends[first] else f"begin with {others[0]}"
        raise EncoderError(
            f"the ids {seen} of the padding token {name} ({number}): put attention_mask beside them, or remove the "
            "padding",
            records=wrong.tolist(),
        )

    def special_among(self, ids: Int32Array) -> BoolArray:
        """[N] which of these ids are of tokens that frame texts; there is a tokenizer."""
        assert self._framing is not None
        found = np.zeros(len(ids), np.bool_)
        for number in self._framing:  # two or three: faster than `np.isin`
            found |= ids == number
        return found


def _texts_with(tokens: BoolArray, batch: TokenBatch) -> list[int]:
    found = np.searchsorted(batch.cu_seqlens, np.flatnonzero(tokens), "right") - 1
    return [int(text) for text in np.unique(found)]


def sequence_ids_of(text: TokenBatch) -> Int32Array:
    """[N] int32, which text of a pair each token is of, -1 for special tokens around them.

    The second text begins after the first special tokens that have others on both sides.

    Args:
        text: one text or pair.
    """
    out = np.full(text.num_tokens, -1, np.int32)
    content = np.arange(text.num_tokens) if text.special is None else np.flatnonzero(~text.special)
    for number, part in enumerate(np.split(content, np.flatnonzero(np.diff(content) > 1)[:1] + 1)):
        if len(part):
            out[part[0] : part[-1] + 1] = number
    return out
