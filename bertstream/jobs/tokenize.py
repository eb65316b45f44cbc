"""Tokenize every text of a corpus once and write the ids to Parquet; a killed run can be continued."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from ..caching.cache import as_bytes
from ..encoding.tokenizer import TextTokenizer
from ..errors import ConfigError, check_at_least, described, kind_of
from ..pipeline.source import read_in_workers
from ..reading.config import StreamConfig
from ..reading.dataset import HasTokenizer, Shards, TextStream
from ..reading.functions import Keep, Map, name_of
from ..reading.mixture import refuse_mixture
from ..reading.options import PLACE, RESERVED, Fields
from ..reading.token_ids import BESIDE_IDS, metadata_of
from ..tokens import TokenBatch
from .parts import PartFolder, local_folder

IDS = "input_ids"
"""The column of ids: the `text=` of a stream of the files."""

_GROUPS, _GROUP_ROWS = 64, (100, 10_240)
"""Row groups of a file, and the fewest and most rows of one. A group is the smallest piece that a file is cut into, and
a shuffled stream mixes 64 pieces: fewer would mix less, and workers could not share them. Smaller ones read slower."""


def tokenize(
    shards: Shards,
    encoder: HasTokenizer,
    out: str | os.PathLike[str],
    *,
    text: str = "text",
    pair: str | None = None,
    fields: Fields = None,
    keep: Keep | None = None,
    map: Map | None = None,
    part_bytes: int | str = "128MiB",
    num_workers: int = 0,
    reading: StreamConfig | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Write the ids of all texts of these shards to Parquet files, with the records' other fields.

    In `stream(f"{out}/*.parquet", encoder, text="input_ids")` each text then has the ids and vectors that it has in a
    stream of the texts, and the workers do not tokenize; batches and their order differ where both are cut otherwise.
    Texts are written whole: `max_length`, `overflow` and `stride` are those of the encoder that reads them.

    You can stop it at any time, even by SIGKILL, and call it again with the same arguments: it continues after the last
    finished part, and writes the files that an undisturbed run writes. With several ranks, each writes its share;
    continue with the same number of ranks. Lanes take turns, `bucket_size` records each: `StreamConfig(lanes=1)`
    keeps the order of the shards, and leaves one worker to do all.

    A row has `input_ids`, and where texts need them `token_type_ids` (of pairs), `word_ids` and `num_words` (of lists
    of words, or with an encoder of word vectors), and `special_tokens_mask` (where a text has special tokens written
    out in it). The files name the tokenizer, and a stream with another one refuses them.

    Args:
        shards, text, pair, fields, keep, map, num_workers, reading: as for `bertstream.stream`; no `Mixture`.
        encoder: anything with the tokenizer to use, also its prompt and its way to split strings into words.
        out: a local folder, created if missing; empty, or of a run that was stopped.
        part_bytes: bytes of a file before compression, and so in memory; a number or a string such as "1GiB". A file
            may exceed it by a bucket.
        progress: whether to show a bar; its total is known for Parquet and for uncompressed files on disk.
    Returns:
        Counts of this rank's share in the folder: `parts`, `texts`, `tokens`, `long_texts` that are longer than the
        encoder takes, `bad_records` and `bad_shards` that were skipped, `dropped_records`, which `keep` and `map`
        dropped; and `texts_before`, the texts of earlier runs.
    Raises:
        ConfigError: an argument is out of range, a field has the name of a column of ids or cannot be a column, the
            folder holds other files, or another process is writing to it.
        StateError: the folder was started with other shards, another tokenizer or other settings.
        ShardError: a shard is missing, or one of its records is broken.
        OSError: the folder cannot be written to.
    """
    refuse_mixture(shards, "tokenize")
    tokenizer = encoder.tokenizer
    if not isinstance(tokenizer, TextTokenizer) or tokenizer.ids_identity is None:
        kind = "none" if isinstance(tokenizer, TextTokenizer) else kind_of(tokenizer)
        raise ConfigError(f"the encoder's tokenizer is {kind}: files name the tokenizer, pass an Encoder that has one")
    if own := [name for name in fields or () if name in PLACE]:
        raise ConfigError(f"fields names {own[0]!r}, which a stream of the files has of its own: leave it out")
    largest = as_bytes("part_bytes", part_bytes)
    check_at_least("part_bytes", largest, 1)
    check_at_least("num_workers", num_workers, 0)
    path = local_folder(out)
    reading = replace(reading or StreamConfig(), uneven="leave")  # a repeated batch would be written twice
    dataset = TextStream(
        shards,
        SimpleNamespace(tokenizer=tokenizer.whole()),
        text=text,
        pair=pair,
        batch_size=reading.bucket_size,  # a bucket is one batch, in the order of its records
        fields=fields,
        keep=keep,
        map=map,
        reading=reading,
    )
    settings = {
        "tokenizer": tokenizer.ids_identity,
        "part_bytes": largest,
        "fields": _as_settings(fields),
    }
    counted = ("texts", "tokens", "long_texts", "bad_records", "bad_shards", "dropped_records")
    folder_of = PartFolder(path, settings, ".parquet", counted=counted, made_by=repr(tokenizer))
    with folder_of.opened(dataset.state_dict()) as folder:
        before = folder.counts["texts"]
        folder.load_into(dataset.load_state_dict)
        if not folder.done:
            total = dataset.count_records() if progress else None
            done = before + folder.counts["bad_records"]
            with tqdm(desc="tokenizing", unit=" texts", total=total, initial=done, disable=not progress) as bar:
                _fill(folder, dataset, tokenizer, largest, num_workers, bar)
        return folder.counts | {"texts_before": before}


