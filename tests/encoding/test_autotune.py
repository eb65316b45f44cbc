"""What is fastest on a device is measured, and kept only where it is clearly faster."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bertstream.encoding import autotune


@pytest.mark.parametrize(("float32_ticks", "chosen"), [(1, torch.float32), (1.4, torch.float32), (1.6, torch.bfloat16)])
def test_the_measured_dtype_is_the_one_that_is_clearly_faster(
    float32_ticks: float, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, linear, now = torch.device("cpu"), torch.nn.functional.linear, 0.0

    def timed(rows: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += float32_ticks if rows.dtype == torch.float32 else 1.0
        return linear(rows, *weights)

    monkeypatch.setattr(torch.nn.functional, "linear", timed)
    monkeypatch.setattr(autotune.time, "thread_time", lambda: now)
    monkeypatch.setattr(autotune.sys, "platform", "linux")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert autotune.fastest_dtype(cpu, 64) == chosen
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert autotune.fastest_dtype(cpu, 64) == torch.float32


@pytest.mark.usefixtures("two_threads")
def test_measuring_leaves_random_numbers_and_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it never reads the wall clock, so other programs do not count."""
    monkeypatch.setattr(autotune.sys, "platform", "linux")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(autotune.time, "perf_counter", None)
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    autotune.fastest_dtype(torch.device("cpu"), 64)
    assert torch.equal(torch.get_rng_state(), random) and torch.get_num_threads() == threads


def test_measuring_stops_after_half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, rounds = 0.0, []

    def run(tokens: int) -> None:
        nonlocal now
        now += tokens * 2e-5
        rounds.append(tokens)

    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now)
    assert autotune.fastest_forward_tokens((1024, 2048, 4096), run, torch.device("cpu"), 2048) == 2048
    assert rounds == [1024, 2048, 4096] * 5


@pytest.mark.parametrize(("seconds", "faster"), [((0.1, 0.2), True), ((0.19, 0.2), True), ((0.1951, 0.2), False)])
def test_work_is_faster_if_it_takes_a_twentieth_less(
    seconds: tuple[float, float], faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, calls = 0.0, 0

    def works(taken: float) -> Callable[[], None]:
        def work() -> None:
            nonlocal now, calls
            now += taken + (calls < 2)  # the first ones are slow
            calls += 1

        return work

    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now)
    monkeypatch.setattr(autotune, "_MEASURED_S", 3)
    run, than = map(works, seconds)
    assert autotune.is_faster(run, than) is faster
    assert calls > 2


def test_on_a_cpu_no_forward_is_tried_above_one_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now, tried = 0.0, set()

    def run(tokens: int) -> None:
        nonlocal now
        now += tokens * 3e-5
        tried.add(tokens)

    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now)
    cpu = torch.device("cpu")
    assert autotune.fastest_forward_tokens((1024, 2048, 4096, 8192), run, cpu, 2048) == 2048
    assert tried == {1024, 2048, 4096}
    assert autotune.fastest_forward_tokens((4096, 8192), run, cpu, 8192) == 8192, "the default is always tried"
