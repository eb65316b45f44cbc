"""Packed attention: several texts in one row, each attending only to itself.

transformers' encoders look their attention function up by name, so a packed forward needs no change to a model: this
module registers one more name. The self-test in `probe_batching` decides which models may use it. A list of model names
could not: several encoders accept the name and silently mix neighbouring texts.

Shapes: N tokens in all, d size of one head.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import EncoderError
from ..tokens import Int32Array, cumulate

PACKED = "bertstream_packed"
"""transformers' name for `packed_attention`, without the substrings that transformers treats specially."""

_LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
"""Numbers of float32 in a vector register of this CPU."""


_RAGGED_SCORES = 2048
"""Scores of a head below which padded keys cost more than they save."""


@dataclass(frozen=True)
class Packing:
    """Where the texts of one packed row begin and end.

    Attributes:
        lengths: [B] int32 on the host, tokens of each text; equal lengths are neighbours.
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

    @cached_property
    def _masks(self) -> dict[tuple[int, int], Tensor]:
        return {}  # the same in every layer

    def window_mask(self, length: int, window: int, like: Tensor) -> Tensor:
        """[length, length] bool, true where two tokens are fewer than `window` positions apart; on like's device."""
        mask = self._masks.get((length, -window))
        if mask is None:
            steps = torch.arange(length, device=like.device)
            mask = self._masks[length, -window] = (steps[:, None] - steps).abs() < window
        return mask

    def ragged_mask(self, length: int, more: int, like: Tensor) -> Tensor:
        """[1, length + more] of like's dtype, added to the scores: 0, then -inf for `more` keys of other texts."""
        mask = self._masks.get((length, more))
        if mask is None:
            mask = self._masks[length, more] = like.new_zeros(1, length + more)
            mask[:, length:] = -math.inf
        return mask


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
    """Attention over a packed row, as a function of transformers' attention interface.

    Args:
        module: the attention layer.
        query: [1, heads, N, d]; `key` and `value` likewise, or with fewer heads that groups of query heads share.
        attention_mask: must be None; a packed row has no padding.
        scaling: factor of the scores; 1 / sqrt(d) if None.
        dropout: probability, applied to the attention weights.
        packing: where the texts begin and end; the argument of `model(..., packing=...)`.
        sliding_window: a token sees the tokens fewer than this many positions away; None for all.
        kwargs: other arguments of the model; the self-test shows whether any of them matters.
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
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if query.is_cuda and query.dtype != torch.float32 and not dropout and _flash_fits(query):
        return _varlen(query, key, value, scaling, packing, sliding_window)[None], None
    out: list[Tensor] = []
    start = 0
    for texts, length in packing.groups:
        more, mask = _key_mask(packing, texts, length, sliding_window, query)
        q, k, v = (_texts(x, start, texts, length, extra) for x, extra in ((query, 0), (key, more), (value, more)))
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
        out.append(found.transpose(1, 2).flatten(0, 1))
        start += texts * length
    return (out[0] if len(out) == 1 else torch.cat(out))[None], None


def attend(
    qkv: Tensor, heads: int, kv_heads: int, head_size: int, packing: Packing, window: int | None = None
) -> Tensor:
    """`packed_attention` over queries, keys and values side by side, without gradients and with little Python.

    Args:
        qkv: [N, (heads + 2 * kv_heads) * head_size], contiguous.
        heads: of the queries.
        kv_heads: of the keys and values.
        head_size: numbers in each head.
        packing: where the texts begin and end.
        window: a token sees the tokens fewer than this many positions away; None for all.
    Returns:
        [N, heads * head_size].
    """
    if qkv.is_cuda:
        states = qkv.view(1, len(qkv), -1, head_size).transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
        out, _ = packed_attention(None, *states, None, packing=packing, sliding_window=window)
        return out.view(len(qkv), heads * head_size)
    found: list[Tensor] = []
    width, start = qkv.shape[1], 0
    for texts, length in packing.groups:
        more, mask = _key_mask(packing, texts, length, window, qkv)
        rows, first = qkv, start
        if start + texts * length + more > len(qkv):  # the last texts of the row, which are its shortest
            rows, first = F.pad(qkv[start:], (0, 0, 0, more)), 0
        stride, begin = (length * width, head_size, width, 1), first * width
        q = rows.as_strided((texts, heads, length, head_size), stride, begin)
        size = (texts, kv_heads, length + more, head_size)
        k = rows.as_strided(size, stride, begin + heads * head_size)
        v = rows.as_strided(size, stride, begin + (heads + kv_heads) * head_size)
        if kv_heads != heads:
            k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        states = F.scaled_dot_product_attention(q, k, v, mask)
        found.append(states.transpose(1, 2).reshape(texts * length, heads * head_size))
        start += texts * length
    return found[0] if len(found) == 1 else torch.cat(found)


def _key_mask(
    packing: Packing, texts: int, length: int, window: int | None, like: Tensor
) -> tuple[int, Tensor | None]:
    """How many of the keys that follow a text attention also reads, and the mask that hides what a token may not see."""
    if window is not None and length > window:
        return 0, packing.window_mask(length, window, like)
    if _is_ragged(like, texts, length):
        more = -length % _LANES
        return more, packing.ragged_mask(length, more, like)
    return 0, None


def _is_ragged(query: Tensor, texts: int, length: int) -> bool:
    """Whether attention over texts of this length is faster with keys padded to whole vector registers.

    torch's CPU kernel computes the exponentials of an incomplete register one by one. With 16 lanes and four or more
    left over, padding brought attention over texts of 5 to 130 tokens to 0.53 to 1.03 of its time, 0.75 on average.
    """
    if length % _LANES < _LANES // 4 or query.is_cuda or query.dtype != torch.float32:
        return False
    if texts * length * length < _RAGGED_SCORES:
        return False
    return not torch.is_grad_enabled()


def _texts(x: Tensor, start: int, texts: int, length: int, more: int) -> Tensor:
    """[texts, heads, length + more, d] of x [1, heads, N, d]: each text from row `start`, and what follows it in x.

    A view, so padding costs no copy; a mask hides the neighbours' keys, so their weights are exactly 0.
    """
    rows = x[0]
    if torch.is_grad_enabled():  # the gradient of a strided view is slow
        return rows[:, start : start + texts * length].unflatten(1, (texts, length)).transpose(0, 1)
    if start + texts * length + more > rows.shape[1]:  # the last texts of the row, which are its shortest
        rows, start = F.pad(rows[:, start:], (0, 0, 0, more)), 0
    head, row, number = rows.stride()
    size, stride = (texts, rows.shape[0], length + more, rows.shape[2]), (length * row, head, row, number)
    return rows.as_strided(size, stride, rows.storage_offset() + start * row)


def _flash_fits(query: Tensor) -> bool:
    head = query.shape[-1]
    return head <= 256 and head % 8 == 0 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, packing: Packing, sliding_window: int | None
) -> Tensor:
    """[N, heads, d] by the variable-length flash kernel, which has no dropout."""
    from torch.nn.attention import varlen

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    farthest = -1 if sliding_window is None else sliding_window - 1  # positions to either side; -1 is all
    cu_seqlens, longest = packing.cu_seqlens, packing.max_length
    found = varlen.varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, window_size=(farthest, farthest)
    )
    return cast(Tensor, found)


def register() -> None:
    """Register `packed_attention` with transformers under the name `PACKED`."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)


