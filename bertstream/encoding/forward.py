"""Token batches through a model, in forwards of limited size, and from the vectors of tokens to what was asked for."""

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
from ..tokens import BoolArray, Int32Array, TokenBatch, cumulate, rows_of, steps
from .attention import BatchingSupport, Packing, register
from .fingerprint import note_training
from .layers import kept_inputs, layer_list
from .pooling import Combine, SentencePooling, WordPooling, combine_layers, pool_runs

logger = logging.getLogger(__name__)

FORWARD_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of one forward. On a few CPU cores more no longer fits the activations into the cache; a GPU is bound by
kernel launches below 5-10 k tokens."""

_LEAST_FORWARD_TOKENS = 256
"""To which a shortage of memory may bring the tokens of a forward."""


class BatchedForward(nn.Module):
    """What an encoder and the upper half of one have in common; they set the attributes.

    Attributes:
        model: a transformers encoder of its own, over shared parameters.
        batching: how texts share a forward of it.
        output: and the others: see `Encoder`.
    """

    model: nn.Module
    batching: BatchingSupport
    output: Output
    layers: tuple[int, ...]
    combine: Combine
    pooling: tuple[str, ...]
    special_tokens: bool
    normalize: bool
    output_dtype: torch.dtype
    _last_layer: int
    _max_forward_tokens: int | None  # the user's
    _found_forward_tokens: dict[torch.device, int]  # measured
    _forward_tokens_limit: int | None = None  # lowered after an out-of-memory error
    _every_window = False  # the lower half of an encoder gives the vectors of all windows' tokens

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._weights_in_turn = InTurn()

    def requires_grad_(self, requires_grad: bool = True) -> BatchedForward:
        """As torch does, for all parameters; caches of encoders that share them know that they may change."""
        note_training(p for p in self.parameters() if requires_grad or p.requires_grad)
        return super().requires_grad_(requires_grad)

    @contextmanager
    def _weights(self) -> Iterator[None]:
        """Reading the weights, or a moment between two optimizers: one thread at a time, and in turn on the device.

        A loader's encoder reads them on a stream of its own, an optimizer writes to them on the training loop's.
        """
        with self._lock, self._weights_in_turn.use(self.device):
            yield

    @property
    def embedding_dim(self) -> int:
        """H, the size of the vectors that come out; the name that `nn.Embedding` uses."""
        config: Any = self.model.config
        layers = len(self.layers) if self.combine == "concat" else 1
        vectors = sum(2 if how == "first_last" else 1 for how in self.pooling) or 1  # tokens are not pooled
        return int(config.hidden_size) * layers * vectors

    @property
    def device(self) -> torch.device:
        """Where the forward runs and the vectors come out."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the forward."""
        return next(self.model.parameters()).dtype

    @property
    def max_forward_tokens(self) -> int:
        """Tokens of one forward at most; a single longer text is a forward of its own."""
        most = self._max_forward_tokens or self._found_forward_tokens.get(self.device, self.default_forward_tokens)
        return min(most, self._forward_tokens_limit or most)

    @property
    def default_forward_tokens(self) -> int:
        """The user's `max_forward_tokens`, or the default of the device; never a measured number."""
        return self._max_forward_tokens or FORWARD_TOKENS.get(self.device.type, 2048)

    def parameter_groups(self, lr: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """What an optimizer takes: a group for each layer, the top one first, what stands outside them last.

        That is the embedding layer, and what all layers use; a norm behind the top one (modernbert's) too.

        Give it all of them from the start: parameters that are frozen have no gradient, and optimizers leave them
        alone.

        Args:
            lr: learning rate of the top layer.
            layer_decay: each layer further down learns at this times the rate of the one above it.
        """
        groups = self._trained_parameters()
        return [{"params": group, "lr": lr * layer_decay**depth} for depth, group in enumerate(groups)]

    def _trained_parameters(self) -> list[list[nn.Parameter]]:
        """The parameters of each layer that is used, from the top, and all others; none twice (albert's are)."""
        pooler = getattr(self.model, "pooler", None)
        top = list(pooler.parameters()) if pooler is not None else []
        groups = [list(layer.parameters()) for layer in layer_list(self.model)][::-1]
        groups = [group for group in groups if group]
        seen = {id(parameter) for group in (top, *groups) for parameter in group}
        groups.append([parameter for parameter in self.model.parameters() if id(parameter) not in seen])
        if "pooler" in self.pooling:
            groups[0] = top + groups[0]
        seen.clear()
        out = []
        for group in groups:
            out.append([parameter for parameter in group if id(parameter) not in seen])
            seen |= {id(parameter) for parameter in group}
        return [group for group in out[:-1] if group] + out[-1:]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row of what comes out: (H,), or (K, H) where K layers are stacked."""
        return (len(self.layers), self.embedding_dim) if self.combine == "stack" else (self.embedding_dim,)

    def row_counts(self, batch: TokenBatch) -> Int32Array:
        """[B] int32, how many rows each text has in what `encode` gives."""
        if self.output == "sentence":
            return np.ones(len(batch), np.int32)
        if self.output == "words":
            return batch.num_words
        kept = self._kept(batch)
        return batch.lengths if kept is None else _count_by_text(kept, batch)

    def assemble(self, values: Tensor, batch: TokenBatch) -> Embeddings:
        """A batch's rows with all that belongs to them; the rows may come from a cache.

        Args:
            values: [N, ...] one row of `row_shape` for each that `row_counts` counts, in the order of the batch; on
                `device`, in `output_dtype`. They are taken over, not copied.
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
        """A batch's vectors in the caller's modes; an upper half makes them from given rows [N, H], one a token."""
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
        """[N] the tokens whose vectors are asked for; None for all."""
        if self._every_window:
            return None
        if self.special_tokens or batch.special is None:
            return batch.owned
        return ~batch.special if batch.owned is None else batch.owned & ~batch.special

    def _tokens(self, layers: list[Tensor], batch: TokenBatch) -> Tensor:
        kept = self._kept(batch)
        values = combine_layers(layers, self.combine)
        return values if kept is None else self._picked(values, kept)

    def _words(self, layers: list[Tensor], batch: TokenBatch) -> Tensor:
        """Each word's tokens are neighbours, so words are runs of rows, and index arithmetic on the host finds them."""
        kept, counts = _tokens_of_words(batch)
        values = self._picked(combine_layers(layers, self.combine), kept)
        return pool_runs(values, self._to_device(cumulate(counts)), cast(WordPooling, self.pooling[0]))

    def _sentences(self, layers: list[Tensor], batch: TokenBatch) -> Tensor:
        values = combine_layers(layers, self.combine)
        kept = self._kept(batch)
        rows = values if kept is None else self._picked(values, kept)
        offsets = cumulate(batch.lengths if kept is None else _count_by_text(kept, batch))
        parts = []
        for how in self.pooling:
            if how in ("cls", "pooler"):  # the first token, which is a special one, whether those count or not
                first = pool_runs(values, self._to_device(batch.cu_seqlens), "first")
                parts.append(self._pooler(first, batch.lengths) if how == "pooler" else first)
            else:
                parts.append(pool_runs(rows, self._to_device(offsets), cast(SentencePooling, how)))
        vectors = parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts], -1)
        return F.normalize(vectors.float(), dim=-1) if self.normalize else vectors

    def _pooler(self, first: Tensor, lengths: Int32Array) -> Tensor:
        model: Any = self.model
        if hasattr(model, "pooler_activation"):  # albert keeps the two apart
            pooled: Tensor = model.pooler_activation(model.pooler(first))
        else:
            pooled = model.pooler(first[:, None])
        if lengths.all():
            return pooled
        return pooled.masked_fill(self._to_device(lengths == 0)[:, None], 0)  # of a text without tokens, its bias

    def _picked(self, values: Tensor, kept: BoolArray) -> Tensor:
        return values if kept.all() else values.index_select(0, self._to_device(np.flatnonzero(kept)))

    def _token_vectors(self, batch: TokenBatch, given: Tensor | None, max_forward_tokens: int | None) -> list[Tensor]:
        """[N, H] for each wanted layer, in the dtype of the forward, rows in the order of the batch."""
        lengths = batch.lengths if batch.window_lengths is None else batch.window_lengths
        cu_seqlens = cumulate(lengths)
        # Longest first: if memory runs out, it does so at once, and equal lengths stand side by side.
        order = np.argsort(-lengths, kind="stable")
        order = order[lengths[order] > 0]
        forward = self._packed_forward if self.batching.way == "packed" else self._padded_forward
        layers: list[Tensor] = []
        budget = max_forward_tokens or self.max_forward_tokens
        waiting = deque(self._forwards(order, lengths, min(budget, self._forward_tokens_limit or budget)))
        while waiting:
            texts = waiting.popleft()
            places = rows_of(texts, cu_seqlens)
            index = self._to_device(places)
            parts = None
            try:
                parts = forward(batch, places, lengths[texts], None if given is None else given.index_select(0, index))
            except torch.OutOfMemoryError:
                if len(texts) == 1:
                    raise
            if parts is None:  # here, where the error no longer holds what the forward has computed
                packed = self.batching.way == "packed"
                self._lower_budget(len(places) if packed else len(texts) * int(lengths[texts].max()))
                waiting.extendleft(np.array_split(texts, 2)[::-1])
                continue
            layers = layers or [part.new_empty(batch.num_tokens, part.shape[1]) for part in parts]
            for layer, part in zip(layers, parts, strict=True):
                layer.index_copy_(0, index, part)
        size = cast(Any, self.model.config).hidden_size
        return layers or [torch.zeros(0, size, dtype=self.dtype, device=self.device) for _ in self.layers]

    def _lower_budget(self, tokens: int) -> None:
        """After a forward of so many tokens, padding included, found no memory: later ones are of half as many.

        Small ones are done in halves alone: what took all of the memory for a moment is another's.
        """
        lowered = max(_LEAST_FORWARD_TOKENS, tokens // 2)
        self._forward_tokens_limit = min(lowered, self._forward_tokens_limit or lowered)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning(
            "a forward of %d tokens found no memory on %s and is done in halves: from now on max_forward_tokens=%d",
            tokens,
            self.device,
            self.max_forward_tokens,
        )

    def _forwards(self, order: Any, lengths: Int32Array, most: int) -> Iterator[Any]:
        """Cut texts, longest first, into forwards by real tokens, or by padded ones where the model is padded."""
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
        places = np.repeat(np.arange(len(lengths)) * longest, lengths) + steps(lengths)

        def pad(flat: Any, fill: int) -> Tensor:
            out = np.full(len(lengths) * longest, fill, np.int64)
            out[places] = flat
            return self._to_device(out.reshape(len(lengths), longest))

        inputs = {
            "input_ids": pad(batch.input_ids[rows], getattr(self.model.config, "pad_token_id", None) or 0),
            "attention_mask": pad(np.ones(len(rows), np.int64), 0),
        }
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = pad(batch.token_type_ids[rows], 0)
        index = self._to_device(places)
        if given is not None:
            padded = given.new_zeros(len(lengths) * longest, given.shape[1])
            given = padded.index_copy(0, index, given).view(len(lengths), longest, -1)
        return [layer.flatten(0, 1).index_select(0, index) for layer in self._run(given, **inputs)]

    def _run(self, given: Tensor | None, **inputs: Any) -> list[Tensor]:
        """The wanted layers of one forward, each [texts, T, H]; an upper half puts in what is given."""
        with kept_inputs(self.model, [layer for layer in self.layers if layer < self._last_layer]) as kept:
            out = self.model(**inputs)
        kept[self._last_layer] = out.last_hidden_state
        return [kept[layer] for layer in self.layers]

    def _to_device(self, array: Any) -> Tensor:
        return to_device(array, self.device)

    def _check_marks(self, batch: TokenBatch) -> None:
        """Special tokens must be told apart where they are left out, and words where vectors are theirs."""
        if not self.special_tokens and batch.special is None and batch.num_tokens:
            raise EncoderError(
                "special_tokens=False needs texts, or tokens of this encoder's own tokenizer: in ids that are padded "
                "already special tokens cannot be told apart"
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
        register()  # the process that unpickles it may not have made one itself
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._weights_in_turn = InTurn()


def _word_ids(batch: TokenBatch) -> Int32Array:
    """[N] the word of each token, -1 for none."""
    return np.full(batch.num_tokens, -1, np.int32) if batch.word_ids is None else batch.word_ids


def _tokens_of_words(batch: TokenBatch) -> tuple[BoolArray, Any]:
    """[N] the tokens that words are made of, and [sum of num_words] how many each word has."""
    word_ids = _word_ids(batch)
    kept = word_ids >= 0 if batch.owned is None else (word_ids >= 0) & batch.owned
    starts = cumulate(batch.num_words)
    texts = np.repeat(np.arange(len(batch)), batch.lengths)
    words = (word_ids + starts[:-1][texts])[kept]
    return kept, np.bincount(words, minlength=starts[-1])


def _count_by_text(kept: BoolArray, batch: TokenBatch) -> Int32Array:
    return np.diff(cumulate(kept)[batch.cu_seqlens])
