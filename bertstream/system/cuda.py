"""Copies to a device, and the side stream on which the encoder runs; on the CPU the same calls do nothing special."""

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

    def follow(self) -> None:
        """What is queued from now on waits for all that the calling thread's current stream has been given."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

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
    """Work on memory that several streams share: each piece waits, on the device, for the one queued before it."""

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None

    @contextmanager
    def use(self, device: torch.device, *shared: Tensor) -> Iterator[None]:
        """Work in this context is queued on the current stream, in its turn; for one thread at a time.

        Args:
            device: where the memory is; on any device but CUDA this does nothing.
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
                tensor.record_stream(stream)  # freed, it is not handed out again before this work is done
            self._last = stream.record_event()


def resolve_device(device: torch.device | str) -> torch.device:
    """The device that a name means, with its index.

    "auto" is the process's current CUDA device if one was set, else LOCAL_RANK's, else the first; the CPU where there
    is no CUDA.

    Raises:
        ConfigError: no device of that name, or not so many CUDA devices.
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
