"""Device names, copies to a device, and the order of work on CUDA streams; without CUDA the ordering is a no-op."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ConfigError
from .distributed import local_rank


def to_device(data: npt.NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Put an array or tensor on a device.

    Args:
        data: any shape and dtype. Memory that is on the device already is shared, not copied.
        device: where to put it. A copy from host memory to CUDA is asynchronous, from pinned memory.
    Returns:
        A tensor with the shape and dtype of `data`.
    """
    tensor = data if isinstance(data, Tensor) else torch.from_numpy(data)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class SideStream:
    """The CUDA stream a loader encodes on, and the hand-over of its results to the consumer's stream.

    Args:
        device: where the encoder runs; every method is a no-op unless it is CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def follow(self) -> None:
        """Make later work wait for everything queued so far on the calling thread's current stream."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def run(self) -> AbstractContextManager[object]:
        """A context that queues its work on the side stream."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def mark(self) -> torch.cuda.Event | None:
        """Record an event after everything queued so far, for a batch's consumer to wait for."""
        return self._stream.record_event() if self._stream is not None else None

    def hand_over(self, event: torch.cuda.Event | None, tensors: Iterable[Tensor]) -> None:
        """Make the calling thread's current stream wait for the event; the CPU does not wait.

        Args:
            event: of `mark`; None does nothing.
            tensors: memory that the side stream allocated. Each CUDA tensor is recorded on the current stream, so the
                allocator reuses its memory only after the consumer's queued work.
        """
        if event is None or self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_event(event)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(current)


class InTurn:
    """Order the work of several CUDA streams on shared memory: each use waits, on the device, for the previous one."""

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None

    @contextmanager
    def use(self, device: torch.device, *shared: Tensor) -> Iterator[None]:
        """A context that queues its work on the current stream, after the previous use; for one thread at a time.

        Args:
            device: where the memory is; the context does nothing unless it is CUDA.
            shared: memory that may be freed while work on it is queued.
        """
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        if self._last is not None:
            stream.wait_event(self._last)
        try:
            yield
        finally:
            for tensor in shared:
                tensor.record_stream(stream)  # once freed, the allocator reuses it only after this work
            self._last = stream.record_event()


def resolve_device(device: torch.device | str) -> torch.device:
    """Turn the name of a device into a device with an index.

    Args:
        device: "auto" is the process's current CUDA device if one was set, else the one of LOCAL_RANK, else the first;
            the CPU if there is no CUDA.
    Raises:
        ConfigError: there is no device of this name or index.
    """
    available = torch.cuda.is_available()
    if str(device) == "auto":
        if not available:
            return torch.device("cpu")
        current, local = torch.cuda.current_device(), local_rank()
        return torch.device("cuda", current if current or local is None else local % torch.cuda.device_count())
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r}: {error}") from None
    if resolved.type != "cuda":
        return resolved
    if not available:
        raise ConfigError(f"device={str(device)!r}, but torch sees no CUDA device")
    if resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    count = torch.cuda.device_count()
    if resolved.index >= count:
        raise ConfigError(f"device={str(device)!r}, but torch sees {count} CUDA devices, counted from cuda:0")
    return resolved
