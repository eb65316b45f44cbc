"""A loader's numbers as a table, and one sentence that names its bottleneck."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import counted
from ..system.process import cpu_and_queue_s

LOOP = ("step", "wait")
"""The stages of the training loop."""

WORK = ("read", "tokenize", "lookup", "encode", "hand_over")
"""The work on a batch. It is part of "wait", except where a worker runs ahead: then only "hand_over" is."""


_SHORT_S = 1.0
"""Below it an iteration may be mostly its start: worker processes take about as long to begin."""

_CROWDED = 1 / 3
"""The share of its time that a process may wait for cores before `bottleneck` says so."""


class KnownWords:
    """The share of words that word caches knew, since this was made.

    Args:
        owner: a tokenizer or a stream's progress; without a `word_count` the share is 0.
    """

    def __init__(self, owner: object) -> None:
        self._owner = owner
        self._before = self._count()

    def _count(self) -> tuple[int, int]:
        return getattr(self._owner, "word_count", (0, 0))

    def share(self) -> float:
        """Words found by words looked up; 0 if there were none."""
        asked, found = (now - before for now, before in zip(self._count(), self._before, strict=True))
        return found / asked if asked else 0.0


class Stats(dict[str, float]):
    """The result of `EmbeddingLoader.stats`: a dict of names and numbers, which `print` shows as a table."""

    def __str__(self) -> str:
        """Counts, seconds of each stage, the cache's misses, and every other number that is not 0."""
        counts = ("epochs", "batches", "texts", "tokens", "texts_per_s", "tokens_per_s", "padding_share")
        rows = [("received", "", "", "")] + [(f"  {name}", _shown(name, self[name]), "", "") for name in counts]
        for title, stages in (("the loop", LOOP), ("the work", WORK)):
            rows.append((title, "seconds", "ms a batch", "share"))
            seconds = [self[f"{stage}_s"] for stage in stages]
            for stage, value in zip(stages, seconds, strict=True):
                a_batch, share = 1e3 * value / (self["batches"] or 1), value / (sum(seconds) or 1.0)
                rows.append((f"  {stage}", f"{value:,.3f}", f"{a_batch:,.2f}", f"{share:.0%}"))
        shown = {*counts, *(f"{stage}_s" for stage in LOOP + WORK)}
        others = {name: value for name, value in self.items() if name not in shown}
        rest = [
            (f"  {name}", _shown(name, value), "", "")
            for name, value in others.items()
            if value or name == "cache_misses"
        ]
        rows += [("and", "", "", ""), *rest] if rest else []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
        return "\n".join(lines)


def _shown(name: str, value: float) -> str:
    if name.endswith("_share"):
        return f"{value:.1%}"
    return f"{value:,.3f}" if name.endswith("_s") and not name.endswith("_per_s") else f"{value:,.0f}"


# Stage -> what a sentence calls it, and what would help.
_ADVICE = {
    "read": ("Reading", "more workers of your DataLoader (its num_workers=), or less work in its dataset"),
    "tokenize": ("Tokenizing", "worker processes (num_workers= of stream, or TokenCollate with wrap)"),
    "lookup": ("The cache's look-up", "larger batches"),
    "encode": ("Encoding", "another device, a smaller model, or a lower layer, at a price in quality"),
    "hand_over": ("Laying out the batch", "layout=None, which yields the packed rows"),
}


class Since:
    """What has happened since this was made: of a loader's counts, and of the cores that its process had.

    Args:
        stats: of `EmbeddingLoader.stats`, now.
    """

    def __init__(self, stats: Mapping[str, float]) -> None:
        self._stats = stats
        self._cpu_s, self._queue_s = cpu_and_queue_s()

    def stats(self, now: Mapping[str, float]) -> dict[str, float]:
        """What `bottleneck` needs of the stats, as if all had begun then."""
        added = {
            name: value - self._stats.get(name, 0.0)
            for name, value in now.items()
            if name in _ADDED or (name.endswith("_s") and not name.endswith("_per_s"))
        }
        return {**now, **added}

    def queued_share(self) -> float:
        """Of the time in which its threads could have run, the share in which others held the cores."""
        cpu_s, queue_s = cpu_and_queue_s()
        ran, queued = max(0.0, cpu_s - self._cpu_s), max(0.0, queue_s - self._queue_s)
        return queued / (ran + queued) if ran + queued else 0.0


