"""CUDA graphs, where there is no CUDA: a replay is the call itself, made again over the same memory."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import Recorded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.torch_version import TorchVersion
from transformers import AutoModel

from bertstream import ConfigError, Encoder, attention, graphs, wrap
from bertstream.attention import plain_mode
from bertstream.graphs import GraphedForward, Shape
from bertstream.types import cumulate, steps


def by_offsets(q: Tensor, k: Tensor, v: Tensor, scaling: Any, packing: Any, window: Any) -> Tensor:
    """[N, heads, d]: attention as the flash kernel does it, which knows offsets and a bound of the lengths alone."""
    ends = packing.cu_seqlens.tolist()
    assert ends[0] == 0 and ends[-1] == q.shape[2], "rows that no text covers are never written"
    assert max(b - a for a, b in pairwise(ends)) <= packing.max_length
    rows = [
        torch.nn.functional.scaled_dot_product_attention(*(x[:, :, a:b] for x in (q, k, v)), scale=scaling)
        for a, b in pairwise(ends)
        if b > a
    ]
    return torch.cat(rows, 2)[0].transpose(0, 1)


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "GraphPool", Recorded)
    monkeypatch.setattr(attention, "_flash_fits", lambda query: True)
    monkeypatch.setattr(attention, "_varlen", by_offsets)


class Graphed(GraphedForward):
    """Of an encoder, and captured at once where a shape was not seen before."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder.model)
        self.forward: Any = partial(encoder._run, None)

    def first(self, lengths: list[int], seed: int = 0, most: int = 1024) -> list[Tensor] | None:
        """Texts of these lengths, of random tokens."""
        held = np.array(lengths, np.int32)
        ids = np.random.default_rng(seed).integers(1000, 20000, int(held.sum()))
        return self.run({"input_ids": ids, "position_ids": steps(held).astype(np.int64)}, held, most)

    def __call__(self, lengths: list[int], seed: int = 0, most: int = 1024) -> list[Tensor] | None:
        with plain_mode(torch.device("cpu")):
            found = self.first(lengths, seed, most)
            if found is not None:
                return found
            self.capture(self.forward)
            return self.first(lengths, seed, most)


@cache
def plain_model(folder: str) -> Any:
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def one_by_one(encoder: Encoder, lengths: list[int], seed: int = 0) -> Tensor:
    ids = torch.from_numpy(np.random.default_rng(seed).integers(1000, 20000, sum(lengths)))
    plain = plain_model(encoder.model.config._name_or_path)
    with torch.no_grad():
        return torch.cat([plain(input_ids=part[None]).last_hidden_state[0] for part in ids.split(lengths)])


@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=80))
def test_a_shape_has_room_for_its_texts_and_little_more(lengths: list[int]) -> None:
    held = np.array(lengths, np.int32)
    shape = Shape.around(held, ["input_ids"])
    assert sum(lengths) <= shape.tokens <= max(256, sum(lengths) * 9 / 8)
    assert max(lengths) <= shape.longest <= max(16, 2 * max(lengths))
    assert len(lengths) <= shape.texts < 2 * shape.tokens + 1


@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=80))
def test_texts_and_padding_cover_every_row_and_no_text_is_longer_than_the_shapes(lengths: list[int]) -> None:
    held = np.array(lengths, np.int32)
    shape = Shape.around(held, ["input_ids"])
    offsets = shape.offsets(held)
    assert offsets.dtype == np.int32 and len(offsets) == shape.texts + 1
    assert offsets[: len(lengths) + 1].tolist() == cumulate(held).tolist()
    assert offsets[-1] == shape.tokens and (np.diff(offsets) >= 0).all() and np.diff(offsets).max() <= shape.longest


