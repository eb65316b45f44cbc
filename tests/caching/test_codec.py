"""Rows become bytes and come back, exactly or within the stated errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bertstream import Encoder
from bertstream.caching.codec import Codec, Storage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(8,), (3, 5), (1,)])
def test_auto_keeps_every_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    codec = Codec("auto", shape, dtype)
    values = torch.randn(7, *shape).to(dtype)
    values[0] = float("nan")
    values[1] = -0.0
    rows = codec.pack(values)
    assert rows.shape == (7, codec.row_bytes)
    found = codec.unpack(rows)
    assert found.dtype == dtype and found.shape == values.shape
    assert found.contiguous().view(torch.uint8).equal(values.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    ("storage", "row_bytes"), [("auto", 1536), ("float32", 1536), ("bfloat16", 768), ("int8", 408)]
)
def test_a_stored_row_has_the_bytes_of_its_storage(storage: Storage, row_bytes: int) -> None:
    assert Codec(storage, (384,), torch.float32).row_bytes == row_bytes


def test_empty_input_gives_empty_output() -> None:
    for storage in ("auto", "bfloat16", "int8"):
        codec = Codec(storage, (70,), torch.float32)
        assert codec.unpack(codec.pack(torch.zeros(0, 70))).shape == (0, 70)


def test_different_storage_has_a_different_name() -> None:
    makes = [("auto", (8,)), ("bfloat16", (8,)), ("int8", (8,)), ("int8", (4, 2))]
    assert len({Codec(storage, shape, torch.float32).name for storage, shape in makes}) == 4
    assert Codec("auto", (8,), torch.float32).name == Codec("float32", (8,), torch.float32).name


@given(
    hnp.arrays(
        "float32",
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=150),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
def test_int8_errors_are_at_most_half_a_step_of_the_group(values: object) -> None:
    tensor = torch.as_tensor(values)
    codec = Codec("int8", (tensor.shape[1],), torch.float32)
    found = codec.unpack(codec.pack(tensor))
    for start in range(0, tensor.shape[1], 32):
        group, back = tensor[:, start : start + 32], found[:, start : start + 32]
        # Half a step of a scale that is rounded up by at most 1 %; for the smallest floats that underflows.
        allowed = group.abs().amax(1, keepdim=True) * (0.5 * 1.02 / 127) + 1e-36
        assert bool(((group - back).abs() <= allowed).all())


def test_a_row_is_stored_independently_of_other_rows() -> None:
    codec = Codec("int8", (100,), torch.float32)
    values = torch.randn(50, 100)
    assert (codec.pack(values)[7:8] == codec.pack(values[7:8])).all()


def test_errors_on_real_vectors_match_the_documented_ones(minilm: Encoder, sentences: list[str]) -> None:
    values = minilm(sentences[:60]).values
    cases: list[tuple[Storage, float, float]] = [("bfloat16", 0.002, 0.004), ("int8", 0.008, 0.015)]
    for storage, on_average, at_most in cases:
        codec = Codec(storage, (384,), torch.float32)
        errors = (codec.unpack(codec.pack(values)) - values).norm(dim=1) / values.norm(dim=1)
        assert on_average / 10 < float(errors.mean()) <= on_average
        assert float(errors.max()) <= at_most
