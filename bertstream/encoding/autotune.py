"""Measurements of this machine: the fastest dtype at load, the fastest forward size when a loader starts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..system.process import on_one_core

TRIED_TOKENS = {"cpu": (1024, 2048, 4096, 8192, 16384), "cuda": (4096, 8192, 16384, 32768, 65536)}
"""Sizes of forwards that `Encoder.calibrate` measures."""


def fastest_dtype(device: torch.device, hidden_size: int) -> torch.dtype:
    """bfloat16 if it is worth its loss of precision, else float32.

    On CUDA the device says. On a CPU its flag is not enough: processors that list AVX512_BF16 ran at 0.55 to 2.9 times
    the float32 rate. So the model's feed-forward product is timed in both dtypes, and bfloat16 is chosen if it is at
    least 1.5 times as fast. The time is one core's thread time: by wall clock, on all cores and beside other programs,
    the ratio came out at 0.5 to 1.7 on a processor where it is 0.55.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu" or sys.platform != "linux" or not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    seconds = on_one_core(lambda: {dtype: _product_seconds(dtype, hidden_size) for dtype in _CPU_DTYPES})
    return torch.bfloat16 if 1.5 * seconds[torch.bfloat16] <= seconds[torch.float32] else torch.float32


_CPU_DTYPES = (torch.float32, torch.bfloat16)


def _product_seconds(dtype: torch.dtype, hidden_size: int) -> float:
    """The calling thread's CPU time for a feed-forward product over 512 tokens."""
    rows = torch.ones(512, hidden_size, dtype=dtype, device="cpu")
    weight, bias = rows.new_ones(4 * hidden_size, hidden_size), rows.new_ones(4 * hidden_size)
    times = []
    for _ in range(3):  # the first warms up
        started = time.thread_time()
        nn.functional.linear(rows, weight, bias)
        times.append(time.thread_time() - started)
    return min(times)


def fastest_forward_tokens(
    candidates: Sequence[int], run: Callable[[int], object], device: torch.device, default: int
) -> int:
    """The number of tokens whose forward takes the least time a token.

    Args:
        candidates: numbers of tokens, ascending.
        run: the work to time, for so many tokens.
        device: where it runs.
        default: one of the candidates, chosen unless another is at least 5 % faster.
    """
    candidates = _worth_trying(candidates, run, device, default)  # which warms up
    if default not in candidates:
        return max(candidates, default=default)
    times: dict[int, list[float]] = {tokens: [] for tokens in candidates}
    until = time.perf_counter() + _MEASURED_S
    for _ in range(5):
        for tokens in candidates:
            times[tokens].append(_seconds(run, tokens, device) / tokens)
        if time.perf_counter() > until:
            break
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the largest took more memory than the chosen one needs
    quickest = min(candidates, key=lambda tokens: min(times[tokens]))
    return quickest if min(times[quickest]) < 0.95 * min(times[default]) else default


def is_faster(run: Callable[[], object], than: Callable[[], object]) -> bool:
    """Whether one piece of work on a CPU takes at most 0.95 of the time of another: both in turn, for half a second."""
    best = [float("inf"), float("inf")]
    until = time.perf_counter() + _MEASURED_S
    for _ in range(10):
        for index, work in enumerate((run, than)):
            started = time.perf_counter()
            work()
            best[index] = min(best[index], time.perf_counter() - started)
        if time.perf_counter() > until:
            break
    return best[0] <= 0.95 * best[1]


_MEASURED_S = 0.5
"""No round starts after so long."""

_LONGEST_S = 0.1
"""A forward larger than one that takes so long is not tried: fixed costs are nothing beside it."""


def _worth_trying(
    candidates: Sequence[int], run: Callable[[int], object], device: torch.device, default: int
) -> list[int]:
    """The candidates that fit into the memory left beside the user's own model, and do not take long on a CPU."""
    found = []
    for tokens in candidates:
        try:
            seconds = _seconds(run, tokens, device)
        except torch.OutOfMemoryError:
            break
        found.append(tokens)
        if device.type == "cpu" and tokens >= default and seconds > _LONGEST_S:
            break
    return found


def _seconds(run: Callable[[int], object], tokens: int, device: torch.device) -> float:
    started = time.perf_counter()
    run(tokens)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
