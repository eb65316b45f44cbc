"""Packed attention: several texts in one row, each attending to itself alone.

transformers' encoders look their attention function up by name, so a packed forward needs no change to a model: this
module registers one more name. The self-test in `probe_batching` decides which models may use it; a list of model
names would be wrong for somebody (several encoders accept the name and silently mix neighbouring texts).

Shapes: N tokens in all, d size of one head.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import EncoderError
from .types import Int32Array, cumulate

PACKED = "bertstream_packed"
"""The name under which transformers finds `packed_attention`; free of the substrings that it treats specially."""


@dataclass(frozen=True)
class Packing:
    """Where the texts of one packed row begin and end.

    Attributes:
        lengths: [B] int32 on the host, tokens of each text; equal lengths stand side by side.
        cu_seqlens: [B + 1] int32 on the device.
    """

    lengths: Int32Array
    cu_seqlens: Tensor

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """Runs of equal lengths as (texts, length): attention over one run is one dense call without a mask."""
        starts = np.flatnonzero(np.diff(self.lengths, prepend=-1))
        counts = np.diff(starts, append=len(self.lengths))
        return list(zip(counts.tolist(), self.lengths[starts].tolist(), strict=True))

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest text."""
        return int(self.lengths.max())


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed row, in the form that transformers' attention interface asks for.

    Args:
        module: the attention layer.
        query: [1, heads, N, d]; `key` and `value` likewise.
        attention_mask: must be None; a packed row has no padding.
        scaling: factor of the scores; 1 / sqrt(d) if None.
        dropout: probability, applied to the attention weights.
        packing: where the texts lie; handed to `model(..., packing=...)`.
        sliding_window: a token sees those fewer than this many places away; None for all.
        kwargs: what else the model passes along; the self-test shows whether any of it mattered.
    Returns:
        ([1, N, heads, d], None), contiguous.
    Raises:
        EncoderError: called without a packing, or with a mask: padded input would give wrong vectors silently.
    """
    if packing is None or attention_mask is not None:
        raise EncoderError(
            f"{PACKED} attention runs only on a packed row (packing= given and no attention_mask); to run this model "
            "on padded input, call set_attn_implementation('sdpa') on it first"
        )
    windowed = sliding_window is not None and packing.max_length > sliding_window
    if query.is_cuda and query.dtype != torch.float32 and not (windowed or dropout) and _flash_fits(query):
        return _varlen(query, key, value, scaling, dropout, packing)[None], None
    out: list[Tensor] = []
    start = 0
    for texts, length in packing.groups:
        rows = slice(start, start + texts * length)
        q, k, v = (x[0, :, rows].unflatten(1, (texts, length)).transpose(0, 1) for x in (query, key, value))
        band = None
        if sliding_window is not None and length > sliding_window:
            steps = torch.arange(length, device=query.device)
            band = (steps[:, None] - steps).abs() < sliding_window
        grouped = F.scaled_dot_product_attention(q, k, v, attn_mask=band, dropout_p=dropout, scale=scaling)
        out.append(grouped.transpose(1, 2).flatten(0, 1))
        start = rows.stop
    return torch.cat(out)[None], None


def _flash_fits(query: Tensor) -> bool:
    head = query.shape[-1]
    return head <= 256 and head % 8 == 0 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, packing: Packing
) -> Tensor:
    """[N, heads, d] by the variable-length flash kernel; it has no dropout, so training with dropout goes elsewhere."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    default = query.shape[-1] ** -0.5
    if scaling is not None and scaling != default:
        q = q * (scaling / default)
    longest = packing.max_length
    return cast(Tensor, varlen_attn(q, k, v, packing.cu_seqlens, packing.cu_seqlens, longest, longest))


