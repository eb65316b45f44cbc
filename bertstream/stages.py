"""What each stage of a loader did and for how long: seconds and items, a trace to look at, and what holds a loop up."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch.profiler import record_function

Stage: TypeAlias = Literal["read", "tokenize", "encode", "hand_over", "wait", "step"]
"""What is timed. Of "lookup", which `WORK` has too, the seconds are worked out: what a cache's "encode" takes beside
computing."""

_KEPT_SPANS = 20_000
"""The latest, for the trace: about 4 MB, and some two minutes of a fast loop."""


class Stages:
    """A clock for each stage of a loader; each stage runs in one thread at a time.

    "read" waits for the source, "tokenize" and "encode" say themselves; "hand_over" puts vectors into the user's batch.
    "wait" is the training loop waiting for a batch, "step" what it does between two of them.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.items: defaultdict[str, int] = defaultdict(int)
        self._spans: deque[tuple[str, int, float, float, int]] = deque(maxlen=_KEPT_SPANS)

    @contextmanager
    def run(self, stage: Stage, items: int = 0) -> Iterator[None]:
        """Time what is inside as one span of the stage; `torch.profiler` shows it as "bertstream.<stage>"."""
        started = time.perf_counter()
        try:
            with record_function(f"bertstream.{stage}"):
                yield
        finally:
            self.add(stage, started, items)

    def add(self, stage: Stage, started: float, items: int = 0) -> None:
        """A span from `started` (`time.perf_counter()`) until now."""
        now = time.perf_counter()
        self.seconds[stage] += now - started
        self.items[stage] += items
        self._spans.append((stage, threading.get_native_id(), started, now - started, items))

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the latest spans in Chrome's trace format; see `EmbeddingLoader.save_trace`."""
        events: list[dict[str, Any]] = [
            {
                "name": stage,
                "ph": "X",
                "pid": os.getpid(),
                "tid": thread,
                "ts": started * 1e6,
                "dur": seconds * 1e6,
                "args": {"items": items},
            }
            for stage, thread, started, seconds, items in list(self._spans)
        ]
        Path(path).write_text(json.dumps({"traceEvents": events}), encoding="utf-8")


LOOP = ("step", "wait")
"""What a training loop's own time goes into."""

WORK = ("read", "tokenize", "lookup", "encode", "hand_over")
"""What is done for a batch: while the loop waits, or beside it, all but "hand_over", where a worker runs ahead."""


class Stats(dict[str, float]):
    """What `EmbeddingLoader.stats` says: a plain dict of names and numbers, which `print` shows as a table."""

    def __str__(self) -> str:
        """The counts, the seconds of each stage, and of all the rest what is not 0, under their names in the dict."""
        counts = ("epochs", "batches", "texts", "tokens", "texts_per_s", "tokens_per_s", "padding_share")
        rows = [("handed out", "", "", "")] + [(f"  {name}", _shown(name, self[name]), "", "") for name in counts]
        for title, stages in (("the loop", LOOP), ("the work", WORK)):
            rows.append((title, "seconds", "ms a batch", "share"))
            seconds = [self[f"{stage}_s"] for stage in stages]
            for stage, value in zip(stages, seconds, strict=True):
                a_batch, share = 1e3 * value / (self["batches"] or 1), value / (sum(seconds) or 1.0)
                rows.append((f"  {stage}", f"{value:,.3f}", f"{a_batch:,.2f}", f"{share:.0%}"))
        shown = {*counts, *(f"{stage}_s" for stage in LOOP + WORK)}
        rest = [
            (f"  {name}", _shown(name, value), "", "") for name, value in self.items() if value and name not in shown
        ]
        rows += [("and", "", "", ""), *rest] if rest else []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
        return "\n".join(lines)


def _shown(name: str, value: float) -> str:
    if name.endswith("_share"):
        return f"{value:.1%}"
    return f"{value:,.3f}" if name.endswith("_s") and not name.endswith("_per_s") else f"{value:,.0f}"


# Stage of the work -> what it is called, and what would help.
_ADVICE = {
    "read": ("Reading", "more workers (num_workers=), larger or local shards, or shard_cache="),
    "tokenize": ("Tokenizing", "worker processes (num_workers= of stream, or TokenCollate with wrap)"),
    "lookup": ("The cache's look-up", "more memory= for it, or a faster disk"),
    "encode": ("Encoding", "a cache, a lower layer, dtype='bfloat16' where the device is fast at it, another device"),
    "hand_over": ("Laying out the batch", "layout=None, which hands out the packed rows"),
}


def bottleneck(stats: Mapping[str, float]) -> str:
    """One sentence on what a training loop waits for, from the `*_s` seconds of `EmbeddingLoader.stats`."""
    wait, step = stats["wait_s"], stats["step_s"]
    if not stats["batches"]:
        return "Nothing was handed out yet."
    share = wait / (wait + step) if wait + step else 0.0
    if share < 0.05:
        return f"The training step is the bottleneck: the loop waits for batches {share:.0%} of its time."
    works = {stage: stats.get(f"{stage}_s", 0.0) for stage in WORK}
    slowest = max(works, key=lambda stage: works[stage])
    part = works[slowest] / (sum(works.values()) or 1.0)
    name, help_with = _ADVICE[slowest]
    return (
        f"{name} is the bottleneck: the loop waits for batches {share:.0%} of its time, and {part:.0%} of the work on "
        f"them is this. What would help: {help_with}."
    )