def _as_settings(fields: Fields) -> Any:
    """The option as JSON: names, or what each field is made by, so that no file of a folder has other numbers."""
    if isinstance(fields, Mapping):
        return {name: name_of(by) if callable(by) else list(by or ()) for name, by in fields.items()}
    return None if fields is None else list(fields)


def _fill(
    folder: PartFolder, dataset: TextStream, tokenizer: TextTokenizer, largest: int, num_workers: int, bar: Any
) -> None:
    batches: list[TokenBatch] = []
    counts = dict(folder.counts)
    held = 0

    def write(*, done: bool = False) -> None:
        bad = dataset.progress.bad
        counts.update(bad_records=bad.records, bad_shards=len(bad.given_up), dropped_records=bad.dropped)
        part = _Part(batches, tokenizer).write if batches else None
        folder.write(part, counts, dataset.state_dict(), done=done)

    with closing(read_in_workers(dataset, num_workers)) as batches_read:  # type: ignore[type-var]
        for batch in batches_read:
            batches.append(batch)
            held += _num_bytes(batch)
            counts["texts"] += len(batch)
            counts["tokens"] += batch.num_tokens
            counts["long_texts"] += int((batch.lengths > tokenizer.max_length).sum())
            bar.update(len(batch))
            if held >= largest:
                write()
                batches, held = [], 0
    write(done=True)


def _num_bytes(batch: TokenBatch) -> int:
    arrays = [batch.input_ids, batch.word_ids, *batch.fields.values()]
    total = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
    columns = (column for column in batch.fields.values() if isinstance(column, list))
    return total + sum(len(value) for column in columns for value in column if isinstance(value, (str, bytes)))


class _Part:
    """The content of one file.

    Args:
        batches: at least one.
        tokenizer: that made them.
    """

    def __init__(self, batches: Sequence[TokenBatch], tokenizer: TextTokenizer) -> None:
        self._batches = batches
        self._tokenizer = tokenizer
        self._tokens = TokenBatch.concat(batches)

    def write(self, path: Path) -> None:
        """Write it as Parquet.

        Raises:
            ConfigError: a field cannot be a column.
            OSError: the file cannot be written.
        """
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table(self._columns_of_ids() | self._fields())
        table = table.replace_schema_metadata(metadata_of(self._tokenizer.ids_identity or {}))
        fewest, most = _GROUP_ROWS
        group = min(max(fewest, len(self._tokens) // _GROUPS), most)
        pyarrow.parquet.write_table(table, path, row_group_size=group)

    def _columns_of_ids(self) -> dict[str, Any]:
        import pyarrow

        tokens = self._tokens

        def lists(values: Any, kind: Any) -> Any:
            return pyarrow.ListArray.from_arrays(pyarrow.array(tokens.cu_seqlens), pyarrow.array(values, kind))

        columns = {IDS: lists(tokens.input_ids, pyarrow.int32())}
        if tokens.token_type_ids is not None:
            columns["token_type_ids"] = lists(tokens.token_type_ids, pyarrow.int8())
        if tokens.word_ids is not None:
            columns["word_ids"] = lists(tokens.word_ids, pyarrow.int32())
            columns["num_words"] = pyarrow.array(tokens.num_words, pyarrow.int32())
        if (self._tokenizer.special_among(tokens.input_ids) != tokens.special).any():
            columns["special_tokens_mask"] = lists(tokens.special, pyarrow.bool_())
        return columns

    def _fields(self) -> dict[str, Any]:
        import pyarrow

        names = dict.fromkeys(name for batch in self._batches for name in batch.fields if name not in RESERVED)
        columns = {}
        for name in names:
            if name in (IDS, *BESIDE_IDS):
                raise ConfigError(
                    f"the records' own field {name!r} would be taken for one of ids: choose others with fields="
                )
            parts = [batch.fields.get(name, [None] * len(batch)) for batch in self._batches]
            dtypes = {part.dtype if isinstance(part, np.ndarray) else None for part in parts}
            try:
                # Numbers of one kind: numpy would make floats of large integers and numbers of truth values.
                if len(dtypes) == 1 and None not in dtypes:
                    columns[name] = pyarrow.array(np.concatenate(parts))
                else:
                    columns[name] = pyarrow.array([value for part in parts for value in part])
            except (pyarrow.ArrowException, ValueError, TypeError) as error:
                raise ConfigError(
                    f"the field {name!r} cannot be a column of Parquet ({described(error)}): leave it out with "
                    "fields=, or give fields= a function that makes values of one type"
                ) from error
        return columns
