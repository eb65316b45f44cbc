"""The mean of a text's token vectors, as a float64 loop gives it."""

from __future__ import annotations

import pytest
import torch
from conftest import host_must_not_wait
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from bertstream.encoding.pooling import pool_runs

H = 5
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def offsets(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def mean_pool(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return pool_runs(values, cu_seqlens, "mean")


def loop(values: Tensor, lengths: list[int]) -> Tensor:
    parts = values.double().split(lengths)
    return torch.stack([part.mean(0) if len(part) else torch.zeros(H, dtype=torch.float64) for part in parts])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.sampled_from(DTYPES), st.integers(0, 9))
@example([0], torch.float32, 0)
@example([0, 0, 3, 0], torch.bfloat16, 0)
def test_the_mean_equals_a_float64_loop(lengths: list[int], dtype: torch.dtype, seed: int) -> None:
    """Law 8."""
    values = torch.randn(sum(lengths), H, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = mean_pool(values, offsets(lengths))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), loop(values, lengths), rtol=1e-6, atol=1e-6)


def test_an_empty_text_gives_zeros_and_no_nan() -> None:
    values = torch.randn(3, H, requires_grad=True)
    found = mean_pool(values, offsets([0, 3, 0]))
    assert not found[0].any() and not found[2].any()
    found.sum().backward()
    assert values.grad is not None and torch.equal(values.grad, torch.full((3, H), 1 / 3))


def test_pooling_no_texts_gives_no_rows() -> None:
    assert mean_pool(torch.zeros(0, H), offsets([])).shape == (0, H)


def test_half_precision_neither_overflows_nor_loses_small_parts() -> None:
    """Trap 12: sums are float32's. In float16 four times 60,000 is infinite; in bfloat16 256 + 1 is 256."""
    assert mean_pool(torch.full((4, H), 60_000.0, dtype=torch.float16), offsets([4])).unique().tolist() == [60_000]
    small = torch.ones(512, H, dtype=torch.bfloat16)
    assert mean_pool(small, offsets([512])).unique().tolist() == [1]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_each_row_gets_an_equal_share_of_the_gradient(lengths: list[int]) -> None:
    values = torch.randn(sum(lengths), H, requires_grad=True)
    weights = torch.randn(len(lengths), H)
    (mean_pool(values, offsets(lengths)) * weights).sum().backward()
    right = torch.cat([weight.expand(length, H) / length for weight, length in zip(weights, lengths, strict=True)])
    assert values.grad is not None
    torch.testing.assert_close(values.grad, right)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_on_cuda_equals_the_loop_and_does_not_wait(dtype: torch.dtype) -> None:
    lengths = [3, 0, 40, 1]
    values, cu_seqlens = torch.randn(sum(lengths), H).to("cuda", dtype), offsets(lengths, "cuda")
    with host_must_not_wait():
        found = mean_pool(values, cu_seqlens)
    torch.testing.assert_close(found.cpu().double(), loop(values.cpu(), lengths), rtol=1e-6, atol=1e-6)
