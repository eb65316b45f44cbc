"""Measures whether the training step leaves cores idle, which is when encoding ahead in a thread pays off."""

from __future__ import annotations

import time

_JUDGED_S, _IDLE_SHARE, _WAIT_SHARE = 0.1, 0.25, 0.1
"""Above these a thread is worth its cost: up to a quarter of the rate on two cores, where the OpenMP helpers of two
threads compete."""

_IDLE_CORES = 0.6
"""The share of the cores that a step must leave idle. Beside a step that kept one of two cores busy (launching tiny
operations, say), encoding in a thread gained nothing and took up to 1.2 times as long as taking turns."""


class StepClock:
    """Measures how much of the processor the training step leaves idle for a thread.

    Args:
        cores: how many the process may use.
    """

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._started = time.perf_counter()
        self._step_s = self._idle_core_s = 0.0
        self._step: tuple[float, float] | None = None

    def begin(self) -> None:
        """Mark the start of a step."""
        self._step = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Mark the end of the step; does nothing if none has begun."""
        if self._step is not None:
            wall_s, cpu_s = time.perf_counter() - self._step[0], time.process_time() - self._step[1]
            self._step_s += wall_s
            self._idle_core_s += max(0.0, wall_s * self._cores - cpu_s)
            self._step = None

    def leaves_room(self) -> bool:
        """Whether steps leave cores idle for a good part of the time, and loading takes long enough to be worth hiding.

        Loading is all that happens between steps. False while too little time has passed to tell.
        """
        seconds = time.perf_counter() - self._started
        idle = self._idle_core_s > self._cores * max(_IDLE_SHARE * seconds, _IDLE_CORES * self._step_s)
        return seconds > _JUDGED_S and idle and seconds - self._step_s > _WAIT_SHARE * seconds
