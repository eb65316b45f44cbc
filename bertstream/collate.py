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
        pair: the place of the second text, where the one at `text` and this one are a pair; it stays in the batch.
    """

    def __init__(
        self, encoder: SupportsEncode, text: Place | Sequence[Place] | None = None, *, pair: Place | None = None
    ) -> None:
        if not hasattr(encoder, "tokenizer"):
            raise ConfigError(f"encoder is a {type(encoder).__name__} without a tokenizer: pass a bertstream.Encoder")
        self._tokenizer = encoder.tokenizer
        self._places = as_places(text)
        self._pair = pair
        if pair is not None and (self._places is None or len(self._places) > 1):
            raise ConfigError(f"pair={pair!r} for text={text!r}: name the one place of the first text")

    def __call__(self, records: Sequence[Any]) -> Any:
        """Make a batch of a list of records.

        Raises:
            EncoderError: a text is of a wrong type or too long.
            ConfigError: `text` names nothing in a record, or the records are of several shapes. In a worker process
                either error is returned in place of the batch, for `wrap` to raise: torch would rebuild it without
                its fields.
        """
        try:
            if not len(records):
                raise ConfigError("a batch of no records: the DataLoader's batch sampler gave an empty list")
            return self._batch(records)
        except BertstreamError as error:
            if get_worker_info() is None:
                raise
            return error

    def _batch(self, records: Sequence[Any]) -> Any:
        if self._places is None:
            return self._tokenize(records, None)
        columns = {
            place: self._tokenize([self._text(record, place) for record in records], place) for place in self._places
        }
        first, fields = records[0], _fields(records)
        if isinstance(first, Sequence):
            columns = {_position(first, place): column for place, column in columns.items()}
        rest = {name: tensor_column(values) for name, values in fields.items() if name not in columns}
        if isinstance(first, Mapping):
            return {name: columns[name] if name in columns else rest[name] for name in fields}
        return put_places(first, columns | rest)

    def _text(self, record: Any, place: Place) -> Any:
        text = get_place(record, place)
        return text if self._pair is None else (text, get_place(record, self._pair))

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
    places: tuple[Any, ...] = (text,)
    if isinstance(text, Sequence) and not isinstance(text, (str, bytes)):
        places = tuple(text)
    named = all(isinstance(place, (str, int)) and not isinstance(place, bool) for place in places)
    if not places or not named or len(set(places)) < len(places):
        raise ConfigError(f"text={text!r}: name a key, a position or an attribute, or several different ones")
    return places


def get_place(holder: Any, place: Place) -> Any:
    """What stands at a key of a mapping, a position of a sequence, or an attribute of anything else."""
    try:
        if isinstance(holder, Mapping):
            return holder[place]
        if isinstance(place, int) and isinstance(holder, Sequence) and not isinstance(holder, str):
            return holder[place]
        if isinstance(place, str) and (hasattr(holder, "_fields") or not isinstance(holder, Sequence)):
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
    column = as_tensors(stack_column(values))
    tensors = [part for part in column if isinstance(part, Tensor)] if isinstance(column, list) else []
    if not tensors:
        return column
    arrays = all(isinstance(value, (Tensor, np.ndarray)) for value in values)
    if arrays and len(tensors) == len(values) and len({(tensor.shape, tensor.dtype) for tensor in tensors}) == 1:
        return torch.stack(tensors)
    return _in_one_memory(column)


def as_tensors(column: Any) -> Any:
    """A column of `bucket.stack_column` with its arrays of numbers as tensors over the same memory."""
    if isinstance(column, list):
        return [_as_tensor(value) for value in column]
    return _as_tensor(column)


def _as_tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
        return value
    return torch.from_numpy(value if value.flags.writeable else value.copy())


def _in_one_memory(column: list[Any]) -> list[Any]:
    """The tensors of a ragged column as views of a single one.

    On their way out of a worker process tensors cost a file handle for each memory, and a process has 1,024 as a rule.
    """
    rows = [value for value in column if isinstance(value, Tensor)]
    plain = all(row.dim() and row.device.type == "cpu" and row.layout is torch.strided for row in rows)
    if not plain or len({(row.dtype, row.shape[1:]) for row in rows}) > 1:
        return column
    views = iter(torch.cat(rows).split([len(row) for row in rows]))
    return [next(views) if isinstance(value, Tensor) else value for value in column]


def _fields(records: Sequence[Any]) -> dict[Place, list[Any]]:
    """All fields of records of one shape: name or position -> one entry a record."""
    first = records[0]
    if isinstance(first, Mapping):
        names = dict.fromkeys(name for record in records for name in record)
        return {name: [record.get(name) for record in records] for name in names}
    if dataclasses.is_dataclass(first):
        return {field.name: [getattr(record, field.name) for record in records] for field in dataclasses.fields(first)}
    if not isinstance(first, Sequence):
        kinds = "TokenCollate knows dicts, tuples, lists, namedtuples and dataclasses"
        raise ConfigError(f"a record is {_describe(first)}: {kinds}")
    odd = next((i for i, r in enumerate(records) if type(r) is not type(first) or len(r) != len(first)), None)
    if odd is not None:
        raise ConfigError(f"record {odd} of the batch is {_describe(records[odd])}, the first {_describe(first)}")
    return dict(enumerate(map(list, zip(*records, strict=True))))


def _position(record: Any, place: Place) -> Place:
    """The position, counted from the front, of a place in a namedtuple, tuple or list."""
    return record._fields.index(place) if isinstance(place, str) else place % len(record)


def _describe(holder: Any) -> str:
    kind = f"a {type(holder).__name__}"
    if isinstance(holder, Mapping):
        return f"{kind} with the keys {list(holder)}"
    if hasattr(holder, "_fields"):
        return f"{kind} with the fields {list(holder._fields)}"
    if dataclasses.is_dataclass(holder):
        return f"{kind} with the fields {[field.name for field in dataclasses.fields(holder)]}"
    if isinstance(holder, Sequence) and not isinstance(holder, str):
        return f"{kind} of length {len(holder)}"
    return kind