def register() -> None:
    """Make `packed_attention` known to transformers under the name `PACKED`."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)


@dataclass(frozen=True)
class BatchingSupport:
    """How the self-test found that texts may share a forward.

    Attributes:
        way: "packed" in one row; "padded" to the longest; "grouped", texts of equal length only.
        reason: why, in words, with the errors seen.
        first_position: the position id of a text's first token (RoBERTa's family counts from padding_idx + 1).
    """

    way: Literal["packed", "padded", "grouped"]
    reason: str
    first_position: int = 0


# Three short texts, no two of one length, told apart in every token by a different stride through the vocabulary.
_PROBE_LENGTHS = np.array([5, 7, 11], np.int32)


def probe_batching(model: nn.Module, packed: bool | None = None) -> BatchingSupport:
    """Run three short texts together and one by one, and compare.

    The model is left with its packed attention if it passes packed, and with its own attention otherwise. It must be
    in eval mode; its config is changed, so it must not be shared with the user.

    Args:
        model: a transformers encoder.
        packed: True refuses a model that cannot be packed, False does not try.
    Returns:
        The fastest way that is right. A way passes if no text is off by more than a relative L2 error of 1e-4 in
        float32; in half precision by more than 8 times what separates the model's eager attention from
        scaled_dot_product_attention.
    Raises:
        EncoderError: `packed` is True and packed texts do not come out as they do one by one.
    """
    register()
    config: Any = model.config
    parameter = next(model.parameters())
    if config._attn_implementation == PACKED:  # the model of another encoder
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
    native = config._attn_implementation
    ids = [row.to(parameter.device) for row in _probe_texts(config.vocab_size)]
    reason = "packing was not asked for"
    with torch.inference_mode(False), torch.no_grad():
        try:
            alone = [model(input_ids=x, attention_mask=torch.ones_like(x)).last_hidden_state[0].float() for x in ids]
        except RuntimeError as error:
            raise EncoderError(
                f"{type(model).__name__} does not run in {parameter.dtype} on {parameter.device}: {error}"
            ) from error
        tolerance = 1e-4
        if parameter.dtype != torch.float32:
            tolerance = max(tolerance, 8 * _noise(model, ids, alone, native, "sdpa" if native == "eager" else "eager"))
        if packed is not False:
            support = _try_packed(model, ids, alone, tolerance)
            if support.way == "packed":
                return support
            model.set_attn_implementation(native)  # type: ignore[operator]
            reason = support.reason
            if packed:
                raise EncoderError(f"{type(model).__name__} cannot run packed: {reason}; leave packed= out")
        worst = _padded_error(model, ids, alone)
    if worst <= tolerance:
        return BatchingSupport("padded", f"{reason}; padded equals one by one ({worst:.1e})")
    return BatchingSupport(
        "grouped", f"{reason}; padded differs from one by one (relative L2 error {worst:.1e} > {tolerance:.0e})"
    )


def _probe_texts(vocab_size: int) -> list[Tensor]:
    usable = range(max(16, vocab_size // 8), vocab_size)
    return [
        torch.tensor([[usable[(text * len(usable) // 3 + 37 * i) % len(usable)] for i in range(length)]])
        for text, length in enumerate(_PROBE_LENGTHS.tolist())
    ]


def _try_packed(model: nn.Module, ids: list[Tensor], alone: list[Tensor], tolerance: float) -> BatchingSupport:
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return BatchingSupport("padded", f"{type(model).__name__} takes no position_ids, so positions cannot restart")
    pad = getattr(model.config, "pad_token_id", None)
    try:
        model.set_attn_implementation(PACKED)  # type: ignore[operator]
        errors = {
            first: _packed_error(model, ids, alone, first) for first in sorted({0, 0 if pad is None else pad + 1})
        }
    except Exception as error:  # whatever a model that cannot be packed does: the verdict says it
        return BatchingSupport("padded", f"the packed self-test raised {type(error).__name__}: {error}")
    first, worst = min(errors.items(), key=lambda item: item[1])
    if worst <= tolerance:
        return BatchingSupport("packed", f"packed equals one by one (worst relative L2 error {worst:.1e})", first)
    return BatchingSupport(
        "padded", f"packed differs from one by one (relative L2 error {worst:.1e} > {tolerance:.0e})"
    )


def _worst_error(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf  # max() passes over a NaN


def _packed_error(model: nn.Module, ids: list[Tensor], alone: list[Tensor], first_position: int) -> float:
    device = ids[0].device
    positions = torch.cat([torch.arange(row.shape[1], device=device) for row in ids])[None] + first_position
    packing = Packing(_PROBE_LENGTHS, torch.from_numpy(cumulate(_PROBE_LENGTHS)).to(device))
    out = model(input_ids=torch.cat(ids, 1), position_ids=positions, packing=packing).last_hidden_state[0]
    return _worst_error(out.split(_PROBE_LENGTHS.tolist()), alone)


def _padded_error(model: nn.Module, ids: list[Tensor], alone: list[Tensor]) -> float:
    pad = getattr(model.config, "pad_token_id", None) or 0
    longest = int(_PROBE_LENGTHS.max())
    padded = torch.cat([nn.functional.pad(row, (0, longest - row.shape[1]), value=pad) for row in ids])
    steps = torch.arange(longest, device=padded.device)
    mask = (steps < torch.tensor(_PROBE_LENGTHS, device=padded.device)[:, None]).long()
    out = model(input_ids=padded, attention_mask=mask).last_hidden_state
    return _worst_error([row[:length] for row, length in zip(out, _PROBE_LENGTHS.tolist(), strict=True)], alone)


def _noise(model: nn.Module, ids: list[Tensor], alone: list[Tensor], native: str, other: str) -> float:
    """How far two of the model's own attention functions lie apart in its precision."""
    try:
        model.set_attn_implementation(other)  # type: ignore[operator]
        found = [model(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state[0] for row in ids]
    except (ValueError, ImportError):
        return 1e-3
    finally:
        model.set_attn_implementation(native)  # type: ignore[operator]
    return _worst_error(found, alone)
