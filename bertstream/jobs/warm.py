"""Filling a cache from shards before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tqdm import tqdm

from ..caching.cache import EmbeddingCache
from ..embeddings import SupportsCache
from ..errors import ConfigError
from ..pipeline.source import read_in_workers
from ..reading.config import StreamConfig
from ..reading.dataset import TextStream


def warm(
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    encoder: SupportsCache,
    cache: EmbeddingCache,
    *,
    text: str = "text",
    pair: str | None = None,
    num_workers: int = 0,
    reading: StreamConfig | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Compute the vectors of all texts of these shards that the cache does not hold yet.

    It may be stopped at any time and called again: what was written is not computed twice. Of several ranks each does
    its share. Vectors of a training run are found again if tokenizer and encoder are the same; batch sizes and order do
    not matter.

    Args:
        shards, text, pair, num_workers, reading: as for `bertstream.stream`.
        encoder: what computes the vectors.
        cache: where they go. Without a disk they go into this process's memory; what does not fit evicts what came
            before.
        progress: whether a bar is shown; its total is known for Parquet, and for files on disk that are not packed.
    Returns:
        `texts` read and `computed` ones (a text that comes several times is computed once); `bad_records` and
        `bad_shards` that were passed over.
    Raises:
        ConfigError: an argument is out of range, the cache is read-only, or a parameter of the encoder requires a
            gradient.
        ShardError: a shard is missing, or one of its records is broken.
    """
    if num_workers < 0:
        raise ConfigError(f"num_workers={num_workers}: write a number of at least 0")
    if cache.read_only:
        raise ConfigError(f"{cache!r} is read-only: open it without read_only=True to fill it")
    cached = cache.of(encoder)
    # By tokens, so that forwards are full; no other field is needed.
    dataset = TextStream(
        shards, encoder, text=text, pair=pair, max_tokens=encoder.max_forward_tokens, fields=(), reading=reading
    )
    done = {"texts": 0, "computed": 0}
    total = dataset.count_records() if progress else None
    with tqdm(unit=" texts", total=total, disable=not progress, desc="filling the cache") as bar:
        for batch in read_in_workers(dataset, num_workers):
            done["texts"] += len(batch)
            done["computed"] += cached.fill(batch)
            bar.update(len(batch))
            bar.set_postfix(computed=done["computed"], refresh=False)
    cache.flush()
    bad = dataset.progress.bad
    return done | {"bad_records": bad.records, "bad_shards": len(bad.given_up)}
