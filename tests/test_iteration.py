"""What an epoch reads is timed, gathered to be encoded together in step with other ranks, and arrives in order."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bertstream import TokenBatch, iteration
from bertstream.dataset import Skip
from bertstream.errors import ConfigError, ShardError
from bertstream.iteration import Entry, Groups, Run, Source, agreed, located
from bertstream.stages import Stages
from bertstream.testing import FakeEncoder
from bertstream.types import Cursor

Item = tuple[int, int]
"""A number and a weight."""

WEIGHTS = st.lists(st.integers(0, 30) | st.just(1), max_size=40)


def gathered(
    items: Iterable[Item],
    limit: int,
    *,
    by_the_clock: bool = False,
    seconds: Callable[[int], float] = lambda weight: 0.0,
    found: list[list[Item]] | None = None,
) -> list[list[Item]]:
    """The groups, each of which takes so many seconds to be encoded."""
    found = [] if found is None else found
    groups = Groups(iter(items), weigh=lambda item: item[1], limit=limit, by_the_clock=by_the_clock)
    for group in groups:
        found.append(group)
        weight = sum(own for _, own in group)
        groups.encoded(weight, seconds(weight))
    return found


def weights_of(groups: list[list[Item]]) -> list[int]:
    return [sum(weight for _, weight in group) for group in groups]


# --- groups -----------------------------------------------------------------------------------------------------------


@given(WEIGHTS, st.integers(1, 60), st.lists(st.floats(0, 9), min_size=1))
@example([0, 0, 5], 9, [0.0])
def test_groups_hold_all_items_in_order_and_grow_to_the_limit(
    weights: list[int], limit: int, times: list[float]
) -> None:
    items = list(enumerate(weights))
    groups = gathered(items, limit)
    assert [item for group in groups for item in group] == items and all(groups)
    heaviest = 0
    for number, (group, weight) in enumerate(zip(groups, weights_of(groups), strict=True)):
        single = sum(own > 0 for _, own in group) <= 1  # what weighs nothing may ride along
        assert single or weight <= limit
        assert single or weight <= 4 * heaviest, "it grew by more than four times"
        assert number or single, "the first item waited for others"
        heaviest = max(heaviest, weight)
    # Not one was closed for nothing: with the next item it would have weighed more than it may.
    budget = 1
    for (group, weight), (following, _) in pairwise(zip(groups, weights_of(groups), strict=True)):
        assert weight >= budget or weight + following[0][1] > budget, (group, following)
        budget = max(budget, min(limit, max(2 * weight, min(2 * budget, 4 * weight))))
    slow = gathered(items, limit, seconds=lambda weight: times[weight % len(times)])
    assert slow == groups, "how long encoding takes has a say although the clock has none"


def test_equal_items_are_gathered_by_one_two_four_and_so_on() -> None:
    assert [len(group) for group in gathered([(i, 3) for i in range(100)], 40)] == [1, 2, 4, 8, *[13] * 6, 7]


def test_items_of_unequal_weight_are_gathered_to_the_limit_as_well() -> None:
    """Two of them are a little more than twice the one before, so that no group fills its budget."""
    groups = gathered([(i, 10 + i % 2) for i in range(60)], 100)
    assert [len(group) for group in groups[:5]] == [1, 1, 3, 7, 9] and {len(group) for group in groups[4:-1]} == {9}


def test_an_item_over_the_limit_is_a_group_of_its_own() -> None:
    assert weights_of(gathered(enumerate([4, 4, 4, 99, 4, 4, 4]), 10)) == [4, 8, 99, 8, 4]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that goes on when it is told to."""
    told = SimpleNamespace(now=100.0)
    told.perf_counter = told.monotonic = lambda: told.now
    monkeypatch.setattr(iteration, "time", told)
    return told


def at_rate(clock: SimpleNamespace, seconds: float, count: int = 200) -> Iterator[Item]:
    """Items of weight 1 that take so long to come."""
    for number in range(count):
        clock.now += seconds
        yield number, 1


