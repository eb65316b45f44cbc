"""Packed attention equals attention text by text, and only models for which that holds may use it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import tiny
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
)
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

from bertstream import EncoderError
from bertstream.encoding import attention
from bertstream.encoding.attention import PACKED, BatchingSupport, Packing, attend, packed_attention, packed_positions
from bertstream.tokens import cumulate


def packing_of(lengths: list[int]) -> Packing:
    return Packing(np.array(lengths, np.int32), torch.from_numpy(cumulate(np.array(lengths))))


def qkv(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(1, tokens, 2, 8, generator=generator).transpose(1, 2).requires_grad_() for _ in range(3)]


def one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], window: int | None = None) -> Any:
    rows, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        steps = torch.arange(length)
        seen = (steps[:, None] - steps).abs() < (window or length)
        rows.append(F.scaled_dot_product_attention(q[:, :, part], k[:, :, part], v[:, :, part], attn_mask=seen))
        start += length
    return torch.cat(rows, 2).transpose(1, 2)


def plain_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int,
    *, scale: float | None, window_size: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    """[N, heads, d]: what torch's documentation says of the kernel, which needs CUDA."""
    assert cu_q is cu_k and max_q == max_k == int(cu_q.diff().max())
    out = []
    left, right = (side if side >= 0 else max_q for side in window_size)
    for start, end in pairwise(cu_q.tolist()):
        steps = torch.arange(end - start)
        seen = (steps >= steps[:, None] - left) & (steps <= steps[:, None] + right)
        rows = (x[start:end].transpose(0, 1) for x in (q, k, v))
        out.append(F.scaled_dot_product_attention(*rows, attn_mask=seen, scale=scale).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_the_flash_kernel_is_called_for_the_same(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    lengths = [7, 5, 5, 1]
    q, k, v = qkv(sum(lengths))
    right = one_by_one(q, k, v, lengths, window)
    found = attention._varlen(q, k, v, None, packing_of(lengths), window)
    torch.testing.assert_close(found[None], right)
    scaled = attention._varlen(q, k, v, 2.0, packing_of(lengths), window)[None]
    assert torch.allclose(scaled, right) == (window == 1), "a token that sees itself alone has one weight"


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), window=st.none() | st.integers(1, 9))
def test_each_text_attends_only_to_itself(lengths: list[int], window: int | None) -> None:
    q, k, v = qkv(sum(lengths))
    packing = packing_of(lengths)
    out, _ = packed_attention(nn.Identity(), q, k, v, None, packing=packing, sliding_window=window)
    right = one_by_one(q, k, v, lengths, window)
    assert out.is_contiguous()
    torch.testing.assert_close(out, right, atol=1e-6, rtol=1e-5)
    for found, expected in zip(
        torch.autograd.grad(out.square().sum(), (q, k, v)),
        torch.autograd.grad(right.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


RUNS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 70) | st.integers(1, 6)), min_size=1, max_size=5)
"""Texts and their length, one run after the other."""


@example(runs=[(11, 3)], window=None, dtype=torch.float32)  # one run, and its last block is not full
@given(runs=RUNS, window=st.none() | st.integers(1, 80), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_texts_that_share_a_block_see_only_themselves(
    runs: list[tuple[int, int]], window: int | None, dtype: torch.dtype
) -> None:
    lengths = [length for texts, length in runs for _ in range(texts)]
    states = torch.randn(sum(lengths), 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        q, k, v = states[None].transpose(1, 2).split(2, 1)
        right = one_by_one(*(x.double() for x in (q, k, v)), lengths, window).float()
        packed, _ = packed_attention(None, q, k, v, None, packing=packing_of(lengths), sliding_window=window)
        fused = attend(states.flatten(1), 2, 2, 8, packing_of(lengths), window)
    assert packed.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for found in (packed, fused.view_as(packed)):
        torch.testing.assert_close(found.float(), right, atol=tolerance, rtol=tolerance)


@given(runs=RUNS, chosen=st.integers(0, 10_000), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_bit_of_a_text_depends_on_what_the_others_hold(
    runs: list[tuple[int, int]], chosen: int, dtype: torch.dtype
) -> None:
    lengths = [length for texts, length in runs for _ in range(texts)]
    cu_seqlens = cumulate(np.array(lengths))
    own = slice(*cu_seqlens[chosen % len(lengths) :][:2].tolist())
    states = torch.randn(sum(lengths), 3 * 2 * 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    others = states * 1e18
    others[own] = states[own]
    with torch.no_grad():
        alone, beside = (attend(x, 2, 2, 8, packing_of(lengths))[own] for x in (states, others))
    assert torch.equal(alone, beside)


@given(lengths=st.lists(st.integers(1, 5), max_size=20))
def test_groups_are_the_runs_of_equal_lengths(lengths: list[int]) -> None:
    groups = packing_of(lengths).groups
    assert [length for texts, length in groups for _ in range(texts)] == lengths
    assert all(a[1] != b[1] for a, b in pairwise(groups))


def test_scores_are_scaled_as_the_model_asks() -> None:
    q, k, v = qkv(6)
    packing = packing_of([6])
    out, _ = packed_attention(nn.Identity(), q, k, v, None, scaling=0.03, packing=packing)
    right = F.scaled_dot_product_attention(q, k, v, scale=0.03).transpose(1, 2)
    torch.testing.assert_close(out, right)


def test_padded_input_is_refused_because_it_would_give_wrong_vectors() -> None:
    model = tiny(BertModel, BertConfig)
    attention.register()
    model.set_attn_implementation(PACKED)
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    with pytest.raises(EncoderError, match="packed row"):
        model(input_ids=ids, attention_mask=(ids > 0).long())


def test_a_sliding_window_limits_attention_in_longer_texts() -> None:
    model = tiny(ModernBertModel, ModernBertConfig, local_attention=16, global_attn_every_n_layers=2, pad_token_id=0)
    texts = [torch.randint(5, 200, (1, length)) for length in (40, 90)]
    with torch.no_grad():
        right = torch.cat([model(input_ids=ids).last_hidden_state for ids in texts], 1)
        attention.register()
        model.set_attn_implementation(PACKED)
        found = model(
            input_ids=torch.cat(texts, 1),
            position_ids=torch.cat([torch.arange(40), torch.arange(90)])[None],
            packing=packing_of([40, 90]),
        ).last_hidden_state
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


@given(texts=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=8), min_size=1, max_size=5))
def test_positions_of_a_packed_row_are_those_of_its_texts(texts: list[list[int]]) -> None:
    lengths = np.array([len(text) for text in texts], np.int32)
    ids = np.concatenate(texts)
    for padding in (0, 3, 9):
        right = [
            RobertaEmbeddings.create_position_ids_from_input_ids(torch.tensor([text]), padding)[0].numpy()
            for text in texts
        ]
        found = packed_positions(ids, lengths, BatchingSupport("packed", "", skipped_id=padding))
        assert found.tolist() == np.concatenate(right).tolist()
    plain = packed_positions(ids, lengths, BatchingSupport("packed", ""))
    assert plain.tolist() == [i for text in texts for i in range(len(text))]
