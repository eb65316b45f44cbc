"""Products on a CPU with weights that oneDNN has laid out in blocks once, instead of at each product.

torch has operators for it that its compiler emits and that are not public. So they are looked for and compared before
use, and `calibrate` measures whether they pay on this processor.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

ACTIVATIONS = ("gelu",)
"""What `linear` can compute after the product, without writing it out in between; the exact gelu."""


def blocked(weight: Tensor, rows: int) -> Tensor:
    """A copy of a weight in the layout in which oneDNN multiplies it fastest.

    Args:
        weight: [out, in], on the CPU.
        rows: of the usual product; others are right too.
    Returns:
        What only `linear` can read.
    """
    copy: Tensor = _operators()._reorder_linear_weight(weight.detach().contiguous(), rows)
    return copy


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """`F.linear`, then an activation.

    Args:
        x: [N, in].
        weight: of `blocked`.
        bias: [out] or None.
        activation: "none", or one of `ACTIVATIONS`.
    Returns:
        [N, out].
    """
    out: Tensor = _operators()._linear_pointwise(x, weight, bias, activation, [], "none")
    return out


@functools.cache
def available(dtype: torch.dtype) -> bool:
    """Whether this torch has the operators and they compute what `F.linear` does, in this dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight = (torch.linspace(-2, 2, n * 48, device="cpu").sin().view(n, 48) for n in (7, 33))
    bias = torch.linspace(-1, 1, 33, device="cpu")
    right = F.gelu(F.linear(x, weight, bias))
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    usual = (F.gelu(F.linear(x, weight, bias)).float() - right).abs().max()
    try:
        with torch.inference_mode():
            ours = (linear(x, blocked(weight, 7), bias, "gelu").float() - right).abs().max()
    except Exception as error:  # an operator that is missing, takes other arguments or not this dtype
        logger.info("no products with weights in oneDNN's layout in %s: %s: %s", dtype, type(error).__name__, error)
        return False
    return bool(ours <= 1.5 * usual + 1e-6)


def _operators() -> Any:
    return torch.ops.mkldnn
