"""The helpers for users' tests pass and fail when they should."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import bertstream
from bertstream import ConfigError, EmbeddingLoader, StateError, StreamConfig
from bertstream.testing import FakeEncoder, _difference, assert_resumes_exactly, write_shards

TEXTS = [f"{'word ' * (i * 7 % 13)}{i}" for i in range(230)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_shards(tmp_path_factory.mktemp("shards"), TEXTS, shards=5)


def test_shards_hold_every_text_once(shards: list[str]) -> None:
    batches = list(bertstream.stream(shards, FakeEncoder()))
    assert sorted(i for batch in batches for i in batch["id"].tolist()) == list(range(len(TEXTS)))


def test_fake_vectors_hold_their_token_and_index() -> None:
    found = FakeEncoder(hidden_size=5).encode(bertstream.TokenBatch.from_texts(FakeEncoder().tokenizer(["a b, a", []])))
    a, b, comma, again = found.values[:, 0].tolist()
    assert a == again and len({a, b, comma}) == 3
    assert found.values[:, 1:].tolist() == [[k, 4, 0, 0] for k in range(4)]
    assert found.lengths.tolist() == [4, 0]
    with pytest.raises(ConfigError, match="hidden_size=2"):
        FakeEncoder(hidden_size=2)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "bucket_size"), [(0, 20), (0, 400), (1, 20), (4, 20)])
def test_a_stream_resumes_exactly(shards: list[str], bucket_size: int, workers: int) -> None:
    def make(num_workers: int = workers) -> EmbeddingLoader:
        reading = StreamConfig(bucket_size=bucket_size, lanes=3)
        return bertstream.stream(
            shards, FakeEncoder(), batch_size=24, shuffle=True, num_workers=num_workers, reading=reading
        )

    if not workers:
        assert_resumes_exactly(make)
    else:  # worker processes start slowly: few cuts, each resumed with another number of workers
        assert_resumes_exactly(make, cuts=[0, 5], resume_with=lambda: make(0))
        assert_resumes_exactly(lambda: make(0), cuts=[9], resume_with=make)


def test_file_order_and_token_budgets_resume_exactly(shards: list[str]) -> None:
    assert_resumes_exactly(lambda: bertstream.stream(shards, FakeEncoder(), max_tokens=90, prefetch=0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_dataloader_resumes_exactly(workers: int) -> None:
    def make() -> EmbeddingLoader:
        return bertstream.wrap(StatefulDataLoader(TEXTS[:60], 8, num_workers=workers), FakeEncoder())

    assert_resumes_exactly(make, cuts=None if not workers else [3, 8])


def test_a_loader_without_a_state_is_refused_with_the_way_out() -> None:
    with pytest.raises(StateError, match="StatefulDataLoader"):
        bertstream.wrap(DataLoader(TEXTS, 8), FakeEncoder()).state_dict()


class Forgetful(EmbeddingLoader):
    """Resumes one batch too late."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._late = any(cursor[2] for queue in state["queues"] for cursor in queue)

    def __iter__(self) -> Iterator[Any]:
        batches = super().__iter__()
        if getattr(self, "_late", False):
            next(batches)
        self._late = False
        return batches


def test_a_loader_that_loses_a_batch_fails(shards: list[str]) -> None:
    def make() -> EmbeddingLoader:
        loader = bertstream.stream(shards, FakeEncoder(), batch_size=16, reading=StreamConfig(bucket_size=16))
        loader.__class__ = Forgetful
        return loader

    with pytest.raises(AssertionError, match="batch 0 of a second resume"):
        assert_resumes_exactly(make)


def test_vectors_that_change_fail(shards: list[str]) -> None:
    class Noisy(FakeEncoder):
        def encode(self, batch: bertstream.TokenBatch) -> bertstream.Embeddings:
            found = super().encode(batch)
            found.values += torch.rand(())
            return found

    with pytest.raises(AssertionError, match=r"^batch 0 .*: batch\['text'\]\['values'\] differs by up to [0-9.e-]+$"):
        assert_resumes_exactly(lambda: bertstream.stream(shards, Noisy()), cuts=[0])


