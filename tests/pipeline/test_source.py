"""What an epoch reads is timed, arrives in order with its state, and is closed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import bertstream
from bertstream import ConfigError, ShardError, StateError, TextStream, TokenBatch
from bertstream.pipeline.clocks import StageClocks
from bertstream.pipeline.progress import reading_items, text_stream
from bertstream.pipeline.source import Source, read, read_in_workers
from bertstream.pipeline.source_progress import ProgressInSource
from bertstream.testing import FakeEncoder, write_shards


class Numbers:
    """An iterable with a state: how many were read."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.read = 0
        self.closed = 0

    def __iter__(self) -> Iterator[int]:
        try:
            for number in range(self.count):
                self.read += 1
                yield number
        finally:
            self.closed += 1

    def state_dict(self) -> int:
        return self.read

    def load_state_dict(self, state: int) -> None:
        self.read = state


def opened(source: Any) -> Source:
    found = Source(ProgressInSource(source), StageClocks())
    found.open()
    return found


@given(st.integers(0, 6))
def test_a_source_gives_what_it_reads_with_the_state_after_it(count: int) -> None:
    numbers = Numbers(count)
    source = opened(numbers)
    assert numbers.read == min(count, 1), "only the first is read when it is opened"
    for number, item in enumerate(source):
        assert (item, source.state) == (number, number + 1)
    assert numbers.read == count and next(source, None) is None


def test_waiting_for_a_source_is_timed() -> None:
    clocks = StageClocks()
    source = Source(ProgressInSource([0, 1, 2]), clocks)
    source.open()
    assert list(source) == [0, 1, 2] and source.state is None
    assert 0 < clocks.seconds["read"] < 1 and clocks.items["read"] >= 3


def test_closing_a_source_closes_what_it_reads_and_ends_it() -> None:
    numbers = Numbers(9)
    source = opened(numbers)
    source.close()
    assert numbers.closed == 1 and list(source) == []
    source.close()


@pytest.mark.parametrize(("persistent", "ended"), [(False, [True]), (True, [])])
def test_closing_a_source_ends_workers_unless_they_are_persistent(persistent: bool, ended: list[bool]) -> None:
    class Workers:
        """What torch's iterator over worker processes has."""

        def __init__(self) -> None:
            self._persistent_workers = persistent
            self.ended: list[bool] = []

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> int:
            return 0

        def _shutdown_workers(self) -> None:
            self.ended.append(True)

    workers = Workers()
    opened(workers).close()
    assert workers.ended == ended


def test_what_can_be_read_only_once_is_refused_the_second_time() -> None:
    loop = ProgressInSource(iter([["a"]]))
    for _ in range(2):
        source = Source(loop, StageClocks())
        if loop.epoch:
            with pytest.raises(ConfigError, match="can be read only once, and was"):
                source.open()
        else:
            source.open()
            loop.end_epoch(0)


def test_entries_carry_the_state_of_their_source() -> None:
    numbers = Numbers(3)
    found = [(entry.item, entry.source_state, entry.cursors) for entry in read(opened(numbers), None)]
    assert found == [(0, 1, ()), (1, 2, ()), (2, 3, ())]


def test_a_source_without_a_state_says_so() -> None:
    with pytest.raises(StateError, match="a list cannot say where it is"):
        ProgressInSource([1]).state_dict()
    with pytest.raises(StateError, match="a list cannot say where it is"):
        ProgressInSource([1]).loading({"version": 1, "epoch": 0, "source": 3})


def test_a_loader_over_a_stream_is_read_by_items_and_stays_as_it_was(tmp_path: Any) -> None:
    stream = TextStream(write_shards(tmp_path, ["a", "b b"]), FakeEncoder(), batch_size=1)
    loader = DataLoader(stream, batch_size=None)
    reader = reading_items(loader)
    assert [type(item).__name__ for item in reader] == ["TokenBatch", "TokenBatch", "LaneEnd"]
    assert [type(item).__name__ for item in loader] == ["TokenBatch", "TokenBatch"]
    assert text_stream(loader) is text_stream(stream) is loader.dataset is stream


def test_a_wrapped_loader_of_our_own_advances_its_stream_itself(tmp_path: Any) -> None:
    inner = bertstream.stream(write_shards(tmp_path, ["a", "b b"]), FakeEncoder(), batch_size=1)
    assert inner.dataset.shards and text_stream(inner) is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_in_workers_counts_what_is_skipped_once(tmp_path: Any, num_workers: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "number {i}"}}\n' if i % 7 else "broken\n" for i in range(40)))
    reading = bertstream.StreamConfig(lanes=3, max_bad_records=6)
    stream = TextStream(path, FakeEncoder(), reading=reading)
    for _ in range(2):
        assert sum(map(len, read_in_workers(stream, num_workers))) == 34
        assert stream.progress.bad.records == 6
    strict = TextStream(path, FakeEncoder())
    with pytest.raises(ShardError, match="record 0: not JSON") as caught:
        list(read_in_workers(strict, num_workers))
    assert caught.value.index == 0 and caught.value.path == str(path)


def test_an_epoch_that_is_chosen_drops_the_state_of_the_one_that_was_left() -> None:
    numbers = Numbers(5)
    loop = ProgressInSource(numbers)
    source = Source(loop, StageClocks())
    source.open()
    for entry in read(source, None):
        loop.received(entry)
        if entry.item == 2:
            break
    assert loop.state_dict() == {"version": 1, "epoch": 0, "source": 3}
    loop.set_epoch(1)
    numbers.read = 0
    assert loop.state_dict() == {"version": 1, "epoch": 1, "source": 0}


def test_a_batch_whose_cursor_a_collate_fn_dropped_moves_nothing(tmp_path: Any) -> None:
    stream = TextStream(write_shards(tmp_path, ["a", "b b", "c c c"]), FakeEncoder(), batch_size=1)

    def without_cursor(item: Any) -> Any:
        return item.pick(np.arange(len(item))) if isinstance(item, TokenBatch) else item

    loader = bertstream.wrap(DataLoader(stream, batch_size=None, collate_fn=without_cursor), FakeEncoder())
    before = loader.state_dict()
    next(iter(loader))
    assert loader.state_dict()["queues"] == before["queues"], "it starts over rather than skip what nobody received"
