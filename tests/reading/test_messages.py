"""Messages of several batches from worker processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from bertstream import ShardError, StreamConfig, TextStream, TokenBatch
from bertstream.pipeline.progress import reading_items
from bertstream.reading.dataset import StreamItems
from bertstream.reading.lane_batches import LaneEnd
from bertstream.reading.messages import MESSAGE, StreamLoader, StreamMessages, WorkersInTurn
from bertstream.testing import FakeEncoder, write_shards


class Items:
    """A stream that yields these items, and raises an error among them."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def items(self) -> Iterator[Any]:
        for item in self._items:
            if isinstance(item, Exception):
                raise item
            yield item


def messages(items: list[Any]) -> Iterator[list[Any]]:
    return iter(StreamMessages(Items(items)))  # type: ignore[arg-type]


def round_robin(workers: list[Iterator[Any]]) -> Iterator[Any]:
    """What torch yields of its workers: one item of each in turn, without those that have ended."""
    while workers:
        for worker in [*workers]:
            try:
                yield next(worker)
            except StopIteration:
                workers.remove(worker)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_items_come_in_the_order_that_they_have_without_messages(counts: list[int]) -> None:
    workers = [[(worker, i) for i in range(count)] for worker, count in enumerate(counts)]
    found = WorkersInTurn(round_robin([messages(items) for items in workers]), len(workers))
    assert list(found) == list(round_robin([iter(items) for items in workers]))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=3), st.integers(0, 20))
def test_an_error_comes_after_the_items_before_it(counts: list[int], before: int) -> None:
    workers: list[list[Any]] = [[(worker, i) for i in range(count)] for worker, count in enumerate(counts)]
    workers.append([*range(before), ValueError("broken")])
    found: list[list[Any]] = []
    for source in (
        WorkersInTurn(round_robin([messages(items) for items in workers]), len(workers)),
        round_robin([Items(items).items() for items in workers]),
    ):
        found.append([])
        with pytest.raises(ValueError, match="broken"):
            found[-1].extend(source)
    assert found[0] == found[1]


def test_the_first_batch_comes_alone_and_later_ones_together() -> None:
    assert [len(message) for message in messages([0] * 20)] == [1, 2, 4, MESSAGE, 6]


def described(item: Any) -> tuple[Any, ...]:
    if isinstance(item, TokenBatch):
        return item.input_ids.tobytes(), item.cursor, item.fields["__key__"], item.report and item.report.read
    return (item.lane, item.report and item.report.read) if isinstance(item, LaneEnd) else (type(item), str(item))


@pytest.mark.parametrize("broken", [False, True])
def test_worker_processes_yield_the_same_items_in_messages(tmp_path: Path, broken: bool) -> None:
    for number, records in enumerate((150, 10, 1, 90, 40)):
        lines = [f'{{"text": "{"word " * (i % 7)}{number} {i}"}}\n' for i in range(records)]
        if broken and number == 3:
            lines[60] = "broken\n"
        (tmp_path / f"{number}.jsonl").write_text("".join(lines))
    reading = StreamConfig(lanes=5, bucket_size=30)
    stream = TextStream(f"{tmp_path}/*.jsonl", FakeEncoder(), batch_size=4, shuffle=True, reading=reading)
    reader = reading_items(StreamLoader(stream, 2))
    found = [described(item) for item in reader]
    assert found == [described(item) for item in DataLoader(StreamItems(stream), batch_size=None, num_workers=2)]
    assert (ShardError in [item[0] for item in found]) == broken


def test_a_loader_without_workers_reads_item_by_item(tmp_path: Path) -> None:
    stream = TextStream(write_shards(tmp_path, ["a", "b b"]), FakeEncoder(), batch_size=1)
    loader = StreamLoader(stream, 0)
    assert [type(item).__name__ for item in reading_items(loader)] == ["TokenBatch", "TokenBatch", "LaneEnd"]
    assert [type(batch).__name__ for batch in loader] == ["TokenBatch", "TokenBatch"]


def test_closing_ends_the_workers(tmp_path: Path) -> None:
    stream = TextStream(write_shards(tmp_path, [f"text {i}" for i in range(500)]), FakeEncoder(), batch_size=1)
    items = iter(reading_items(StreamLoader(stream, 2)))
    assert len(list(islice(items, 5))) == 5
    workers = items._messages._workers
    items.close()
    until = time.monotonic() + 10
    while any(worker.is_alive() for worker in workers) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(worker.is_alive() for worker in workers) and list(items) == []
