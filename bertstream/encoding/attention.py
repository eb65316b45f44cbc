"""Packed attention: several texts in one row, each attending only to itself.

transformers' encoders look their attention function up by name, so a packed forward needs no change to a model: this
module registers one more name. The self-test (`self_test.py`) decides which models may use it. A list of model names
could not: several encoders accept the name and silently mix neighbouring texts.

Shapes: N tokens in all, d size of one head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import EncoderError
from ..tokens import Int32Array, cumulate, steps

PACKED = "bertstream_packed"
"""transformers' name for `packed_attention`, without the substrings that transformers treats specially."""

_LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
"""Numbers of float32 in a vector register of this CPU."""

_BLOCK = 2 * _LANES
"""Tokens of a block in which short texts share attention. With 16 lanes, blocks of 16, 48, 64 and 96 were slower."""

_MASK_SCORES = 2048
"""Scores of a head below which keys that a mask hides cost more than they save."""


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
        mask = self._masks.get((-window, length))
        if mask is None:
            steps = torch.arange(length, device=like.device)
            mask = self._masks[-window, length] = (steps[:, None] - steps).abs() < window
        return mask

    def block_mask(self, texts: int, length: int, more: int, like: Tensor) -> Tensor:
        """[texts * length or 1, texts * length + more] of like's dtype, added to the scores of a block of texts.

        0 for the keys of a token's own text, -inf for the others and for `more` keys after them.
        """
        mask = self._masks.get((texts, length))
        if mask is None:
            text = torch.arange(texts * length + more, device=like.device) // length
            others = text[: texts * length, None] != text if texts > 1 else (text > 0)[None]
            mask = self._masks[texts, length] = like.new_zeros(others.shape).masked_fill_(others, -math.inf)
        return mask


