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


@pytest.mark.parametrize("skipped", [None, [0, 0, 0], [2, 0, 5]])
def test_weights_count_the_rows_that_were_left_out_before_a_run(skipped: list[int] | None) -> None:
    values, lengths = torch.arange(12.0).view(6, 2), [2, 0, 4]
    found = pool_runs(values, offsets(lengths), "weighted_mean", None if skipped is None else torch.tensor(skipped))
    for run, rows, first in zip(found, values.split(lengths), skipped or [0, 0, 0], strict=True):
        weights = torch.arange(first + 1.0, first + 1 + len(rows))[:, None]
        right = (rows * weights).sum(0) / weights.sum() if len(rows) else torch.zeros(2)
        torch.testing.assert_close(run, right)


def test_weights_of_a_book_sum_to_more_than_32_bits_hold() -> None:
    found = pool_runs(torch.ones(50_000, 1), offsets([50_000]), "weighted_mean")
    torch.testing.assert_close(found, torch.ones(1, 1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("lengths", [[1], [3, 0, 5], [0], [2, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_by_the_root_of_the_length_is_the_sum_divided_by_it(lengths: list[int], dtype: torch.dtype) -> None:
    values = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = pool_runs(values, offsets(lengths), "mean_sqrt_len")
    right = [rows.double().sum(0) / max(1, len(rows)) ** 0.5 for rows in values.split(lengths)]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.stack(right), atol=1e-5, rtol=1e-5)


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


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    st.sampled_from(DTYPES),
    st.sampled_from([(), (2,)]),
    st.integers(0, 9),
)
@example([2], torch.float32, (), 0)
@example([0, 2, 0], torch.float32, (), 0)
def test_rows_that_tie_for_a_maximum_share_its_gradient(
    lengths: list[int], dtype: torch.dtype, layers: tuple[int, ...], seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    # Few different values, so that most runs have ties; the weights are of both signs.
    values = torch.randint(-1, 2, (sum(lengths), *layers, H), generator=random).to(dtype).requires_grad_()
    weights = torch.randn(len(lengths), *layers, H, generator=random).to(dtype)
    found = pool_runs(values, offsets(lengths), "max")
    (found * weights).sum().backward()
    exact = values.detach().double().requires_grad_()
    parts = [part.amax(0) if len(part) else torch.zeros(*layers, H).double() for part in exact.split(lengths)]
    (torch.stack(parts) * weights).sum().backward()
    assert found.dtype == dtype and torch.equal(found.double(), torch.stack(parts))
    assert values.grad is not None and values.grad.dtype == dtype
    right = torch.zeros_like(exact) if exact.grad is None else exact.grad
    torch.testing.assert_close(values.grad.double(), right, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("number", [-1.0, 1.0])
def test_the_parts_of_a_maximums_gradient_add_up_whatever_its_sign(number: float) -> None:
    values = torch.tensor([[2.0], [2.0], [-1.0]], requires_grad=True)
    (number * pool_runs(values, offsets([3]), "max")).sum().backward()
    assert values.grad is not None and values.grad.flatten().tolist() == [number / 2, number / 2, 0]


def test_maxima_are_those_of_torch_with_and_without_gradients() -> None:
    values, cu_seqlens = torch.randn(9, H), offsets([4, 0, 5])
    right = torch.stack([values[:4].amax(0), torch.zeros(H), values[4:].amax(0)])
    with torch.inference_mode():
        assert torch.equal(pool_runs(values, cu_seqlens, "max"), right)
    assert torch.equal(pool_runs(values.requires_grad_(), cu_seqlens, "max"), right)
