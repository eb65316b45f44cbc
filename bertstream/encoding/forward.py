"""Token batches through a model in forwards of limited size, and token vectors into the rows that were asked for."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..embeddings import Embeddings, Output
from ..errors import EncoderError
from ..system.cuda import InTurn, to_device
from ..tokens import BoolArray, Indices, Int32Array, TokenBatch, cumulate, rows_of, steps
from .attention import BatchingSupport, Packing, packed_positions, register
from .fingerprint import note_training
from .forward_size import ForwardSize
from .fused import FusedForward
from .layers import kept_inputs, parameters_by_layer
from .model_state import unchanged
from .output_spec import OutputSpec
from .pooling import Combine, SentencePooling, WordPooling, combine_layers, pool_runs

logger = logging.getLogger(__name__)

Forward = Callable[[TokenBatch, Indices, Int32Array, Tensor | None], tuple[list[Tensor], Tensor]]


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
        self._fused = FusedForward(model, spec.layers, num_layers) if batching.way == "fused" else None
        self._num_layers = num_layers
        self._size = size
        self._lock = threading.Lock()
        self._weights_in_turn = InTurn()
        self._device_now: torch.device | None = None  # while weights are held: looking it up is slow

    def requires_grad_(self, requires_grad: bool = True) -> BatchedForward:
        """As in torch, for all parameters; caches of other encoders that share them notice the change."""
        note_training(p for p in self.parameters() if requires_grad or p.requires_grad)
        return super().requires_grad_(requires_grad)

    @contextmanager
    def _weights(self) -> Iterator[None]:
        """Hold while reading or changing weights: one thread, ordered across CUDA streams.

        A loader's encoder reads them on its own stream, an optimizer writes them on the training loop's.
        """
        with self._lock:
            self._device_now = device = self.device
            try:
                with self._weights_in_turn.use(device):
                    yield
            finally:
                self._device_now = None

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
        return self._device_now or next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the forward."""
        return next(self.model.parameters()).dtype

    @property
    def max_forward_tokens(self) -> int:
        """Tokens of one forward at most; a longer single text is a forward of its own."""
        return self._most_tokens(None)

    def _most_tokens(self, asked: int | None) -> int:
        most = self._size.most(self.device, asked)
        return min(most, self.batching.most_tokens or most)

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
        forward = self._chosen_forward(given)
        layers: list[Tensor] = []
        waiting = deque(self._forwards(order, lengths, self._most_tokens(max_forward_tokens)))
        while waiting:
            texts = waiting.popleft()
            rows = rows_of(texts, cu_seqlens)
            made = None
            try:
                made = forward(batch, rows, lengths[texts], given)
            except torch.OutOfMemoryError:
                if len(texts) == 1:
                    raise
            if made is None:  # out of the except block, the error no longer holds the forward's tensors
                self._lower_size(len(rows) if self.batching.packs else len(texts) * int(lengths[texts].max()))
                waiting.extendleft(np.array_split(texts, 2)[::-1])
                continue
            parts, index = made
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
        ordered = lengths[order]
        ends = cumulate(ordered)
        start = 0
        while start < len(order):
            if self.batching.packs:
                end = int(np.searchsorted(ends, int(ends[start]) + most, "right")) - 1
            elif self.batching.way == "padded":
                end = start + most // int(ordered[start])
            else:
                equal = len(order) - int(np.searchsorted(ordered[::-1], ordered[start], "left"))
                end = min(equal, start + most // int(ordered[start]))
            end = max(end, start + 1)
            yield order[start:end]
            start = end

    def _chosen_forward(self, given: Tensor | None = None) -> Forward:
        if not self.batching.packs:
            return self._padded_forward
        fused = given is None and self._fused is not None and not self.training and self._is_plain()
        return self._fused_forward if fused else self._packed_forward

    def _is_plain(self) -> bool:
        """Whether the fused forward gives what the caller's modes ask for, and the model is as it was read."""
        if torch.is_autocast_enabled(self.device.type):
            return False
        assert self._fused is not None
        return self._fused.ready(self.model) and not (torch.is_grad_enabled() and self._fused.requires_grad)

    def _fused_forward(
        self, batch: TokenBatch, rows: Indices, lengths: Int32Array, given: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Like `_packed_forward`; all inputs go to the device in one copy."""
        assert self._fused is not None and given is None
        tiles = self._fused.tiles(lengths)
        types = None if batch.token_type_ids is None else batch.token_type_ids[rows]
        ids = batch.input_ids[rows]
        parts = [rows, ids, packed_positions(ids, lengths, self.batching), cumulate(lengths), types, tiles]
        sizes = [0 if part is None else part.size for part in parts]
        flat = [part.ravel() for part in parts if part is not None]
        slab = self._to_device(np.concatenate(flat, dtype=np.int32, casting="unsafe"))
        index, input_ids, positions, cu_seqlens, *others = slab.split(sizes)
        segments, tiled = (part if len(part) else None for part in others)
        packing = Packing(lengths, cu_seqlens)
        made = self._fused(input_ids, positions, segments, packing, None if tiled is None else tiled.view(-1, 2))
        return made, index.long()

    def _packed_forward(
        self, batch: TokenBatch, rows: Indices, lengths: Int32Array, given: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The hidden states of `layers`, each [n, H], of these texts, and the rows [n] that they are of."""
        ids = batch.input_ids[rows]
        inputs = {"input_ids": ids, "position_ids": packed_positions(ids, lengths, self.batching)}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids[rows]
        tensors = {name: self._to_device(ids.astype(np.int64))[None] for name, ids in inputs.items()}
        packing = Packing(lengths, self._to_device(cumulate(lengths)))
        index = self._to_device(rows)
        given = None if given is None else given.index_select(0, index)[None]
        return [layer[0] for layer in self._run(given, **tensors, packing=packing)], index

    def _padded_forward(
        self, batch: TokenBatch, rows: Indices, lengths: Int32Array, given: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Like `_packed_forward`, with each text in a row of its own."""
        longest = int(lengths.max())
        slots = np.repeat(np.arange(len(lengths)) * longest, lengths) + steps(lengths)

        def pad(flat: Any, fill: int) -> Tensor:
            out = np.full(len(lengths) * longest, fill, np.int64)
            out[slots] = flat
            return self._to_device(out.reshape(len(lengths), longest))

        inputs = {
            "input_ids": pad(batch.input_ids[rows], self.batching.fill_id),
            "attention_mask": pad(np.ones(len(rows), np.int64), 0),
        }
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = pad(batch.token_type_ids[rows], 0)
        index, filled = self._to_device(rows), self._to_device(slots)
        if given is not None:
            padded = given.new_zeros(len(lengths) * longest, given.shape[1])
            given = padded.index_copy(0, filled, given.index_select(0, index)).view(len(lengths), longest, -1)
        return [layer.flatten(0, 1).index_select(0, filled) for layer in self._run(given, **inputs)], index

    def _run(self, given: Tensor | None, **inputs: Any) -> list[Tensor]:
        """The layers of `layers` from one forward, each [texts, T, H]; an upper half starts from `given`."""
        inner = [layer for layer in self.layers if layer < self._num_layers]
        own = self.batching.reads_own and bool(inner)
        with (
            unchanged(self.model) if self.batching.changes_itself else nullcontext(),
            kept_inputs(self.model, [] if own else inner) as kept,
        ):
            out = self.model(**inputs, **({"output_hidden_states": True} if own else {}))
        if own:
            kept.update(enumerate(out.hidden_states))
        kept[self._num_layers] = out.last_hidden_state
        tokens = inputs["input_ids"].shape[1]  # some models pad inside, on the right
        return [kept[layer][:, :tokens] for layer in self.layers]

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
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_weights_in_turn")} | {
            "_device_now": None
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()  # this process may not have made an encoder yet
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._weights_in_turn = InTurn()


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
