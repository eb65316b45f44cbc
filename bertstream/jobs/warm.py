"""Fill a cache from shards before training."""

from __future__ import annotations

import logging

from tqdm import tqdm

from ..caching.cache import EmbeddingCache
from ..embeddings import SupportsCache
from ..errors import ConfigError, check_at_least
from ..pipeline.source import read_in_workers
from ..reading.config import StreamConfig
from ..reading.dataset import Shards, TextStream
from ..reading.functions import Keep, Map
from ..reading.mixture import refuse_mixture

logger = logging.getLogger(__name__)


def warm(
    shards: Shards,
    encoder: SupportsCache,
    cache: EmbeddingCache,
    *,
    text: str = "text",
    pair: str | None = None,
    keep: Keep | None = None,
    map: Map | None = None,
    num_workers: int = 0,
    reading: StreamConfig | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Compute the vectors of all texts of these shards that the cache does not hold yet.

    You can stop it at any time and call it again: vectors that were written are not computed twice. With several ranks,
    each does its share. A training run with the same tokenizer and encoder finds these vectors, whatever its batch
    sizes and order.

    Args:
        shards, text, pair, keep, map, num_workers, reading: as for `bertstream.stream`; no `Mixture`.
        encoder: computes the vectors.
        cache: receives them. Without a disk they stay in this process's memory, and new ones evict earlier ones when
            it is full.
        progress: whether to show a bar; its total is known for Parquet and for uncompressed files on disk.
    Returns:
        `texts` read, and how many of them were `computed` (repeated texts once); `not_kept`, how many texts found no
        room in the cache or evicted others, which the log also says; `bad_records` and `bad_shards` that were skipped;
        `dropped_records`, which `keep` and `map` dropped.
    Raises:
        ConfigError: an argument is out of range, the cache is read-only, or a parameter of the encoder requires
            gradients.
        ShardError: a shard is missing, or one of its records is broken.
    """
    refuse_mixture(shards, "warm")
    check_at_least("num_workers", num_workers, 0)
    if cache.read_only:
        raise ConfigError(f"{cache!r} is read-only: open it without read_only=True to fill it")
    cached = cache.of(encoder)
    # A token budget fills every forward.
    dataset = TextStream(
        shards,
        encoder,
        text=text,
        pair=pair,
        max_tokens=encoder.max_forward_tokens,
        fields=(),
        keep=keep,
        map=map,
        reading=reading,
    )
    done = {"texts": 0, "computed": 0}
    before = cache.stats()
    total = dataset.count_records() if progress else None
    with tqdm(unit=" texts", total=total, disable=not progress, desc="filling the cache") as bar:
        for batch in read_in_workers(dataset, num_workers):
            done["texts"] += len(batch)
            done["computed"] += cached.fill(batch)
            bar.update(len(batch))
            bar.set_postfix(computed=done["computed"], refresh=False)
    cache.flush()
    done["not_kept"] = _not_kept(cache, before, done["computed"])
    bad = dataset.progress.bad
    return done | {"bad_records": bad.records, "bad_shards": len(bad.given_up), "dropped_records": bad.dropped}


def _not_kept(cache: EmbeddingCache, before: dict[str, float], computed: int) -> int:
    """How many texts the cache evicted or dropped while it was filled, which is logged."""
    after = cache.stats()
    if cache.disk is None:
        count = computed - int(after["memory_texts"] - before["memory_texts"])
        way_out = "raise memory="
    else:
        count = sum(int(after[name] - before[name]) for name in ("disk_evictions", "disk_dropped_writes"))
        failed = after["disk_failed_writes"] > before["disk_failed_writes"]
        way_out = "make room on the disk" if failed else "raise disk_limit="
    if count:
        logger.warning("%r did not keep %d of the texts, which will be computed again: %s", cache, count, way_out)
    return count