@dataclass(frozen=True)
class BatchingSupport:
    """How texts may share a forward, as the self-test found.

    Attributes:
        way: "fused", in one row and by our own loop over the weights; "packed" in one row; "padded" to the longest;
            "grouped", texts of equal length only.
        reason: why, in words, with the measured errors.
        first_position: the position id of a text's first token (RoBERTa's family counts from padding_idx + 1).
    """

    way: Literal["fused", "packed", "padded", "grouped"]
    reason: str
    first_position: int = 0

    @property
    def packs(self) -> bool:
        """Whether texts of any length share a row."""
        return self.way in ("fused", "packed")


def probe_batching(model: nn.Module, packed: bool | None = None) -> BatchingSupport:
    """Run three texts together and one by one, and compare.

    A model that passes packed keeps the packed attention; any other keeps its own. It must be in eval mode, and must
    not share its config, which changes, with the user.

    Args:
        model: a transformers encoder.
        packed: True refuses a model that cannot be packed, False does not try.
    Returns:
        The fastest correct way. A way passes if no text has a relative L2 error above 1e-4 in float32; in half
        precision, above 8 times the difference between the model's eager attention and scaled_dot_product_attention.
    Raises:
        EncoderError: the model is no encoder, or does not run in its precision; or `packed` is True and packed texts
            differ from one by one.
    """
    register()
    config: Any = model.config
    parameter = next(model.parameters())
    native = config._attn_implementation
    first_position = _first_position(model)
    ids = [row.to(parameter.device) for row in _probe_texts(config, first_position)]
    reason = "packing was not asked for"
    with plain_mode(parameter.device):
        alone = _one_by_one(model, ids)
        tolerance = 1e-4
        if parameter.dtype != torch.float32:
            tolerance = max(tolerance, 8 * _noise(model, ids, alone, native, "sdpa" if native == "eager" else "eager"))
        if packed is not False:
            passed, reason = _try_packed(model, ids, alone, first_position, tolerance)
            if passed:
                return BatchingSupport("packed", reason, first_position)
            model.set_attn_implementation(native)  # type: ignore[operator]
            if packed:
                raise EncoderError(f"{type(model).__name__} cannot run packed: {reason}; leave packed= out")
        worst = _padded_error(model, ids, alone)
    if worst <= tolerance:
        return BatchingSupport("padded", f"{reason}; padded equals one by one ({worst:.1e})", first_position)
    reason = f"{reason}; padded differs from one by one (relative L2 error {worst:.1e} > {tolerance:.0e})"
    return BatchingSupport("grouped", reason, first_position)


