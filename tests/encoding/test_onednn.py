"""Products of blocked weights: equal to torch's own, in any number of rows, or not used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bertstream.encoding import onednn

pytestmark = pytest.mark.skipif(not onednn.available(torch.float32), reason="this torch is built without oneDNN")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 64, 300])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_blocked_weight_gives_the_product_of_the_plain_one(
    dtype: torch.dtype, rows: int, activation: str, bias: bool
) -> None:
    torch.manual_seed(0)
    x, weight, offset = torch.randn(rows, 48), torch.randn(80, 48), torch.randn(80)
    right = F.linear(x, weight, offset if bias else None)
    right = F.gelu(right) if activation == "gelu" else right
    blocked = onednn.blocked(weight.to(dtype), 64)
    found = onednn.linear(x.to(dtype), blocked, offset.to(dtype) if bias else None, activation)
    error = float((found.float() - right).norm() / right.norm())
    assert found.dtype == dtype and error < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("wrong", ["missing", "inexact"])
def test_operators_that_are_missing_or_compute_something_else_are_not_available(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.ops.mkldnn

    class Operators:
        _reorder_linear_weight = staticmethod(real._reorder_linear_weight)
        if wrong == "inexact":

            @staticmethod
            def _linear_pointwise(*arguments: object) -> torch.Tensor:
                found: torch.Tensor = real._linear_pointwise(*arguments)
                return found + 0.01

    onednn.available.cache_clear()
    monkeypatch.setattr(onednn, "_operators", Operators)
    assert not onednn.available(torch.float32)
    monkeypatch.undo()
    onednn.available.cache_clear()
    assert onednn.available(torch.float32)


def test_a_dtype_that_onednn_does_not_multiply_is_not_available() -> None:
    assert not onednn.available(torch.float64)
