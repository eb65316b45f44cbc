"""OpenMP's helpers: a thread's go when it is told so, settings stay, and what it computes stays the same."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bertstream import openmp
from bertstream.openmp import release_helpers

TASKS = Path("/proc/self/task")


def compute() -> float:
    return float(torch.ones(512, 512).matmul(torch.ones(512, 512)).add(1).mul_(0.5).sum())


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.skipif(not openmp._runtimes(), reason="torch runs on another OpenMP than GCC's here")
def test_helpers_go_and_come_back_and_the_number_of_threads_stays() -> None:
    with_helpers = []
    for _ in range(3):
        compute()
        with_helpers.append(len(os.listdir(TASKS)))
        release_helpers()
        assert len(os.listdir(TASKS)) < with_helpers[-1]
        assert torch.get_num_threads() == 2
    assert len(set(with_helpers)) == 1
    release_helpers()  # where there are none, nothing happens


@pytest.mark.usefixtures("_two_threads")
def test_another_threads_helpers_are_left_alone() -> None:
    right = compute()
    found = []
    for _ in range(20):
        thread = threading.Thread(target=lambda: found.append([compute() for _ in range(5)]))
        thread.start()
        release_helpers()
        thread.join()
        assert compute() == right
    assert found == [[right] * 5] * 20


def test_where_there_is_no_such_runtime_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_runtimes", list)
    release_helpers()
