"""From token vectors to the rows that were asked for: tokens, words or sentences."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..embeddings import Embeddings
from ..errors import EncoderError
from ..tokens import BoolArray, Int32Array, TokenBatch, cumulate, steps
from .forward import BatchedForward
from .pooling import SentencePooling, WordPooling, combine_layers, pool_runs
from .spans import SpanFinder


class RowForward(BatchedForward):
    """A `BatchedForward` that gives `Embeddings`: what an encoder and the upper half of a split one share."""

    def row_counts(self, batch: TokenBatch) -> Int32Array:
        """[B] int32, how many rows `encode` returns for each text."""
        if self.output == "sentence":
            return np.ones(len(batch), np.int32)
        if self.output == "words":
            return batch.num_words
        kept = self._kept(batch)
        return batch.lengths if kept is None else _count_by_text(kept, batch)

    def assemble(self, values: Tensor, batch: TokenBatch) -> Embeddings:
        """Build `Embeddings` from a batch's rows, which may come from a cache.

        Args:
            values: [N, ...] as many rows of `row_shape` as `row_counts` counts, in the order of the batch; on `device`,
                in `output_dtype`. They are not copied.
            batch: the texts.
        """
        tokenizer = getattr(self, "tokenizer", None)  # an upper half has none
        lengths = self.row_counts(batch)
        word_ids, present = None, None
        if self.output == "words":
            word_ids = steps(lengths).astype(np.int32)
            if batch.words_cut is not None:
                word_ids[batch.words_cut] = -1
            present = self._to_device(_tokens_of_words(batch)[1] > 0)
        elif self.output == "tokens" and batch.word_ids is not None:
            kept = self._kept(batch)
            word_ids = batch.word_ids if kept is None else batch.word_ids[kept]
        return Embeddings(
            values=values,
            cu_seqlens=self._to_device(cumulate(lengths)),
            lengths=torch.from_numpy(lengths.astype(np.int64)),
            tokens=batch,
            output=self.output,
            word_ids=word_ids,
            present=present,
            layers=self.layers,
            finder=None if tokenizer is None else SpanFinder(tokenizer),
        )

    def _vectors(
        self, batch: TokenBatch, given: Tensor | None = None, max_forward_tokens: int | None = None
    ) -> Embeddings:
        """A batch's vectors in the caller's modes; an upper half computes them from given rows [N, H], one a token."""
        with self._weights():
            layers = self._token_vectors(batch, given, max_forward_tokens)
            if self.output == "words":
                values = self._words(layers, batch)
            elif self.output == "sentence":
                values = self._sentences(layers, batch)
            else:
                values = self._tokens(layers, batch)
            return self.assemble(values.to(self.output_dtype), batch)

    def _kept(self, batch: TokenBatch) -> BoolArray | None:
        """[N] the tokens whose vectors count; None for all."""
        if self.spec.every_window:
            return None
        if self.special_tokens or batch.special is None:
            return batch.owned
        return ~batch.special if batch.owned is None else batch.owned & ~batch.special

    def _tokens(self, layers: list[Tensor], batch: TokenBatch) -> Tensor:
        kept = self._kept(batch)
        values = combine_layers(layers, self.combine)
        return values if kept is None else self._pick(values, kept)

    def _words(self, layers: list[Tensor], batch: TokenBatch) -> Tensor:
        """A word's tokens are neighbours, so each word is a run of rows, found by index arithmetic on the host."""
        kept, counts = _tokens_of_words(batch)
        values = self._pick(combine_layers(layers, self.combine), kept)
        return pool_runs(values, self._to_device(cumulate(counts)), cast(WordPooling, self.pooling[0]))

    def _sentences(self, layers: list[Tensor], batch: TokenBatch) -> Tensor:
        values = combine_layers(layers, self.combine)
        rows, offsets = self._runs(values, self._kept(batch), batch)
        skipped = None if batch.owned is None else self._to_device(_skipped(batch.owned, batch))
        parts = []
        for how in self.pooling:
            if how == "pooler":
                first = pool_runs(values, self._to_device(batch.cu_seqlens), "first")
                parts.append(self._pooler(first, batch.lengths))
            elif how == "cls":  # the first token, even where special tokens do not count
                parts.append(pool_runs(*self._runs(values, batch.owned, batch), "first"))
            else:
                parts.append(pool_runs(rows, offsets, cast(SentencePooling, how), skipped))
        vectors = parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts], -1)
        if self.spec.head:
            head: Any = self.model.sentence_head
            vectors = head(vectors.to(next(head.parameters()).dtype))
            vectors = vectors.masked_fill(self._to_device(batch.lengths == 0)[:, None], 0)  # or it would be the bias
        return F.normalize(vectors.float(), dim=-1) if self.normalize else vectors

    def _runs(self, values: Tensor, kept: BoolArray | None, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """The rows of these tokens [n], and where those of each text begin [B + 1], on the device."""
        lengths = batch.lengths if kept is None else _count_by_text(kept, batch)
        return values if kept is None else self._pick(values, kept), self._to_device(cumulate(lengths))

    def _pooler(self, first: Tensor, lengths: Int32Array) -> Tensor:
        model: Any = self.model
        if hasattr(model, "pooler_activation"):  # albert's is a separate module
            pooled: Tensor = model.pooler_activation(model.pooler(first))
        else:
            pooled = model.pooler(first[:, None])
        if lengths.all():
            return pooled
        return pooled.masked_fill(self._to_device(lengths == 0)[:, None], 0)  # without tokens it would be the bias

    def _pick(self, values: Tensor, kept: BoolArray) -> Tensor:
        return values if kept.all() else values.index_select(0, self._to_device(np.flatnonzero(kept)))

    def _check_marks(self, batch: TokenBatch) -> None:
        """Refuse a batch that does not say which tokens are special, or which word each is of, where that matters."""
        if not self.special_tokens and batch.special is None and batch.num_tokens:
            raise EncoderError(
                "special_tokens=False needs texts, or tokens of this encoder's own tokenizer: in ids that came padded, "
                "special tokens cannot be told apart"
            )
        if self.output == "words":
            of_no_word = batch.word_of_token < 0
            if batch.special is not None:
                of_no_word &= ~batch.special
            texts = np.flatnonzero(_count_by_text(of_no_word, batch))
            if len(texts):
                raise EncoderError(
                    "word vectors need texts as lists of words, or strings tokenized by this encoder's own tokenizer; "
                    f"text {texts[0]} has tokens that belong to no word",
                    records=texts.tolist(),
                )


def check_segments(batch: TokenBatch, config: Any) -> None:
    """Refuse segment ids that the model has no embedding of.

    Raises:
        EncoderError: naming the texts.
    """
    known = getattr(config, "type_vocab_size", None)
    if batch.token_type_ids is None or not known or not batch.num_tokens or batch.token_type_ids.max() < known:
        return
    texts = np.flatnonzero(_count_by_text(batch.token_type_ids >= known, batch))
    raise EncoderError(
        f"text {texts[0]} has the segment id {batch.token_type_ids.max()}, the model knows 0 to {known - 1} "
        f"(type_vocab_size={known}): this tokenizer marks the second text of a pair, and the model was trained without "
        "such marks; use the model's own tokenizer",
        records=texts.tolist(),
    )


def _tokens_of_words(batch: TokenBatch) -> tuple[BoolArray, Any]:
    """[N] the tokens that belong to a word, and [sum of num_words] how many each word has."""
    word_ids = batch.word_of_token
    kept = word_ids >= 0 if batch.owned is None else (word_ids >= 0) & batch.owned
    starts = cumulate(batch.num_words)
    texts = np.repeat(np.arange(len(batch)), batch.lengths)
    words = (word_ids + starts[:-1][texts])[kept]
    return kept, np.bincount(words, minlength=starts[-1])


def _skipped(owned: BoolArray, batch: TokenBatch) -> Int32Array:
    """[B] how many tokens of each text come before the first whose vector is used: those of a prompt."""
    used = np.append(np.flatnonzero(owned), batch.num_tokens)
    first = used[np.searchsorted(used, batch.cu_seqlens[:-1])]
    return np.asarray(np.minimum(first, batch.cu_seqlens[1:]) - batch.cu_seqlens[:-1], np.int32)


def _count_by_text(kept: BoolArray, batch: TokenBatch) -> Int32Array:
    return np.diff(cumulate(kept)[batch.cu_seqlens])
