"""The encode stage by itself: batches in, the same ones out in order, each with its own vectors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bertstream
from bertstream import Embeddings, EncoderError, TokenBatch
from bertstream.pipeline.clocks import StageClocks
from bertstream.pipeline.encode import BatchEncoder, Ready, encode, tokenize
from bertstream.pipeline.fields import texts_of
from bertstream.pipeline.groups import GroupBudget, gather
from bertstream.pipeline.progress import Entry
from bertstream.pipeline.source import EpochStatus
from bertstream.reading.lane_batches import LaneEnd
from bertstream.system.cuda import SideStream
from bertstream.testing import FakeEncoder


class Frozen(FakeEncoder):
    """Fails on the word "bad", can be trained, and remembers the forward size of its last call."""

    times_frozen = 0
    trainable = False
    default_forward_tokens = 77
    asked_for: int | None = None

    def calibrate(self) -> int:
        return self.max_forward_tokens

    def encode(self, batch: TokenBatch, *, max_forward_tokens: int | None = None) -> Embeddings:
        self.asked_for = max_forward_tokens
        if BAD in batch.input_ids:
            raise EncoderError("a bad word", records=(0,))
        return super().encode(batch)


BAD = FakeEncoder().tokenizer(["bad"])[0].input_ids[0]


def batch_encoder(encoder: FakeEncoder | None = None, *, deterministic: bool = False) -> BatchEncoder:
    return BatchEncoder(encoder or Frozen(), None, StageClocks(), deterministic=deterministic)


def encoded(encoder: BatchEncoder, items: Iterator[Entry], *, limit: int, by_the_clock: bool = False) -> Iterator[Any]:
    """Tokenize, gather and encode, as an epoch does."""
    loop = EpochStatus()
    texts = partial(texts_of, fields=None, tokenizer=FakeEncoder().tokenizer)
    budget = GroupBudget[Entry](lambda entry: entry.weight, limit=limit, by_the_clock=by_the_clock)
    return encode(gather(tokenize(items, texts, StageClocks(), loop), budget), budget, encoder, loop)


def entries(*items: Any) -> Iterator[Entry]:
    return (Entry(item) for item in items)


def assert_own_vectors(found: Ready) -> None:
    texts = found.entry.item
    right = Frozen().encode(TokenBatch.from_texts(Frozen().tokenizer(texts)))
    (embeddings,) = found.embeddings.values()
    assert isinstance(embeddings, Embeddings)
    assert torch.equal(embeddings.values, right.values) and torch.equal(embeddings.cu_seqlens, right.cu_seqlens)


TEXTS = st.lists(st.sampled_from(["", "one", "one two", "one two three"]), max_size=4)


@given(st.lists(TEXTS | st.builds(LaneEnd, st.integers(0, 3)), max_size=12), st.integers(1, 20), st.booleans())
def test_whatever_comes_goes_out_once_in_order_with_its_own_vectors(
    items: list[Any], limit: int, by_the_clock: bool
) -> None:
    tried = batch_encoder()
    found = list(encoded(tried, entries(*items), limit=limit, by_the_clock=by_the_clock))
    assert [item.entry.item if isinstance(item, Ready) else item.item for item in found] == items
    ready = [item for item in found if isinstance(item, Ready)]
    for item in ready:
        tried.receive(item)
        assert_own_vectors(item)
        assert item.tokens == sum(len(text.split()) for text in item.entry.item)
    counts = tried.counts
    assert counts.encode_calls <= len(ready) and counts.encoded_tokens <= sum(item.tokens for item in ready)


@pytest.mark.parametrize("limit", [1, 100])
def test_a_batch_that_fails_is_named_and_comes_after_those_before_it(limit: int) -> None:
    items = [["one"], ["two", "three"], LaneEnd(0), ["four"], ["bad"], ["five"]]
    run = encoded(batch_encoder(), entries(*items), limit=limit)
    found = [next(run) for _ in range(4)]
    for item in found:
        assert isinstance(item, Entry) or assert_own_vectors(item) is None
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
    tried = batch_encoder(encoder)
    first, second, third = encoded(tried, entries(["one"], ["two"], ["three"]), limit=1)
    assert isinstance(first, Ready) and isinstance(second, Ready) and isinstance(third, Ready)
    tried.receive(first)
    assert tried.counts.encode_calls == 3
    encoder.trainable = True
    tried.receive(second)
    assert isinstance(second.embeddings[None], TokenBatch)
    encoder.trainable, encoder.times_frozen = False, 1
    tried.receive(third)
    assert tried.counts.encode_calls == 4
    assert_own_vectors(third)


def test_deterministic_calls_have_a_size_that_nothing_measures() -> None:
    """And the encoder, which others may share, stays as it is."""
    for deterministic, size in ((False, None), (True, 77)):
        encoder = Frozen()
        tried = batch_encoder(encoder, deterministic=deterministic)
        list(encoded(tried, entries(["one"]), limit=1))
        assert encoder.asked_for == size and encoder.max_forward_tokens == 2048
        assert tried.forward_tokens == (77 if deterministic else 2048)
