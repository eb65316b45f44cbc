"""Forwards run one at a time, are halved when memory runs out, and name the text that a model cannot run."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import tiny_bert
from torch import Tensor
from transformers import (
    FunnelConfig,
    FunnelModel,
)

from bertstream import Encoder, EncoderError
from bertstream.system.cuda import InTurn


def test_weights_are_read_and_written_in_turn(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """On CUDA an optimizer writes weights on one stream, and a loader's encoder reads them on another."""
    encoder, turns = Encoder(tiny_bert(), tokenizer).freeze(), []

    @contextmanager
    def use(self: InTurn, device: torch.device, *shared: Tensor) -> Iterator[None]:
        turns.append((self, encoder.trainable))
        yield
        turns.append((self, encoder.trainable))

    monkeypatch.setattr(InTurn, "use", use)

    def seen(work: Callable[[], object]) -> list[bool]:
        turns.clear()
        work()
        assert {turn for turn, _ in turns} == {encoder._weights_in_turn}
        return [trainable for _, trainable in turns]

    assert seen(lambda: encoder(["a bank"])) == [False, False]
    assert seen(encoder.fingerprint) == [False, False]
    assert seen(encoder.unfreeze)[-2:] == [False, True], "training after this waits for all earlier encoding"
    assert seen(lambda: encoder(["a bank"])) == [True, True]
    assert seen(encoder.freeze) == [True, False], "encoding after this waits for all earlier training"


def test_one_encoder_serves_many_threads_one_forward_at_a_time(
    minilm: Encoder, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most, found = 0, 0, {}
    forward = minilm._fused_forward

    def counted(*given: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.005)
        made = forward(*given)
        inside -= 1
        return made

    monkeypatch.setattr(minilm, "_fused_forward", counted)

    def work(number: int) -> None:
        found[number] = minilm(sentences[number * 5 : number * 5 + 5]).values

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    for number, values in found.items():
        assert torch.equal(values, minilm(sentences[number * 5 : number * 5 + 5]).values)


def test_a_forward_that_runs_out_of_memory_is_halved_and_later_ones_are_smaller(
    tokenizer: Any, sentences: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = Encoder(tiny_bert(), tokenizer, max_forward_tokens=64)(sentences[:100])
    encoder = Encoder(tiny_bert(), tokenizer)
    run, sizes = encoder.model.forward, []

    def forward(input_ids: Tensor, **named: Any) -> Any:
        sizes.append(input_ids.numel())
        if input_ids.numel() > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(input_ids=input_ids, **named)

    monkeypatch.setattr(encoder.model, "forward", forward)
    found = encoder(sentences[:100])
    assert torch.allclose(found.values, right.values, atol=1e-5)
    assert max(sizes) > 300 and encoder.max_forward_tokens <= 300
    assert "ran out of memory" in caplog.text and f"max_forward_tokens={encoder.max_forward_tokens}" in caplog.text
    sizes.clear()
    encoder(sentences[:100])
    assert max(sizes) <= 300
    before, few = encoder.max_forward_tokens, 3
    monkeypatch.setattr(encoder.model, "forward", lambda **named: forward_if(few, **named))

    def forward_if(most: int, **named: Any) -> Any:
        if named["input_ids"].numel() > most + 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(**named)

    encoder(["a bank"] * 30)
    assert encoder.max_forward_tokens == min(before, 256), (
        "a shortage caused elsewhere does not shrink forwards to single texts for good"
    )
    longest = max(sentences, key=len)
    monkeypatch.setattr(encoder.model, "forward", lambda **named: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):
        encoder([longest])  # a single text cannot be split


@pytest.mark.parametrize("kind", [RuntimeError, IndexError, AssertionError])
def test_a_text_that_the_model_itself_cannot_run_is_refused_by_its_length(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    for packed, said in ((None, "2 texts of 3 to 6 tokens"), (False, "2 texts of 3 to 6 tokens")):
        encoder = Encoder(tiny_bert(), tokenizer, packed=packed)
        encoder.train()  # fused forwards do not call the model

        def pooling(*arguments: Any, **named: Any) -> Any:
            raise kind("output [1, 2, 1] doesn't match [1, 2, 2]")

        monkeypatch.setattr(encoder.model, "forward", pooling)
        with pytest.raises(EncoderError, match=rf"BertModel fails .* {said} \({kind.__name__}: output") as caught:
            encoder(["bank", "the bank of river"])
        assert isinstance(caught.value.__cause__, kind)
        with pytest.raises(EncoderError, match="a text of 3 tokens"):
            encoder(["bank"])


def test_funnel_takes_no_text_of_three_tokens_and_says_so(tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = FunnelConfig(
        vocab_size=30522, d_model=32, n_head=4, d_head=8, d_inner=64, block_sizes=[1, 1, 1], num_decoder_layers=1
    )
    encoder = Encoder(FunnelModel(config).eval(), tokenizer)
    assert encoder(["the bank of the river"]).values.isfinite().all()
    with pytest.raises(EncoderError, match="FunnelModel fails in a forward of 2 texts of 3 tokens .*leave texts of"):
        encoder(["the bank of the river", "bank", "river"])


def test_a_failed_forwards_tensors_are_freed_before_the_cuda_cache_is_emptied(
    tokenizer: Any, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(tiny_bert(), tokenizer, max_forward_tokens=4096)
    run, computed, alive = encoder.model.forward, [], []

    def forward(input_ids: Tensor, **named: Any) -> Any:
        hidden = run(input_ids=input_ids, **named)
        if input_ids.numel() > 300:
            computed.append(weakref.ref(hidden.last_hidden_state))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden

    def lower(tokens: int) -> None:
        alive.append(computed[-1]() is not None)
        encoder._size.limit = tokens // 2

    monkeypatch.setattr(encoder.model, "forward", forward)
    monkeypatch.setattr(encoder, "_lower_size", lower)
    encoder(sentences[:100])
    assert alive and not any(alive)