_ADDED = ("batches", "cache_memory_hits", "cache_disk_hits", "cache_misses")


def bottleneck(stats: Mapping[str, float], dtype: torch.dtype | None = None, queued_share: float = 0.0) -> str:
    """Say in one sentence what a training loop waits for, and what would help; in a second one, if cores are taken.

    Args:
        stats: of `EmbeddingLoader.stats`; the `*_s` seconds and the numbers of batches, workers and lanes are used.
        dtype: the encoder's, if it has one.
        queued_share: of `Since.queued_share`.
    """
    found = _bottleneck(stats, dtype)
    if stats["batches"] and stats["wait_s"] + stats["step_s"] < _SHORT_S:
        found += f" But {stats['wait_s'] + stats['step_s']:.2f} s are too short to judge by."
    if stats["batches"] and queued_share > _CROWDED:
        found += (
            f" Its threads waited for a core {queued_share:.0%} of the time that they could have run: other processes "
            "hold the cores, or it has more workers than cores."
        )
    return found


def _bottleneck(stats: Mapping[str, float], dtype: torch.dtype | None) -> str:
    wait, step = stats["wait_s"], stats["step_s"]
    if not stats["batches"]:
        return "No batch was received yet."
    share = wait / (wait + step) if wait + step else 0.0
    if share < 0.05:
        return f"The training step is the bottleneck: the loop waits for batches {share:.0%} of its time."
    works = {stage: stats.get(f"{stage}_s", 0.0) for stage in WORK}
    slowest = max(works, key=lambda stage: works[stage])
    part = works[slowest] / (sum(works.values()) or 1.0)
    name, help_with = _ADVICE[slowest]
    if slowest == "encode" and dtype in (None, torch.float32):
        help_with = f"dtype='bfloat16' where the device is fast at it, {help_with}"
    if slowest == "encode" and "cache_misses" not in stats:
        help_with = f"a cache, {help_with}"
    elif slowest == "encode":
        help_with = f"{_of_cache(stats)}, {help_with}"
    if slowest == "lookup" and 2 * stats.get("cache_disk_read_s", 0.0) > works["lookup"]:
        help_with = f"more memory= for the cache, a faster disk, {help_with}"
    if slowest == "read" and "lanes" in stats:
        help_with = _more_readers(int(stats["workers"]), int(stats["lanes"]))
    if share < 0.5:
        return (
            f"The training step takes {1 - share:.0%} of the time. The rest is waiting for batches, and "
            f"{part:.0%} of the work on them is {name[0].lower()}{name[1:]}. What would help: {help_with}."
        )
    return (
        f"{name} is the bottleneck: the loop waits for batches {share:.0%} of its time, and this is {part:.0%} of the "
        f"work on them. What would help: {help_with}."
    )


def _of_cache(stats: Mapping[str, float]) -> str:
    """What would help where a cache is there, and the encoder still is the bottleneck."""
    hits, misses = stats.get("cache_memory_hits", 0.0) + stats.get("cache_disk_hits", 0.0), stats["cache_misses"]
    missed = f"{misses / (hits + misses):.0%}" if hits + misses else "none"
    return f"nothing in later epochs, if the cache holds all texts (it lacked {missed} of those asked for)"


def _more_readers(workers: int, lanes: int) -> str:
    """What would help a stream whose workers are the bottleneck: a lane is read by one worker, so lanes limit them."""
    seen = f"it has {counted(workers, 'worker')}, {counted(lanes, 'lane')}"
    shards = "larger or local shards, or shard_cache="
    if workers < lanes:
        return f"more workers (num_workers=; {seen}), {shards}"
    idle = (
        f" and {workers - lanes} of the workers {'has' if workers == lanes + 1 else 'have'} nothing to read"
        if workers > lanes
        else ""
    )
    least = max(workers, lanes + 1)
    return (
        f"more lanes ({seen}{idle}): reading=StreamConfig(lanes={least}) or more a rank, with as many shards where "
        f"they cannot be cut; another number of lanes is another order of the records. Or {shards}"
    )
