"""A fake CUDA device: tensors with a device, a shape and a dtype, but no content.

It catches mistakes that a CPU hides: an operation over tensors of two devices, and a value that the host reads, for
which it would wait on a real device. It does not check the numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import EllipsisType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.overrides import TorchFunctionMode

from bertstream.caching import cache
from bertstream.encoding import kernels
from bertstream.encoding.forward import BatchedForward
from bertstream.system.cuda import InTurn

CUDA = torch.device("cuda", 0)


@contextmanager
def fake_cuda(encoder: BatchedForward, monkeypatch: pytest.MonkeyPatch, *, triton: bool = False) -> Iterator[None]:
    """A context in which the encoder is on the device, which has the flash kernel; its weights are lost.

    Args:
        encoder: moved to the device.
        monkeypatch: for what the device lacks.
        triton: whether the device has our kernels, which then compute nothing.
    """
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(kernels, "available", lambda device: triton)
    monkeypatch.setattr(kernels, "_launch", _launched)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _checked(varlen_attn))
    monkeypatch.setattr(InTurn, "use", lambda self, device, *shared: nullcontext())
    monkeypatch.setattr(cache, "resolve_device", torch.device)
    mode = FakeTensorMode()
    with mode, _Device(mode), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer")  # which tells whether a weight was moved
        for module in encoder.model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = torch.nn.Parameter(_empty_like(weight), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = _empty_like(buffer)
        yield


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


class _Device(TorchFunctionMode):
    """Allows operations that torch without CUDA refuses: pinning, copies to a device, indexing on a device."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and not isinstance(args[0], FakeTensor):
            args = (self.mode.from_tensor(args[0]), *args[1:])
        if func in (torch.Tensor.to, torch.Tensor.cpu) and args[0].is_cuda:
            to = "cpu" if func is torch.Tensor.cpu else (kwargs or {}).get("device", [*args, None][1])
            assert not str(to).startswith("cpu"), "the host waits for the device here"
        if func is torch.Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            return _item(args[0], args[1] if isinstance(args[1], tuple) else (args[1],))
        return _UNGUARDED.get(func, func)(*args, **(kwargs or {}))


def _launched(name: str, grid: Any, tensors: Sequence[Tensor | None], *others: Any, **options: Any) -> None:
    """A launch that only looks at the tensors."""
    for tensor in tensors:
        assert tensor is None or (tensor.device == CUDA and tensor.is_contiguous()), name


def _checked(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Check devices of the arguments, which the fake flash kernel does not."""

    def checked(*args: Any, **kwargs: Any) -> Tensor:
        assert all(tensor.device == CUDA for tensor in args[:5])
        return attend(*args, **kwargs)

    return checked


# The methods check for CUDA themselves, the operations that they call do not.
_UNGUARDED = {torch.Tensor.copy_: torch.ops.aten.copy_.default, torch.Tensor.fill_: torch.ops.aten.fill_.Scalar}


def _item(tensor: Tensor, index: tuple[Any, ...]) -> Tensor:
    """`tensor[index]`, by operations that need no device."""
    dim = 0
    for position, one in enumerate(index, 1):
        if one is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(one, int):
            tensor = tensor.select(dim, one)
        elif isinstance(one, slice):
            if one != slice(None):
                tensor = torch.ops.aten.slice.Tensor(tensor, dim, one.start, one.stop, one.step or 1)
            dim += 1
        elif isinstance(one, EllipsisType):
            dim = tensor.ndim - sum(following is not None for following in index[position:])
        else:
            tensor, dim = torch.ops.aten.index.Tensor(tensor, [None] * dim + [one]), dim + 1
    return tensor
