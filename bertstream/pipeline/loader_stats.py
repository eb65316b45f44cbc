"""A loader's numbers, collected from its parts: all since it was made, and those of the last iteration."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import get_args

import torch

from ..caching.cache import EmbeddingCache
from ..caching.cached_encoder import CachedEncoder
from .clocks import Stage
from .epoch import Epochs, Parts
from .plots import plot_step
from .stats import LOOP, WORK, KnownWords, Since, Stats, bottleneck


class LoaderStats:
    """Collects what a loader's parts count and time.

    Args:
        parts: of the loader.
        epochs: that it runs.
        num_workers: the processes that it reads from.
        cache: the user's, or None.
        cached: the encoder with it, or None.
    """

    def __init__(
        self,
        parts: Parts,
        epochs: Epochs,
        num_workers: int,
        cache: EmbeddingCache | None,
        cached: CachedEncoder | None,
    ) -> None:
        self._parts = parts
        self._epochs = epochs
        self._num_workers = num_workers
        self._cache = cache
        self._cached = cached
        self._known_words = KnownWords(parts.tokenizer if parts.stream is None else parts.stream.progress)
        self.begin_iteration()

    def begin_iteration(self) -> None:
        """From here on `bottleneck` counts."""
        self._since = Since(self.stats())

    def stats(self) -> Stats:
        """See `EmbeddingLoader.stats`."""
        parts, stream, cached = self._parts, self._parts.stream, self._cached
        seconds = parts.clocks.seconds
        counts = asdict(parts.counts) | self._epochs.counts()
        of_sources = {f"source_{number}_texts": texts for number, texts in enumerate(counts.pop("source_texts"))}
        stats = Stats(counts | of_sources | asdict(parts.encoder.counts))
        bad = None if stream is None else stream.progress.bad
        if stream is not None:
            own = range(stream.rank, stream.num_lanes, stream.world_size)
            stats["workers"], stats["lanes"] = self._num_workers, len(own)
        stats["bad_records"], stats["bad_shards"] = (0, 0) if bad is None else (bad.all_records, bad.all_shards)
        stats["dropped_records"] = 0 if bad is None else bad.all_dropped
        stats["known_words_share"] = self._known_words.share()
        if cached is not None:
            stats["encode_calls"], stats["encoded_tokens"] = cached.encode_calls, cached.encoded_tokens
        padded = stats.pop("padded_tokens")
        stats["padding_share"] = 1 - stats["tokens"] / padded if padded else 0.0
        stats |= {f"{stage}_s": seconds[stage] for stage in get_args(Stage)}
        stats["lookup_s"] = 0.0
        if cached is not None:
            # During a call, its compute time is counted already and the call itself is not.
            stats["lookup_s"] = max(0.0, seconds["encode"] - cached.compute_s)
            stats["encode_s"] = cached.compute_s
        loop_s = stats["wait_s"] + stats["step_s"]
        for name in ("texts", "tokens"):
            stats[f"{name}_per_s"] = stats[name] / loop_s if loop_s else 0.0
        if self._cache is not None:
            stats |= {f"cache_{name}": value for name, value in self._cache.stats().items()}
        return stats

    def bottleneck(self, dtype: torch.dtype | None) -> str:
        """See `EmbeddingLoader.bottleneck`; `dtype` is the encoder's, if it has one."""
        return bottleneck(self._since.stats(self.stats()), dtype, self._since.queued_share())

    def save_plot(self, path: str | os.PathLike[str]) -> None:
        """See `EmbeddingLoader.save_plot`."""
        stats = self.stats()
        loop, work = (
            {stage: 1e3 * stats[f"{stage}_s"] / (stats["batches"] or 1) for stage in stages} for stages in (LOOP, WORK)
        )
        plot_step(path, loop=loop, work=work)