def packed_attention(
    module: nn.Module | None,
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
            "on padded input, call set_attn_implementation('sdpa') on a copy of it first"
        )
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if query.is_cuda and query.dtype != torch.float32 and not dropout and _flash_fits(query):
        return _varlen(query, key, value, scaling, packing, sliding_window)[None], None
    out: list[Tensor] = []
    start = 0
    for texts, length in packing.groups:
        together, more, mask = _best_block(packing, texts, length, sliding_window, query)
        blocks, size = -(-texts // together), together * length
        q, k, v = (
            _rows_in_blocks(x, start, blocks, size, extra) for x, extra in ((query, 0), (key, more), (value, more))
        )
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
        out.append(found.transpose(1, 2).flatten(0, 1)[: texts * length])
        start += texts * length
    return (out[0].contiguous() if len(out) == 1 else torch.cat(out))[None], None


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
        states = qkv.view(1, len(qkv), -1, head_size).transpose(1, 2)
        query, key, value = states.split((heads, kv_heads, kv_heads), 1)
        out, _ = packed_attention(None, query, key, value, None, packing=packing, sliding_window=window)
        return out.view(len(qkv), heads * head_size)
    found: list[Tensor] = []
    width, start = qkv.shape[1], 0
    for texts, length in packing.groups:
        together, more, mask = _best_block(packing, texts, length, window, qkv)
        blocks, size = -(-texts // together), together * length
        rows, first = qkv, start
        if (missing := start + blocks * size + more - len(qkv)) > 0:  # after the last texts of the row
            rows, first = F.pad(qkv[start:], (0, 0, 0, missing)), 0
        stride, begin = (size * width, head_size, width, 1), rows.storage_offset() + first * width
        q = rows.as_strided((blocks, heads, size, head_size), stride, begin)
        shape = (blocks, kv_heads, size + more, head_size)
        k = rows.as_strided(shape, stride, begin + heads * head_size)
        v = rows.as_strided(shape, stride, begin + (heads + kv_heads) * head_size)
        if kv_heads != heads:
            k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        states = F.scaled_dot_product_attention(q, k, v, mask)
        found.append(states.transpose(1, 2).reshape(blocks * size, heads * head_size)[: texts * length])
        start += texts * length
    return found[0] if len(found) == 1 else torch.cat(found)


def _best_block(
    packing: Packing, texts: int, length: int, window: int | None, like: Tensor
) -> tuple[int, int, Tensor | None]:
    """How attention over texts of one length is computed fastest.

    torch's CPU kernel takes each head of each text for itself, which costs far more than the arithmetic of a few
    tokens, and computes the exponentials of an incomplete vector register one by one. So short texts share blocks, and
    keys are padded to whole registers; a mask hides from a token what is not its own text. On a CPU with registers of
    16 numbers blocks brought texts of 3 to 14 tokens to 0.2 to 0.45 of their time in bfloat16, 0.5 to 0.6 in float32;
    padding alone brought lengths with four or more numbers left over to 0.53 to 1.03, 0.75 on average.

    Returns:
        Texts in a block, how many keys after a block attention reads too, and the mask to add to the scores.
    """
    if window is not None and length > window:
        return 1, 0, packing.window_mask(length, window, like)
    # Gradients of strided views are slow. And a text's NaN reaches those that share its block: in float16 one text may
    # overflow alone, in float32 and bfloat16 only weights that are not finite make any.
    if like.is_cuda or like.dtype not in (torch.float32, torch.bfloat16) or torch.is_grad_enabled():
        return 1, 0, None
    most = min(texts, _BLOCK // max(1, length))
    if most < (2 if like.dtype == torch.bfloat16 else 3):  # in float32 two texts of 16 tokens are as fast alone
        most = 1
    together = -(-texts // -(-texts // most))  # all blocks about full
    left_over = together * length % _LANES
    more = -left_over % _LANES
    if together == 1 and (left_over < _LANES // 4 or texts * length * length < _MASK_SCORES):
        return 1, 0, None
    return together, more, packing.block_mask(together, length, more, like)


def _rows_in_blocks(x: Tensor, start: int, blocks: int, size: int, more: int) -> Tensor:
    """[blocks, heads, size + more, d] of x [1, heads, N, d]: each block from row `start`, and what follows it in x.

    A view, so padding costs no copy; a mask hides the neighbours' keys, so their weights are exactly 0.
    """
    rows = x[0]
    if torch.is_grad_enabled():  # the gradient of a strided view is slow
        taken: Tensor = rows[:, start : start + blocks * size].unflatten(1, (blocks, size))
        return taken.transpose(0, 1)
    if (missing := start + blocks * size + more - rows.shape[1]) > 0:  # after the last texts of the row
        rows, start = F.pad(rows[:, start:], (0, 0, 0, missing)), 0
    head, row, number = rows.stride()
    shape, stride = (blocks, rows.shape[0], size + more, rows.shape[2]), (size * row, head, row, number)
    return rows.as_strided(shape, stride, rows.storage_offset() + start * row)


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
        skipped_id: the token id that has no position of its own, where the model counts positions over the others
            (RoBERTa's family); None where it counts all tokens from 0.
        fill_id: the token id that fills up padded rows.
        most_tokens: tokens of one packed forward at most, where a table of the model is no longer; None for no limit.
        reads_own: whether layers are what the whole model gives as `hidden_states`, because reading them inside is not
            right; the forward then does not stop at the highest layer.
        changes_itself: whether a forward changes more of the model than its output, so that each begins with it as it
            was loaded.
    """

    way: Literal["fused", "packed", "padded", "grouped"]
    reason: str
    skipped_id: int | None = None
    fill_id: int = 0
    most_tokens: int | None = None
    reads_own: bool = False
    changes_itself: bool = False

    @property
    def first_position(self) -> int:
        """The position id of a text's first token."""
        return 0 if self.skipped_id is None else self.skipped_id + 1

    @property
    def packs(self) -> bool:
        """Whether texts of any length share a row."""
        return self.way in ("fused", "packed")


def packed_positions(ids: npt.NDArray[Any], lengths: Int32Array, batching: BatchingSupport) -> npt.NDArray[Any]:
    """[N] the position id of each token of a packed row, as the model gives them to each text alone.

    Args:
        ids: [N] the token ids, text by text.
        lengths: [B] tokens of each text.
        batching: how the model counts.
    """
    if batching.skipped_id is None:
        return steps(lengths, np.int32)
    counted = ids != batching.skipped_id
    before = cumulate(counted)
    within = before[1:] - np.repeat(before[cumulate(lengths)[:-1]], lengths)
    positions: npt.NDArray[Any] = np.where(counted, within, 0) + batching.skipped_id
    return positions


@contextmanager
def plain_mode(device: torch.device) -> Iterator[None]:
    """A context without gradients, inference tensors and autocast, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
