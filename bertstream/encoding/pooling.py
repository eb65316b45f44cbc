"""Token vectors to rows: subwords to words, tokens to sentences, several layers to one.

Shapes: B texts, W words, N tokens in all, H hidden size, K layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import ConfigError, check_at_least

WordPooling: TypeAlias = Literal["first", "last", "mean", "max", "first_last"]
SentencePooling: TypeAlias = Literal["cls", "last", "mean", "max", "mean_sqrt_len", "weighted_mean", "pooler"]
Combine: TypeAlias = Literal["concat", "mean", "sum", "stack"]


def pool_runs(
    values: Tensor, offsets: Tensor, how: WordPooling | SentencePooling, skipped: Tensor | None = None
) -> Tensor:
    """One vector for each run of rows: a word's tokens, or a text's.

    Args:
        values: [N, ...] floating point, any device.
        offsets: [S + 1] int32, same device; run i is rows offsets[i]:offsets[i + 1].
        how: "mean"; "max"; "first", which is also "cls"; "last"; "first_last", both side by side; "weighted_mean", in
            which the k-th row of a run weighs k; "mean_sqrt_len", the sum divided by the root of the number of rows.
        skipped: [S] integers, how many rows of each run were left out before its first, and count in k; None for none.
    Returns:
        [S, ...], twice as wide for "first_last"; float32 for means, which are summed in float32, else the dtype of
        `values`. A run without rows gives zeros. Rows that tie for a maximum share its gradient.
    Source: Reimers and Gurevych 2019 (Sentence-BERT), section 3; weights as in Muennighoff 2022 (SGPT), equation 2.
    """
    if how == "first_last":
        return torch.cat([pool_runs(values, offsets, "first"), pool_runs(values, offsets, "last")], -1)
    lengths = offsets.to(torch.int64).diff()  # the weights of 46,341 rows sum to more than 32 bits hold
    trailing = (1,) * (values.dim() - 1)
    if how in ("mean", "mean_sqrt_len", "weighted_mean"):
        rows, weight = values.float(), lengths
        if how == "weighted_mean":
            runs = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths, output_size=len(values))
            steps = torch.arange(1, len(values) + 1, device=values.device) - offsets[runs]
            weight = lengths * (lengths + 1) // 2
            if skipped is not None:
                steps, weight = steps + skipped[runs], weight + lengths * skipped
            rows = rows * steps.view(-1, *trailing)
        sums = torch.segment_reduce(rows, "sum", offsets=offsets.to(torch.int64), axis=0, unsafe=True)
        weight = weight.clamp(min=1).view(-1, *trailing)
        return sums / (weight.sqrt() if how == "mean_sqrt_len" else weight)
    if not len(values):
        return values.new_zeros(len(lengths), *values.shape[1:])
    if how == "max":
        found = _MaxOfRuns.apply(values, offsets)  # type: ignore[no-untyped-call]
    elif how in ("first", "cls", "last"):
        rows = offsets[1:] - 1 if how == "last" else offsets[:-1]
        found = values.index_select(0, rows.clamp(0, len(values) - 1))
    else:
        raise ConfigError(f"pooling={how!r} is not a pooling of rows")
    return torch.where((lengths > 0).view(-1, *trailing), found, found.new_zeros(()))


class _MaxOfRuns(torch.autograd.Function):
    """The largest number of each run; rows that tie for it share its gradient equally.

    `torch.segment_reduce` shares only a positive gradient: of a negative one each of these rows gets all.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, offsets: Tensor) -> Tensor:
        found = torch.segment_reduce(values.float(), "max", offsets=offsets.to(torch.int64), axis=0, unsafe=True)
        found = found.to(values.dtype)
        ctx.save_for_backward(values, found, offsets)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        values, found, offsets = ctx.saved_tensors
        lengths = offsets.diff()
        runs = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths, output_size=len(values))
        is_max = (values == found.index_select(0, runs)).float()
        ties = torch.segment_reduce(is_max, "sum", offsets=offsets.to(torch.int64), axis=0, unsafe=True)
        share = grads[0].float() / ties.clamp(min=1)
        return (is_max * share.index_select(0, runs)).to(values.dtype), None


def combine_layers(layers: Sequence[Tensor], how: Combine) -> Tensor:
    """Combine several layers into one tensor.

    Args:
        layers: K tensors [N, H].
        how: "concat" to [N, K * H], "mean" or "sum" to [N, H] (float32, summed in float32), "stack" to [N, K, H].
    """
    if len(layers) == 1 and how != "stack":
        return layers[0]
    if how == "concat":
        return torch.cat(list(layers), -1)
    if how == "stack":
        return torch.stack(list(layers), 1)
    total = layers[0].float()
    for layer in layers[1:]:
        total = total + layer
    return total / len(layers) if how == "mean" else total


class ScalarMix(nn.Module):
    """A learned mix of layers, for `combine="stack"`: gamma * sum of softmax(w)_k times layer k.

    Args:
        num_layers: K, how many layers are stacked.
    Source: Peters et al. 2018 (ELMo), equation 1.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        check_at_least("num_layers", num_layers, 1)
        self.weights = nn.Parameter(torch.zeros(num_layers))
        self.gamma = nn.Parameter(torch.ones(()))

    def extra_repr(self) -> str:
        """The share of each layer, for `print`."""
        shares = self.weights.detach().softmax(0).tolist()
        return f"shares={[round(share, 3) for share in shares]}, gamma={self.gamma.item():.3g}"

    def forward(self, values: Tensor) -> Tensor:
        """[..., K, H] to [..., H]."""
        if values.dim() < 2 or values.shape[-2] != len(self.weights):
            raise ConfigError(
                f"values are {list(values.shape)}: the last dimension but one must be the {len(self.weights)} layers, "
                "as combine='stack' returns them"
            )
        return self.gamma * torch.einsum("k,...kh->...h", self.weights.softmax(0).to(values.dtype), values)
