"""Records as columns: a list or array for each field, so that one of many costs next to nothing of Python.

What a shard stores as columns stays so up to the batch. Records that are read one by one become columns when they are
tokenized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ..tokens import Indices, Record, Text, TokenBatch, TokenizedText
from .raw import values_of


class Missing:
    """The entry of a record that lacks a field which others have; a class of its own, so that it is found fast."""


MISSING = Missing()


@dataclass(slots=True)
class RecordColumns:
    """B records.

    Attributes:
        texts: their texts; a batch if all are ids that a shard stores as columns.
        fields: their other fields by name, B entries each: a list, or numbers in an array; `MISSING` where a record
            lacks a field.
        keys, shards: as of `Record`.
        indices: [B] int64, as of `Record`.
    """

    texts: list[Text | TokenizedText] | TokenBatch
    fields: dict[str, Any]
    keys: list[str]
    shards: list[str]
    indices: Indices

    @classmethod
    def of(cls, records: Sequence[Record]) -> RecordColumns:
        """Records that were read one by one."""
        names = dict.fromkeys(chain.from_iterable(record.fields for record in records))
        return cls(
            texts=[record.text for record in records],
            fields={name: [record.fields.get(name, MISSING) for record in records] for name in names},
            keys=[record.key for record in records],
            shards=[record.shard for record in records],
            indices=np.array([record.index for record in records], np.int64),
        )

    def __len__(self) -> int:
        return len(self.indices)

    def records(self) -> Iterator[Record]:
        """The records one by one, if none lacks a field that others have."""
        columns = [values_of(column) for column in self.fields.values()]
        rows = zip(*columns, strict=True) if columns else ((),) * len(self)
        places = zip(values_of(self.texts), rows, self.keys, self.shards, self.indices.tolist(), strict=True)
        for text, row, key, shard, index in places:
            yield Record(text, dict(zip(self.fields, row, strict=True)), key, shard, index)
