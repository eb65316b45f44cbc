"""Token batches through a model, in forwards of limited size."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..embeddings import Output
from ..errors import BertstreamError, EncoderError
from ..system.cuda import InTurn, to_device
from ..tokens import Indices, Int32Array, TokenBatch, cumulate, rows_of, steps
from .attention import BatchingSupport, Packing, packed_positions, register
from .fingerprint import note_training
from .forward_size import ForwardSize
from .fused import FusedForward
from .layers import kept_inputs, parameters_by_layer
from .model_state import remove_capture, unchanged
from .output_spec import OutputSpec
from .pooling import Combine

logger = logging.getLogger(__name__)

Forward = Callable[[TokenBatch, npt.NDArray[np.integer[Any]], Int32Array, Tensor | None], tuple[list[Tensor], Tensor]]


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
        self._batching = batching
        self._attention: str = cast(Any, model.config)._attn_implementation  # that the self-test saw, or sees next
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
    def batching(self) -> BatchingSupport:
        """How texts share a forward now, and why: as the self-test found, or packed while the model runs itself."""
        found = self._batching
        if self._fused is None:
            return found
        training = self.training or self.model.training
        reason = "it is in train mode" if training else self._fused.refusal(self.model)
        if reason is None:
            return found
        return dataclasses.replace(found, way="packed", reason=f"not fused now: {reason}; when loaded, {found.reason}")

    @property
    def copied_bytes(self) -> int:
        """Bytes of the copies of weights that the fused forward keeps; 0 before the first forward."""
        return 0 if self._fused is None else self._fused.copied_bytes

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
        return min(most, self._batching.most_tokens or most)

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
            rows = rows_of(texts, cu_seqlens, np.int32)
            made = None
            try:
                made = forward(batch, rows, lengths[texts], given)
            except torch.OutOfMemoryError:
                if len(texts) == 1:
                    raise
            if made is None:  # out of the except block, the error no longer holds the forward's tensors
                self._lower_size(len(rows) if self._batching.packs else len(texts) * int(lengths[texts].max()))
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
            if self._batching.packs:
                end = int(np.searchsorted(ends, int(ends[start]) + most, "right")) - 1
            elif self._batching.way == "padded":
                end = start + most // int(ordered[start])
            else:
                equal = len(order) - int(np.searchsorted(ordered[::-1], ordered[start], "left"))
                end = min(equal, start + most // int(ordered[start]))
            end = max(end, start + 1)
            yield order[start:end]
            start = end

    def _chosen_forward(self, given: Tensor | None = None) -> Forward:
        if not self._batching.packs:
            return self._padded_forward
        eval_mode = not (self.training or self.model.training)
        fused = given is None and self._fused is not None and eval_mode and self._is_plain()
        return self._fused_forward if fused else self._packed_forward

    def _is_plain(self) -> bool:
        """Whether the fused forward gives what the caller's modes ask for, and the model is as it was read."""
        if torch.is_autocast_enabled(self.device.type):
            return False
        assert self._fused is not None
        return self._fused.ready(self.model) and not (torch.is_grad_enabled() and self._fused.requires_grad)

    def _fused_forward(
        self, batch: TokenBatch, rows: npt.NDArray[np.integer[Any]], lengths: Int32Array, given: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Like `_packed_forward`; all inputs go to the device in one copy."""
        assert self._fused is not None and given is None
        tiles = self._fused.tiles(lengths)
        types = None if batch.token_type_ids is None else batch.token_type_ids[rows]
        ids = batch.input_ids[rows]
        positions = packed_positions(ids, lengths, self._batching)
        parts: list[npt.NDArray[Any] | None] = [rows, ids, positions, cumulate(lengths), types, tiles]
        sizes = [0 if part is None else part.size for part in parts]
        flat = [part.ravel() for part in parts if part is not None]
        slab = self._to_device(np.concatenate(flat, dtype=np.int32, casting="unsafe"))
        index, input_ids, position_ids, cu_seqlens, *others = slab.split(sizes)
        segments, tiled = (part if len(part) else None for part in others)
        packing = Packing(lengths, cu_seqlens)
        with torch.cuda.device(self.device) if slab.is_cuda else nullcontext():  # where Triton launches
            made = self._fused(input_ids, position_ids, segments, packing, None if tiled is None else tiled.view(-1, 2))
        return made, index.long()

    def _packed_forward(
        self, batch: TokenBatch, rows: npt.NDArray[np.integer[Any]], lengths: Int32Array, given: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The hidden states of `layers`, each [n, H], of these texts, and the rows [n] that they are of."""
        if (attention := cast(Any, self.model.config)._attn_implementation) != self._attention:
            raise EncoderError(
                f"the model's attention is {attention!r} now, which mixes the texts of a packed row: call "
                f"encoder.model.set_attn_implementation({self._attention!r}), and choose another one on a copy of it"
            )
        ids = batch.input_ids[rows]
        inputs = {"input_ids": ids, "position_ids": packed_positions(ids, lengths, self._batching)}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids[rows]
        tensors = {name: self._to_device(ids.astype(np.int64))[None] for name, ids in inputs.items()}
        packing = Packing(lengths, self._to_device(cumulate(lengths)))
        index = self._to_device(rows.astype(np.int64))
        given = None if given is None else given.index_select(0, index)[None]
        return [layer[0] for layer in self._run(given, **tensors, packing=packing)], index

    def _padded_forward(
        self, batch: TokenBatch, rows: npt.NDArray[np.integer[Any]], lengths: Int32Array, given: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Like `_packed_forward`, with each text in a row of its own."""
        longest = int(lengths.max())
        slots = np.repeat(np.arange(len(lengths)) * longest, lengths) + steps(lengths)

        def pad(flat: Any, fill: int) -> Tensor:
            out = np.full(len(lengths) * longest, fill, np.int64)
            out[slots] = flat
            return self._to_device(out.reshape(len(lengths), longest))

        inputs = {
            "input_ids": pad(batch.input_ids[rows], self._batching.fill_id),
            "attention_mask": pad(np.ones(len(rows), np.int64), 0),
        }
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = pad(batch.token_type_ids[rows], 0)
        index, filled = self._to_device(rows.astype(np.int64)), self._to_device(slots)
        if given is not None:
            padded = given.new_zeros(len(lengths) * longest, given.shape[1])
            given = padded.index_copy(0, filled, given.index_select(0, index)).view(len(lengths), longest, -1)
        return [layer.flatten(0, 1).index_select(0, filled) for layer in self._run(given, **inputs)], index

    def _run(self, given: Tensor | None, **inputs: Any) -> list[Tensor]:
        """The layers of `layers` from one forward, each [texts, T, H]; an upper half starts from `given`."""
        inner = [layer for layer in self.layers if layer < self._num_layers]
        own = self._batching.reads_own and bool(inner)
        with (
            unchanged(self.model) if self._batching.changes_itself else nullcontext(),
            kept_inputs(self.model, [] if own else inner) as kept,
        ):
            try:
                out = self.model(**inputs, **({"output_hidden_states": True} if own else {}))
            except (torch.OutOfMemoryError, BertstreamError):
                raise
            except Exception as error:  # whatever a model does with a text that it cannot take
                raise _model_fails(self.model, inputs, error) from error
        if own:
            kept.update(enumerate(out.hidden_states))
        kept[self._num_layers] = out.last_hidden_state
        tokens = inputs["input_ids"].shape[1]  # some models pad inside, on the right
        return [kept[layer][:, :tokens] for layer in self.layers]

    def _to_device(self, array: Any) -> Tensor:
        return to_device(array, self.device)

    def __getstate__(self) -> dict[str, Any]:
        if self._batching.reads_own:
            with self._lock:  # not in the middle of a forward
                remove_capture(self.model)
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_weights_in_turn")} | {
            "_device_now": None
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()  # this process may not have made an encoder yet
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_attention" not in state:  # encoders that were pickled before have none
            self._attention = cast(Any, self.model.config)._attn_implementation
        self._lock = threading.Lock()
        self._weights_in_turn = InTurn()


def _model_fails(model: nn.Module, inputs: dict[str, Any], error: Exception) -> EncoderError:
    """What to raise for an error of the model's own: funnel's pooling takes no text of three tokens, for example."""
    packing = inputs.get("packing")
    lengths = packing.lengths if packing is not None else inputs["attention_mask"].sum(1).cpu().numpy()
    shortest, longest = int(lengths.min()), int(lengths.max())
    tokens = f"{longest} tokens" if shortest == longest else f"{shortest} to {longest} tokens"
    texts = "a text" if len(lengths) == 1 else f"{len(lengths)} texts"
    return EncoderError(
        f"{type(model).__name__} fails in a forward of {texts} of {tokens} ({type(error).__name__}: {error}): leave "
        "texts of such lengths out, or use another model"
    )
