"""Ranks in lockstep receive equally many batches, every record once; differing settings are named."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertstream import TokenBatch
from bertstream.cursors import Cursor
from bertstream.errors import ConfigError, ShardError
from bertstream.pipeline.groups import GroupBudget, gather
from bertstream.pipeline.lockstep import in_lockstep
from bertstream.pipeline.progress import Entry
from bertstream.pipeline.source import EpochStatus
from bertstream.reading.lane_batches import LaneEnd
from bertstream.testing import FakeEncoder
from bertstream.tokens import ReadReport


class Table:
    """Connects ranks that are threads of this process."""

    def __init__(self, world_size: int) -> None:
        self._offers: list[Any] = [None] * world_size
        self._barrier = threading.Barrier(world_size, timeout=20)

    def seat(self, rank: int) -> Any:
        def exchange(offer: Any, batch: int, is_over: Any, waits_since: Any) -> list[Any]:
            self._offers[rank] = offer
            self._barrier.wait()
            offers = [*self._offers]
            self._barrier.wait()
            return offers

        return SimpleNamespace(exchange=exchange, leave=self._barrier.abort)


def own_entry(rank: int, number: int, words: int | ShardError | None) -> Entry:
    """A batch of one text with this many words; the end of a lane for None."""
    if isinstance(words, ShardError):
        raise words
    if words is None:
        return Entry(LaneEnd(number))
    batch = TokenBatch.from_texts(FakeEncoder().tokenizer(["word " * words]))
    batch = replace(batch, cursor=Cursor(0, rank, batch=number))
    entry = Entry(batch)
    entry.set_texts({None: batch})
    return entry


def some_stream(
    uneven: str, settings: dict[str, Any] | None = None, *, from_the_top: bool = False, **others: Any
) -> Any:
    progress = SimpleNamespace(running=lambda: None, from_the_top=from_the_top)
    return SimpleNamespace(uneven=uneven, epoch=0, settings=settings or {}, progress=progress, **others)


def in_step(
    ranks: Sequence[tuple[Sequence[int | ShardError | None], int]], uneven: str, *about: dict[str, Any]
) -> tuple[list[list[list[Entry]]], list[int]]:
    """Run ranks, each with its entries and limit; return by rank its groups and the number of texts it leaves."""
    table, left = Table(len(ranks)), [0] * len(ranks)

    def run(rank: int) -> list[list[Entry]]:
        entries, limit = ranks[rank]
        own = (own_entry(rank, number, words) for number, words in enumerate(entries))
        budget = GroupBudget[Entry](lambda entry: entry.weight, limit=limit, by_the_clock=False)
        stream = some_stream(uneven, about[rank] if about else {}, any_batch=lambda: own_entry(rank, -1, 1).item)
        peers = table.seat(rank)

        def count_left(texts: int) -> None:
            left[rank] += texts

        found = []
        try:
            for group in in_lockstep(gather(own, budget), budget, stream, peers, EpochStatus(), count_left):
                found.append([*group])
                budget.encoded(sum(entry.weight for entry in group), 0.0)
        except ShardError:
            peers.leave()  # as the owner of an epoch does
            raise
        return found

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(run, range(len(ranks)))), left


def batches_of(entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in entries if isinstance(entry.item, TokenBatch)]


RANK = st.tuples(st.lists(st.integers(0, 9) | st.none(), max_size=12), st.integers(1, 60))


@given(st.lists(RANK, min_size=2, max_size=3), st.sampled_from(["pad", "stop"]))
@settings(deadline=None, max_examples=50)
def test_ranks_yield_equally_many_batches_and_each_its_own_once(
    ranks: list[tuple[list[int | None], int]], uneven: str
) -> None:
    found, left = in_step(ranks, uneven)
    numbers = [[number for number, words in enumerate(entries) if words is not None] for entries, _ in ranks]
    steps = (max if uneven == "pad" else min)(map(len, numbers))
    cursors = [
        [Cursor(0, rank, batch=own[step]) if step < len(own) else None for rank, own in enumerate(numbers)]
        for step in range(steps)
    ]
    own_sizes = []
    for groups in found:
        batches = [group for group in map(batches_of, groups) if group]
        repeated = [bool(group[0].item.fields.get("__repeated__")) for group in batches]
        own_sizes.append([len(group) for group, repeats in zip(batches, repeated, strict=True) if not repeats])
        assert all(len(group) == 1 for group, repeats in zip(batches, repeated, strict=True) if repeats)
    longest = max(own_sizes, key=len)
    for own in own_sizes:
        assert own == longest[: len(own)], "a rank encodes a larger group than another agreed to"
    for rank, groups in enumerate(found):
        entries = [entry for group in groups for entry in group]
        assert [entry.cursors for entry in batches_of(entries)] == cursors
        repeated = [bool(entry.item.fields.get("__repeated__")) for entry in batches_of(entries)]
        assert repeated == [step >= len(numbers[rank]) for step in range(steps)]
        yielded = [
            entry.item.lane if isinstance(entry.item, LaneEnd) else entry.item.cursor.batch
            for entry in entries
            if isinstance(entry.item, LaneEnd) or not entry.item.fields.get("__repeated__")
        ]
        here = len(ranks[rank][0]) if uneven == "pad" else len(yielded)
        assert yielded == list(range(here))
        assert left[rank] == (0 if uneven == "pad" else len(numbers[rank]) - steps)


def test_what_a_loop_does_to_its_batch_in_place_is_not_in_a_repeated_one() -> None:
    table = Table(2)

    def run(rank: int) -> list[tuple[bool, list[int], list[list[int]]]]:
        entries = [own_entry(rank, number, 1) for number in range((1, 4)[rank])]
        for number, entry in enumerate(entries):
            lock = threading.Lock()  # which nothing copies
            entry.item.fields = {"label": np.array([number]), "spans": [np.array([number])], "lock": [lock]}
        budget = GroupBudget[Entry](lambda entry: entry.weight, limit=1, by_the_clock=False)
        stream = some_stream("pad", any_batch=lambda: None)
        groups = in_lockstep(
            gather(iter(entries), budget), budget, stream, table.seat(rank), EpochStatus(), lambda texts: None
        )
        found = []
        for entry in (entry for group in groups for entry in group):
            fields = entry.item.fields
            found.append(
                (fields["__repeated__"], fields["label"].tolist(), [span.tolist() for span in fields["spans"]])
            )
            fields["label"] -= 9
            fields["spans"][0] -= 9
        return found

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(run, range(2)))
    assert found[0] == [(repeated, [0], [[0]]) for repeated in (False, True, True, True)]
    assert found[1] == [(False, [number], [[number]]) for number in range(4)]


def test_records_that_no_rank_receives_may_be_broken(caplog: pytest.LogCaptureFixture) -> None:
    """The other ranks have finished the epoch, and would wait for this rank in the next one."""
    error = ShardError("not JSON", path="a.jsonl", index=3)
    found, left = in_step([([1] * 3, 1), ([1, 1, 1, 1, 1, error, 1], 1)], "stop")
    assert [sum(map(len, groups)) for groups in found] == [3, 3] and left == [0, 2]
    assert "is broken, and left_texts too low" in caplog.text
    with pytest.raises(ShardError):
        in_step([([1, 1, error, 1], 1), ([1] * 9, 1)], "stop")


@pytest.mark.parametrize("uneven", ["pad", "stop"])
def test_a_rank_without_a_record_is_named_unless_it_resumed(uneven: str) -> None:
    """Of two ranks, the other one has nothing to offer."""

    def groups(*, from_the_top: bool) -> list[list[Entry]]:
        peers: Any = SimpleNamespace(exchange=lambda about, *_: [about, [] if isinstance(about, list) else about])
        budget = GroupBudget[Entry](lambda entry: entry.weight, limit=1, by_the_clock=False)
        own = gather(iter([own_entry(0, 0, 1)]), budget)
        stream = some_stream(uneven, from_the_top=from_the_top)
        return [*islice(in_lockstep(own, budget, stream, peers, EpochStatus(), lambda texts: None), 1)]

    with pytest.raises(ShardError, match=r"of 2 ranks, \[1\] have no record in this epoch"):
        groups(from_the_top=True)
    assert len(groups(from_the_top=False)) == (uneven == "pad")


@pytest.mark.parametrize("uneven", ["pad", "stop"])
def test_an_epoch_in_which_no_rank_has_a_record_is_refused_unless_it_resumed(uneven: str) -> None:
    def groups(*, from_the_top: bool) -> list[list[Entry]]:
        peers: Any = SimpleNamespace(exchange=lambda about, *_: [about, about])
        budget = GroupBudget[Entry](lambda entry: entry.weight, limit=1, by_the_clock=False)
        stream = some_stream(uneven, from_the_top=from_the_top)
        own = gather(iter(()), budget)
        return [*in_lockstep(own, budget, stream, peers, EpochStatus(), lambda texts: None)]

    with pytest.raises(ShardError, match=r"of 2 ranks, \[0, 1\] have no record in this epoch"):
        groups(from_the_top=True)
    assert groups(from_the_top=False) == []


@pytest.mark.parametrize("report", [ReadReport(3, (ShardError("broken"),)), ReadReport(3, dropped=3)])
@pytest.mark.parametrize("uneven", ["pad", "stop"])
def test_a_rank_with_only_broken_or_dropped_records_repeats_a_batch_or_is_named(
    uneven: str, report: ReadReport, caplog: pytest.LogCaptureFixture
) -> None:
    end = LaneEnd(0, report)

    def run(rank: int) -> list[list[Entry]]:
        entries = [Entry(end)] if rank == 0 else [own_entry(1, number, 1) for number in range(3)]
        budget = GroupBudget[Entry](lambda entry: entry.weight, limit=1, by_the_clock=False)
        stream = some_stream(uneven, from_the_top=True, any_batch=lambda: own_entry(1, 0, 1).item)
        own = gather(iter(entries), budget)
        return [*in_lockstep(own, budget, stream, table.seat(rank), EpochStatus(), lambda texts: None)]

    table = Table(2)
    with ThreadPoolExecutor(2) as threads:
        ranks = [threads.submit(run, rank) for rank in range(2)]
        if uneven == "stop":
            for rank in ranks:
                with pytest.raises(ShardError, match=r"of 2 ranks, \[0\] have only broken records .*uneven=.pad"):
                    rank.result()
            return
        found = [batches_of(entry for group in rank.result() for entry in group) for rank in ranks]
    assert [[entry.item.fields["__repeated__"] for entry in entries] for entries in found] == [[True] * 3, [False] * 3]
    assert "every record of this rank was broken" in caplog.text


def test_texts_that_no_rank_receives_are_counted_for_a_limited_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bertstream.pipeline.lockstep._COUNT_REST_S", 0.0)
    found, left = in_step([([1] * 3, 1), ([1] * 3000, 1)], "stop")
    assert [sum(map(len, groups)) for groups in found] == [3, 3] and left[1] < 2997
    assert "is not all read: left_texts is too low" in caplog.text


def test_yielded_batches_are_released() -> None:
    alive: list[weakref.ref[Entry]] = []

    def entries() -> Iterator[Entry]:
        for number in range(30):
            entry = own_entry(0, number, 1)
            alive.append(weakref.ref(entry))
            yield entry
            del entry

    budget = GroupBudget[Entry](lambda entry: entry.weight, limit=8, by_the_clock=False)
    groups = gather(entries(), budget)
    peers: Any = Table(1).seat(0)
    gc.disable()
    try:
        for group in in_lockstep(groups, budget, some_stream("pad"), peers, EpochStatus(), lambda texts: None):
            weight = len(group)
            group.clear()
            budget.encoded(weight, 0.0)
            assert sum(ref() is not None for ref in alive) <= 1, "the one that did not fit"
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["seed", "shards", "state"])
def test_ranks_with_different_settings_are_refused(name: str) -> None:
    about = {"seed": 0, "shards": "3 by the digest ab", "state": "cd"}
    with pytest.raises(ConfigError, match=rf"^rank 1 streams with {name}='other', this rank with {name}="):
        in_step([([1], 9)] * 2, "pad", about, about | {name: "other"})
    assert in_step([([1], 9)] * 2, "pad", about, {"seed": 0, "shards": about["shards"]})[1] == [0, 0]


def test_ranks_with_unequal_batches_gather_nearly_as_many_as_one_alone() -> None:
    """Batches that a rank has beyond the others wait for its next group; they are no group of their own."""
    found, _ = in_step([([3] * 200, 40), ([2, 4] * 100, 40)], "stop")
    assert [len(group) for group in found[0]] == [len(group) for group in found[1]]
    assert len(found[0]) <= 20 and sum(map(len, found[0])) == 200
