"""Settings of a process and its threads: cores, OpenMP's threads, torch's modes, the heap, garbage collection."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def usable_cores() -> int:
    """The number of cores this process may run on; all cores of the machine where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_and_queue_s() -> tuple[float, float]:
    """Seconds that this process's threads have run, and that they were ready to run while others held the cores.

    Of the threads that are alive. Zeros where the system does not say: only Linux does.
    """
    ran = queued = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            on_core, waited, _ = path.read_text().split()
        except (OSError, ValueError):
            continue  # the thread has just ended
        ran, queued = ran + int(on_core), queued + int(waited)
    return ran / 1e9, queued / 1e9


def release_openmp_threads() -> None:
    """End the worker threads that OpenMP keeps for the calling thread, before another thread computes.

    OpenMP keeps a team of idle threads for every thread that has computed on several cores. With more of them than
    cores, they no longer spin between two operations but sleep, and each operation has to wake them. Encoding batches
    of 128 short texts in a second thread, with all-MiniLM-L6-v2 on two cores, then takes 6,600 context switches instead
    of 6, and 1.45 times the time. A team that was ended comes back with its thread's next operation, in some 0.1 ms.

    Only GCC's OpenMP can do this (torch on Linux uses it); elsewhere nothing happens.
    """
    for library in _openmp():
        library.omp_pause_resource_all(_OMP_PAUSE_SOFT)


def on_one_core(run: Callable[[], Result]) -> Result:
    """Call `run` in a new thread whose torch operations use one core, and return its result."""

    def use_one_core() -> None:
        torch.get_num_threads()  # the first query sets the thread's number to the default: it has to come first
        torch.set_num_threads(1)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=use_one_core) as thread:
        thread.submit(int).result()  # the initializer has run
        torch.set_num_threads(threads)  # the default for threads that start later; the new thread keeps its 1
        return thread.submit(run).result()


def torch_modes() -> AbstractContextManager[object]:
    """Capture the torch settings of the calling thread, as a context to enter in another thread.

    Covers the default device, the current CUDA device, and the grad and inference modes, all of which torch keeps per
    thread.
    """
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    device = torch.get_default_device()
    cuda = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as modes:
            if inference:
                modes.enter_context(torch.inference_mode())
            modes.enter_context(torch.set_grad_enabled(grad))
            if device.type != "cpu":
                modes.enter_context(device)
            if cuda is not None:
                modes.enter_context(torch.cuda.device(cuda))
            yield

    return entered()


def trim_heap() -> None:
    """Return free memory between glibc's blocks to the system.

    Batches differ in size and are freed in another order than they were made, so the heap fragments over thousands of
    them. A call takes milliseconds, and reused memory costs page faults again: call it every few seconds at most. Does
    nothing with another C library.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def collect_garbage_rarely() -> None:
    """In a worker process: collect garbage less often, and leave out all objects that exist now.

    A stream's buckets are many small objects that live for a while. With Python's defaults, collections are frequent,
    find nothing, and the full ones scan all imported modules: a worker took 1.2 times as long. A second call does
    nothing.
    """
    global _collects_rarely_in
    if _collects_rarely_in == os.getpid():
        return
    _collects_rarely_in = os.getpid()
    gc.freeze()
    youngest, *others = gc.get_threshold()
    if youngest:  # 0 turns collection off
        gc.set_threshold(max(youngest, _YOUNGEST_THRESHOLD), *others)


_collects_rarely_in = 0  # id of the process that was set up; a forked child starts over
_YOUNGEST_THRESHOLD = 10_000
"""New objects before the youngest generation is collected; Python's default is 700 (2,000 since 3.13)."""

_OMP_PAUSE_SOFT = 1
"""OpenMP's constant: end the threads, and keep settings such as their number."""


@cache
def _openmp() -> list[Any]:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "/libgomp" in line}
    libraries = [ctypes.CDLL(path) for path in sorted(paths) if Path(path).exists()]
    return [library for library in libraries if hasattr(library, "omp_pause_resource_all")]


@cache
def _malloc_trim() -> Any:
    """The function of glibc; None with another C library."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


_PARENT_CHECK_INTERVAL_S = 1.0
_exits_with_parent_in = 0  # id of the process whose parent is watched; a forked child starts over


def exit_with_parent() -> None:
    """In a worker process: exit within a second or so of the parent process, however the parent ended.

    torch's workers watch their parent too, but miss two cases: the parent dies before their first check, or they block
    on writing to a full pipe that nobody reads. A second call does nothing.
    """
    global _exits_with_parent_in
    parent = multiprocessing.parent_process()
    if parent is not None and _exits_with_parent_in != os.getpid():
        _exits_with_parent_in = os.getpid()
        threading.Thread(target=_exit_once_orphaned, args=(parent,), name="bertstream-parent", daemon=True).start()


def _exit_once_orphaned(parent: BaseProcess) -> None:
    # Two checks, since each misses a case. With a fork server, getppid() is the server. And is_alive() reads a pipe,
    # which a sibling that was forked later may hold open after the parent's death.
    started_by = os.getppid()
    while os.getppid() == started_by and parent.is_alive():
        time.sleep(_PARENT_CHECK_INTERVAL_S)
    os._exit(1)
