"""Every stage's time is added up, and its spans are shown in a trace and in torch's profiler."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

import bertstream
from bertstream.pipeline import clocks
from bertstream.pipeline.clocks import StageClocks
from bertstream.testing import FakeEncoder

STAGES = {"read", "tokenize", "encode", "hand_over", "wait", "step"}
BATCHES = [{"text": ["a b", "c"]} for _ in range(20)]


def trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace, after checks against Chrome's format for complete events."""
    whole = json.loads(path.read_text("utf-8"))
    for event in whole["traceEvents"]:
        assert event["ph"] == "X" and event["name"] in STAGES and event["pid"] == os.getpid()
        assert isinstance(event["tid"], int) and event["ts"] >= 0 and event["dur"] >= 0
    events: list[dict[str, Any]] = whole["traceEvents"]
    return events


def assert_apart_or_nested(events: Sequence[dict[str, Any]]) -> None:
    """In a thread, spans of one stage never overlap, and spans of two stages are apart or nested."""
    lanes, threads = defaultdict(list), defaultdict(list)
    for event in events:
        span = event["ts"], event["ts"] + event["dur"]
        lanes[event["tid"], event["name"]].append(span)
        threads[event["tid"]].append(span)
    slack = 0.01  # us: microseconds since the machine's start, as a float
    for spans in lanes.values():
        assert all(end <= start + slack for (_, end), (start, _) in pairwise(sorted(spans)))
    for spans in threads.values():
        open_until: list[float] = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_until and open_until[-1] <= start + slack:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + slack
            open_until.append(end)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_trace_shows_every_stage_in_its_thread(tmp_path: Path, prefetch: int) -> None:
    loader = bertstream.wrap(BATCHES, FakeEncoder(), text="text", prefetch=prefetch)
    for _ in range(2):
        for _ in loader:
            time.sleep(0.0005)
    loader.save_trace(tmp_path / "trace.json")
    events = trace(tmp_path / "trace.json")
    assert_apart_or_nested(events)
    named = {name: [event for event in events if event["name"] == name] for name in STAGES}
    assert all(len(named[name]) >= 40 for name in ("read", "tokenize", "hand_over", "wait", "step"))
    assert sum(event["args"]["items"] for event in named["encode"]) == 40 >= len(named["encode"]) > 0
    threads = {name: {event["tid"] for event in events} for name, events in named.items()}
    here = threading.get_native_id()
    assert threads["wait"] == threads["step"] == threads["hand_over"] == {here}
    # Each epoch has one worker thread; without one, encoding is part of the loop's waiting.
    assert (threads["encode"] == {here}) if not prefetch else (here not in threads["encode"])
    stats = loader.stats()
    for name in STAGES:
        assert stats[f"{name}_s"] == pytest.approx(sum(event["dur"] for event in named[name]) / 1e6)
    assert stats["step_s"] >= 40 * 0.0005
    if not prefetch:
        assert stats["wait_s"] >= sum(stats[f"{name}_s"] for name in ("read", "tokenize", "encode", "hand_over"))


def test_a_trace_keeps_the_latest_spans_and_the_clock_counts_all_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "_KEPT_SPANS", 10)
    timed = StageClocks()
    for number in range(25):
        with timed.run("encode", number):
            pass
    timed.save_trace(tmp_path / "trace.json")
    assert [event["args"]["items"] for event in trace(tmp_path / "trace.json")] == list(range(15, 25))
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: 30.0))
    timed.add("read", 10.0)
    timed.add("read", 25.5)
    assert timed.seconds["read"] == 24.5


def test_a_failing_stage_is_timed_too() -> None:
    timed = StageClocks()
    with pytest.raises(ZeroDivisionError), timed.run("tokenize"):
        time.sleep(0.01)
        raise ZeroDivisionError
    assert timed.seconds["tokenize"] >= 0.01


@pytest.mark.parametrize("prefetch", [0, 2])
def test_torchs_profiler_sees_the_stages(prefetch: int) -> None:
    """By default torch's profiler leaves out all other threads, so also the encode worker."""
    config = _ExperimentalConfig(profile_all_threads=True) if prefetch else None
    with profile(activities=[ProfilerActivity.CPU], experimental_config=config, acc_events=True) as seen:
        list(bertstream.wrap(BATCHES, FakeEncoder(), text="text", prefetch=prefetch))
    counts = {event.key: event.count for event in seen.key_averages()}
    assert {f"bertstream.{name}" for name in ("read", "tokenize", "encode", "hand_over")} <= counts.keys()
    assert counts["bertstream.tokenize"] == counts["bertstream.hand_over"] == len(BATCHES)
