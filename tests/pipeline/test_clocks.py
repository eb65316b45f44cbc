"""What each stage did is added up, can be looked at as a trace, and one sentence says what holds a loop up."""

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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile
from torch.utils.tensorboard import SummaryWriter

import bertstream
from bertstream.pipeline import clocks as stages
from bertstream.pipeline.clocks import StageClocks
from bertstream.pipeline.stats import LOOP, WORK, Stats, bottleneck
from bertstream.testing import FakeEncoder

STAGES = {"read", "tokenize", "encode", "hand_over", "wait", "step"}
BATCHES = [{"text": ["a b", "c"]} for _ in range(20)]


def trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace, checked against what Chrome's format asks of complete events."""
    whole = json.loads(path.read_text("utf-8"))
    for event in whole["traceEvents"]:
        assert event["ph"] == "X" and event["name"] in STAGES and event["pid"] == os.getpid()
        assert isinstance(event["tid"], int) and event["ts"] >= 0 and event["dur"] >= 0
    events: list[dict[str, Any]] = whole["traceEvents"]
    return events


def assert_apart_or_nested(events: Sequence[dict[str, Any]]) -> None:
    """In one thread spans of one stage never overlap, and of different ones only by one holding the other whole."""
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
    # One thread an epoch; where there is none, all of it is part of waiting.
    assert (threads["encode"] == {here}) if not prefetch else (here not in threads["encode"])
    stats = loader.stats()
    for name in STAGES:
        assert stats[f"{name}_s"] == pytest.approx(sum(event["dur"] for event in named[name]) / 1e6)
    assert stats["step_s"] >= 40 * 0.0005
    if not prefetch:
        assert stats["wait_s"] >= sum(stats[f"{name}_s"] for name in ("read", "tokenize", "encode", "hand_over"))


def test_the_latest_spans_are_kept_and_all_seconds_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_KEPT_SPANS", 10)
    kept = StageClocks()
    for number in range(25):
        with kept.run("encode", number):
            pass
    kept.save_trace(tmp_path / "trace.json")
    assert [event["args"]["items"] for event in trace(tmp_path / "trace.json")] == list(range(15, 25))
    monkeypatch.setattr(stages, "time", SimpleNamespace(perf_counter=lambda: 30.0))
    kept.add("read", 10.0)
    kept.add("read", 25.5)
    assert kept.seconds["read"] == 24.5


def test_a_stage_that_fails_is_timed_too() -> None:
    timed = StageClocks()
    with pytest.raises(ZeroDivisionError), timed.run("tokenize"):
        time.sleep(0.01)
        raise ZeroDivisionError
    assert timed.seconds["tokenize"] >= 0.01


@pytest.mark.parametrize("prefetch", [0, 2])
def test_torchs_profiler_sees_the_stages(prefetch: int) -> None:
    """A worker's only if it is asked for all threads, which torch's profiler leaves out by default."""
    config = _ExperimentalConfig(profile_all_threads=True) if prefetch else None
    with profile(activities=[ProfilerActivity.CPU], experimental_config=config, acc_events=True) as seen:
        list(bertstream.wrap(BATCHES, FakeEncoder(), text="text", prefetch=prefetch))
    counts = {event.key: event.count for event in seen.key_averages()}
    assert {f"bertstream.{name}" for name in ("read", "tokenize", "encode", "hand_over")} <= counts.keys()
    assert counts["bertstream.tokenize"] == counts["bertstream.hand_over"] == len(BATCHES)


# --- the numbers as a table, and in TensorBoard -----------------------------------------------------------------------


def cells(table: str) -> dict[str, list[str]]:
    """The first word of each line of a table -> the others."""
    return {words[0]: words[1:] for words in map(str.split, table.splitlines())}


def test_numbers_are_printed_as_a_table_and_are_a_plain_dict_otherwise() -> None:
    counts = dict.fromkeys(("epochs", "batches", "texts", "tokens", "bad_records", "cut_texts"), 0)
    seconds = {f"{name}_s": 0.0 for name in (*LOOP, *WORK)}
    rates = {"texts_per_s": 0.0, "tokens_per_s": 0.0, "padding_share": 0.0}
    stats = Stats(counts | seconds | rates)
    assert "cut_texts" not in str(stats) and str(stats).endswith("0%"), "nothing was handed out, and nothing skipped"
    stats |= {"epochs": 2, "batches": 40, "tokens": 54321, "tokens_per_s": 9876.5, "padding_share": 0.25}
    stats |= {"step_s": 3.0, "wait_s": 1.0, "read_s": 0.4, "encode_s": 1.6, "cut_texts": 1234, "room_wait_s": 0.25}
    assert str(stats).splitlines() == [
        "handed out",
        "  epochs               2",
        "  batches             40",
        "  texts                0",
        "  tokens          54,321",
        "  texts_per_s          0",
        "  tokens_per_s     9,876",
        "  padding_share    25.0%",
        "the loop         seconds  ms a batch  share",
        "  step             3.000       75.00    75%",
        "  wait             1.000       25.00    25%",
        "the work         seconds  ms a batch  share",
        "  read             0.400       10.00    20%",
        "  tokenize         0.000        0.00     0%",
        "  lookup           0.000        0.00     0%",
        "  encode           1.600       40.00    80%",
        "  hand_over        0.000        0.00     0%",
        "and",
        "  cut_texts        1,234",
        "  room_wait_s      0.250",
    ]
    assert repr(stats) == repr(dict(stats)) and json.loads(json.dumps(stats)) == stats


