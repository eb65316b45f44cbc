"""OpenMP's threads, torch's modes, the heap and garbage collection are set as asked, and results stay the same."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from fork_server import RANKS

from bertstream.system import process
from bertstream.system.process import on_one_core, release_openmp_threads, torch_modes, trim_heap, usable_cores


def test_usable_cores_counts_the_cores_this_process_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5}, raising=False)
    assert usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says how long threads waited for a core")
def test_the_time_is_known_that_a_process_waits_for_a_core_which_another_holds() -> None:
    program = """
import os, threading, time
from bertstream.system.process import cpu_and_queue_s
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
(ran, queued), started = cpu_and_queue_s(), time.thread_time()
if not os.fork():
    while time.thread_time() < started + 0.2: pass
    os._exit(0)
while time.thread_time() < started + 0.2: pass
now = cpu_and_queue_s()
print(now[0] - ran > 0.1, now[1] - queued > 0.05)
"""
    out, errors, _ = RANKS.start(program).finish()
    assert out.split() == ["True", "True"], out + errors


def compute() -> float:
    return float(torch.ones(512, 512).matmul(torch.ones(512, 512)).add(1).mul_(0.5).sum())


@pytest.mark.usefixtures("two_threads")
def test_on_one_core_leaves_other_threads_their_number_of_cores() -> None:
    def threads_of_a_new_thread() -> int:
        with ThreadPoolExecutor(1) as other:
            return other.submit(torch.get_num_threads).result()

    def run() -> tuple[float, int, int]:
        return compute(), torch.get_num_threads(), threads_of_a_new_thread()

    assert on_one_core(run) == (pytest.approx(compute()), 1, 2)
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2
    with pytest.raises(ZeroDivisionError):
        on_one_core(lambda: 1 // 0)


def test_torch_modes_carries_the_settings_of_one_thread_to_another() -> None:
    def modes() -> tuple[bool, bool, str]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_device().type

    def elsewhere(taken: AbstractContextManager[object]) -> tuple[bool, bool, str]:
        with taken:
            return modes()

    with ThreadPoolExecutor(1) as other:
        with torch.device("meta"), torch.no_grad():
            found = other.submit(elsewhere, torch_modes()).result(), modes()
        assert found[0] == found[1] == (False, False, "meta")
        with torch.inference_mode():
            assert other.submit(elsewhere, torch_modes()).result() == modes() == (False, True, "cpu")
        assert other.submit(modes).result() == (True, False, "cpu"), "the other thread's own settings are restored"


RELEASING = """
import os, torch
from bertstream.system.process import release_openmp_threads

torch.set_num_threads(2)
with_team = []
for _ in range(3):
    torch.ones(512, 512).matmul(torch.ones(512, 512)).add(1).mul_(0.5).sum()
    with_team.append(len(os.listdir("/proc/self/task")))
    release_openmp_threads()
    assert len(os.listdir("/proc/self/task")) < with_team[-1], with_team
    assert torch.get_num_threads() == 2
assert len(set(with_team)) == 1, with_team
release_openmp_threads()  # without a team, nothing happens
"""


@pytest.mark.skipif(not process._openmp(), reason="torch does not use GCC's OpenMP here")
def test_released_openmp_threads_come_back_and_their_number_stays_the_same() -> None:
    """Runs in a new process: in this one, threads of other tests come and go."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run([sys.executable, "-c", RELEASING], check=True, env=environment)


@pytest.mark.usefixtures("two_threads")
def test_releasing_leaves_the_openmp_threads_of_other_threads_alone() -> None:
    right = compute()
    found = []
    for _ in range(20):
        thread = threading.Thread(target=lambda: found.append([compute() for _ in range(5)]))
        thread.start()
        release_openmp_threads()
        thread.join()
        assert compute() == right
    assert found == [[right] * 5] * 20


@pytest.mark.skipif(process._malloc_trim() is None, reason="the C library is not glibc")
def test_trimming_returns_the_free_memory_between_used_blocks() -> None:
    blocks = [torch.ones(25_000) for _ in range(2_000)]  # 100 kB each: glibc maps larger blocks one by one
    whole = resident_bytes()
    kept = blocks[::8]
    del blocks
    fragmented = resident_bytes()
    trim_heap()
    assert fragmented - resident_bytes() > 0.7 * 1e5 * (2_000 - len(kept)) - (whole - fragmented)
    assert all(float(block.sum()) == 25_000 for block in kept)


COLLECTING = """
import gc
from bertstream.system.process import collect_garbage_rarely
gc.unfreeze()
gc.set_threshold({before})
collect_garbage_rarely()
frozen = gc.get_freeze_count()
younger = [[] for _ in range(100)]
collect_garbage_rarely()
assert 10_000 < frozen == gc.get_freeze_count(), "the second call does nothing"
print(gc.get_threshold()[0])
"""


@pytest.mark.parametrize(("before", "after"), [(700, 10_000), (50_000, 50_000), (0, 0)])
def test_collecting_rarely_leaves_out_existing_objects_and_never_lowers_the_threshold(before: int, after: int) -> None:
    out, errors, status = RANKS.start(COLLECTING.format(before=before)).finish()
    assert (out, status) == (f"{after}\n", 0), errors


@pytest.mark.usefixtures("two_threads")
def test_without_gcc_openmp_and_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_openmp", list)
    monkeypatch.setattr(process, "_malloc_trim", lambda: None)
    right = compute()
    release_openmp_threads()
    trim_heap()
    assert torch.get_num_threads() == 2 and compute() == right


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
