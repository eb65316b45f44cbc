"""Token batches through a model in forwards of limited size, and token vectors into the rows that were asked for."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..embeddings import Embeddings, Output
from ..errors import EncoderError
from ..system.cuda import InTurn, to_device
from ..tokens import BoolArray, Indices, Int32Array, TokenBatch, cumulate, rows_of, steps
from .attention import BatchingSupport, Packing, register
from .fingerprint import note_training
from .forward_size import ForwardSize
from .layers import kept_inputs, parameters_by_layer
from .output_spec import OutputSpec
from .pooling import Combine, SentencePooling, WordPooling, combine_layers, pool_runs

logger = logging.getLogger(__name__)


class BatchedForward(nn.Module):
    """The shared part of an encoder and of the upper half of a split one.

    Args:
        model: a transformers encoder of its own structure, over shared parameters.
        spec: the rows to return, with layers counted from 0.
        batching: how texts share a forward of the model.
        num_layers: layers of the whole model, also where `model` was cut off below the last.
        size: how many tokens one forward takes.
    """

    def __init__(
        self, model: nn.Module, spec: OutputSpec, batching: BatchingSupport, num_layers: int, size: ForwardSize
    ) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.batching = batching
        self._num_layers = num_layers
        self._size = size
        self._lock = threading.Lock()
        self._weights_in_turn = InTurn()

    def requires_grad_(self, requires_grad: bool = True) -> BatchedForward:
        """As in torch, for all parameters; caches of other encoders that share them notice the change."""
        note_training(p for p in self.parameters() if requires_grad or p.requires_grad)
        return super().requires_grad_(requires_grad)

    @contextmanager
    def _weights(self) -> Iterator[None]:
        """Hold while reading or changing weights: one thread, ordered across CUDA streams.

        A loader's encoder reads them on its own stream, an optimizer writes them on the training loop's.
        """
        with self._lock, self._weights_in_turn.use(self.device):
            yield

    @property
    def output(self) -> Output:
        """What a row is of: "tokens", "words" or "sentence"."""
        return self.spec.output

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that vectors are made of, counted from 0, the embedding layer."""
        return self.spec.layers

    @property
    def combine(self) -> Combine:
        """How several layers become one row."""
        return self.spec.combine

    @property
    def pooling(self) -> tuple[str, ...]:
        """How tokens become words or sentences; empty for token output."""
        return self.spec.pooling

    @property
    def special_tokens(self) -> bool:
        """Whether special tokens have rows or count in pooling."""
        return self.spec.special_tokens

    @property
    def normalize(self) -> bool:
        """Whether sentence vectors are scaled to length 1."""
        return self.spec.normalize

    @property
    def output_dtype(self) -> torch.dtype:
        """Dtype of the rows."""
        return self.spec.output_dtype

    @property
    def embedding_dim(self) -> int:
        """H, the size of the vectors; the name that `nn.Embedding` uses."""
        return self.spec.embedding_dim(self._hidden_size)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row: (H,), or (K, H) where K layers are stacked."""
        return self.spec.row_shape(self._hidden_size)

    @property
    def device(self) -> torch.device:
        """Device of the forward and of the vectors."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the forward."""
        return next(self.model.parameters()).dtype

    @property
    def max_forward_tokens(self) -> int:
        """Tokens of one forward at most; a longer single text is a forward of its own."""
        return self._size.most(self.device)

    @property
    def default_forward_tokens(self) -> int:
        """The user's `max_forward_tokens`, or the default of the device; never a measured number."""
        return self._size.default(self.device)

    @property
    def _hidden_size(self) -> int:
        return int(cast(Any, self.model.config).hidden_size)

    def parameter_groups(self, lr: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Groups for an optimizer: one for each layer, top first, then the parameters outside the layers.

        The last group holds the embedding layer, parameters that all layers use, and a norm after the top layer
        (modernbert's).

        Give an optimizer all groups from the start: frozen parameters have no gradient, and optimizers skip them.

        Args:
            lr: learning rate of the top layer.
            layer_decay: each layer below learns at this times the rate of the one above.
        """
        groups = self._layer_parameters()
        return [{"params": group, "lr": lr * layer_decay**depth} for depth, group in enumerate(groups)]

    def _layer_parameters(self) -> list[list[nn.Parameter]]:
        return parameters_by_layer(self.model, with_pooler="pooler" in self.pooling)

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

    def _token_vectors(self, batch: TokenBatch, given: Tensor | None, max_forward_tokens: int | None) -> list[Tensor]:
        """[N, H] for each layer of `layers`, in the dtype of the forward, rows in the order of the batch."""
        lengths = batch.lengths if batch.window_lengths is None else batch.window_lengths
        cu_seqlens = cumulate(lengths)
        # Longest first: memory runs out in the first forward or never, and equal lengths are neighbours.
        order = np.argsort(-lengths, kind="stable")
        order = order[lengths[order] > 0]
        forward = self._packed_forward if self.batching.way == "packed" else self._padded_forward
        layers: list[Tensor] = []
        waiting = deque(self._forwards(order, lengths, self._size.most(self.device, max_forward_tokens)))
        while waiting:
            texts = waiting.popleft()
            rows = rows_of(texts, cu_seqlens)
            index = self._to_device(rows)
            parts = None
            try:
                parts = forward(batch, rows, lengths[texts], None if given is None else given.index_select(0, index))
            except torch.OutOfMemoryError:
                if len(texts) == 1:
                    raise
            if parts is None:  # out of the except block, the error no longer holds the forward's tensors
                packed = self.batching.way == "packed"
                self._lower_size(len(rows) if packed else len(texts) * int(lengths[texts].max()))
                waiting.extendleft(np.array_split(texts, 2)[::-1])
                continue
            layers = layers or [part.new_empty(batch.num_tokens, part.shape[1]) for part in parts]
            for layer, part in zip(layers, parts, strict=True):
                layer.index_copy_(0, index, part)
        return layers or [torch.zeros(0, self._hidden_size, dtype=self.dtype, device=self.device) for _ in self.layers]

    def _lower_size(self, tokens: int) -> None:
        """Make later forwards smaller, after one of so many tokens, padding included, ran out of memory."""
        self._size.lower(tokens)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning(
            "a forward of %d tokens ran out of memory on %s and is repeated in halves: max_forward_tokens=%d from now",
            tokens,
            self.device,
            self.max_forward_tokens,
        )

    def _forwards(self, order: Indices, lengths: Int32Array, most: int) -> Iterator[Indices]:
        """Cut texts, longest first, into forwards of at most `most` tokens, padding included where the model pads."""
        start, held = 0, 0
        for end, text in enumerate(order.tolist()):
            longest, length = int(lengths[order[start]]), int(lengths[text])
            cost = length if self.batching.way == "packed" else longest
            odd = self.batching.way == "grouped" and length != longest
            if held and (odd or held + cost > most):
                yield order[start:end]
                start, held, cost = end, 0, length
            held += cost
        if len(order):
            yield order[start:]

    def _packed_forward(
        self, batch: TokenBatch, rows: Any, lengths: Int32Array, given: Tensor | None = None
    ) -> list[Tensor]:
        positions = steps(lengths) + self.batching.first_position
        inputs = {"input_ids": batch.input_ids[rows], "position_ids": positions}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids[rows]
        tensors = {name: self._to_device(ids.astype(np.int64))[None] for name, ids in inputs.items()}
        packing = Packing(lengths, self._to_device(cumulate(lengths)))
        given = None if given is None else given[None]
        return [layer[0] for layer in self._run(given, **tensors, packing=packing)]

    def _padded_forward(
        self, batch: TokenBatch, rows: Any, lengths: Int32Array, given: Tensor | None = None
    ) -> list[Tensor]:
        longest = int(lengths.max())
        slots = np.repeat(np.arange(len(lengths)) * longest, lengths) + steps(lengths)

        def pad(flat: Any, fill: int) -> Tensor:
            out = np.full(len(lengths) * longest, fill, np.int64)
            out[slots] = flat
            return self._to_device(out.reshape(len(lengths), longest))

        inputs = {
            "input_ids": pad(batch.input_ids[rows], getattr(self.model.config, "pad_token_id", None) or 0),
            "attention_mask": pad(np.ones(len(rows), np.int64), 0),
        }
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = pad(batch.token_type_ids[rows], 0)
        index = self._to_device(slots)
        if given is not None:
            padded = given.new_zeros(len(lengths) * longest, given.shape[1])
            given = padded.index_copy(0, index, given).view(len(lengths), longest, -1)
        return [layer.flatten(0, 1).index_select(0, index) for layer in self._run(given, **inputs)]

    def _run(self, given: Tensor | None, **inputs: Any) -> list[Tensor]:
        """The layers of `layers` from one forward, each [texts, T, H]; an upper half starts from `given`."""
        with kept_inputs(self.model, [layer for layer in self.layers if layer < self._num_layers]) as kept:
            out = self.model(**inputs)
        kept[self._num_layers] = out.last_hidden_state
        return [kept[layer] for layer in self.layers]

    def _to_device(self, array: Any) -> Tensor:
        return to_device(array, self.device)

    def _check_marks(self, batch: TokenBatch) -> None:
        """Refuse a batch that does not say which tokens are special, or which word each is of, where that matters."""
        if not self.special_tokens and batch.special is None and batch.num_tokens:
            raise EncoderError(
                "special_tokens=False needs texts, or tokens of this encoder's own tokenizer: in ids that came padded, "
                "special tokens cannot be told apart"
            )
        if self.output == "words":
            of_no_word = _word_ids(batch) < 0
            if batch.special is not None:
                of_no_word &= ~batch.special
            texts = np.flatnonzero(_count_by_text(of_no_word, batch))
            if len(texts):
                raise EncoderError(
                    "word vectors need texts as lists of words, or strings tokenized by this encoder's own tokenizer; "
                    f"text {texts[0]} has tokens that belong to no word",
                    records=texts.tolist(),
                )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_weights_in_turn")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()  # this process may not have made an encoder yet
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._weights_in_turn = InTurn()


def _word_ids(batch: TokenBatch) -> Int32Array:
    """[N] the word of each token, -1 for none."""
    return np.full(batch.num_tokens, -1, np.int32) if batch.word_ids is None else batch.word_ids


def _tokens_of_words(batch: TokenBatch) -> tuple[BoolArray, Any]:
    """[N] the tokens that belong to a word, and [sum of num_words] how many each word has."""
    word_ids = _word_ids(batch)
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
