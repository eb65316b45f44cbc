"""The encode stage by itself: batches in, the same ones out in order, each with its own vectors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bertstream
from bertstream import Embeddings, EncoderError, TokenBatch
from bertstream.pipeline.clocks import Stages
from bertstream.pipeline.encode import EncodeStage, Ready
from bertstream.pipeline.epoch import Run
from bertstream.pipeline.source import Entry
from bertstream.reading.window import Skip
from bertstream.system.cuda import SideStream
from bertstream.testing import FakeEncoder


class Frozen(FakeEncoder):
    """Fails on the word "bad", and says how often it was frozen."""

    times_frozen = 0
    trainable = False

    def encode(self, batch: TokenBatch) -> Embeddings:
        if BAD in batch.input_ids:
            raise EncoderError("a bad word", records=(0,))
        return super().encode(batch)


BAD = FakeEncoder().tokenizer(["bad"])[0].input_ids[0]


def stage(encoder: FakeEncoder | None = None) -> EncodeStage:
    return EncodeStage(encoder or Frozen(), None, None, Stages())


def entries(*items: Any) -> Iterator[Entry]:
    return (Entry(item) for item in items)


def assert_own_vectors(found: Ready) -> None:
    texts = found.entry.item
    right = Frozen().encode(TokenBatch.from_texts(Frozen().tokenizer(texts)))
    (embeddings,) = found.embeddings.values()
    assert isinstance(embeddings, Embeddings)
    assert torch.equal(embeddings.values, right.values) and torch.equal(embeddings.cu_seqlens, right.cu_seqlens)


TEXTS = st.lists(st.sampled_from(["", "one", "one two", "one two three"]), max_size=4)


@given(st.lists(TEXTS | st.builds(Skip, st.integers(0, 3)), max_size=12), st.integers(1, 20), st.booleans())
def test_whatever_comes_goes_out_once_in_order_with_its_own_vectors(
    items: list[Any], limit: int, by_the_clock: bool
) -> None:
    tried = stage()
    found = list(tried.run(entries(*items), Run(), limit=limit, by_the_clock=by_the_clock))
    assert [item if isinstance(item, Skip) else item.entry.item for item in found] == items
    ready = [item for item in found if isinstance(item, Ready)]
    for item in ready:
        tried.hand_over(item)
        assert_own_vectors(item)
        assert item.tokens == sum(len(text.split()) for text in item.entry.item)
    counts = tried.counts
    assert counts.encode_calls <= len(ready) and counts.encoded_tokens <= sum(item.tokens for item in ready)


@pytest.mark.parametrize("limit", [1, 100])
def test_a_batch_that_fails_is_named_and_comes_behind_those_before_it(limit: int) -> None:
    items = [["one"], ["two", "three"], Skip(0), ["four"], ["bad"], ["five"]]
    run = stage().run(entries(*items), Run(), limit=limit, by_the_clock=False)
    found = [next(run) for _ in range(4)]
    for item in found:
        assert isinstance(item, Skip) or assert_own_vectors(item) is None
    with pytest.raises(EncoderError, match="batch 3: a bad word") as caught:
        next(run)
    assert caught.value.records == (0,)
    assert list(run) == []


def test_an_epoch_follows_what_its_loop_has_done_to_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Side(SideStream):
        def follow(self) -> None:
            done.append(f"follows {threading.current_thread().name}")

        def run(self) -> AbstractContextManager[object]:
            done.append("encodes")
            return super().run()

    monkeypatch.setattr("bertstream.pipeline.encode.SideStream", Side)
    for prefetch in (0, 8):
        done.clear()
        loader = bertstream.wrap([["one"]], Frozen(), prefetch=prefetch)
        assert len(list(loader)) == len(list(loader)) == 1
        assert done == ["follows MainThread", "encodes"] * 2


def test_what_was_made_before_a_training_is_made_again_or_left_to_the_model() -> None:
    encoder = Frozen()
    tried = stage(encoder)
    first, second, third = tried.run(entries(["one"], ["two"], ["three"]), Run(), limit=1, by_the_clock=False)
    assert isinstance(first, Ready) and isinstance(second, Ready) and isinstance(third, Ready)
    tried.hand_over(first)
    assert tried.counts.encode_calls == 3
    encoder.trainable = True
    tried.hand_over(second)
    assert isinstance(second.embeddings[None], TokenBatch)
    encoder.trainable, encoder.times_frozen = False, 1
    tried.hand_over(third)
    assert tried.counts.encode_calls == 4
    assert_own_vectors(third)
