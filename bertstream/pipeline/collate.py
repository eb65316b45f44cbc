"""Records to batches with tokens where the texts were, whatever the structure of a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..embeddings import SupportsEncode
from ..errors import BertstreamError, ConfigError, EncoderError
from ..reading.bucket import stack_column
from ..tokens import TokenBatch
from .fields import Field, as_fields, as_tensors, check_pair, describe, get_field, put_fields


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
        self, encoder: SupportsEncode, text: Field | Sequence[Field] | None = None, *, pair: Field | None = None
    ) -> None:
        if not hasattr(encoder, "tokenizer"):
            raise ConfigError(f"encoder is a {type(encoder).__name__} without a tokenizer: pass a bertstream.Encoder")
        self._tokenizer = encoder.tokenizer
        self._places = as_fields(text)
        self._pair = pair
        check_pair(pair, self._places)

    def __repr__(self) -> str:
        text = self._places[0] if self._places is not None and len(self._places) == 1 else self._places
        pair = f", pair={self._pair!r}" if self._pair is not None else ""
        return f"TokenCollate(text={text!r}{pair}, {self._tokenizer!r})"

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
        return put_fields(first, columns | rest)

    def _text(self, record: Any, place: Field) -> Any:
        text = get_field(record, place)
        return text if self._pair is None else (text, get_field(record, self._pair, "pair"))

    def _tokenize(self, texts: Sequence[Any], place: Field | None) -> TokenBatch:
        try:
            return TokenBatch.from_texts(self._tokenizer(texts))
        except EncoderError as error:
            if place is not None:
                raise EncoderError(f"field {place!r}: {error}", records=error.records) from error
            raise


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


def _fields(records: Sequence[Any]) -> dict[Field, list[Any]]:
    """All fields of records of one shape: name or position -> one entry a record."""
    first = records[0]
    if isinstance(first, Mapping):
        names = dict.fromkeys(name for record in records for name in record)
        return {name: [record.get(name) for record in records] for name in names}
    if dataclasses.is_dataclass(first):
        return {field.name: [getattr(record, field.name) for record in records] for field in dataclasses.fields(first)}
    if not isinstance(first, Sequence):
        kinds = "TokenCollate knows dicts, tuples, lists, namedtuples and dataclasses"
        raise ConfigError(f"a record is {describe(first)}: {kinds}")
    odd = next((i for i, r in enumerate(records) if type(r) is not type(first) or len(r) != len(first)), None)
    if odd is not None:
        raise ConfigError(f"record {odd} of the batch is {describe(records[odd])}, the first {describe(first)}")
    return dict(enumerate(map(list, zip(*records, strict=True))))


def _position(record: Any, place: Field) -> Field:
    """The position, counted from the front, of a place in a namedtuple, tuple or list."""
    return record._fields.index(place) if isinstance(place, str) else place % len(record)
