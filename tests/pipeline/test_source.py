"""What an epoch reads is timed, arrives in order with where it stood, and is let go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertstream.pipeline.clocks import Stages
from bertstream.pipeline.source import Source, located


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


def test_a_batch_is_located_by_where_its_source_stood_behind_it() -> None:
    found = list(located(Source(iter([["a"], ["b"]]), lambda: "here", Stages()), None))
    assert [entry.item for entry in found] == [["a"], ["b"]]
    assert {(entry.source_state, tuple(entry.cursors)) for entry in found} == {("here", ())}
