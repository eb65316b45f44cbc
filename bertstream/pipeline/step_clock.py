"""Whether the training step leaves cores idle, so that encoding ahead in a thread pays off."""

from __future__ import annotations

import time

_JUDGED_S, _IDLE_SHARE, _WAIT_SHARE = 0.1, 0.25, 0.1
"""Above these shares a thread is worth what it costs: up to a quarter of the rate on two cores, where OpenMP's helpers
of two threads stand in one another's way."""

_IDLE_CORES = 0.6
"""Of the cores, what a step must leave idle. Beside one that keeps one of two busy, launching tiny operations say,
encoding in a thread gained nothing, and took up to 1.2 times as long as both in turn."""


class StepClock:
    """Whether a consumer's step leaves the processor idle, so that work in a thread would hide behind it.

    Args:
        cores: of the processor.
    """

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._started = time.perf_counter()
        self._step_s = self._idle_core_s = 0.0
        self._step: tuple[float, float] | None = None

    def begin(self) -> None:
        """A step begins."""
        self._step = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """The step is over."""
        if self._step is not None:
            wall_s, cpu_s = time.perf_counter() - self._step[0], time.process_time() - self._step[1]
            self._step_s += wall_s
            self._idle_core_s += max(0.0, wall_s * self._cores - cpu_s)
            self._step = None

    def leaves_room(self) -> bool:
        """Whether cores stood idle during steps for a good part of all time so far, and there is something to hide.

        That is, whether what lies between the steps takes its time. False while there was too little time to tell.
        """
        seconds = time.perf_counter() - self._started
        idle = self._idle_core_s > self._cores * max(_IDLE_SHARE * seconds, _IDLE_CORES * self._step_s)
        return seconds > _JUDGED_S and idle and seconds - self._step_s > _WAIT_SHARE * seconds
