"""A window of tokenized records -> batches of about equal lengths. Pure: the same window gives the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .types import Record, TokenBatch, TokenizedText

Indices = npt.NDArray[np.int64]


def cut_window(
    lengths: npt.NDArray[Any],
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    shuffle: np.random.Generator | None = None,
) -> list[Indices]:
    """Sort a window by length and cut it into batches.

    Args:
        lengths: [W] tokens of each record of the window, special tokens included.
        batch_size: records in a batch; the window's last batch may have fewer.
        max_tokens: real tokens in a batch at most, counted without padding; a record that is longer is a batch of its
            own. Exactly one of `batch_size` and `max_tokens` is given.
        shuffle: mixes records of equal length and the order of the batches; None keeps shorter batches first.
    Returns:
        For each batch the places of its records in the window, ascending; every place is in exactly one batch.
    """
    order = np.arange(len(lengths)) if shuffle is None else shuffle.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    if batch_size is not None:
        cuts = list(range(batch_size, len(order), batch_size))
    else:
        assert max_tokens is not None
        cuts, held = [], 0
        for place, length in enumerate(lengths[order].tolist()):
            if held and held + length > max_tokens:
                cuts.append(place)
                held = 0
            held += length
    batches = [np.sort(batch) for batch in np.split(order, cuts) if len(batch)]
    if shuffle is not None:
        batches = [batches[i] for i in shuffle.permutation(len(batches))]
    return batches


def make_batch(records: Sequence[Record], texts: Sequence[TokenizedText], *, keep_text_as: str | None) -> TokenBatch:
    """One batch of records and their tokens, with the records' fields as columns.

    Args:
        records: the batch's records.
        texts: their tokens.
        keep_text_as: the field under which the raw texts stay in the batch; None drops them.
    Returns:
        The batch; its fields also hold `__key__`, `__shard__` and `__index__`.
    """
    batch = TokenBatch.from_texts(texts)
    names = dict.fromkeys(name for record in records for name in record.fields)
    batch.fields = {name: stack_column([record.fields.get(name) for record in records]) for name in names}
    if keep_text_as is not None:
        batch.fields[keep_text_as] = [record.text for record in records]
    batch.fields["__key__"] = [record.key for record in records]
    batch.fields["__shard__"] = [record.shard for record in records]
    batch.fields["__index__"] = np.array([record.index for record in records], np.int64)
    return batch


def stack_column(values: list[Any]) -> Any:
    """One field of a batch: an array if every record has a number, else a list with one entry a record.

    Dtypes are those of torch's default collate: bool, int64, float64. A list of numbers (one a word, say) becomes an
    array of its own and is never joined with another record's. A missing value is None, and keeps the column a list.
    """
    kinds = {type(value) for value in values}
    try:
        if kinds and kinds <= {bool, int, float} and (bool not in kinds or len(kinds) == 1):
            return np.array(values, bool if bool in kinds else np.float64 if float in kinds else np.int64)
        return [_number_list(value) for value in values]
    except OverflowError:  # an integer beyond 64 bits stays what it is
        return values


def _number_list(value: Any) -> Any:
    if not isinstance(value, list) or not value or not {type(item) for item in value} <= {int, float}:
        return value
    return np.array(value, np.float64 if any(isinstance(item, float) for item in value) else np.int64)