def test_a_loaders_table_names_everything_that_happened(minilm: bertstream.Encoder) -> None:
    cache = bertstream.EmbeddingCache("1MiB")
    loader = bertstream.wrap(BATCHES, minilm, text="text", cache=cache)
    fresh = cells(str(loader.stats()))
    assert fresh["cache_misses"] == ["0"] and "cache_memory_texts" not in fresh
    assert "and" not in cells(str(bertstream.wrap(BATCHES, minilm, text="text").stats()))
    list(loader)
    stats = loader.stats()
    table = cells(str(stats))
    for name, value in stats.items():
        stage = name.removesuffix("_s")
        shown = table.get(stage if stage in (*LOOP, *WORK) else name)
        assert (shown is not None) or not value, f"{name} is {value} and not in the table"
    assert table["batches"] == ["20"] and table["cache_memory_hits"] == [str(stats["cache_memory_hits"])]
    assert table["encode"][0] == f"{stats['encode_s']:.3f}"


def test_tensorboard_takes_every_number_as_it_is(tmp_path: Path, minilm: bertstream.Encoder) -> None:
    with bertstream.EmbeddingCache("1MiB", disk=tmp_path / "cache", disk_limit="10MiB") as cache:
        loader = bertstream.wrap(BATCHES, minilm, text="text", cache=cache)
        with SummaryWriter(tmp_path / "runs") as writer:
            for _ in loader:
                stats = loader.stats()
                for name, value in stats.items():
                    writer.add_scalar(f"bertstream/{name}", value, stats["batches"])
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert set(events.Tags()["scalars"]) == {f"bertstream/{name}" for name in stats}
    for name, value in stats.items():
        written = events.Scalars(f"bertstream/{name}")
        assert [event.step for event in written] == list(range(1, len(BATCHES) + 1))
        assert written[-1].value == pytest.approx(value)


# --- what holds a loop up ---------------------------------------------------------------------------------------------


def sentence(**seconds: float) -> str:
    names = ("wait", "step", "read", "tokenize", "lookup", "encode", "hand_over")
    return bottleneck({"batches": 5} | {f"{name}_s": seconds.get(name, 0.0) for name in names})


@pytest.mark.parametrize(
    ("slowest", "said", "cure"),
    [
        ("read", "Reading is the bottleneck", "num_workers="),
        ("tokenize", "Tokenizing is the bottleneck", "TokenCollate"),
        ("lookup", "The cache's look-up is the bottleneck", "larger batches"),
        ("encode", "Encoding is the bottleneck", "a cache"),
        ("hand_over", "Laying out the batch is the bottleneck", "layout=None"),
    ],
)
def test_what_is_slowest_is_named_with_what_would_help(slowest: str, said: str, cure: str) -> None:
    others = dict.fromkeys(("read", "tokenize", "lookup", "encode"), 1.0) | {"hand_over": 0.0}
    works = others | {slowest: 7.0 if slowest != "hand_over" else 28 / 3}
    found = sentence(wait=3.0, step=1.0, **works)
    assert found.startswith(f"{said}: the loop waits for batches 75% of its time, and 70% of the work on them is this.")
    assert "What would help: " in found and cure in found and found.endswith(".")
    found = sentence(wait=1.0, step=3.0, **works)
    assert found.startswith("The training step takes 75% of the time. For the rest the loop waits for batches, and ")
    assert f"70% of the work on them is {said.partition(' is the')[0].lower()}" in found.lower()
    assert "What would help: " in found and cure in found and found.endswith(".")


def test_what_would_help_a_loop_with_a_cache_is_no_cache() -> None:
    works = {"wait_s": 9.0, "step_s": 1.0, "batches": 1, "cache_misses": 5}
    assert "a cache" not in bottleneck(works | {"encode_s": 9.0})
    from_memory = bottleneck(works | {"lookup_s": 9.0, "cache_disk_read_s": 1.0})
    from_disk = bottleneck(works | {"lookup_s": 9.0, "cache_disk_read_s": 8.0})
    assert "disk" not in from_memory and "more memory= for the cache, a faster disk" in from_disk


def test_a_loop_that_hardly_waits_has_its_step_for_a_bottleneck() -> None:
    found = sentence(wait=0.1, step=9.9, encode=9.0)
    assert found == "The training step is the bottleneck: the loop waits for batches 1% of its time."
    assert "takes 94% of the time" in sentence(wait=0.6, step=9.4, encode=9.0)


def test_a_loader_says_what_it_waits_for() -> None:
    class Slow(FakeEncoder):
        def encode(self, batch: Any) -> Any:
            time.sleep(0.005)
            return super().encode(batch)

    def slowly() -> Any:
        for batch in BATCHES:
            time.sleep(0.005)
            yield batch

    loader = bertstream.wrap(BATCHES, Slow(), text="text", prefetch=0)
    assert loader.bottleneck() == "Nothing was handed out yet."
    list(loader)
    assert loader.bottleneck().startswith("Encoding is the bottleneck")
    reading = bertstream.wrap(slowly(), FakeEncoder(), text="text", prefetch=0)
    list(reading)
    assert reading.bottleneck().startswith("Reading is the bottleneck")
    training = bertstream.wrap(BATCHES[:3], FakeEncoder(), text="text", prefetch=0)
    for _ in training:
        time.sleep(0.1)
    assert training.bottleneck().startswith("The training step is the bottleneck")