@contextmanager
def plain_mode(device: torch.device) -> Iterator[None]:
    """A context without gradients, inference tensors and autocast, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _first_position(model: nn.Module) -> int:
    """Position id of a text's first token; RoBERTa's family counts from padding_idx + 1."""
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def _probe_texts(config: Any, first_position: int) -> list[Tensor]:
    """Three texts of different lengths, each starting in another part of the vocabulary.

    The longest is longer than the sliding window of a model that has one.
    """
    windows = [getattr(config, name, None) or 0 for name in ("sliding_window", "local_attention")]
    longest = max(11, *(window + 1 for window in windows))
    longest = min(longest, (getattr(config, "max_position_embeddings", None) or longest) - first_position)
    usable = range(min(max(16, config.vocab_size // 8), config.vocab_size // 2), config.vocab_size)
    return [
        torch.tensor([[usable[(text * len(usable) // 3 + 37 * i) % len(usable)] for i in range(length)]])
        for text, length in enumerate((5, 7, longest))
    ]


def _one_by_one(model: nn.Module, ids: list[Tensor]) -> list[Tensor]:
    name, parameter = type(model).__name__, next(model.parameters())
    try:
        found = [model(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state[0].float() for row in ids]
    except AttributeError as error:
        raise EncoderError(
            f"{name} gives no last_hidden_state ({error}): pass the encoder alone, as AutoModel loads it or "
            "model.base_model holds it"
        ) from error
    except RuntimeError as error:
        raise EncoderError(f"{name} does not run in {parameter.dtype} on {parameter.device}: {error}") from error
    if not all(bool(row.isfinite().all()) for row in found):
        way_out = "ask for dtype='bfloat16' or 'float32'" if parameter.dtype == torch.float16 else "look at its weights"
        raise EncoderError(f"{name} gives values that are not finite in {parameter.dtype}: {way_out}")
    return found


def _try_packed(
    model: nn.Module, ids: list[Tensor], alone: list[Tensor], first_position: int, tolerance: float
) -> tuple[bool, str]:
    """Whether packed texts equal one by one, and why."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False, f"{type(model).__name__} takes no position_ids, so positions cannot restart"
    try:
        model.set_attn_implementation(PACKED)  # type: ignore[operator]
        worst = _packed_error(model, ids, alone, first_position)
    except Exception as error:  # a model that cannot be packed may raise anything; the reason says what
        return False, f"the packed self-test raised {type(error).__name__}: {error}"
    if worst <= tolerance:
        return True, f"packed equals one by one (worst relative L2 error {worst:.1e})"
    return False, f"packed differs from one by one (relative L2 error {worst:.1e} > {tolerance:.0e})"


def _worst_error(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf  # max() ignores a NaN


def _packed_error(model: nn.Module, ids: list[Tensor], alone: list[Tensor], first_position: int) -> float:
    device = ids[0].device
    lengths = np.array([row.shape[1] for row in ids], np.int32)
    positions = torch.cat([torch.arange(row.shape[1], device=device) for row in ids])[None] + first_position
    packing = Packing(lengths, torch.from_numpy(cumulate(lengths)).to(device))
    out = model(input_ids=torch.cat(ids, 1), position_ids=positions, packing=packing).last_hidden_state[0]
    return _worst_error(out.split(lengths.tolist()), alone)


def _padded_error(model: nn.Module, ids: list[Tensor], alone: list[Tensor]) -> float:
    pad = getattr(model.config, "pad_token_id", None) or 0
    rows = [row[0] for row in ids]
    padded = pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    out = model(input_ids=padded, attention_mask=mask).last_hidden_state
    return _worst_error([found[: len(row)] for found, row in zip(out, rows, strict=True)], alone)


def _noise(model: nn.Module, ids: list[Tensor], alone: list[Tensor], native: str, other: str) -> float:
    """The difference between two of the model's own attention functions in its precision."""
    try:
        model.set_attn_implementation(other)  # type: ignore[operator]
        found = [model(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state[0] for row in ids]
    except (ValueError, ImportError):
        return 1e-3
    finally:
        model.set_attn_implementation(native)  # type: ignore[operator]
    noise = _worst_error(found, alone)
    return noise if math.isfinite(noise) else 1e-3
