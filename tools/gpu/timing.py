"""How long work takes on a device: the CPU's time to launch it, the device's time, and the time when it is repeated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Milliseconds of one run.

    Attributes:
        cpu_ms: until the call returns, with nothing queued before it; median.
        gpu_ms: from its first to its last operation on the device; median. On a CPU the same as `cpu_ms`.
        back_to_back_ms: of one of many in a row, which is what a busy device needs; mean.
    """

    cpu_ms: float
    gpu_ms: float
    back_to_back_ms: float


def synchronize(device: torch.device | str) -> None:
    """Wait for all work queued on the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def times_of(run: Callable[[], object], device: torch.device | str, *, repeats: int, warm: int = 3) -> Times:
    """Time a function that queues work on the current stream of a device.

    Args:
        run: what to time; its result is dropped.
        device: where it works.
        repeats: runs of each kind of timing.
        warm: runs before them.
    """
    for _ in range(warm):
        run()
    synchronize(device)
    timed = [_one(run, torch.device(device)) for _ in range(repeats)]
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    together = 1e3 * (time.perf_counter() - started) / repeats
    cpu, gpu = (statistics.median(column) for column in zip(*timed, strict=True))
    return Times(cpu, gpu, together)


def _one(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Milliseconds of the CPU and of the device."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        took = 1e3 * (time.perf_counter() - started)
        return took, took
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):  # events are recorded on its current stream
        started = time.perf_counter()
        first.record()
        run()
        last.record()
        cpu = 1e3 * (time.perf_counter() - started)
        last.synchronize()
    return cpu, first.elapsed_time(last)