def test_a_slow_source_closes_groups_early(clock: SimpleNamespace) -> None:
    """Gathering goes on for about as long as encoding took, so the two take turns and neither is waited for long."""

    def encoding(weight: int) -> float:
        clock.now += 0.25
        return 0.25

    fast = gathered(at_rate(clock, 0.001), 64, by_the_clock=True, seconds=encoding)
    assert [len(group) for group in fast] == [1, 2, 4, 8, 16, 32, 64, 64, 9]
    slow = gathered(at_rate(clock, 0.1), 64, by_the_clock=True, seconds=encoding)
    assert [len(group) for group in slow][:6] == [1, 2, 3, 3, 3, 3]
    slower = gathered(at_rate(clock, 0.3), 64, by_the_clock=True, seconds=encoding)
    assert {len(group) for group in slower} == {1}


def test_what_the_loop_does_meanwhile_is_no_time_of_the_source(clock: SimpleNamespace) -> None:
    def training(weight: int) -> float:
        clock.now += 50.0
        return 0.1

    assert max(map(len, gathered(at_rate(clock, 0.001), 64, by_the_clock=True, seconds=training))) == 64


def test_groups_take_half_a_second_at_most_and_shrink_where_the_machine_becomes_slow(clock: SimpleNamespace) -> None:
    """So that a loop which is left does not wait long for the group in progress."""
    spent: list[float] = []

    def encoding(weight: int) -> float:
        spent.append(weight * (0.04 if len(spent) < 12 else 0.2))  # seconds for an item
        return spent[-1]

    gathered(at_rate(clock, 0.0, 200), 1000, by_the_clock=True, seconds=encoding)
    assert spent[4:12] == [pytest.approx(0.48)] * 8
    assert spent[12] == pytest.approx(2.4) and len(spent) > 20 and max(spent[13:]) <= 0.5


@given(WEIGHTS, st.booleans())
def test_an_error_comes_behind_the_group_that_was_gathered_before_it(weights: list[int], by_the_clock: bool) -> None:
    error = ZeroDivisionError("theirs")

    def items() -> Iterator[Item]:
        yield from enumerate(weights)
        raise error

    found: list[list[Item]] = []
    with pytest.raises(ZeroDivisionError) as caught:
        gathered(items(), 20, by_the_clock=by_the_clock, found=found)
    assert caught.value is error and [item for group in found for item in group] == list(enumerate(weights))


def test_an_interruption_is_not_held_back() -> None:
    def items() -> Iterator[Item]:
        yield 0, 1
        yield 1, 1
        raise KeyboardInterrupt

    found: list[list[Item]] = []
    with pytest.raises(KeyboardInterrupt):
        gathered(items(), 20, found=found)
    assert found == [[(0, 1)]]


def test_an_error_that_was_handled_keeps_nothing_alive() -> None:
    """A circle through its traceback would keep a DataLoader's worker processes until the collector runs."""

    class TheirError(Exception):
        pass

    def items() -> Iterator[Item]:
        yield 0, 1
        raise TheirError

    gc.disable()
    try:
        error = None
        try:
            gathered(items(), 20)
        except TheirError as caught:
            error = weakref.ref(caught)
        assert error is not None and error() is None
    finally:
        gc.enable()


@given(WEIGHTS, st.data())
def test_what_is_put_back_comes_first_in_the_next_group(weights: list[int], data: st.DataObject) -> None:
    items = list(enumerate(weights))
    groups = Groups(iter(items), weigh=lambda item: item[1], limit=40, by_the_clock=False)
    kept: list[Item] = []
    for group in groups:
        here = data.draw(st.integers(1, len(group)))
        kept += group[:here]
        groups.put_back(group[here:])
        groups.encoded(sum(weight for _, weight in group[:here]), 0.0)
    assert kept == items


# --- ranks ------------------------------------------------------------------------------------------------------------


class Table:
    """Ranks that are threads of this process."""

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

        return SimpleNamespace(
            exchange=exchange, leave=lambda reason: self._barrier.abort() if "not JSON" in reason else None
        )


