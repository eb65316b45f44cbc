"""`warm` fills a cache before training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch

import bertstream
from bertstream import ConfigError, EmbeddingCache, Encoder, ShardError, StreamConfig, TokenBatch
from bertstream.caching.disk import DiskTier
from bertstream.reading.messages import AHEAD, StreamLoader


@pytest.fixture
def shard(tmp_path: Path, sentences: list[str]) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = [{"text": text, "label": 1} for text in sentences[:40] + sentences[:10]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("num_workers", [0, 1])
def test_after_warm_an_epoch_computes_nothing(
    minilm: Encoder, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    with EmbeddingCache("1MiB", tmp_path / "cache", "64MiB") as cache:
        done = bertstream.warm(shard, minilm, cache, num_workers=num_workers, progress=False)
        assert done == {
            "texts": 50,
            "computed": 40,
            "not_kept": 0,
            "bad_records": 0,
            "bad_shards": 0,
            "dropped_records": 0,
        }
    with EmbeddingCache("16MiB", tmp_path / "cache", "64MiB") as cache:
        right = [batch["text"].values for batch in bertstream.stream(shard, minilm, batch_size=7)]
        monkeypatch.setattr(minilm, "encode", lambda batch: pytest.fail("computed"))
        for _ in range(2):
            found = [batch["text"].values for batch in bertstream.stream(shard, minilm, batch_size=7, cache=cache)]
            for a, b in zip(found, right, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert cache.stats()["disk_hits"] == 40 and cache.stats()["misses"] == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_read_as_far_ahead_as_those_of_a_stream(
    minilm: Encoder, shard: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    read: list[tuple[int, int | None]] = []

    def not_started(loader: StreamLoader) -> Iterator[TokenBatch]:
        read.append((loader.num_workers, loader.prefetch_factor))
        return iter(())

    monkeypatch.setattr(StreamLoader, "__iter__", not_started)
    with pytest.raises(ShardError, match="no record in the whole epoch"):
        list(bertstream.stream(shard, minilm, num_workers=num_workers))
    with pytest.raises(ShardError, match="no record in the whole epoch"):
        bertstream.warm(shard, minilm, EmbeddingCache("1MiB"), num_workers=num_workers, progress=False)
    assert read == [(num_workers, AHEAD if num_workers else None)] * 2


def test_texts_computed_before_a_stop_are_not_computed_again(
    minilm: Encoder, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = minilm.encode, []

    def stopped(batch: TokenBatch) -> bertstream.Embeddings:
        calls.append(len(batch))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(batch)

    monkeypatch.setattr(minilm, "encode", stopped)
    monkeypatch.setattr(minilm._size, "given", 300)
    with EmbeddingCache(0, tmp_path / "cache", "64MiB") as cache, pytest.raises(KeyboardInterrupt):
        bertstream.warm(shard, minilm, cache, progress=False)
    monkeypatch.setattr(minilm, "encode", encode)
    with EmbeddingCache(0, tmp_path / "cache", "64MiB") as cache:
        done = bertstream.warm(shard, minilm, cache, progress=False)
        assert (done["texts"], done["computed"]) == (50, 40 - calls[0])
        assert bertstream.warm(shard, minilm, cache, progress=False)["computed"] == 0


def test_a_slow_disk_drops_nothing(
    minilm: Encoder, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertstream.caching.disk._QUEUE_BYTES", 1)
    monkeypatch.setattr(minilm._size, "given", 100)
    with EmbeddingCache(0, tmp_path / "cache", "64MiB") as cache:
        bertstream.warm(shard, minilm, cache, progress=False)
        assert cache.stats()["disk_texts"] == 40 and cache.stats()["disk_dropped_writes"] == 0


def test_memory_alone_can_be_filled_and_the_bar_shows_progress(
    minilm: Encoder, shard: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = EmbeddingCache("16MiB")
    assert bertstream.warm(shard, minilm, cache)["computed"] == cache.stats()["memory_texts"] == 40
    assert "| 50/50 " in capsys.readouterr().err


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_records_are_counted_over_all_workers(minilm: Encoder, tmp_path: Path, num_workers: int) -> None:
    paths = [tmp_path / f"{name}.jsonl" for name in "abcd"]
    for path in paths:
        path.write_text('{"text": "good"}\nno json\n{"text": "good"}\n', encoding="utf-8")

    def fill(most: int) -> dict[str, int]:
        reading = StreamConfig(max_bad_records=most, lanes=4)
        cache = EmbeddingCache("1MiB")
        return bertstream.warm(paths, minilm, cache, num_workers=num_workers, reading=reading, progress=False)

    assert fill(4) == {
        "texts": 8,
        "computed": 1,
        "not_kept": 0,
        "bad_records": 4,
        "bad_shards": 0,
        "dropped_records": 0,
    }
    with pytest.raises(ShardError, match="4 broken records .* more than max_bad_records=3"):
        fill(3)


def test_texts_that_a_small_memory_does_not_keep_are_counted_and_logged(
    minilm: Encoder, shard: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = EmbeddingCache("100KB")
    done = bertstream.warm(shard, minilm, cache, progress=False)
    assert done["computed"] == 40 and done["not_kept"] == 40 - cache.stats()["memory_texts"] > 0
    assert f"did not keep {done['not_kept']} of the texts" in caplog.text and "raise memory=" in caplog.text


@pytest.mark.parametrize(("failed", "way_out"), [(0, "raise disk_limit="), (1, "make room on the disk")])
def test_texts_that_the_disk_does_not_keep_are_counted_and_logged(
    minilm: Encoder,
    shard: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    failed: int,
    way_out: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(tier: DiskTier, group: object) -> None:
        raise lmdb.DiskError("mdb_txn_commit: No space left on device") if failed else lmdb.MapFullError("full")

    monkeypatch.setattr(DiskTier, "_put", full)
    with EmbeddingCache("16MiB", tmp_path / "cache", "64MiB") as cache:
        assert bertstream.warm(shard, minilm, cache, progress=False)["not_kept"] == 40
        assert cache.stats()["disk_dropped_writes"] == 40 and cache.stats()["disk_failed_writes"] == 40 * failed
    assert "did not keep 40 of the texts" in caplog.text and way_out in caplog.text


def test_a_cache_that_cannot_be_filled_is_refused(minilm: Encoder, shard: Path, tmp_path: Path) -> None:
    with EmbeddingCache(0, tmp_path / "cache", "16MiB") as cache:
        bertstream.warm(shard, minilm, cache, progress=False)
        with pytest.raises(ConfigError, match="num_workers=-1"):
            bertstream.warm(shard, minilm, cache, num_workers=-1)
    with EmbeddingCache(0, tmp_path / "cache", "16MiB", read_only=True) as cache, pytest.raises(ConfigError):
        bertstream.warm(shard, minilm, cache)
    minilm.requires_grad_(True)
    try:
        with pytest.raises(ConfigError, match="encoder.freeze"):
            bertstream.warm(shard, minilm, EmbeddingCache("1MiB"), progress=False)
    finally:
        minilm.requires_grad_(False)


def test_pairs_are_found_in_the_cache_and_the_bar_knows_the_total(
    minilm: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "Who?", "answer": "The bank."}\n' * 2, encoding="utf-8")
    with EmbeddingCache("1MiB") as cache:
        done = bertstream.warm(path, minilm, cache, text="question", pair="answer")
        assert (done["texts"], done["computed"]) == (2, 1)
        assert "2/2" in capsys.readouterr().err
        list(bertstream.stream(path, minilm, text="question", pair="answer", cache=cache))
        assert cache.stats()["misses"] == 0


def test_warm_computes_the_texts_that_a_stream_with_the_same_functions_reads(
    minilm: Encoder, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions: Any = {
        "keep": lambda record: "y" in record["text"],
        "map": lambda record: {"said": record["text"].upper()},
        "text": "said",
    }
    with EmbeddingCache("16MiB", tmp_path / "cache", "64MiB") as cache:
        done = bertstream.warm(shard, minilm, cache, progress=False, **functions)
        assert done["dropped_records"] > 0 and done["texts"] + done["dropped_records"] == 50
        monkeypatch.setattr(minilm, "encode", lambda batch: pytest.fail("computed"))
        batches = list(bertstream.stream(shard, minilm, cache=cache, into="vectors", **functions))
        assert sum(len(batch["said"]) for batch in batches) == done["texts"]
