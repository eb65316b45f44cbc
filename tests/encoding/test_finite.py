"""Vectors that are not finite are found, and the log names their texts."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from families import Tokenizer, make
from hypothesis import given
from hypothesis import strategies as st

from bertstream import Encoder, EncoderError
from bertstream.encoding.finite import texts_not_finite

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@given(st.lists(st.integers(0, 4), max_size=6), st.sampled_from(DTYPES), st.sampled_from([(3,), (2, 3)]), st.data())
def test_the_texts_that_are_not_finite_are_those_of_a_loop(
    lengths: list[int], dtype: torch.dtype, row: tuple[int, ...], data: st.DataObject
) -> None:
    values = torch.full((sum(lengths), *row), torch.finfo(torch.float16).max, dtype=dtype)  # sums fit no float16
    for index in data.draw(st.lists(st.integers(0, max(values.numel() - 1, 0)), max_size=3 * bool(values.numel()))):
        values.view(-1)[index] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    right = [i for i, text in enumerate(values.split(lengths)) if not text.isfinite().all()]
    assert texts_not_finite(values, np.array(lengths, np.int32)) == right


def test_a_row_of_nan_in_the_vocabulary_is_named_once_with_its_text(
    minilm_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make("Bert")
    encoder = Encoder(model, Tokenizer(minilm_folder, model))
    texts = ["the river", "the bank of the river", "a"]
    right = encoder(texts)
    (broken,) = encoder.tokenizer.backend.ids("bank")[1:-1]
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[broken] = math.nan  # type: ignore[union-attr,operator,index]
    with caplog.at_level(logging.WARNING):
        found = [encoder(texts) for _ in range(2)]
    assert all(torch.equal(one[i], right[i]) for one in found for i in (0, 2)) and found[0][1].isnan().all()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "not finite in float32" in message and "1 of 3 texts" in message
    assert "number 1, 'the bank of the river'" in message


def test_a_model_converted_to_float16_later_is_checked_at_its_first_batch(minilm_folder: str) -> None:
    model: Any = make("Bert")
    with torch.no_grad():
        model.encoder.layer[-1].output.dense.weight.mul_(1e7)
        model.encoder.layer[-1].output.LayerNorm.weight.mul_(1e7)
    encoder = Encoder(model, Tokenizer(minilm_folder, model))
    encoder(["some text"])
    with pytest.raises(EncoderError, match="first float16 batch holds values that are not finite"):
        encoder.to(torch.float16)(["some text"])
