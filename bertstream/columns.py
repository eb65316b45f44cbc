"""Dataclasses whose arrays declare what an entry belongs to: all of them are picked from and joined alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ONE_WINDOW = object()
"""Absent entry of `window_lengths`: a text without any is one window."""


def axis(name: str, absent: object = None) -> dict[str, object]:
    """Metadata of a dataclass field that holds an array: what an entry of it belongs to.

    `picked` and `concatenated` follow from it, so a new field is declared here and nowhere else.

    Args:
        name: "tokens", "words", "windows" or "texts"; of `Embeddings`, "rows" on the device or "host rows".
        absent: the entry of a text that lacks the array where others have it; None if no text lacks it.
    """
    return {"axis": name, "absent": absent}


_KNOWN: dict[type, list[tuple[str, str, Any, Callable[[Any], Any]]]] = {}


def columns(kind: type) -> list[tuple[str, str, Any, Callable[[Any], Any]]]:
    """Name, axis, absent entry and getter of each field that has an axis."""
    known = _KNOWN.get(kind)
    if known is None:
        declared = [(f.name, f.metadata) for f in fields(kind) if "axis" in f.metadata]
        known = [(name, about["axis"], about["absent"], attrgetter(name)) for name, about in declared]
        _KNOWN[kind] = known
    return known


def picked(owner: Any, entries: Mapping[str, Any]) -> dict[str, Any]:
    """These entries of each field that has an axis; a field whose axis is not in `entries` is left out.

    Args:
        owner: a dataclass whose fields declare their `axis`.
        entries: by axis, a mask or indices, on the device of its fields; or a slice.
    Returns:
        By name, copies.
    """
    return {
        name: None if (array := get(owner)) is None else _take(array, entries[of])
        for name, of, _, get in columns(type(owner))
        if of in entries
    }


def _take(array: Any, entries: Any) -> Any:
    if isinstance(entries, slice):
        return array[entries].clone() if isinstance(array, Tensor) else array[entries].copy()
    return array.index_select(0, entries) if isinstance(array, Tensor) else array[entries]


def concatenated(
    kind: type,
    parts: Sequence[Any],
    sizes: Mapping[str, Sequence[int] | npt.NDArray[Any]],
    window: Callable[[int], npt.NDArray[Any]] | None = None,
) -> dict[str, Any]:
    """Each field that has an axis, of all parts one after the other; a field that all parts lack is None.

    Args:
        kind: a dataclass whose fields declare their `axis`.
        parts: of this kind, or with the same fields.
        sizes: by axis, how many entries each part has.
        window: lengths of the windows of part i where it has none, but others do: each of its texts is one window. For
            kinds that have windows.
    """
    out: dict[str, Any] = {}
    for name, of, absent, get in columns(kind):
        arrays = list(map(get, parts))
        if absent is not None:
            missing = [array is None for array in arrays]
            if all(missing):
                out[name] = None
                continue
            if any(missing):
                like = arrays[missing.index(False)]
                for i in np.flatnonzero(missing).tolist():
                    if absent is ONE_WINDOW:
                        assert window is not None
                        arrays[i] = window(i)
                    else:
                        arrays[i] = _filled(like, sizes[of][i], absent)
        out[name] = _joined(arrays)
    return out


def _filled(like: Any, size: int, absent: Any) -> Any:
    if isinstance(like, Tensor):
        return torch.full((size,), absent, dtype=like.dtype, device=like.device)
    return np.full(size, absent)


def _joined(arrays: Sequence[Any]) -> Any:
    if not arrays:
        return np.zeros(0, np.int32)
    return torch.cat(list(arrays)) if isinstance(arrays[0], Tensor) else np.concatenate(arrays)


def picked_fields(fields: Mapping[str, Any], indices: npt.NDArray[np.integer[Any]]) -> dict[str, Any]:
    """The entries of these texts, of each field that is an array or list with one entry a text."""
    return {
        name: column[indices] if isinstance(column, np.ndarray) else [column[i] for i in indices.tolist()]
        for name, column in fields.items()
    }


def joined_fields(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields that all parts have, one part after the other."""
    names = [name for name in parts[0] if all(name in part for part in parts)]
    found = {name: [part[name] for part in parts] for name in names}
    return {
        name: np.concatenate(own) if all(isinstance(part, np.ndarray) for part in own) else list(chain(*own))
        for name, own in found.items()
    }