def own_entry(rank: int, number: int, words: int | ShardError | None) -> Entry:
    """A batch of one text of so many words; the end of a lane where it has none."""
    if isinstance(words, ShardError):
        raise words
    if words is None:
        return Entry(Skip(number))
    batch = TokenBatch.from_texts(FakeEncoder().tokenizer(["word " * words]))
    batch = replace(batch, cursor=Cursor(0, rank, batch=number))
    return Entry(batch, texts={None: batch})


def in_step(
    ranks: Sequence[tuple[Sequence[int | ShardError | None], int]], uneven: str, *about: dict[str, Any]
) -> tuple[list[list[list[Entry]]], list[int]]:
    """By rank, the groups that it encodes and how many texts it leaves; each has its entries and its limit."""
    table, left = Table(len(ranks)), [0] * len(ranks)

    def run(rank: int) -> list[list[Entry]]:
        entries, limit = ranks[rank]
        own = (own_entry(rank, number, words) for number, words in enumerate(entries))
        groups = Groups(own, weigh=lambda entry: entry.weight, limit=limit, by_the_clock=False)
        stream: Any = SimpleNamespace(
            uneven=uneven, epoch=0, rank_timeout_s=20, any_batch=lambda: own_entry(rank, -1, 1).item
        )

        def count_left(texts: int) -> None:
            left[rank] += texts

        found = []
        own_about = about[rank] if about else {}
        for group in agreed(groups, stream, table.seat(rank), Run(), own_about, count_left):
            found.append([*group])
            groups.encoded(sum(entry.weight for entry in group), 0.0)
        return found

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(run, range(len(ranks)))), left


def batches_of(entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in entries if isinstance(entry.item, TokenBatch)]


RANK = st.tuples(st.lists(st.integers(0, 9) | st.none(), max_size=12), st.integers(1, 60))


@given(st.lists(RANK, min_size=2, max_size=3), st.sampled_from(["pad", "stop"]))
@settings(deadline=None, max_examples=50)
def test_ranks_hand_out_equally_many_batches_and_each_its_own_once(
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
        through = [bool(group[0].item.fields.get("__repeated__")) for group in batches]
        own_sizes.append([len(group) for group, repeats in zip(batches, through, strict=True) if not repeats])
        assert all(len(group) == 1 for group, repeats in zip(batches, through, strict=True) if repeats)
    longest = max(own_sizes, key=len)
    for own in own_sizes:
        assert own == longest[: len(own)], "a rank encodes more together than another has agreed to"
    for rank, groups in enumerate(found):
        entries = [entry for group in groups for entry in group]
        assert [entry.cursors for entry in batches_of(entries)] == cursors
        repeated = [bool(entry.item.fields.get("__repeated__")) for entry in batches_of(entries)]
        assert repeated == [step >= len(numbers[rank]) for step in range(steps)]
        handed_out = [
            entry.item.lane if isinstance(entry.item, Skip) else entry.item.cursor.batch
            for entry in entries
            if isinstance(entry.item, Skip) or not entry.item.fields.get("__repeated__")
        ]
        here = len(ranks[rank][0]) if uneven == "pad" else len(handed_out)
        assert handed_out == list(range(here))
        assert left[rank] == (0 if uneven == "pad" else len(numbers[rank]) - steps)


def test_what_no_rank_gets_may_be_broken(caplog: pytest.LogCaptureFixture) -> None:
    """The others are through with the epoch, and would wait for this rank in the next one."""
    error = ShardError("not JSON", path="a.jsonl", index=3)
    found, left = in_step([([1] * 3, 1), ([1, 1, 1, 1, 1, error, 1], 1)], "stop")
    assert [sum(map(len, groups)) for groups in found] == [3, 3] and left == [0, 2]
    assert "is broken, and left_texts too low" in caplog.text
    with pytest.raises(ShardError):
        in_step([([1, 1, error, 1], 1), ([1] * 9, 1)], "stop")


def test_batches_that_were_handed_over_are_let_go() -> None:
    alive: list[weakref.ref[Entry]] = []

    def entries() -> Iterator[Entry]:
        for number in range(30):
            entry = own_entry(0, number, 1)
            alive.append(weakref.ref(entry))
            yield entry
            del entry

    groups = Groups(entries(), weigh=lambda entry: entry.weight, limit=8, by_the_clock=False)
    stream: Any = SimpleNamespace(uneven="pad", epoch=0, rank_timeout_s=20)
    peers: Any = Table(1).seat(0)
    gc.disable()
    try:
        for group in agreed(groups, stream, peers, Run(), {}, lambda texts: None):
            weight = len(group)
            group.clear()
            groups.encoded(weight, 0.0)
            assert sum(ref() is not None for ref in alive) <= 1, "the one that did not fit"
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["seed", "shards", "state"])
def test_ranks_that_would_not_share_the_records_out_are_told_so(name: str) -> None:
    about = {"seed": 0, "shards": "3 by the digest ab", "state": "cd"}
    with pytest.raises(ConfigError, match=rf"^rank 1 streams with {name}='other', this rank with {name}="):
        in_step([([1], 9)] * 2, "pad", about, about | {name: "other"})
    assert in_step([([1], 9)] * 2, "pad", about, {"seed": 0, "shards": about["shards"]})[1] == [0, 0]


