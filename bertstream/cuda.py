"""Copies to a device, the side stream of the encoder, and CUDA graphs; on the CPU the same calls do nothing special."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(data: npt.NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Data as a tensor on a device; the same memory where it is there. From the host it never waits for the device."""
    tensor = data if isinstance(data, Tensor) else torch.from_numpy(data)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class SideStream:
    """One CUDA stream for a loader's life, and the hand-over from it to the consumer's.

    Args:
        device: where the encoder runs; on any device but CUDA every method is a no-op.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self) -> AbstractContextManager[object]:
        """Work inside this context is queued on the side stream."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def mark(self) -> torch.cuda.Event | None:
        """An event behind everything queued so far: what a batch's consumer has to wait for."""
        return self._stream.record_event() if self._stream is not None else None

    def hand_over(self, event: torch.cuda.Event | None, tensors: Iterable[Tensor]) -> None:
        """Make the calling thread's current stream wait for the event; the CPU does not wait.

        Each CUDA tensor is recorded on that stream: its memory, which the side stream allocated, is then not handed
        out again before the consumer's queued work has read it.
        """
        if event is None or self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_event(event)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(current)


class InTurn:
    """Work on memory that several streams share: each piece waits, on the device, for the one queued before it.

    Args:
        device: where the memory is; on any device but CUDA this does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Event | None = None

    @contextmanager
    def use(self, *shared: Tensor) -> Iterator[None]:
        """Work in this context is queued on the current stream, in its turn; for one thread at a time."""
        if self._device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None:
            stream.wait_event(self._last)
        try:
            yield
        finally:
            for tensor in shared:
                tensor.record_stream(stream)  # freed, it is not handed out again before this work is done
            self._last = stream.record_event()


class GraphPool:
    """Captures work as CUDA graphs that share their memory: they are replayed one behind the other.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """What queues the work's kernels on the current stream, each time over the memory that the work used.

        Nothing is computed here. The device is waited for once, and until the end no thread may wait for all of it.

        Raises:
            RuntimeError: the work waits for the device, or does something else that cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        # In the default mode any call to CUDA of another thread would break the capture: a training step, say. The
        # current stream is entered again because torch does not leave its capture stream where a capture fails.
        with (
            _CAPTURING,
            torch.cuda.device(self._stream.device),
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            work()
        return graph.replay


_CAPTURING = threading.Lock()
"""torch allows one capture at a time in a process."""
