"""Turns records into batches with tokens in place of the texts, whatever the structure of a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..embeddings import SupportsEncode
from ..encoding.texts import text_list
from ..errors import BertstreamError, ConfigError, EncoderError, kind_of
from ..reading.batch_fields import stack_column
from ..reading.raw import RecordError
from ..reading.token_ids import BESIDE_IDS, ids_of, tokens_of
from ..tokens import Text, TokenBatch, TokenizedText
from .fields import (
    Field,
    as_fields,
    as_tensors,
    as_written,
    check_pair,
    describe,
    follow,
    get_field,
    position,
    put_fields,
    way_to,
)


class TokenCollate:
    """A `collate_fn` that tokenizes in the DataLoader's workers; then pass the loader to `bertstream.wrap`.

    It holds only the tokenizer, so it is cheap to send to worker processes. The batch has the structure of a record
    (dict, tuple, list, namedtuple or dataclass; or a bare text), with a `TokenBatch` in place of the text. In the other
    fields, numbers become a tensor [B], tensors of one shape are stacked, a list of numbers per record (one for each
    word, say) becomes one tensor per record, and all else becomes a list.

    A text may be ids already, as a list, array or tensor: `attention_mask`, `token_type_ids`, `special_tokens_mask` and
    `word_ids` beside it in the record are taken with it, and stay in the batch too.

    Args:
        encoder: whose tokenizer to use.
        text: the key, position or attribute of the text, or several; None if a record is the bare text.
        pair: the field of the second text, if it forms a pair with the one at `text`; it stays in the batch.
        keep_text: whether the tokens bring their texts along, for `Embeddings.spans` and `strings`.
    Raises:
        ConfigError: an argument is out of range, or the encoder has no tokenizer.
    """

    def __init__(
        self,
        encoder: SupportsEncode,
        text: Field | Sequence[Field] | None = None,
        *,
        pair: Field | None = None,
        keep_text: bool = False,
    ) -> None:
        if not hasattr(encoder, "tokenizer"):
            raise ConfigError(f"encoder is {kind_of(encoder)} without a tokenizer: pass a bertstream.Encoder")
        if not getattr(encoder.tokenizer, "takes_texts", True):
            raise ConfigError(
                "the encoder has no tokenizer and takes ids alone: collate padded ids with their attention_mask, or "
                "make it with its model's tokenizer, Encoder(model, tokenizer)"
            )
        self._tokenizer = encoder.tokenizer
        self._fields = as_fields(text)
        self._pair = pair
        if not isinstance(keep_text, bool):
            raise ConfigError(f"keep_text={keep_text!r}: write True or False; tokens.texts holds the texts")
        self._keep_text = keep_text
        check_pair(pair, self._fields)

    def __repr__(self) -> str:
        pair = f", pair={self._pair!r}" if self._pair is not None else ""
        return f"TokenCollate(text={as_written(self._fields)!r}{pair}, {self._tokenizer!r})"

    def __call__(self, records: Sequence[Any]) -> Any:
        """Make a batch of a list of records.

        Raises:
            EncoderError: a text has a wrong type or is too long.
            ConfigError: `text` names nothing in a record, or the records differ in structure. A worker process returns
                either error in place of the batch, for `wrap` to raise: torch would rebuild it without its fields.
        """
        try:
            if not len(records):
                raise ConfigError("a batch of no records: the DataLoader's batch sampler yielded an empty list")
            return self._batch(records)
        except BertstreamError as error:
            if get_worker_info() is None:
                raise
            return error

    def _batch(self, records: Sequence[Any]) -> Any:
        if self._fields is None:
            return self._tokenize([_given(text, i) for i, text in enumerate(text_list(records))], None)
        return _collated(
            records,
            {
                way_to(records[0], field): self._tokenize(
                    [self._text(record, i, field) for i, record in enumerate(records)], field
                )
                for field in self._fields
            },
        )

    def _text(self, record: Any, index: int, field: Field) -> Any:
        text = get_field(record, field)
        if self._pair is not None:
            return text, get_field(record, self._pair, "pair")
        return _given(text, index, record, field)

    def _tokenize(self, texts: Sequence[Any], field: Field | None) -> TokenBatch:
        texts = text_list(texts)
        try:
            tokens = tokens_of(self._tokenizer, texts)
        except EncoderError as error:
            # The errors of texts say which text it is, those of ids do not.
            where = [f"record {i}" for i in error.records[:1] if isinstance(texts[i], TokenizedText)]
            where += [] if field is None else [f"field {field!r}"]
            raise EncoderError(
                f"{', '.join(where)}: {error}" if where else str(error), records=error.records
            ) from error
        has_ids = any(isinstance(text, TokenizedText) for text in texts)  # ids have no characters
        tokens.texts = texts if self._keep_text and not has_ids else None
        return tokens


def _given(text: Any, index: int, record: Any = None, field: Field | None = None) -> Text | TokenizedText:
    """A record's text as it is, or its ids with what is beside them in the record.

    Raises:
        EncoderError: ids, or what is beside them, are no lists of whole numbers that fit.
    """
    if isinstance(text, (str, tuple)) or (isinstance(text, list) and text and isinstance(text[0], str)):
        return text
    holder = None if field is None else follow(record, way_to(record, field)[:-1])
    name = "text" if field is None else str(field)
    beside = {
        other: get_field(holder, other)
        for other in BESIDE_IDS
        if (other in holder if isinstance(holder, Mapping) else hasattr(holder, other))
    }
    try:
        ids = ids_of(text, beside | {name: text}, name)
    except RecordError as error:
        where = f"record {index}" if field is None else f"record {index}, field {error.field!r}"
        raise EncoderError(f"{where}: {error}", records=(index,)) from error
    return text if ids is None else ids


def tensor_column(values: list[Any]) -> Any:
    """One field of a batch as tensors where its values allow, as `TokenCollate` describes.

    Args:
        values: one per record.
    Returns:
        One tensor, a list of tensors, or the values.
    """
    column = as_tensors(stack_column(values))
    tensors = [part for part in column if isinstance(part, Tensor)] if isinstance(column, list) else []
    if not tensors:
        return column
    arrays = all(isinstance(value, (Tensor, np.ndarray)) for value in values)
    if arrays and len(tensors) == len(values) and len({(tensor.shape, tensor.dtype) for tensor in tensors}) == 1:
        return torch.stack(tensors)
    return _in_one_storage(column)


def _in_one_storage(column: list[Any]) -> list[Any]:
    """The tensors of a ragged column as views of a single tensor.

    A tensor that leaves a worker process costs a file handle per storage, and a process usually has 1,024.
    """
    rows = [value for value in column if isinstance(value, Tensor)]
    plain = all(row.dim() and row.device.type == "cpu" and row.layout is torch.strided for row in rows)
    if not plain or len({(row.dtype, row.shape[1:]) for row in rows}) > 1:
        return column
    views = iter(torch.cat(rows).split([len(row) for row in rows]))
    return [next(views) if isinstance(value, Tensor) else value for value in column]


def _collated(records: Sequence[Any], tokens: Mapping[tuple[Field, ...], TokenBatch], path: str = "") -> Any:
    """A batch with the structure of a record, and of the parts of it on the ways to its texts.

    Args:
        records: of one structure.
        tokens: by the way to the texts within a record.
        path: to the records within the user's, for messages.
    """
    first, columns = records[0], _columns(records, path)
    inside: dict[Field, dict[tuple[Field, ...], TokenBatch]] = {}
    for way, batch in tokens.items():
        inside.setdefault(position(first, way[0]), {})[way[1:]] = batch
    values: dict[Field, Any] = {}
    for name, column in columns.items():
        own = inside.get(name, {})
        if () in own:
            values[name] = own[()]
        else:
            values[name] = _collated(column, own, f"{path}{name}.") if own else tensor_column(column)
    return values if isinstance(first, Mapping) else put_fields(first, values)


def _columns(records: Sequence[Any], path: str) -> dict[Field, list[Any]]:
    """All fields of records of one structure: name or position -> one entry per record."""
    first: Any = records[0]
    if not isinstance(first, (Mapping, Sequence)) and not dataclasses.is_dataclass(first):
        kinds = "dicts, tuples, lists, namedtuples and dataclasses"
        raise ConfigError(f"{_named('a record', path)} is {describe(first)}: TokenCollate takes {kinds}")
    length = len(first) if isinstance(first, Sequence) else None
    for i, record in enumerate(records):
        alike = isinstance(record, Mapping) if isinstance(first, Mapping) else type(record) is type(first)
        if not alike or (length is not None and len(record) != length):
            where = _named(f"record {i} of the batch", path)
            raise ConfigError(f"{where} is {describe(record)}, the first {describe(first)}")
    if isinstance(first, Mapping):
        names = dict.fromkeys(name for record in records for name in record)
        return {name: [record.get(name) for record in records] for name in names}
    if length is not None:
        return dict(enumerate(map(list, zip(*records, strict=True))))
    return {
        field.name: [getattr(record, field.name) for record in records]
        for field in dataclasses.fields(cast(Any, first))
    }


def _named(record: str, path: str) -> str:
    return f"{path[:-1]!r} of {record}" if path else record
