"""Groups hold all batches in order, grow, and stay within their bounds."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bertstream.pipeline.groups import GroupBudget, gather

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
    """The groups; encoding a group of weight w takes `seconds(w)`."""
    found = [] if found is None else found
    budget = GroupBudget[Item](lambda item: item[1], limit=limit, by_the_clock=by_the_clock)
    for group in gather(iter(items), budget):
        found.append(group)
        weight = sum(own for _, own in group)
        budget.encoded(weight, seconds(weight))
    return found


def weights_of(groups: list[list[Item]]) -> list[int]:
    return [sum(weight for _, weight in group) for group in groups]


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
        single = sum(own > 0 for _, own in group) <= 1  # items without weight may join any group
        assert single or weight <= limit
        assert single or weight <= 4 * heaviest, "a group is more than four times as heavy as the heaviest before"
        assert number or single, "the first item waited for others"
        heaviest = max(heaviest, weight)
    # Each group is as large as it may be: the next item would exceed its budget.
    budget = 1
    for (group, weight), (following, _) in pairwise(zip(groups, weights_of(groups), strict=True)):
        assert weight >= budget or weight + following[0][1] > budget, (group, following)
        budget = max(budget, min(limit, max(2 * weight, min(2 * budget, 4 * weight))))
    slow = gathered(items, limit, seconds=lambda weight: times[weight % len(times)])
    assert slow == groups, "encoding time changes the groups although by_the_clock is False"


def test_groups_of_equal_items_double_up_to_the_limit() -> None:
    assert [len(group) for group in gathered([(i, 3) for i in range(100)], 40)] == [1, 2, 4, 8, *[13] * 6, 7]


def test_groups_of_unequal_items_grow_to_the_limit_too() -> None:
    """Two items are slightly more than twice the previous group, so no group fills its budget."""
    groups = gathered([(i, 10 + i % 2) for i in range(60)], 100)
    assert [len(group) for group in groups[:5]] == [1, 1, 3, 7, 9] and {len(group) for group in groups[4:-1]} == {9}


def test_an_item_over_the_limit_is_a_group_of_its_own() -> None:
    assert weights_of(gathered(enumerate([4, 4, 4, 99, 4, 4, 4]), 10)) == [4, 8, 99, 8, 4]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that advances only when a test sets `now`."""
    fake = SimpleNamespace(now=100.0)
    fake.perf_counter = fake.monotonic = lambda: fake.now
    monkeypatch.setattr("bertstream.pipeline.groups.time", fake)
    return fake


def at_rate(clock: SimpleNamespace, seconds: float, count: int = 200) -> Iterator[Item]:
    """Items of weight 1, one every `seconds`."""
    for number in range(count):
        clock.now += seconds
        yield number, 1


def test_a_slow_source_closes_groups_early(clock: SimpleNamespace) -> None:
    """Gathering takes about as long as encoding took, so neither waits long for the other."""

    def encoding(weight: int) -> float:
        clock.now += 0.25
        return 0.25

    fast = gathered(at_rate(clock, 0.001), 64, by_the_clock=True, seconds=encoding)
    assert [len(group) for group in fast] == [1, 2, 4, 8, 16, 32, 64, 64, 9]
    slow = gathered(at_rate(clock, 0.1), 64, by_the_clock=True, seconds=encoding)
    assert [len(group) for group in slow][:6] == [1, 2, 3, 3, 3, 3]
    slower = gathered(at_rate(clock, 0.3), 64, by_the_clock=True, seconds=encoding)
    assert {len(group) for group in slower} == {1}


def test_time_in_the_loop_does_not_count_as_time_of_the_source(clock: SimpleNamespace) -> None:
    def training(weight: int) -> float:
        clock.now += 50.0
        return 0.1

    assert max(map(len, gathered(at_rate(clock, 0.001), 64, by_the_clock=True, seconds=training))) == 64


def test_groups_take_half_a_second_at_most_and_shrink_when_the_machine_slows_down(clock: SimpleNamespace) -> None:
    """A loop that is left waits for the group in progress, so groups must be short."""
    spent: list[float] = []

    def encoding(weight: int) -> float:
        spent.append(weight * (0.04 if len(spent) < 12 else 0.2))  # seconds per item
        return spent[-1]

    gathered(at_rate(clock, 0.0, 200), 1000, by_the_clock=True, seconds=encoding)
    assert spent[4:12] == [pytest.approx(0.48)] * 8
    assert spent[12] == pytest.approx(2.4) and len(spent) > 20 and max(spent[13:]) <= 0.5


@given(WEIGHTS, st.booleans())
def test_an_error_comes_after_the_group_gathered_before_it(weights: list[int], by_the_clock: bool) -> None:
    error = ZeroDivisionError("theirs")

    def items() -> Iterator[Item]:
        yield from enumerate(weights)
        raise error

    found: list[list[Item]] = []
    with pytest.raises(ZeroDivisionError) as caught:
        gathered(items(), 20, by_the_clock=by_the_clock, found=found)
    assert caught.value is error and [item for group in found for item in group] == list(enumerate(weights))


def test_an_interruption_is_raised_immediately() -> None:
    def items() -> Iterator[Item]:
        yield 0, 1
        yield 1, 1
        raise KeyboardInterrupt

    found: list[list[Item]] = []
    with pytest.raises(KeyboardInterrupt):
        gathered(items(), 20, found=found)
    assert found == [[(0, 1)]]


def test_a_handled_error_keeps_nothing_alive() -> None:
    """A reference cycle through its traceback would keep a DataLoader's workers alive until garbage collection."""

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
def test_items_put_back_come_first_in_the_next_group(weights: list[int], data: st.DataObject) -> None:
    items = list(enumerate(weights))
    budget = GroupBudget[Item](lambda item: item[1], limit=40, by_the_clock=False)
    kept: list[Item] = []
    for group in gather(iter(items), budget):
        here = data.draw(st.integers(1, len(group)))
        kept += group[:here]
        budget.put_back(group[here:])
        budget.encoded(sum(weight for _, weight in group[:here]), 0.0)
    assert kept == items
