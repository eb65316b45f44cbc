"""One epoch of a loader, from the source to the training loop."""

from __future__ import annotations

import inspect
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import LoaderClosedError
from ..system.threads import Prefetcher
from .clocks import Stages


@dataclass
class Run:
    """What an iteration and whoever ends it both know of it."""

    worker: Prefetcher[Any] | None = None
    ended_by: str | None = None
    is_over: bool = False
    waits_since: float | None = None


class Iteration(Iterator[Any]):
    """What a training loop iterates. Dropping it ends the worker: it holds the only reference to the generator."""

    def __init__(self, batches: Generator[Any, None, None], run: Run, stages: Stages) -> None:
        self._batches = batches
        self._run = run
        self._stages = stages
        self._handed_out_at: float | None = None

    def __next__(self) -> Any:
        if self._handed_out_at is not None:
            self._stages.add("step", self._handed_out_at, 1)
            self._handed_out_at = None
        started = time.perf_counter()
        self._run.waits_since = time.monotonic()
        try:
            for batch in self._batches:
                self._run.waits_since = None
                self._stages.add("wait", started, 1)
                self._handed_out_at = time.perf_counter()
                return batch
        except ValueError:  # "generator already executing": `end`, in another thread, is about to close it
            if self._run.ended_by is None:
                raise
        if self._run.ended_by is not None:
            raise LoaderClosedError(self._run.ended_by)
        raise StopIteration

    def end(self, reason: str) -> None:
        """Stop the worker, from whatever thread; the next `next()` says why."""
        if inspect.getgeneratorstate(self._batches) == inspect.GEN_CLOSED:
            return
        self._run.ended_by = reason
        self._run.is_over = True
        if self._run.worker is not None:
            self._run.worker.close()
        # A loop that waits in another thread has the generator running: it wakes up, and ends it there.
        with suppress(ValueError):
            self._batches.close()
