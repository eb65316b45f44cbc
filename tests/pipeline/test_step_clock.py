"""Idle cores during steps are measured, and a thread starts only where it gains time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bertstream.pipeline import step_clock
from bertstream.pipeline.step_clock import StepClock


class Machine:
    """Four cores; their clocks advance only in `spend`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall_s = self.cpu_s = 50.0
        clocks = SimpleNamespace(perf_counter=lambda: self.wall_s, process_time=lambda: self.cpu_s)
        monkeypatch.setattr(step_clock, "time", clocks)

    def spend(self, seconds: float, busy_cores: float) -> None:
        self.wall_s += seconds
        self.cpu_s += seconds * busy_cores


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("encoding_s", "step_s", "busy_cores", "leaves_room"),
    [
        (1.0, 1.0, 0.0, True),  # it waits for a GPU, or sleeps
        (1.0, 1.0, 0.5, True),
        (1.0, 1.0, 4.0, False),  # it computes on all cores
        (1.0, 1.0, 3.5, False),
        (1.0, 1.0, 2.0, False),  # it computes on half of them, and encoding needs all
        (0.2, 1.0, 1.0, True),  # it computes on one of four, for most of the time
        (0.1, 1.0, 3.5, False),
        (1.0, 0.05, 0.0, False),  # it waits, but too briefly to hide much work
        (1.0, 0.4, 0.0, True),
    ],
)
def test_a_thread_is_worth_it_beside_steps_that_leave_cores_idle_for_a_good_part_of_the_time(
    machine: Machine, encoding_s: float, step_s: float, busy_cores: float, leaves_room: bool
) -> None:
    clock = StepClock(cores=4)
    for _ in range(5):
        machine.spend(encoding_s, 2.0)  # time between steps does not count as the step's
        clock.begin()
        machine.spend(step_s, busy_cores)
        clock.end()
    assert clock.leaves_room() == leaves_room


def test_a_loop_that_hardly_waits_needs_no_thread(machine: Machine) -> None:
    """For example, with a cache: a small model's steps keep a core busy, and an epoch is slower with a thread."""
    clock = StepClock(cores=4)
    for encoding_s, leaves_room in ((0.05, False), (0.5, True)):
        for _ in range(5):
            machine.spend(encoding_s, 2.0)
            clock.begin()
            machine.spend(1.0, 1.0)
            clock.end()
        assert clock.leaves_room() == leaves_room


def test_no_thread_starts_before_enough_time_was_measured(machine: Machine) -> None:
    clock = StepClock(cores=4)
    for _ in range(9):
        machine.spend(0.002, 2.0)
        clock.begin()
        machine.spend(0.008, 0.0)
        clock.end()
        assert not clock.leaves_room()
    clock.begin()
    machine.spend(0.02, 0.0)
    clock.end()
    assert clock.leaves_room()


def test_processor_time_beyond_all_cores_does_not_cancel_idle_time(machine: Machine) -> None:
    """Clocks are coarse: a step may seem to use more cores than exist, which must not reduce another's idle time."""
    clock = StepClock(cores=4)
    for busy_cores in (9.0, 0.0, 0.0):
        machine.spend(0.3, 2.0)
        clock.begin()
        machine.spend(1.0, busy_cores)
        clock.end()
    assert clock.leaves_room()
