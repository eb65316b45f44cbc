"""Batches are gathered into groups, each encoded in one call: of what is ready, and what a device can take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

_GROUP_FORWARDS = {"cpu": 8}
"""Forwards' worth of tokens in a group at most; 1 on other devices. A CPU's forwards are small, to stay in its caches,
and many texts give each forward texts of about one length."""

_GROUP_S = 0.5
"""Seconds that encoding a group should take at most: a loop that is left waits for the group in progress, and an
epoch's last group leaves nothing to encode during its own steps. 0.25, 0.5 and 1 were equally fast."""


def group_tokens(forward_tokens: int, device: torch.device) -> int:
    """The limit of a group for an encoder on this device whose forwards hold so many tokens."""
    return forward_tokens * _GROUP_FORWARDS.get(device.type, 1)


class GroupBudget(Generic[T]):
    """How much one group may weigh: `gather` asks, whoever encodes reports.

    The first group is one item, so that the loop need not wait for more; the budget then doubles up to `limit`. By the
    clock, no group should take longer than half a second to encode.

    Args:
        weigh: an item's weight, in tokens. A single item may be heavier than the limit.
        limit: weight of a group at most.
        by_the_clock: whether groups may depend on how long things take.
    Attributes:
        weight: what the next group may weigh.
        encode_s: seconds that the last group took to encode.
        heaviest: weight of the heaviest group so far.
        waiting: items that come first in the next group.
    """

    def __init__(self, weigh: Callable[[T], int], *, limit: int, by_the_clock: bool) -> None:
        self.weigh = weigh
        self.by_the_clock = by_the_clock
        self.weight = 1
        self.encode_s = 0.0
        self.heaviest = 0
        self.waiting: deque[T] = deque()
        self._limit = limit

    def put_back(self, items: Sequence[T]) -> None:
        """Items of the last group that come first in the next."""
        self.waiting.extendleft(reversed(items))

    def encoded(self, weight: int, seconds: float) -> None:
        """Report how long a group took to encode."""
        if not weight:
            return
        self.encode_s = seconds
        self.heaviest = max(self.heaviest, weight)
        # Batches of unequal weight never fill the budget, but it should not grow far beyond what was ever gathered.
        grown = min(self._limit, max(2 * weight, min(2 * self.weight, 4 * weight)))
        self.weight = max(self.weight, grown)
        if self.by_the_clock and seconds > 0:
            self.weight = max(1, min(self.weight, int(weight * _GROUP_S / seconds)))


def gather(items: Iterator[T], budget: GroupBudget[T]) -> Generator[list[T], None, None]:
    """Groups of items within the budget; an error of the items comes after the group gathered before it.

    By the clock, a group also ends when gathering it took longer than encoding the last one: then reading is the
    bottleneck, and waiting for more would not help.
    """
    waiting = budget.waiting
    error: Exception | None = None
    try:
        while error is None or waiting:
            group: list[T] = []
            weight, started = 0, time.perf_counter()
            while True:
                if not waiting and error is None:
                    try:
                        waiting.append(next(items))
                    except Exception as raised:
                        error = raised
                if not waiting:
                    break
                own = budget.weigh(waiting[0])
                if group and weight + own > budget.weight:
                    break
                group.append(waiting.popleft())
                weight += own
                is_late = budget.by_the_clock and time.perf_counter() - started > budget.encode_s
                if weight >= budget.weight or is_late:
                    break
            if group:
                yield group
        if not isinstance(error, StopIteration):
            raise error
    finally:
        del error  # its traceback holds this frame: a cycle that would keep alive all that the frames hold
