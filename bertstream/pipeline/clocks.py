"""A clock for each stage of a loader: its seconds, its items, and a trace of its latest spans."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch.autograd import profiler
from torch.profiler import record_function

Stage: TypeAlias = Literal["read", "tokenize", "encode", "hand_over", "wait", "step"]
"""What is timed. `stats.WORK` also has "lookup", which is derived: "encode" minus the cache's compute time."""


class _Span:
    """A `with` block that is timed; no generator, because several are entered for each batch."""

    __slots__ = ("_clocks", "_items", "_named", "_stage", "_started")

    def __init__(self, clocks: StageClocks, stage: Stage, items: int) -> None:
        self._clocks, self._stage, self._items = clocks, stage, items
        self._named: record_function | None = None

    def __enter__(self) -> None:
        self._started = time.perf_counter()
        if profiler._is_profiler_enabled:  # without one to see it, the name would cost as much as the rest of a span
            self._named = record_function(f"bertstream.{self._stage}")
            self._named.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._named is not None:
            self._named.__exit__(*error)
        self._clocks.add(self._stage, self._started, self._items)


_KEPT_SPANS = 20_000
"""The trace keeps the latest spans: about 4 MB, some two minutes of a fast loop."""


class StageClocks:
    """Times the stages of a loader; each stage runs in one thread at a time.

    "read" waits for the source, "tokenize" and "encode" do what they say, "hand_over" puts vectors into the user's
    batch. "wait" is the training loop waiting for a batch, "step" what it does between two batches.

    Attributes:
        seconds: by stage, in all.
        items: by stage, in all.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.items: defaultdict[str, int] = defaultdict(int)
        self._spans: deque[tuple[str, int, float, float, int]] = deque(maxlen=_KEPT_SPANS)

    def run(self, stage: Stage, items: int = 0) -> _Span:
        """Time the `with` block as one span of the stage; `torch.profiler` shows it as "bertstream.<stage>"."""
        return _Span(self, stage, items)

    def add(self, stage: Stage, started: float, items: int = 0) -> None:
        """Add a span from `started` (a `time.perf_counter()`) until now."""
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
        Path(path).expanduser().write_text(json.dumps({"traceEvents": events}), encoding="utf-8")
