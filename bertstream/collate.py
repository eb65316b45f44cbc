"""Somebody's records and batches: getting texts out of them, and putting vectors in, whatever their structure."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from .bucket import stack_column
from .errors import BertstreamError, ConfigError, EncoderError
from .types import SupportsEncode, TokenBatch

Place: TypeAlias = str | int
"""Where a text stands in a record or batch: a key, a position, or an attribute."""


class TokenCollate:
    """A `collate_fn` that tokenizes in the DataLoader's workers; hand the loader to `bertstream.wrap` afterwards.

    It holds the tokenizer alone, so it is cheap to send to worker processes. The batch has the structure of a record
    (dict, tuple, namedtuple or dataclass; or a bare text), with a `TokenBatch` where the text was. Of the other fields
    numbers become tensors [B], tensors of one shape are stacked, a list of numbers a record (one a word, say) becomes
    one tensor a record, and all else becomes a list.

    Args:
        encoder: whose tokenizer to use.
        text: the key, position or attribute of the text, or several; None where a record is the bare text.
    """

    def __init__(self, encoder: SupportsEncode, text: Place | Sequence[Place] | None = None) -> None:
        self._tokenizer = encoder.tokenizer
        self._places = as_places(text)

    def __call__(self, records: Sequence[Any]) -> Any:
        """Make a batch of a list of records.

        Raises:
            EncoderError: a text is of a wrong type or too long. In a worker process the error is returned in place of
                the batch, for `wrap` to raise: torch would rebuild it without its fields.
        """
        try:
            return self._batch(records)
        except BertstreamError as error:
            if get_worker_info() is None:
                raise
            return error

    def _batch(self, records: Sequence[Any]) -> Any:
        if self._places is None:
            return self._tokenize(records, None)
        columns = {
            place: self._tokenize([get_place(record, place) for record in records], place) for place in self._places
        }
        first = records[0]
        if isinstance(first, Mapping):
            names = dict.fromkeys(name for record in records for name in record)
            rest = {
                name: tensor_column([record.get(name) for record in records]) for name in names if name not in columns
            }
            return {name: columns[name] if name in columns else rest[name] for name in names}
        if dataclasses.is_dataclass(first):
            rest = {
                f.name: tensor_column([getattr(record, f.name) for record in records])
                for f in dataclasses.fields(first)
                if f.name not in columns
            }
            return put_places(first, columns | rest)
        positions: list[Place] = list(getattr(first, "_fields", range(len(first))))
        by_position = {(positions[p] if isinstance(p, int) else p): column for p, column in columns.items()}
        parts = [
            by_position[name] if name in by_position else tensor_column([record[i] for record in records])
            for i, name in enumerate(positions)
        ]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)

    def _tokenize(self, texts: Sequence[Any], place: Place | None) -> TokenBatch:
        try:
            return TokenBatch.from_texts(self._tokenizer(texts))
        except EncoderError as error:
            if place is not None:
                raise EncoderError(f"field {place!r}: {error}", records=error.records) from error
            raise


def as_places(text: Place | Sequence[Place] | None) -> tuple[Place, ...] | None:
    """The user's `text=` as a tuple of places; None stays None."""
    if text is None:
        return None
    places = (text,) if isinstance(text, (str, int)) else tuple(text)
    if not places or any(not isinstance(place, (str, int)) or isinstance(place, bool) for place in places):
        raise ConfigError(f"text={text!r}: name a key, a position or an attribute, or several of them")
    return places


def get_place(holder: Any, place: Place) -> Any:
    """What stands at a key of a mapping, a position of a sequence, or an attribute of anything else."""
    try:
        if isinstance(holder, Mapping) or (isinstance(place, int) and isinstance(holder, Sequence)):
            return holder[place]
        if isinstance(place, str) and not isinstance(holder, (str, list)):
            return getattr(holder, place)
    except (KeyError, IndexError, AttributeError):
        pass
    raise ConfigError(f"text={place!r} names nothing in {_describe(holder)}")


def put_places(holder: Any, values: Mapping[Any, Any]) -> Any:
    """A shallow copy with other values at these places, of the same type; the holder is left as it was."""
    if hasattr(holder, "_fields"):  # a namedtuple
        names = holder._fields
        return holder._replace(**{names[p] if isinstance(p, int) else p: value for p, value in values.items()})
    if isinstance(holder, tuple):
        return type(holder)(values.get(i, values.get(i - len(holder), part)) for i, part in enumerate(holder))
    out = copy.copy(holder)
    for place, value in values.items():
        if isinstance(out, (Mapping, list)):
            out[place] = value  # type: ignore[index]
        else:
            object.__setattr__(out, place, value)  # also in a frozen dataclass: the copy is ours
    return out


def tensor_column(values: list[Any]) -> Any:
    """One field of a batch as tensors, see `TokenCollate`."""
    if values and all(isinstance(value, Tensor) for value in values):
        return torch.stack(values) if len({(v.shape, v.dtype) for v in values}) == 1 else values
    if values and all(isinstance(value, (np.ndarray, np.generic)) for value in values):
        return tensor_column([torch.as_tensor(value) for value in values])
    return as_tensors(stack_column(values))


def as_tensors(column: Any) -> Any:
    """A column of `bucket.stack_column` with its arrays as tensors over the same memory."""
    if isinstance(column, np.ndarray):
        return torch.from_numpy(column)
    if isinstance(column, list):
        return [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in column]
    return column


def _describe(holder: Any) -> str:
    if isinstance(holder, Mapping):
        return f"a {type(holder).__name__} with the keys {list(holder)}"
    if isinstance(holder, Sequence) and not isinstance(holder, str):
        return f"a {type(holder).__name__} of length {len(holder)}"
    return f"a {type(holder).__name__}"
