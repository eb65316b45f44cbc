"""Records as columns: a list or array for each field, so that one of many costs next to nothing of Python.

What a shard stores as columns stays so up to the batch. Records that are read one by one become columns when a lane has
read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ..columns import picked_fields
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

    @classmethod
    def concat(cls, parts: Sequence[RecordColumns]) -> RecordColumns:
        """The records of all parts, one part after the other; at least one part."""
        batches = [part.texts for part in parts if isinstance(part.texts, TokenBatch)]
        said = {(batch.special is None, batch.word_ids is None) for batch in batches}  # what `TokenBatch.concat` loses
        return cls(
            texts=TokenBatch.concat(batches)
            if len(batches) == len(parts) and len(said) == 1
            else list(chain.from_iterable(values_of(part.texts) for part in parts)),
            fields=joined_columns([part.fields for part in parts], list(map(len, parts))),
            keys=list(chain.from_iterable(part.keys for part in parts)),
            shards=list(chain.from_iterable(part.shards for part in parts)),
            indices=np.concatenate([part.indices for part in parts]),
        )

    def part(self, start: int, stop: int) -> RecordColumns:
        """Those of the records from `start` to `stop`, counted from 0."""
        if stop - start == len(self):
            return self
        own, texts = slice(start, stop), self.texts
        return RecordColumns(
            texts=texts.part(start, stop) if isinstance(texts, TokenBatch) else texts[own],
            fields={name: column[own] for name, column in self.fields.items()},
            keys=self.keys[own],
            shards=self.shards[own],
            indices=self.indices[own],
        )

    def pick(self, chosen: Indices) -> RecordColumns:
        """These of the records, counted from 0."""
        columns = picked_fields({"keys": self.keys, "shards": self.shards, "indices": self.indices}, chosen)
        texts = self.texts
        return RecordColumns(
            texts=texts.pick(chosen) if isinstance(texts, TokenBatch) else [texts[i] for i in chosen.tolist()],
            fields=picked_fields(self.fields, chosen),
            **columns,
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


class Gathering:
    """Records in the order of their places, put together from columns and from records that were read one by one.

    Attributes:
        parts: the places of some of the records, which increase, and their columns.
        alone: the records that were read one by one, by their places.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[Sequence[int], RecordColumns]] = []
        self.alone: dict[int, Record] = {}

    def columns(self) -> RecordColumns:
        """All of them, whose places are the numbers from 0 on."""
        parts = [*self.parts]
        if self.alone or not parts:
            places = sorted(self.alone)
            parts.append((places, RecordColumns.of([self.alone[place] for place in places])))
        if len(parts) == 1:
            return parts[0][1]
        parts.sort(key=lambda part: part[0][0])  # fields are in the order in which records have them
        joined = RecordColumns.concat([columns for _, columns in parts])
        return joined.pick(np.argsort(np.concatenate([places for places, _ in parts])))


def joined_columns(parts: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
    """The columns of all parts, one part after the other, with `MISSING` where a part lacks one that others have.

    Args:
        parts: columns by name, each a list or an array.
        sizes: how many entries those of each part have.
    """
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(chain.from_iterable(parts)):
        columns = [part.get(name, [MISSING] * size) for part, size in zip(parts, sizes, strict=True)]
        kinds = {column.dtype if isinstance(column, np.ndarray) else None for column in columns}
        if len(kinds) == 1 and None not in kinds:
            joined[name] = np.concatenate(columns)
        else:  # which numbers share an array is decided by batch
            joined[name] = list(chain.from_iterable(map(values_of, columns)))
    return joined
