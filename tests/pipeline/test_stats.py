"""A loader's numbers print as a table, and one sentence names the bottleneck."""

from __future__ import annotations

import json

import pytest
import torch

import bertstream
from bertstream.pipeline.stats import LOOP, WORK, Since, Stats, bottleneck
from bertstream.testing import FakeEncoder


def test_stats_print_as_a_table_and_are_a_plain_dict_otherwise() -> None:
    counts = dict.fromkeys(("epochs", "batches", "texts", "tokens", "bad_records", "cut_texts"), 0)
    seconds = {f"{name}_s": 0.0 for name in (*LOOP, *WORK)}
    rates = {"texts_per_s": 0.0, "tokens_per_s": 0.0, "padding_share": 0.0}
    stats = Stats(counts | seconds | rates)
    assert "cut_texts" not in str(stats) and str(stats).endswith("0%"), "zeros outside the fixed rows are not shown"
    stats |= {"epochs": 2, "batches": 40, "tokens": 54321, "tokens_per_s": 9876.5, "padding_share": 0.25}
    stats |= {"step_s": 3.0, "wait_s": 1.0, "read_s": 0.4, "encode_s": 1.6, "cut_texts": 1234, "room_wait_s": 0.25}
    assert str(stats).splitlines() == [
        "received",
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


# --- the bottleneck ---------------------------------------------------------------------------------------------------


def sentence(**seconds: float) -> str:
    names = ("wait", "step", "read", "tokenize", "lookup", "encode", "hand_over")
    return bottleneck({"batches": 5} | {f"{name}_s": seconds.get(name, 0.0) for name in names})


def test_half_precision_is_not_advised_to_an_encoder_that_runs_in_it() -> None:
    stats = dict.fromkeys((f"{name}_s" for name in (*LOOP, *WORK)), 0.0) | {
        "batches": 5,
        "wait_s": 9.0,
        "encode_s": 9.0,
    }
    assert all("dtype='bfloat16'" in bottleneck(stats, dtype) for dtype in (None, torch.float32))
    assert all("dtype=" not in bottleneck(stats, dtype) for dtype in (torch.bfloat16, torch.float16))
    loader = bertstream.wrap([["a b", "c"]], FakeEncoder())
    loader.encoder.dtype = torch.bfloat16  # type: ignore[attr-defined]
    for _ in loader:
        pass
    assert "dtype=" not in loader.bottleneck()


@pytest.mark.parametrize(
    ("slowest", "opening", "advice"),
    [
        ("read", "Reading is the bottleneck", "num_workers="),
        ("tokenize", "Tokenizing is the bottleneck", "TokenCollate"),
        ("lookup", "The cache's look-up is the bottleneck", "larger batches"),
        ("encode", "Encoding is the bottleneck", "a cache"),
        ("hand_over", "Laying out the batch is the bottleneck", "layout=None"),
    ],
)
def test_the_slowest_stage_is_named_with_what_would_help(slowest: str, opening: str, advice: str) -> None:
    others = dict.fromkeys(("read", "tokenize", "lookup", "encode"), 1.0) | {"hand_over": 0.0}
    works = others | {slowest: 7.0 if slowest != "hand_over" else 28 / 3}
    found = sentence(wait=3.0, step=1.0, **works)
    assert found.startswith(
        f"{opening}: the loop waits for batches 75% of its time, and this is 70% of the work on them."
    )
    assert "What would help: " in found and advice in found and found.endswith(".")
    found = sentence(wait=1.0, step=3.0, **works)
    assert found.startswith("The training step takes 75% of the time. The rest is waiting for batches, and ")
    assert f"70% of the work on them is {opening.partition(' is the')[0].lower()}" in found.lower()
    assert "What would help: " in found and advice in found and found.endswith(".")


def test_a_loop_with_a_cache_is_not_advised_to_use_one() -> None:
    works = {"wait_s": 9.0, "step_s": 1.0, "batches": 1, "cache_misses": 5}
    assert "a cache" not in bottleneck(works | {"encode_s": 9.0})
    from_memory = bottleneck(works | {"lookup_s": 9.0, "cache_disk_read_s": 1.0})
    from_disk = bottleneck(works | {"lookup_s": 9.0, "cache_disk_read_s": 8.0})
    assert "disk" not in from_memory and "more memory= for the cache, a faster disk" in from_disk


def test_the_step_is_the_bottleneck_of_a_loop_that_hardly_waits() -> None:
    found = sentence(wait=0.1, step=9.9, encode=9.0)
    assert found == "The training step is the bottleneck: the loop waits for batches 1% of its time."
    assert "takes 94% of the time" in sentence(wait=0.6, step=9.4, encode=9.0)


def test_a_short_iteration_is_not_judged_without_saying_so() -> None:
    assert sentence(wait=0.3, step=0.01, encode=0.3).endswith("But 0.31 s are too short to judge by.")
    assert "too short" not in sentence(wait=3.0, step=0.1, encode=3.0)


def test_a_wrapped_loader_is_told_of_its_own_workers() -> None:
    assert "workers of your DataLoader (its num_workers=)" in sentence(wait=9.0, read=9.0)


def test_where_the_cache_lacks_texts_their_share_is_named() -> None:
    stats = {"batches": 9.0, "wait_s": 9.0, "step_s": 1.0, "encode_s": 8.0}
    cached = stats | {"cache_misses": 3.0, "cache_memory_hits": 1.0}
    assert "if the cache holds all texts (it lacked 75% of those asked for)" in bottleneck(cached)
    since = Since(cached | {"cache_misses": 0.0, "cache_memory_hits": 0.0, "batches": 0.0})
    assert since.stats(cached)["cache_misses"] == 3.0 and since.stats(cached)["batches"] == 9.0


def test_cores_that_others_hold_are_told() -> None:
    stats = {"batches": 9.0, "wait_s": 9.0, "step_s": 1.0, "encode_s": 8.0}
    assert bottleneck(stats, queued_share=0.5).endswith(
        "waited for a core 50% of the time that they could have run: other processes hold the cores, or it has more "
        "workers than cores."
    )
    assert "core" not in bottleneck(stats, queued_share=0.1)
    assert "core" not in bottleneck(stats | {"batches": 0}, queued_share=0.5)
    assert 0.0 <= Since(stats).queued_share() <= 1.0


@pytest.mark.parametrize(
    ("workers", "lanes", "advice"),
    [
        (
            12,
            4,
            "more lanes (it has 12 workers, 4 lanes and 8 of the workers have nothing to read): "
            "reading=StreamConfig(lanes=12)",
        ),
        (4, 4, "more lanes (it has 4 workers, 4 lanes): reading=StreamConfig(lanes=5)"),
        (2, 4, "more workers (num_workers=; it has 2 workers, 4 lanes), larger"),
        (0, 4, "more workers (num_workers=; it has 0 workers, 4 lanes), larger"),
    ],
)
def test_where_reading_is_the_bottleneck_workers_and_lanes_are_counted(workers: int, lanes: int, advice: str) -> None:
    stats = {"batches": 9.0, "wait_s": 9.0, "step_s": 1.0, "read_s": 8.0, "workers": workers, "lanes": lanes}
    assert advice in bottleneck(stats)
    assert "lanes" not in bottleneck(stats | {"encode_s": 99.0})
