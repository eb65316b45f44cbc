"""An encoder finds the size of its forwards by trying, once, and never against the user's number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import tiny_bert
from torch import Tensor

from bertstream import Encoder
from bertstream.encoding import autotune


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of forwards are measured, which all other tests do without."""
    monkeypatch.setattr("bertstream.encoding.calibrating.fastest_forward_tokens", autotune.fastest_forward_tokens)


@pytest.mark.usefixtures("measured")
def test_calibrate_skips_sizes_without_memory_and_trained_encoders(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    asked = []

    def forward(self: Encoder) -> Callable[[int], None]:
        def run(tokens: int) -> None:
            asked.append(tokens)
            if tokens > 1024:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    monkeypatch.setattr(Encoder, "_feed_forward", forward)
    encoder = Encoder(tiny_bert(), tokenizer).unfreeze()
    assert encoder.calibrate() == 2048 and asked == []
    assert encoder.freeze().calibrate() == 1024 and asked == [1024, 2048]


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(("seconds_a_token", "chosen"), [({1024: 2, 2048: 3, 4096: 4}, 1024), ({4096: 0.99}, 2048)])
def test_the_default_forward_size_is_kept_unless_another_is_clearly_faster(
    seconds_a_token: dict[int, float], chosen: int, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    now = 0.0

    def forward(self: Encoder) -> Callable[[int], None]:
        def run(tokens: int) -> None:
            nonlocal now
            now += tokens * seconds_a_token.get(tokens, 1)

        return run

    monkeypatch.setattr(Encoder, "_feed_forward", forward)
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now)
    encoder = Encoder(tiny_bert(), tokenizer)
    assert encoder.calibrate() == encoder.max_forward_tokens == chosen
    seconds_a_token.clear()
    assert encoder.calibrate() == chosen, "it is measured once"
    assert Encoder(tiny_bert(), tokenizer, max_forward_tokens=77).calibrate() == 77, "a user's number wins"


def test_a_call_with_its_own_forward_tokens_leaves_the_encoder_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, sentences: list[str]
) -> None:
    monkeypatch.setattr("bertstream.encoding.calibrating.fastest_forward_tokens", lambda *arguments: 4096)
    encoder = Encoder(tiny_bert(), tokenizer)
    run, sizes = encoder.model.forward, []

    def forward(input_ids: Tensor, **named: Any) -> Any:
        sizes.append(input_ids.numel())
        return run(input_ids=input_ids, **named)

    monkeypatch.setattr(encoder.model, "forward", forward)
    encoder.calibrate()
    assert (encoder.max_forward_tokens, encoder.default_forward_tokens) == (4096, 2048)
    batch = encoder.tokenizer.batch(sentences[:100])
    own = encoder.encode(batch, max_forward_tokens=300).values
    assert len(sizes) > 1 and max(sizes) <= 300
    assert encoder.max_forward_tokens == 4096
    sizes.clear()
    torch.testing.assert_close(encoder.encode(batch).values, own)
    assert len(sizes) == -(-batch.num_tokens // 4096)
    encoder._lower_size(500)
    sizes.clear()
    encoder.encode(batch, max_forward_tokens=encoder.default_forward_tokens)
    assert max(sizes) <= encoder.max_forward_tokens == 256 and encoder.default_forward_tokens == 2048


def test_both_measured_workloads_run(minilm: Encoder) -> None:
    minilm._feed_forward()(1024)
    (states,), rows = minilm._dummy_forward(256)
    assert states.shape == (256, 384) and rows.tolist() == list(range(256))
