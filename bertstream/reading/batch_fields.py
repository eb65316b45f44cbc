"""The other fields of a batch's records as columns: arrays of numbers, or lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from ..errors import shortened
from ..tokens import Record, TokenBatch, TokenizedText

# What torch's default collate makes of Python's numbers.
_DTYPES: dict[type, type] = {bool: np.bool_, int: np.int64, float: np.float64}


def add_fields(
    batch: TokenBatch, records: Sequence[Record], *, keep_text_as: str | None, with_place: bool = True
) -> None:
    """Put the records' fields into their batch as columns, with `__key__`, `__shard__` and `__index__`.

    Args:
        batch: changed in place.
        records: one a text.
        keep_text_as: the field under which the raw texts stay in the batch; None drops them.
        with_place: whether to add these three; False if those that are wanted are among the records' fields.
    """
    names = dict.fromkeys(name for record in records for name in record.fields)
    batch.fields = {name: stack_column([record.fields.get(name) for record in records]) for name in names}
    if keep_text_as is not None:
        texts = [record.text for record in records if not isinstance(record.text, TokenizedText)]
        if len(texts) == len(records):  # ids have no characters
            batch.texts = batch.fields[keep_text_as] = texts
        else:
            kept = (record.text for record in records)
            batch.fields[keep_text_as] = [text.input_ids if isinstance(text, TokenizedText) else text for text in kept]
    if with_place:
        batch.fields["__key__"] = [record.key for record in records]
        batch.fields["__shard__"] = [record.shard for record in records]
        batch.fields["__index__"] = np.array([record.index for record in records], np.int64)


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