@pytest.mark.parametrize(
    ("found", "right", "message"),
    [
        ({"a": [1, 2], "b": [1.5, 2]}, {"a": [1, 2], "b": [1, 2.25]}, "batch['b'] differs by up to 0.5"),
        ({"a": ["x", "y"]}, {"a": ["x", "z"]}, "batch['a'][1] is y, in an uninterrupted epoch it is z"),
        ({"a": [1, None]}, {"a": [2, None]}, "batch['a'][0] is 1, in an uninterrupted epoch it is 2"),
        ([["x"], {"lengths": [1, 2]}], [["x"], {"lengths": [1, 7]}], "batch[1]['lengths'] differs by up to 5"),
        ({"a": [[1], [2, 3]]}, {"a": [[1], [2, 4]]}, "batch['a'][1] differs by up to 1"),
        ({"a": [1]}, {"a": [1, 2]}, "batch['a'] is [1], in an uninterrupted epoch it is [1, 2]"),
        ({"a": 1}, {"b": 1}, "batch is {'a': 1}, in an uninterrupted epoch it is {'b': 1}"),
        (None, [1], "batch is None, in an uninterrupted epoch it is [1]"),
    ],
)
def test_a_difference_is_named_by_its_field_first(found: Any, right: Any, message: str) -> None:
    assert _difference(found, right) == message


def test_a_stream_wrapped_again_resumes_exactly(shards: list[str]) -> None:
    def make() -> EmbeddingLoader:
        inner = bertstream.stream(shards, FakeEncoder(), batch_size=16, shuffle=True, into="vectors")
        return bertstream.wrap(inner, FakeEncoder(), text="text", into="others")

    assert_resumes_exactly(make, cuts=[0, 3, 14])


def test_a_stateful_loader_around_a_stream_resumes_exactly(shards: list[str]) -> None:
    def make() -> EmbeddingLoader:
        dataset = bertstream.TextStream(shards, FakeEncoder(), batch_size=16, shuffle=True)
        return bertstream.wrap(StatefulDataLoader(dataset, batch_size=None), FakeEncoder())

    assert_resumes_exactly(make, cuts=[0, 3, 14])


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_every_start_method_of_workers_works(shards: list[str], context: str) -> None:
    dataset = bertstream.TextStream(shards, FakeEncoder(), batch_size=16)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=context)
    assert sum(len(batch["text"]) for batch in bertstream.wrap(loader, FakeEncoder())) == len(TEXTS)


def test_a_state_of_another_kind_is_refused(shards: list[str]) -> None:
    stream = bertstream.stream(shards, FakeEncoder())
    state = bertstream.wrap(StatefulDataLoader(TEXTS, 8), FakeEncoder()).state_dict()
    for broken in (state, stream.state_dict() | {"queues": []}):
        with pytest.raises(StateError, match="no state of a stream"):
            stream.load_state_dict(broken)
    with pytest.raises(StateError, match="epoch='3', where a number from 0 belongs"):
        stream.load_state_dict(stream.state_dict() | {"epoch": "3"})
    assert len(list(stream)) == len(list(bertstream.stream(shards, FakeEncoder())))


@pytest.mark.parametrize(
    ("change", "key"),
    [({"source": None}, "source"), ({"version": 0}, "version")]
    + [({"epoch": epoch}, "epoch") for epoch in (None, "1", 1.0, -1, True)],
    ids=str,
)
def test_a_refused_state_changes_nothing_in_a_wrapped_loader(change: dict[str, Any], key: str) -> None:
    loader = bertstream.wrap(StatefulDataLoader(TEXTS[:24], 8), FakeEncoder())
    loader.set_epoch(2)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    broken = {name: value for name, value in (state | change).items() if value is not None}
    with pytest.raises(StateError) as caught:
        loader.load_state_dict(broken)
    assert caught.value.key == key and loader.epoch == 2
    assert len(list(batches)) == 2