def test_ranks_whose_batches_differ_gather_nearly_as_many_as_one_alone() -> None:
    """What one has more than another waits for its next group, and is not a group by itself."""
    found, _ = in_step([([3] * 200, 40), ([2, 4] * 100, 40)], "stop")
    assert [len(group) for group in found[0]] == [len(group) for group in found[1]]
    assert len(found[0]) <= 20 and sum(map(len, found[0])) == 200


# --- sources ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 6), st.booleans())
def test_a_source_gives_what_it_reads_with_where_it_stood(count: int, first: bool) -> None:
    read: list[int] = []
    numbers = (read.append(i) or i for i in range(count))  # type: ignore[func-returns-value]
    source = Source(numbers, lambda: len(read), Stages())
    if first:
        source.read_first()
        assert len(read) == min(count, 1), "only the first was asked for"
    for number, item in enumerate(source):
        assert (item, source.state) == (number, number + 1)
    assert len(read) == count and next(source, None) is None


def test_waiting_for_a_source_is_timed() -> None:
    stages = Stages()
    source = Source(iter(range(3)), None, stages)
    source.read_first()
    assert list(source) == [0, 1, 2] and source.state is None
    assert 0 < stages.seconds["read"] < 1 and stages.items["read"] >= 3


def test_closing_a_source_closes_what_it_reads_and_ends_it() -> None:
    closed = []

    def numbers() -> Iterator[int]:
        try:
            yield from range(9)
        finally:
            closed.append(True)

    source = Source(numbers(), None, Stages())
    source.read_first()
    source.close()
    assert closed == [True] and list(source) == []
    source.close()


@pytest.mark.parametrize(("persistent", "ended"), [(False, [True]), (True, [])])
def test_closing_a_source_ends_workers_that_are_not_to_stay(persistent: bool, ended: list[bool]) -> None:
    class Workers:
        """What torch's iterator over worker processes has."""

        def __init__(self) -> None:
            self._persistent_workers = persistent
            self.ended: list[bool] = []

        def __next__(self) -> int:
            return 0

        def _shutdown_workers(self) -> None:
            self.ended.append(True)

    workers: Any = Workers()
    Source(workers, None, Stages()).close()
    assert workers.ended == ended


def test_an_error_that_travelled_as_an_item_is_raised_in_its_place() -> None:
    error = ShardError("broken", path="a.jsonl", index=3)
    found = []
    with pytest.raises(ShardError) as caught:
        for entry in located(Source(iter([["a"], ["b"], error, ["c"]]), lambda: "here", Stages()), None):
            found.append(entry)
    assert caught.value is error and [entry.item for entry in found] == [["a"], ["b"]]
    assert {(entry.source_state, tuple(entry.cursors)) for entry in found} == {("here", ())}
