"""Rows of vectors as bytes and back: in their own dtype, in bfloat16, or in 8 bits with a scale per 32 dimensions."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Storage: TypeAlias = Literal["auto", "float32", "bfloat16", "int8"]

_GROUP = 32
"""Dimensions that share a scale. One scale per vector gives an error of 2.6 % for all-MiniLM-L6-v2, because a few
dimensions are large. A number is off by up to half a step of 1/127 of its group's largest; for 32 dimensions with
evenly spread rounding errors that is at most 1.3 % of the group."""


class Codec:
    """How one encoder's rows are stored.

    Args:
        storage: how to store them; "auto" keeps the encoder's dtype, bit for bit.
        row_shape: the shape of one row.
        dtype: the dtype of the encoder's rows.
    Attributes:
        name: shape and storage; a codec of another name cannot read these rows.
        row_bytes: bytes of one stored row.
    """

    def __init__(self, storage: Storage, row_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._row_shape = row_shape
        self._dtype = dtype
        self._size = math.prod(row_shape)
        stored = str(dtype).removeprefix("torch.") if storage == "auto" else storage
        self._stored: torch.dtype | None = None if stored == "int8" else getattr(torch, stored)
        self._groups = -(-self._size // _GROUP)
        if self._stored is None:
            self.row_bytes = self._size + 2 * self._groups
        else:
            self.row_bytes = self._size * self._stored.itemsize
        self.name = f"{stored} {row_shape}" + (f" by {_GROUP}" if self._stored is None else "")

    def pack(self, values: Tensor) -> Tensor:
        """Convert rows to bytes.

        Args:
            values: [N, *row_shape] on any device.
        Returns:
            [N, row_bytes] uint8, same device; the same memory where nothing is converted.
        """
        if not len(values):  # NumPy's arrays without rows have strides that torch cannot view as another dtype
            return torch.zeros(0, self.row_bytes, dtype=torch.uint8, device=values.device)
        flat = values.detach().reshape(len(values), self._size)
        return self._quantized(flat) if self._stored is None else flat.to(self._stored).contiguous().view(torch.uint8)

    def unpack(self, rows: Tensor) -> Tensor:
        """Convert bytes back to rows.

        Args:
            rows: [N, row_bytes] uint8 on any device.
        Returns:
            [N, *row_shape] in the encoder's dtype, same device; the same memory where nothing is converted.
        """
        flat = self._dequantized(rows) if self._stored is None else rows.view(self._stored)
        return flat.to(self._dtype).view(len(rows), *self._row_shape)

    def _quantized(self, flat: Tensor) -> Tensor:
        """Integers from -127 to 127, then a bfloat16 scale per group, rounded up so that no number is clipped."""
        padded = F.pad(flat.float(), (0, self._groups * _GROUP - self._size)).view(-1, self._groups, _GROUP)
        scales = (padded.abs().amax(-1) * ((1 + 2**-7) / 127)).to(torch.bfloat16)
        divisors = scales.float().clamp(min=torch.finfo(torch.float32).tiny)
        numbers = (padded / divisors[..., None]).round().to(torch.int8).flatten(1)[:, : self._size]
        return torch.cat([numbers.contiguous().view(torch.uint8), scales.view(torch.uint8)], 1)

    def _dequantized(self, stored: Tensor) -> Tensor:
        numbers = stored[:, : self._size].view(torch.int8).float()
        # Copied, because a view as bfloat16 needs an even address.
        scales = stored[:, self._size :].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
        padded = F.pad(numbers, (0, self._groups * _GROUP - self._size)).view(-1, self._groups, _GROUP)
        return (padded * scales[..., None]).flatten(1)[:, : self._size]
