"""The other fields of a batch's records as columns: arrays of numbers, or lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from ..errors import shortened
from ..tokens import Text, TokenBatch, TokenizedText
from .options import PLACE
from .raw import values_of
from .record_columns import MISSING, Missing, RecordColumns

# What torch's default collate makes of Python's numbers.
_DTYPES: dict[type, type] = {bool: np.bool_, int: np.int64, float: np.float64}


def fields_of(records: RecordColumns, *, keep_text_as: str | None, with_place: bool = True) -> dict[str, Any]:
    """The columns of a batch's fields.

    Args:
        records: of the batch, or more.
        keep_text_as: the field under which the raw texts stay in the batch; None drops them.
        with_place: whether to add `__key__`, `__shard__` and `__index__`; False if those that are wanted are among the
            records' fields.
    """
    fields = dict(records.fields)
    if keep_text_as is not None:
        fields[keep_text_as] = list(values_of(records.texts))
    if with_place:
        fields |= zip(PLACE, (records.keys, records.shards, records.indices), strict=True)
    return fields


def add_fields(batch: TokenBatch, fields: Mapping[str, Any], *, keep_text_as: str | None) -> None:
    """Put fields into their batch, as arrays of numbers where they can be.

    Args:
        batch: changed in place.
        fields: columns of `fields_of`, one entry a text.
        keep_text_as: the field that holds the texts.
    """
    batch.fields = {}
    for name, column in fields.items():
        if not isinstance(column, list):
            batch.fields[name] = column
        elif name == keep_text_as:
            has_ids = any(isinstance(text, TokenizedText) for text in column)
            batch.fields[name] = [_plain(text) for text in column] if has_ids else column
            batch.texts = None if has_ids else column  # ids have no characters
        elif Missing not in (kinds := set(map(type, column))):
            batch.fields[name] = stack_column(column)
        elif len(kinds) > 1:
            batch.fields[name] = stack_column([None if value is MISSING else value for value in column])


def _plain(text: Text | TokenizedText) -> Any:
    return text.input_ids if isinstance(text, TokenizedText) else text


class Strings(list[str]):
    """A field of strings, which says where a tensor is wanted how strings become numbers."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """TypeError that says how strings become numbers: torch's own says that it wants a tensor."""
        strings = next(arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, cls))
        name = getattr(function, "__name__", str(function))
        raise TypeError(
            f"torch's {name}() takes tensors, and was given strings, {shortened([*strings])}: {strings._way_out()}"
        )

    def __getattr__(self, name: str) -> NoReturn:
        """AttributeError with the same hint, for those of a tensor such as `to` and `shape`."""
        raise AttributeError(f"a field of strings, {shortened([*self])}, has no attribute {name!r}: {self._way_out()}")

    def _way_out(self) -> str:
        kind = _number_kind(self)
        if kind is not None:
            return (
                f'numbers of a csv are strings, and stream(..., fields={{"id": {kind.__name__}}}) makes numbers of them'
            )
        return (
            'where they are labels, list them, as in stream(..., fields={"label": ["ham", "spam"]}), and they become '
            "numbers"
        )


def _number_kind(strings: list[str]) -> type[int] | type[float] | None:
    """What reads all of the strings as numbers; None if they are none."""
    for kind in (int, float) if strings else ():
        try:
            for string in strings:
                kind(string)
            return kind
        except ValueError:
            pass
    return None


def stack_column(values: list[Any]) -> Any:
    """One field of a batch: an array if every record has a number, else a list with one entry a record.

    Dtypes are those of torch's default collate: bool, int64, float64, and a numpy number's own. Lists of numbers (one a
    word, say) become arrays of one dtype, one a record, and are never joined. A missing value is None, and keeps the
    column a list.
    """
    if set(map(type, values)) <= {str}:
        return Strings(values)
    lists = [value for value in values if isinstance(value, list)]
    try:
        if dtype := _number_dtype(values):
            return np.array(values, dtype)
        if dtype := _number_dtype([item for items in lists for item in items]):
            return [np.array(value, dtype) if isinstance(value, list) else value for value in values]
    except OverflowError:  # an integer beyond 64 bits stays what it is
        pass
    return Strings(values) if all(isinstance(value, str) for value in values) else values


def _number_dtype(values: list[Any]) -> np.dtype[Any] | None:
    """The dtype that holds all of these; None if there are none, or not all are numbers, or all truth values."""
    kinds = {_DTYPES.get(type(value), type(value)) for value in values}
    if not kinds or not all(issubclass(kind, (np.number, np.bool_)) for kind in kinds):
        return None
    return None if np.bool_ in kinds and len(kinds) > 1 else np.result_type(*kinds)
