"""Encode every text of a corpus once and write the vectors to files; a killed run can be continued."""

from __future__ import annotations

import math
import os
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..caching.cache import EmbeddingCache, as_bytes
from ..embeddings import Embeddings, SupportsCache
from ..errors import ConfigError, check_at_least
from ..loader import stream
from ..pipeline.embedding_loader import EmbeddingLoader
from ..reading.config import StreamConfig
from ..reading.dataset import Shards
from ..reading.functions import Keep, Map
from ..reading.mixture import refuse_mixture
from .parts import PartFolder, local_folder
from .writers import Part, PartFormat, check_format, ending_of, write_part

_BATCH_TOKENS = 16384
"""A state fits one budget only, so not the encoder's `max_forward_tokens`, which differs from run to run."""

_PART_S = 120.0
"""Seconds after which a part is written, however small; a kill loses at most this much work."""

_COUNTED = ("texts", "tokens", "rows", "cut_texts", "bad_records", "bad_shards", "dropped_records")


def embed(
    shards: Shards,
    encoder: SupportsCache,
    out: str | os.PathLike[str],
    *,
    text: str = "text",
    pair: str | None = None,
    keep: Keep | None = None,
    map: Map | None = None,
    format: PartFormat = "parquet",
    part_bytes: int | str = "128MiB",
    num_workers: int = 0,
    cache: EmbeddingCache | None = None,
    reading: StreamConfig | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Write the vectors of all texts of these shards to a folder, with each record's key, shard and index.

    You can stop it at any time, even by SIGKILL, and call it again with the same arguments: it continues after the last
    finished part, and every record is written exactly once. With several ranks, each writes its share; continue with
    the same number of ranks. Records are not in the order of the shards: each bucket is sorted by length.

    Args:
        shards, text, pair, keep, map, num_workers, cache, reading: as for `bertstream.stream`; no `Mixture`.
        encoder: computes the vectors, which are written in its `output_dtype`.
        out: a local folder, created if missing; empty, or of a run that was stopped.
        format: "parquet", "webdataset" or "safetensors"; see `bertstream.jobs.writers.write_part`.
        part_bytes: bytes of vectors in a file, and so in memory; a number or a string such as "1GiB". A file may exceed
            it by a quarter, or more where a single text does. After two minutes a part is written however small.
        progress: whether to show a bar; its total is known for Parquet and for uncompressed files on disk.
    Returns:
        Counts of this rank's share in the folder: `parts`, `texts`, `tokens`, `rows`, `cut_texts` that were truncated,
        `bad_records` and `bad_shards` that were skipped, and `dropped_records` that `keep` and `map` dropped; and
        `texts_before`, the texts of earlier runs.
    Raises:
        ConfigError: an argument is out of range, a parameter of the encoder requires gradients, the folder holds other
            files, or another process is writing to it.
        StateError: the folder was started with other shards, another encoder or other settings.
        ShardError: a shard is missing, or one of its records is broken.
        OSError: the folder cannot be written to.
    """
    refuse_mixture(shards, "embed")
    check_format(format, encoder.output_dtype)
    largest = as_bytes("part_bytes", part_bytes)
    check_at_least("part_bytes", largest, 1)
    row_bytes = math.prod(encoder.row_shape) * encoder.output_dtype.itemsize
    path = local_folder(out)
    fingerprint = encoder.fingerprint()
    if fingerprint is None:
        raise ConfigError("parameters of the encoder require gradients: call encoder.freeze() first")
    reading = replace(reading or StreamConfig(), uneven="leave")  # a repeated batch would be written twice
    loader = stream(
        shards,
        encoder,
        text=text,
        pair=pair,
        max_tokens=max(1, min(_BATCH_TOKENS, largest // (4 * row_bytes))),
        fields=(),
        keep=keep,
        map=map,
        num_workers=num_workers,
        cache=cache,
        reading=reading,
    )
    settings = {"format": format, "part_bytes": largest, "encoder": fingerprint.hex()}
    folder_of = PartFolder(path, settings, ending_of(format), counted=_COUNTED, made_by=repr(encoder))
    with closing(loader), folder_of.opened(loader.state_dict()) as folder:
        before = dict(folder.counts)
        folder.load_into(loader.load_state_dict)
        if not folder.done:
            _fill(folder, loader, text, largest, format, progress=progress)
        return folder.counts | {"texts_before": before["texts"]}


def _fill(
    folder: PartFolder, loader: EmbeddingLoader, text: str, largest: int, format: PartFormat, *, progress: bool
) -> None:
    before = dict(folder.counts)
    started = time.monotonic()
    gathered = _Gathered()

    def write(*, done: bool = False) -> None:
        counts = {name: folder.counts[name] + gathered.counts[name] for name in gathered.counts}
        for name in ("bad_records", "bad_shards", "dropped_records"):
            counts[name] = before[name] + int(loader.stats()[name])
        part = partial(write_part, part=gathered.part(), format=format) if gathered.counts["texts"] else None
        folder.write(part, counts, loader.state_dict(), done=done)

    total = loader.count_records() if progress else None
    done = before["texts"] + before["bad_records"]
    # smoothing=0 is the mean rate of the run: batches are sorted by length within a bucket, so recent ones say little.
    with tqdm(desc="embedding", unit=" texts", total=total, initial=done, disable=not progress, smoothing=0) as bar:
        for batch in loader:
            gathered.add(batch, batch[text])
            bar.update(len(batch["__key__"]))
            tokens = folder.counts["tokens"] + gathered.counts["tokens"] - before["tokens"]
            bar.set_postfix_str(f"{tokens / (time.monotonic() - started):,.0f} tokens/s", refresh=False)
            if gathered.num_bytes >= largest or time.monotonic() - gathered.started >= _PART_S:
                write()
                gathered = _Gathered()
        write(done=True)


class _Gathered:
    """The batches of the next part."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.counts = {"texts": 0, "tokens": 0, "rows": 0, "cut_texts": 0}
        self.num_bytes = 0
        self._batches: list[dict[str, Any]] = []
        self._vectors: list[Embeddings] = []

    def add(self, batch: dict[str, Any], vectors: Embeddings) -> None:
        """Keep a batch's record ids and vectors."""
        vectors = vectors.to("cpu")
        self._batches.append({name: batch[name] for name in ("__key__", "__shard__", "__index__")})
        self._vectors.append(vectors)
        self.num_bytes += vectors.values.nbytes
        self.counts["texts"] += len(vectors)
        self.counts["tokens"] += vectors.tokens.num_tokens
        self.counts["rows"] += len(vectors.values)
        self.counts["cut_texts"] += int((vectors.tokens.cut_tokens > 0).sum())

    def part(self) -> Part:
        """Join all batches into a part."""

        def joined(name: str) -> list[str]:
            return [entry for batch in self._batches for entry in batch[name]]

        one_each = self._vectors[0].output == "sentence"
        return Part(
            keys=joined("__key__"),
            shards=joined("__shard__"),
            indices=np.concatenate([batch["__index__"].numpy() for batch in self._batches]),
            lengths=None if one_each else np.concatenate([vectors.lengths.numpy() for vectors in self._vectors]),
            values=torch.cat([vectors.values for vectors in self._vectors]),
        )
