"""Batches gathered into groups that are encoded together, of what is there and what a device can take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Generic, TypeVar

from ..embeddings import SupportsEncode

T = TypeVar("T")

_GROUP_FORWARDS = {"cpu": 8}
"""Forwards' worth of tokens that are gathered to be encoded together, else one. A CPU's forwards are small, so that
they stay in its caches; out of many texts each gets some of about one length."""

_GROUP_S = 0.5
"""Seconds that encoding a group should take at most: a loop that is left waits for the group in progress, and behind an
epoch's last group there is nothing left to encode while its steps run. A quarter, a half and one were equally fast."""


def group_tokens(encoder: SupportsEncode) -> int:
    """The limit of `Groups` for an encoder: tokens that are encoded together at most."""
    return encoder.max_forward_tokens * _GROUP_FORWARDS.get(encoder.device.type, 1)


class Groups(Generic[T]):
    """Gathers items into groups of a bounded weight, to be encoded together.

    The first group is the first item alone, so that the loop need not wait for more; each later one may weigh twice as
    much as the one before might have, up to the limit. By the clock too, unless that is to have no say: a group is
    closed when gathering it took longer than the last one's encoding (then reading is what holds the loop up, and
    waiting for more would not help), and none may weigh more than half a second encodes.

    Args:
        items: what to gather.
        weigh: an item's weight. A single one may be heavier than the limit.
        limit: weight of a group at most.
        by_the_clock: whether groups depend on how long things take.
    """

    def __init__(self, items: Iterator[T], *, weigh: Callable[[T], int], limit: int, by_the_clock: bool) -> None:
        self._items = items
        self._weigh = weigh
        self._limit = limit
        self._by_the_clock = by_the_clock
        self._budget = 1
        self._encode_s = 0.0
        self._waiting: deque[T] = deque()

    def __iter__(self) -> Generator[list[T], None, None]:
        """Groups; an error of the items comes behind the group that was gathered before it."""
        error: Exception | None = None
        try:
            while error is None or self._waiting:
                group: list[T] = []
                weight, started = 0, time.perf_counter()
                while True:
                    if not self._waiting and error is None:
                        try:
                            self._waiting.append(next(self._items))
                        except Exception as raised:
                            error = raised
                    if not self._waiting:
                        break
                    own = self._weigh(self._waiting[0])
                    if group and weight + own > self._budget:
                        break
                    group.append(self._waiting.popleft())
                    weight += own
                    is_late = self._by_the_clock and time.perf_counter() - started > self._encode_s
                    if weight >= self._budget or is_late:
                        break
                if group:
                    yield group
            if not isinstance(error, StopIteration):
                raise error
        finally:
            del error  # its traceback holds this frame: a circle would keep all that its frames hold alive

    def put_back(self, items: Sequence[T]) -> None:
        """Items of the last group that come first in the next."""
        self._waiting.extendleft(reversed(items))

    def encoded(self, weight: int, seconds: float) -> None:
        """Say how long a group took to be encoded."""
        if not weight:
            return
        self._encode_s = seconds
        # By the budget, which batches of unequal weight never fill, but not far beyond what was ever seen.
        grown = min(self._limit, max(2 * weight, min(2 * self._budget, 4 * weight)))
        self._budget = max(self._budget, grown)
        if self._by_the_clock and seconds > 0:
            self._budget = max(1, min(self._budget, int(weight * _GROUP_S / seconds)))
