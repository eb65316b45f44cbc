"""Fused steps of a packed forward as Triton kernels: add + norm, attention of short texts, gates, rotary positions.

Triton comes with torch on CUDA and is imported by the first launch; `available` says whether it works. Nothing here
records gradients. A launch goes to the current device, which must be that of the tensors.

Shapes: B texts, N tokens in all, H hidden size, d size of one head.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import EncoderError
from ..tokens import Int32Array, steps

logger = logging.getLogger(__name__)

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
"""What `gated` computes."""


class Tile(NamedTuple):
    """How `packed_attention` divides its work.

    Attributes:
        rows: tokens of one text whose attention one program computes; a power of two, at least 16.
        columns: keys that it reads at a time; likewise.
        warps: warps of 32 threads of one program.
        stages: blocks of keys that are in flight at a time.
    """

    rows: int
    columns: int
    warps: int
    stages: int


ATTENTION_TILES: dict[tuple[int, int], Tile] = {
    (2, 16): Tile(64, 64, 4, 3),
    (2, 32): Tile(64, 64, 4, 3),
    (2, 64): Tile(64, 64, 4, 3),
    (2, 128): Tile(64, 64, 4, 2),
    (4, 16): Tile(32, 32, 4, 1),
    (4, 32): Tile(32, 32, 4, 1),
    (4, 64): Tile(32, 32, 4, 1),
    (4, 128): Tile(32, 32, 4, 1),
}
"""By bytes of a number and the head size, rounded up to a power of two."""

VALUES: dict[str, int] = {"add_norm": 2048, "gated": 1024, "rotate": 1024}
"""Values of one program of the other kernels, unless a row has more; `_block` reads it once for each width."""

PER_WARP = 512
"""Values that one warp of the other kernels computes: 16 a thread."""

_OPTIONS = {"enable_fp_fusion": True}
"""Of every launch: Triton 3.9 warns where it is not given, because its default will change."""


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels work on a device: a small one is compiled and compared, once for each device.

    Args:
        device: CUDA of compute capability 8.0 or later; or the CPU if the environment variable TRITON_INTERPRET is 1,
            for tests.
    Returns:
        False also if Triton is not installed or fails; a warning then says why. A CPU is not worth one.
    """
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    reason = _why_not(device)
    if reason is not None:
        logger.warning("no Triton kernels on %s, so torch's own, slower functions run there: %s", device, reason)
    return reason is None


def _why_not(device: torch.device) -> str | None:
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"its compute capability is {capability[0]}.{capability[1]}, and they need 8.0"
    x = torch.linspace(-4, 4, 64, dtype=torch.float32, device="cpu")
    right = F.gelu(x[:32]) * x[32:]
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            found = gated(x[None].to(device), "gelu", up_first=False)[0].cpu()
    except Exception as error:  # Triton, its compiler, the C compiler it calls and the driver may raise anything
        return f"a first one raised {type(error).__name__}: {error}"
    difference = float((found - right).abs().max())
    return None if difference < 1e-5 else f"a first one gave values that differ by {difference:.1e}"


@functools.cache
def _jit() -> Any:
    from . import triton_kernels

    return triton_kernels


_compiled: dict[Hashable, Any] = {}


def _launch(
    name: str,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    constants: tuple[Any, ...],
    **options: int,
) -> None:
    """Launch a kernel on its arguments: tensors, then numbers that may change, then what is compiled in.

    The first launch compiles. Later ones start the compiled kernel itself, because Triton's look at each argument takes
    longer than a launch.
    """
    first = tensors[0]
    assert first is not None
    # All that Triton compiles differently; the kernels exempt `numbers` from it.
    kinds = tuple([tensor is not None and (tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors])
    key = name, first.device.index, kinds, constants, *options.values()
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](*tensors, *numbers, *constants)
    else:
        _compiled[key] = getattr(_jit(), name)[grid](*tensors, *numbers, *constants, **options, **_OPTIONS)


@functools.cache
def _padded(width: int) -> int:
    """The next power of two, which the shapes in a kernel are."""
    return 1 << max(width - 1, 0).bit_length()


