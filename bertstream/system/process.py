"""What runs under us: how many cores, OpenMP's helper threads and what they cost, glibc's heap, Python's collector."""

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
    """How many cores this process may run on, where the system says so; else how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def release_openmp_threads() -> None:
    """End the helper threads that OpenMP (GCC's, with which torch comes on Linux) keeps for the calling thread.

    They come back when the thread next computes on several cores, which costs some 0.1 ms. While they are there, though
    idle, another thread's helpers are more than the cores, so those no longer spin between two operations but sleep,
    and are woken for each: encoding in a thread, batches of 128 short texts, all-MiniLM-L6-v2, two cores, 6,600
    context switches instead of 6, and 1.45 times the time.
    """
    for library in _openmp():
        library.omp_pause_resource_all(_SOFT)


def on_one_core(run: Callable[[], Result]) -> Result:
    """What `run` gives, called in a thread of its own whose torch operations have no helper threads."""

    def begin() -> None:
        torch.get_num_threads()  # a thread's number is set when it is first asked for, so that comes first
        torch.set_num_threads(1)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=begin) as thread:
        thread.submit(int).result()
        torch.set_num_threads(threads)  # for others that begin from now on; that thread keeps its 1
        return thread.submit(run).result()


def torch_modes() -> AbstractContextManager[object]:
    """What torch keeps for each thread by itself, as it is in the calling one; to be entered in another thread.

    That is the default device, the current CUDA device, and whether gradients are recorded.
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
    """Give the system back what glibc keeps between blocks of memory that are in use.

    Batches are of many sizes and are freed in another order than they were made in, so the holes grow over thousands of
    them. It takes milliseconds, and memory that is used anew costs its page faults: for every few seconds.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def collect_garbage_rarely() -> None:
    """For a worker process, once: garbage collections that pass over what it began with, and fewer of them.

    A stream's windows are many small objects that stay for a while. So collections are frequent, find nothing, and each
    of the thorough ones goes through all that was imported: a worker took 1.2 times as long.
    """
    global _collects_rarely
    if _collects_rarely == os.getpid():
        return
    _collects_rarely = os.getpid()
    gc.freeze()
    often, *others = gc.get_threshold()
    if often:  # else somebody has turned collections off
        gc.set_threshold(max(often, _COLLECT_AFTER), *others)


_collects_rarely = 0  # the process that does
_COLLECT_AFTER = 10_000
"""Objects that are made before the youngest are looked through; Python's own number is 700 (2,000 since 3.13)."""

_SOFT = 1
"""omp_pause_soft: settings such as the number of threads stay."""


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
    """Glibc's function, or None where the C library is another."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


_PARENT_PAUSE_S = 1.0
_orphans_end_in = 0  # the process whose parent is looked after


def exit_with_parent() -> None:
    """In a worker process: end it soon after the process that started it, however that one ended.

    torch's workers look after their parent too, but not one whose parent died before it looked for the first time, nor
    one that has a full pipe to write to, which nobody reads any more.
    """
    global _orphans_end_in
    parent = multiprocessing.parent_process()
    if parent is not None and _orphans_end_in != os.getpid():
        _orphans_end_in = os.getpid()
        threading.Thread(target=_end_orphan, args=(parent,), name="bertstream-parent", daemon=True).start()


def _end_orphan(parent: BaseProcess) -> None:
    # A fork server stands between the two; and a sibling that was forked later holds the pipe by which a death is seen.
    started_by = os.getppid()
    while os.getppid() == started_by and parent.is_alive():
        time.sleep(_PARENT_PAUSE_S)
    os._exit(1)