def test_forwards_of_all_sizes_have_few_shapes() -> None:
    shapes = {Shape.around(np.full(tokens // 32, 32, np.int32), []).tokens for tokens in range(32, 1 << 16, 32)}
    assert len(shapes) <= 8 * 8 + 1


@pytest.mark.usefixtures("replaying")
def test_a_replay_equals_plain_transformers_whatever_was_in_memory_before(minilm: Encoder) -> None:
    forward = Graphed(minilm)
    for seed, lengths in enumerate(([9, 7, 7, 1], [200, 30], [16] * 12, [5], [140, 90])):
        found = forward(lengths, seed)
        assert found is not None
        torch.testing.assert_close(found[0], one_by_one(minilm, lengths, seed), atol=2e-5, rtol=1e-4)
    assert forward.captured == 3 and not forward.given_up, "the second and the last have a graph each"


@pytest.mark.usefixtures("replaying")
def test_what_is_handed_out_is_not_overwritten_by_the_next_replay(minilm: Encoder) -> None:
    forward = Graphed(minilm)
    first = [forward([8, 8], seed) for seed in (0, 1)][1]
    assert first is not None
    kept = first[0].clone()
    forward([8, 8], 2)
    assert torch.equal(first[0], kept)


@pytest.mark.usefixtures("replaying")
def test_several_layers_come_each_for_itself(minilm_folder: str) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, dtype="float32", device="cpu", layers=[0, 3, 6])
    found = Graphed(encoder)([6, 4])
    assert found is not None and [tuple(rows.shape) for rows in found] == [(10, 384)] * 3
    torch.testing.assert_close(found[2], one_by_one(encoder, [6, 4]), atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("replaying")
def test_other_weights_let_the_graphs_go_and_trained_ones_have_none(minilm_folder: str) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, dtype="float32", device="cpu")
    forward = Graphed(encoder)
    before = forward([6, 4])
    encoder.unfreeze()
    assert forward([6, 4]) is None, "a training step may change the weights at any time"
    with torch.no_grad():
        encoder.model.encoder.layer[0].output.dense.weight.data = torch.zeros(384, 1536)
    encoder.freeze()
    after = forward([6, 4])
    assert before is not None and after is not None and forward.captured == 1
    assert not torch.allclose(before[0], after[0], atol=1e-3)


@pytest.mark.usefixtures("replaying")
def test_a_larger_forward_takes_new_memory_and_the_graphs_over_the_old_are_let_go(minilm: Encoder) -> None:
    forward = Graphed(minilm)
    forward([8], most=300)
    forward([200, 200], most=300)
    assert forward.captured == 1
    found = forward([8])
    assert found is not None and forward.captured == 2
    torch.testing.assert_close(found[0], one_by_one(minilm, [8]), atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("replaying")
def test_a_shape_is_captured_when_it_is_asked_for_and_not_by_the_forward_that_has_it_first(minilm: Encoder) -> None:
    """The forward may run beside a training step that waits for the device, which no capture allows."""
    forward = Graphed(minilm)
    assert forward.first([8]) is None and forward.first([40]) is None and forward.captured == 0
    for captured in (1, 2, 2):
        forward.capture(forward.forward)
        assert forward.captured == captured
    assert forward.first([8]) is not None and forward.first([40]) is not None


@pytest.mark.usefixtures("replaying")
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
def test_any_shape_can_be_captured_before_its_texts_come(minilm: Encoder, lengths: list[int]) -> None:
    forward = Graphed(minilm)
    found = forward(lengths)
    assert found is not None and forward.captured == 1
    torch.testing.assert_close(found[0], one_by_one(minilm, lengths), atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("replaying")
def test_weights_that_change_before_a_capture_put_it_off(minilm_folder: str) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, dtype="float32", device="cpu")
    forward = Graphed(encoder)
    forward.first([8])
    with torch.no_grad():
        next(encoder.model.parameters()).mul_(1)
    forward.capture(forward.forward)
    assert forward.captured == 0 and forward([8]) is not None


@pytest.mark.usefixtures("replaying")
def test_shapes_beyond_the_most_run_without(minilm: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    forward = Graphed(minilm)
    assert forward([8]) is not None
    assert forward([40]) is None and forward.captured == 1
    assert forward([9]) is not None and not forward.given_up


def test_without_the_flash_kernel_graphs_are_given_up_with_the_reason(
    minilm: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    forward = Graphed(minilm)
    with caplog.at_level(logging.WARNING, "bertstream"):
        assert forward([8]) is None and forward([8]) is None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("BertModel runs without CUDA graphs: EncoderError: the lengths of the texts")
    assert "float32 on cpu" in forward.given_up


@pytest.mark.usefixtures("replaying")
@pytest.mark.parametrize("fault", ["raises", "writes nothing", "is off"])
def test_a_capture_that_fails_or_replays_something_else_ends_the_graphs(
    minilm: Encoder, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    class Broken(Recorded):
        def capture(self, work: Callable[[], object]) -> Callable[[], object]:
            if fault == "raises":
                raise RuntimeError("operation not permitted when stream is capturing")

            def replay() -> None:
                if fault == "is off":
                    forward._inputs["input_ids"] += 1
                    work()

            return replay

    monkeypatch.setattr(graphs, "GraphPool", Broken)
    forward = Graphed(minilm)
    assert forward([8]) is None and forward.captured == 0
    said = "RuntimeError: operation not permitted" if fault == "raises" else "a replay differs"
    assert forward.given_up.startswith(said)


@pytest.mark.usefixtures("replaying")
def test_a_capture_without_memory_ends_the_graphs_and_not_the_loop(minilm: Encoder) -> None:
    def full(**inputs: Any) -> list[Tensor]:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    forward = Graphed(minilm)
    forward.forward = full
    assert forward([8]) is None and forward.given_up.startswith("OutOfMemoryError: tried to allocate")


def test_an_encoder_that_is_trained_or_moved_lets_its_graphs_go(minilm_folder: str) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, dtype="float32", device="cpu")
    changes: list[Callable[[], object]] = [encoder.unfreeze, encoder.freeze, lambda: encoder.to("cpu"), encoder.float]
    for change in changes:
        encoder._graphs = Graphed(encoder)
        change()
        assert encoder._graphs is None


def test_a_loader_captures_in_the_thread_of_the_loop(
    minilm: Encoder, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(minilm, "capture_graph", lambda: seen.append(threading.current_thread()))
    for _ in wrap([sentences[i : i + 4] for i in range(0, 20, 4)], minilm, prefetch=3):
        pass
    assert seen == [threading.current_thread()] * 5


def test_graphs_keep_no_encoder_alive(minilm_folder: str) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, dtype="float32", device="cpu")
    encoder._graphs = GraphedForward(encoder.model)
    gone = weakref.ref(encoder)
    gc.disable()
    try:
        del encoder
        assert gone() is None
    finally:
        gc.enable()


def test_torch_before_2_13_is_refused_with_the_reason(minilm: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1+cpu"))
    with pytest.raises(ConfigError, match="wants torch 2.13 or later, this is 2.12.1.*a dropout's in"):
        Encoder(minilm.model, minilm._pretrained_tokenizer, cuda_graphs=True)


def test_on_a_cpu_the_option_changes_nothing(
    minilm: Encoder, minilm_folder: str, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0"))
    encoder = Encoder.from_pretrained(minilm_folder, dtype="float32", device="cpu", cuda_graphs=True)
    assert torch.equal(encoder(sentences[:20]).values, minilm(sentences[:20]).values)
    assert encoder.split(at=3)[0].cuda_graphs