@functools.cache
def _block(name: str, width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program of one of the kernels in `VALUES`."""
    columns = _padded(width)
    if name == "gated":  # the only one that does not need whole rows
        columns = min(columns, VALUES[name])
    rows = max(VALUES[name] // columns, 1)
    return rows, columns, min(max(rows * columns // PER_WARP, 1), 16)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    keep_sum: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """LayerNorm or RMSNorm of x + residual, in one pass.

    Args:
        x: [N, H] float16, bfloat16 or float32, contiguous; H at most 8192.
        residual: the same shape and dtype, contiguous; None for the norm of x alone.
        weight, bias: [H]; no bias if None.
        eps: added to the variance.
        rms: divide by the root of the mean square, without subtracting the mean.
        keep_sum: return x + residual too, which a layer with its norm first adds to later.
    Returns:
        The sum, None unless it is kept, and its norm: [N, H] in the dtype of x. The norm is computed in float32 from
        the sum before that is rounded.
    """
    tokens, hidden = x.shape
    out = torch.empty_like(x)
    total = torch.empty_like(x) if keep_sum and residual is not None else None
    rows, columns, warps = _block("add_norm", hidden)
    tensors = (x, residual, weight, bias, total, out)
    grid = (-(-tokens // rows), 1, 1)
    _launch("add_norm", grid, tensors, (tokens, eps), (hidden, columns, rows, rms), num_warps=warps)
    return (x if keep_sum and residual is None else total), out


def fits(dtype: torch.dtype) -> bool:
    """Whether the kernels take tensors of this dtype."""
    return dtype in (torch.float16, torch.bfloat16, torch.float32)


def attention_fits(head_size: int, dtype: torch.dtype) -> bool:
    """Whether `packed_attention` takes heads of this size and dtype."""
    return head_size % 8 == 0 and 16 <= head_size <= 128 and fits(dtype)


def tile_rows(head_size: int, dtype: torch.dtype) -> int:
    """Rows of a tile of `packed_attention`, for `attention_tiles`."""
    return ATTENTION_TILES[dtype.itemsize, _padded(head_size)].rows


def attention_tiles(lengths: Int32Array, rows: int) -> Int32Array:
    """Divide the texts of a packed row into tiles for `packed_attention`.

    Args:
        lengths: [B] tokens of each text; an empty text gets no tile.
        rows: what `tile_rows` says.
    Returns:
        [tiles, 2] (text, its first row in the tile); tiles of long texts first, so that no long work starts last.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    counts = -(-lengths[longest_first] // rows)
    tiles = np.empty((int(counts.sum()), 2), np.int32)
    tiles[:, 0] = np.repeat(longest_first, counts)
    tiles[:, 1] = steps(counts) * rows
    return tiles


def packed_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    tiles: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_size: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attention of each token over its own text, or over the part of it that a window shows.

    Args:
        qkv: [N, (heads + 2 * kv_heads) * head_size], contiguous: a token's query heads, key heads and value heads.
            Sizes and dtypes: `attention_fits`.
        cu_seqlens: [B + 1] int32 on the device.
        tiles: [tiles, 2] int32 on the device, of `attention_tiles` with `tile_rows` of this head size and dtype.
        heads: query heads; a multiple of `kv_heads`, and neighbours share a key and value head.
        kv_heads: key heads, and value heads.
        head_size: size of a head.
        scale: factor of the scores.
        window: a token sees the tokens fewer than this many positions away; None for all.
    Returns:
        [N, heads * head_size] in the dtype of qkv; sums in float32.
    """
    out = qkv.new_empty(qkv.shape[0], heads * head_size)
    padded = _padded(head_size)
    rows, columns, warps, stages = ATTENTION_TILES[qkv.element_size(), padded]
    constants = (heads, kv_heads, head_size, padded, window or 0, rows, columns)
    grid = (tiles.shape[0] * heads, 1, 1)
    tensors = (qkv, cu_seqlens, tiles, out)
    _launch("attend", grid, tensors, (scale,), constants, num_warps=warps, num_stages=stages)
    return out


def gated(x: Tensor, activation: str, up_first: bool) -> Tensor:
    """The middle of a gated feed-forward, act(gate) * up, in one pass.

    Args:
        x: [N, 2 * I], contiguous: gate and up.
        activation: one of `ACTIVATIONS`; "gelu" is the exact one.
        up_first: whether `up` is the first half of x.
    Returns:
        [N, I] in the dtype of x, computed in float32.
    Raises:
        EncoderError: the activation is another one.
    """
    if activation not in ACTIVATIONS:
        raise EncoderError(f"activation={activation!r}: gated() has {', '.join(ACTIVATIONS)}; use torch's function")
    tokens, inner = x.shape[0], x.shape[1] // 2
    out = x.new_empty(tokens, inner)
    rows, columns, warps = _block("gated", inner)
    grid = (-(-tokens // rows), -(-inner // columns), 1)
    _launch("gate", grid, (x, out), (tokens,), (inner, columns, rows, activation, up_first), num_warps=warps)
    return out


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, heads: int, kv_heads: int, head_size: int, rotary_dim: int
) -> None:
    """Apply rotary positions to the query and key heads of qkv, in place, as transformers' `rotate_half` does.

    Args:
        qkv: [N, (heads + 2 * kv_heads) * head_size], contiguous; as `packed_attention` takes it.
        cos, sin: [N, rotary_dim] of each token's position, contiguous, of any float dtype; computed with in float32.
        heads, kv_heads, head_size: as in `packed_attention`.
        rotary_dim: the first so many values of a head are rotated; even.
    """
    half = rotary_dim // 2
    turned = heads + kv_heads
    pairs = qkv.shape[0] * turned
    rows, columns, warps = _block("rotate", half)
    width = (turned + kv_heads) * head_size
    constants = (turned, width, head_size, half, columns, rows)
    _launch("rotate", (-(-pairs // rows), 1, 1), (qkv, cos, sin), (pairs,), constants, num_warps=warps)
