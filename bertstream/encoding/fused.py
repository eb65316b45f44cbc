"""The forward of a frozen encoder as one loop over its weights, without the model's modules in between.

transformers' modules take several milliseconds of Python for a forward that a GPU computes in two. The loop takes the
weights where they are, and joins those of queries, keys and values, so that one product makes all three.

Shapes: N tokens of all texts, H hidden size, d size of one head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tokens import Int32Array
from . import kernels, onednn
from .attention import Packing, attend
from .fingerprint import states_of
from .layer_modules import EncoderModules, LayerModules, UndescribedError, describe
from .model_guard import ModelGuard
from .weights import Layer, Norm, Product, is_rms_norm, join, read_norm

logger = logging.getLogger(__name__)

_KERNEL_NAMES = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Activations by their names in transformers."""

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


_OTHER_MODULES = "it has other modules than at the self-test"


class FusedForward:
    """A model's forward over packed texts.

    It reads the weights of the model and keeps copies of some, joined or blocked (see `onednn`), which it renews when a
    weight was written in place, moved, replaced or trained. Weights that require a gradient are not copied: optimizers
    may change them without a trace.

    Attributes:
        copied_bytes: of the copies, beside the model's own weights; 0 before the first forward.
    Args:
        model: an encoder in eval mode; layers above the highest of `layers` may have been dropped.
        layers: whose hidden states are wanted, counted from 0, the embedding layer.
        num_layers: of the whole model. The hidden states of the last layer are those after the model's final norm.
    Raises:
        UndescribedError: the model is none that this forward knows.
    """

    copied_bytes = 0

    def __init__(self, model: nn.Module, layers: Sequence[int], num_layers: int) -> None:
        self.model = model
        self.layers = tuple(layers)
        self._num_layers = num_layers
        self._warned = False
        self._block_rows: int | None = None
        self._copies: list[Tensor] = []
        self._describe()
        self._kinds = self._guard.kinds
        if reason := self._guard.interference():
            raise UndescribedError(reason)

    def _describe(self) -> None:
        self._refusal: str | None = "it was not described"
        self._guard = ModelGuard(self.model)
        self._modules = describe(self.model, max(self.layers), whole=max(self.layers) == self._num_layers)
        self._activation = _KERNEL_NAMES.get(self._modules.activation, "")
        if not self._activation:
            raise UndescribedError(f"its activation is {self._modules.activation}")
        weights = [weight for module in _used(self._modules) for weight in _plain_weights(module)]
        if len({(weight.dtype, weight.device) for weight in weights}) > 1:
            raise UndescribedError("its weights are of several dtypes or on several devices")
        self._watch()
        self._state: object = None
        self._refusal = None

    def _watch(self) -> None:
        """Choose the weights whose changes matter: those that are copied, or one that tells that the model moved."""
        layers = self._modules.layers
        copied = [layer.qkv for layer in layers] + [layer.up for layer in layers]
        if self._block_rows is None:
            copied = [sources for sources in copied if len(sources) > 1]
        else:
            copied += [(layer.attention_out, layer.down) for layer in layers]
            copied += [(self._modules.projection,)] if self._modules.projection is not None else []
        sources = {id(weight): weight for modules in copied for module in modules for weight in module.parameters()}
        self._watched = list(sources.values()) or list(_used(self._modules)[0].parameters())[:1]

    def ready(self, model: nn.Module) -> bool:
        """Whether the model can run fused as it is now; if so, the copied weights are up to date.

        Cheap enough for every batch. If not, the model has to run itself; the first time, the log says why.
        """
        if model is not self.model or self._guard.replaced():
            self.model = model
            self._describe_again()
        if reason := self.refusal(model):
            if not self._warned:
                logger.warning("%s runs through its own modules: %s", type(model).__name__, reason)
            self._warned = True
            return False
        state = states_of(self._watched)
        if state != self._state:
            self._read_weights()
            self._state = state
            self._held = [weight.detach() for weight in self._watched]  # else other weights could get their address
        return True

    def refusal(self, model: nn.Module) -> str | None:
        """Why the model has to run itself as it is now, in words; None if it can run fused. Changes nothing here."""
        if model is self.model and not self._guard.replaced():
            return self._refusal or self._guard.interference()
        try:
            looked_at = FusedForward(model, self.layers, self._num_layers)
        except UndescribedError as error:
            return str(error)
        return None if looked_at._kinds == self._kinds else _OTHER_MODULES

    def _describe_again(self) -> None:
        """After a change; only weights may be others, because the self-test saw no other modules."""
        try:
            self._describe()
        except UndescribedError as error:
            self._refusal = str(error)
        else:
            if self._guard.kinds != self._kinds:
                self._refusal = _OTHER_MODULES

    def use_blocked_weights(self, rows: int | None) -> None:
        """On a CPU, multiply by copies of the weights that oneDNN laid out for products of so many rows.

        None is the model's own weights again. It takes effect with the next forward.
        """
        self._block_rows = rows
        self._watch()
        self._state = None

    def products_of_a_layer(self, rows: int, *, blocked: bool) -> Callable[[], None]:
        """A function to time: the products of the first layer, with its activation, over `rows` tokens."""
        layer: Any = self._modules.layers[0]

        def products(*sources: Any) -> tuple[Product, ...]:
            return join(sources, rows if blocked else None)

        steps: list[Any] = [
            partial(_apply, products(*layer.qkv)),
            products(layer.attention_out)[0],
            partial(self._activate, products(*layer.up)),
            products(layer.down)[0],
        ]
        widths = [source.weight.shape[1] for source in (layer.qkv[0], layer.attention_out, layer.up[0], layer.down)]
        inputs = [torch.zeros(rows, width, dtype=layer.down.weight.dtype, device="cpu") for width in widths]

        def run() -> None:
            with torch.inference_mode():
                for step, x in zip(steps, inputs, strict=True):
                    step(x)

        return run

    @property
    def requires_grad(self) -> bool:
        """Whether any parameter of the model requires a gradient."""
        return self._guard.requires_grad()

    def _read_weights(self) -> None:
        modules = self._modules
        for tensor in self._copies:  # work that was queued here may still read them
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        known: dict[tuple[int, ...], tuple[Product, ...]] = {}
        weight = cast(Tensor, modules.tables[0][0].weight)
        rows = self._block_rows if weight.device.type == "cpu" and onednn.available(weight.dtype) else None

        def products(*sources: Any) -> tuple[Product, ...]:
            key = tuple(id(source.weight) for source in sources)  # layers may share their weights
            if key not in known:
                known[key] = join(sources, rows)
            return known[key]

        self._loop = [
            Layer(
                qkv=products(*layer.qkv),
                attention_out=products(layer.attention_out)[0],
                attention_norm=read_norm(layer.attention_norm),
                up=products(*layer.up),
                down=products(layer.down)[0],
                feed_forward_norm=read_norm(layer.feed_forward_norm),
                window=layer.window,
                rotary=layer.rotary,
            )
            for layer in modules.layers
        ]
        own = {id(weight) for weight in self.model.parameters()}
        used = [tensor for made in known.values() for product in made for tensor in (product.weight, product.bias)]
        copied = [tensor for tensor in used if tensor is not None and id(tensor) not in own]
        self.copied_bytes = sum(tensor.nbytes for tensor in copied)
        tables: tuple[tuple[Any, str], ...] = modules.tables
        self._tables: list[tuple[Tensor, str]] = [(table.weight, ids) for table, ids in tables]
        self._embedding_norm = read_norm(modules.embedding_norm)
        self._projection = products(modules.projection)[0] if modules.projection is not None else None
        norms = [*(layer.attention_norm for layer in self._loop), read_norm(modules.final_norm)]
        self._following = norms[1:]
        self._rotary = self._rotary_tables() if self._loop else {}
        self._copies = [*copied, *(tensor for pair in self._rotary.values() for tensor in pair)]
        self._kernels = kernels.fits(weight.dtype) and kernels.available(weight.device)
        fits = self._kernels and kernels.attention_fits(modules.head_size, weight.dtype)
        self._tile_rows = kernels.tile_rows(modules.head_size, weight.dtype) if fits else None

    def _rotary_tables(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Cosines and sines [positions, d] of each kind of layer, as the model computes them."""
        config: Any = self.model.config
        weight = self._tables[0][0]
        like = weight.new_zeros(1, 1, config.hidden_size)
        positions = torch.arange(config.max_position_embeddings, device=weight.device)[None]
        made = {kind: rotary(like, positions) for kind, rotary in self._modules.rotary.items()}
        return {kind: (cos[0], sin[0]) for kind, (cos, sin) in made.items()}

    def tiles(self, lengths: Int32Array) -> Int32Array | None:
        """[tiles, 2] of `kernels.attention_tiles` for a forward of these texts; None if it uses another attention."""
        return None if self._tile_rows is None else kernels.attention_tiles(lengths, self._tile_rows)

    @torch.inference_mode()  # operations cost less; what they return is copied into ordinary tensors
    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None,
        packing: Packing,
        tiles: Tensor | None = None,
    ) -> list[Tensor]:
        """The hidden states [N, H] of each of `layers`, after `ready` said yes.

        Args:
            input_ids: [N] of an integer dtype, on the model's device, one text after the other.
            position_ids: [N], as the model counts them.
            token_type_ids: [N]; None is all zeros.
            packing: where the texts begin and end.
            tiles: what `tiles` returned, on the device.
        """
        x = self._embed({"input_ids": input_ids, "position_ids": position_ids, "token_type_ids": token_type_ids})
        kept = {0: x} if 0 in self.layers else {}
        rotary = {kind: (cos[position_ids], sin[position_ids]) for kind, (cos, sin) in self._rotary.items()}
        pre_norm = self._modules.pre_norm
        first = self._loop[0].attention_norm if self._loop and pre_norm else None
        normed = x if first is None else first(x)
        for index, (layer, following) in enumerate(zip(self._loop, self._following, strict=True), 1):
            qkv = _apply(layer.qkv, normed)
            attended = self._attend(qkv, packing, tiles, layer.window, rotary.get(layer.rotary or ""))
            out = layer.attention_out(attended)
            x, normed = self._add(out, x, layer.feed_forward_norm if pre_norm else layer.attention_norm)
            out = layer.down(self._activate(layer.up, normed))
            x, normed = self._add(out, x, following if pre_norm else layer.feed_forward_norm)
            if index in self.layers:
                kept[index] = normed if index == self._num_layers else x
        return [kept[layer] for layer in self.layers]

    def _embed(self, ids: dict[str, Tensor | None]) -> Tensor:
        found = [
            table[0] if (named := ids.get(name)) is None else F.embedding(named, table) for table, name in self._tables
        ]
        x = found[0]
        for rows in found[1:]:
            x = x.add_(rows)
        x = x if self._embedding_norm is None else self._embedding_norm(x)
        return x if self._projection is None else self._projection(x)

    def _add(self, out: Tensor, x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
        """What the next residual is added to, and what the next product takes; in a post-norm layer the same.

        Args:
            out: [N, H], the product to add to x; it may be overwritten.
            x: [N, H].
            norm: of the sum; None for no norm.
        """
        pre_norm = self._modules.pre_norm
        if norm is not None and self._kernels:
            total, normed = kernels.add_norm(out, x, norm.weight, norm.bias, norm.eps, rms=norm.rms, keep_sum=pre_norm)
            return (normed if total is None else total), normed
        total = out.add_(x)
        normed = total if norm is None else norm(total)
        return (total if pre_norm else normed), normed

    def _activate(self, products: tuple[Product, ...], x: Tensor) -> Tensor:
        first = products[0]
        if first.blocked and not self._modules.gated and self._activation in onednn.ACTIVATIONS:
            return onednn.linear(x, first.weight, first.bias, self._activation)
        up = _apply(products, x)
        function = _FUNCTIONS[self._activation]
        if not self._modules.gated:
            return function(up)
        if self._kernels and self._activation in kernels.ACTIVATIONS:
            return kernels.gated(up, self._activation, up_first=False)
        gate, value = up.chunk(2, -1)
        return function(gate).mul_(value)

    def _attend(
        self,
        qkv: Tensor,
        packing: Packing,
        tiles: Tensor | None,
        window: int | None,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """[N, heads * d] from queries, keys and values side by side."""
        heads, kv_heads, size = self._modules.heads, self._modules.kv_heads, self._modules.head_size
        if rotary is not None and self._kernels:
            cos, sin = rotary
            kernels.rotate(qkv, cos, sin, heads=heads, kv_heads=kv_heads, head_size=size, rotary_dim=size)
        elif rotary is not None:
            turned = qkv.view(len(qkv), heads + 2 * kv_heads, size)[:, : heads + kv_heads]
            turned.copy_(_rotated(turned, *rotary))
        if tiles is not None:
            return kernels.packed_attention(
                qkv,
                packing.cu_seqlens,
                tiles,
                heads=heads,
                kv_heads=kv_heads,
                head_size=size,
                scale=size**-0.5,
                window=window,
            )
        return attend(qkv, heads, kv_heads, size, packing, window)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "layers", "_num_layers", "_warned", "_kinds", "_block_rows")  # the rest is read from the model
        return {name: getattr(self, name) for name in kept} | {"_copies": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._describe_again()


def _used(modules: EncoderModules) -> list[nn.Module]:
    """All modules whose weights are read."""
    outside = [*(table for table, _ in modules.tables), modules.embedding_norm, modules.projection, modules.final_norm]
    inside = [module for layer in modules.layers for module in _used_in(layer)]
    return [module for module in (*outside, *inside) if module is not None]


def _used_in(layer: LayerModules) -> list[nn.Module | None]:
    products = [*layer.qkv, layer.attention_out, *layer.up, layer.down]
    return [*products, layer.attention_norm, layer.feed_forward_norm]


def _plain_weights(module: nn.Module) -> list[nn.Parameter]:
    """A module's weights, if it is of a kind that needs nothing else: not quantized, no adapter, no parametrization."""
    kind = type(module)
    if kind not in (nn.Linear, nn.Embedding, nn.LayerNorm) and not is_rms_norm(module):
        raise UndescribedError(f"it has a {kind.__module__}.{kind.__name__}")
    if getattr(module, "max_norm", None) is not None:
        raise UndescribedError("its embedding table has a max_norm")
    weights = list(module.parameters(recurse=False))
    for weight in weights:
        if type(weight) is not nn.Parameter:
            raise UndescribedError(f"it has weights of type {type(weight).__name__}")
    return weights


def _apply(products: tuple[Product, ...], x: Tensor) -> Tensor:
    made = [product(x) for product in products]
    return made[0] if len(made) == 1 else torch.cat(made, -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of [N, heads, d] in float32; cos and sin are [N, d]."""
    first, second = x.float().chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (x * cos.float()[:, None]).add_(turned.mul_(sin.float()[:, None]))
