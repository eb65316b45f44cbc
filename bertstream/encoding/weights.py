"""The weights of a layer as the fused forward reads them.

Shapes: N tokens of all texts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import onednn


class Product(NamedTuple):
    """A linear layer.

    Attributes:
        weight: [out, in].
        bias: [out], or None.
        blocked: whether the weight is a copy made by `onednn.blocked`.
    """

    weight: Tensor
    bias: Tensor | None
    blocked: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """[N, out] of [N, in]."""
        return (onednn.linear if self.blocked else F.linear)(x, self.weight, self.bias)

    @property
    def requires_grad(self) -> bool:
        """Whether an optimizer may change it without a trace."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)


def join(sources: Sequence[Any], block_rows: int | None = None) -> tuple[Product, ...]:
    """One product in the place of several linear layers of the same input; several where one may be trained.

    Args:
        sources: the linear layers.
        block_rows: blocks the weights for products of about so many rows; None leaves them. Those that may be trained
            stay as they are.
    """
    products = tuple(Product(source.weight, source.bias) for source in sources)
    biases = [product.bias for product in products if product.bias is not None]
    trained = any(product.requires_grad for product in products)
    if len(products) > 1 and len(biases) in (0, len(products)) and not trained:
        with torch.no_grad():
            weight = torch.cat([product.weight for product in products])
            products = (Product(weight, torch.cat(biases) if biases else None),)
    return products if block_rows is None else tuple(_blocked(product, block_rows) for product in products)


def _blocked(product: Product, rows: int) -> Product:
    if product.requires_grad:
        return product
    return Product(onednn.blocked(product.weight, rows), product.bias, blocked=True)


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm, or RMSNorm, which has no mean and no bias."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    rms: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize [N, H] along H."""
        if not self.rms:
            return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer, in the order in which they are used.

    Attributes:
        qkv: one product, or three where the weights may change unnoticed and so are not joined.
        attention_norm: None for no norm; `feed_forward_norm` too.
        up: one product; or two of a gated feed-forward that are not joined.
        window: see `LayerModules`; `rotary` too.
    """

    qkv: tuple[Product, ...]
    attention_out: Product
    attention_norm: Norm | None
    up: tuple[Product, ...]
    down: Product
    feed_forward_norm: Norm | None
    window: int | None
    rotary: str | None


def read_norm(module: Any) -> Norm | None:
    """A norm of a model; None for None."""
    if module is None:
        return None
    if is_rms_norm(module):
        return Norm(module.weight, None, module.variance_epsilon, rms=True)
    return Norm(module.weight, module.bias, module.eps, rms=False)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is an RMSNorm of transformers, each of whose families has a class of its own."""
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
