"""Records as a shard stores them, not parsed yet, and the helpers that turn their bytes into values.

Parsing is left for later, so that skipped records cost little and a broken one does not end the shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import shortened
from ..tokens import TokenBatch

BOM = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder()
_JSON_BLANKS = " \t\n\r"


class RawRecord(NamedTuple):
    """A record before parsing.

    Attributes:
        parse: makes the fields of `source`. Kept apart because a `partial` for each record would cost more.
        source: what `parse` takes.
        key: the record's key; None for "<file name>:<index>".
        offset: byte of the decompressed shard at which the record begins; 0 if reading cannot resume there.
        records: how many records this is. A reader may jump over those before the first wanted one, as one item.
    """

    parse: Callable[[Any], dict[str, Any]]
    source: Any
    key: str | None = None
    offset: int = 0
    records: int = 1


class RawColumns(NamedTuple):
    """Several records, one after the other, that a shard stores as columns.

    Attributes:
        columns: by name, one entry a record: Python's values in a list, or numbers in an array of int64, float64 or
            bool, or token ids.
        records: how many records these are.
    """

    columns: Mapping[str, list[Any] | npt.NDArray[Any] | TokenBatch]
    records: int

    def part(self, own: range, first: int) -> Mapping[str, Any]:
        """The columns of some of the records.

        Args:
            own: their indices in the shard.
            first: the index of the first of all.
        """
        if len(own) == self.records:
            return self.columns
        chosen = slice(own.start - first, own.stop - first, own.step)
        numbers = np.arange(self.records)[chosen]
        return {
            name: column.pick(numbers) if isinstance(column, TokenBatch) else column[chosen]
            for name, column in self.columns.items()
        }

    def rows(self) -> Iterator[RawRecord]:
        """The records one by one."""
        columns = map(values_of, self.columns.values())
        return (RawRecord(_as_it_is, dict(zip(self.columns, row, strict=True))) for row in zip(*columns, strict=True))


def values_of(column: list[Any] | npt.NDArray[Any] | TokenBatch) -> Any:
    """The entries of a column as Python's values, ids as texts; one whose segments are all 0 has none."""
    if isinstance(column, TokenBatch):
        texts = list(column.apart())
        for text in texts:
            if text.token_type_ids is not None and not text.token_type_ids.any():
                text.token_type_ids = None
        return texts
    return column.tolist() if isinstance(column, np.ndarray) else column


def _as_it_is(row: dict[str, Any]) -> dict[str, Any]:
    return row


class RecordError(Exception):
    """The record being read is broken; `read_records` turns this into a `ShardError` with the place.

    Attributes:
        field: the field at fault, or None.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def broken(error: RecordError) -> dict[str, Any]:
    """The `parse` of a record that its reader has found broken.

    Raises:
        RecordError: always, the error given.
    """
    raise error


def parse_text(data: bytes, name: str | None = None, encoding: str | None = None) -> str:
    """Decode bytes of the field `name`.

    Args:
        data: the bytes.
        name: the field, for the error.
        encoding: what the user chose; None where the format is always UTF-8.
    Raises:
        RecordError: the bytes are not of this encoding.
    """
    try:
        return data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        near = data[max(error.start - 20, 0) : error.start + 20]
        hint = {None: ": re-encode it as UTF-8", "utf-8": ": write StreamConfig(encoding=), or re-encode it as UTF-8"}
        seen = f"byte 0x{data[error.start]:02x} in {shortened(near)}"
        message = f"not {(encoding or 'utf-8').upper()}: {seen}{hint.get(encoding, '')}"
        raise RecordError(message, name) from error


def check_size(num_bytes: int, limit: int, what: str, name: str | None = None) -> None:
    """Refuse a record, or its field `name`, that is larger than `max_record_bytes`.

    Raises:
        RecordError: with the limit.
    """
    if num_bytes > limit:
        message = f"more than {limit} bytes in {what}: write StreamConfig(max_record_bytes=) if that is no fault"
        raise RecordError(message, name)


def parse_json(data: bytes, name: str | None = None) -> Any:
    """Parse the JSON value of the field `name`.

    Raises:
        RecordError: the bytes are not UTF-8 or not JSON.
    """
    text = parse_text(data, name).strip(_JSON_BLANKS)
    try:
        value, end = _DECODER.raw_decode(text)  # `decode` finds blanks by regular expressions: a microsecond more
        return value if end == len(text) else _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not JSON: {error}: {shortened(text)}", name) from error
