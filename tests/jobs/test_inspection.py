"""The figures of an inspection equal those counted by hand."""

from __future__ import annotations

import gzip
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bertstream
from bertstream import ConfigError, EmbeddingCache, Embeddings, Encoder, ShardError, StreamConfig, TokenBatch
from bertstream.jobs.inspection import Spread, inspect_shards
from bertstream.testing import write_shards

QUIET: dict[str, Any] = {"progress": False, "timed_s": 0}


def padding(lengths: list[int], sizes: list[int]) -> float:
    places, start = 0, 0
    for size in sizes:
        batch = lengths[start : start + size]
        places += len(batch) * max(batch)
        start += size
    return 1 - sum(lengths) / places


@settings(max_examples=25)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=80), st.integers(1, 9), st.integers(1, 3))
@example(words=[0, 1, 0], batch_size=2, shards=3)  # the first batch holds the first and the third
def test_lengths_batches_and_padding_are_those_of_the_texts(
    minilm: Encoder, tmp_path_factory: pytest.TempPathFactory, words: list[int], batch_size: int, shards: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    paths = write_shards(folder, ["bank " * count for count in words], shards=min(shards, len(words)))
    found = inspect_shards(paths, minilm, batch_size=batch_size, **QUIET)
    lengths = [2 + count for count in words]
    batches = [
        batch["text"].tokens.lengths.tolist() for batch in bertstream.stream(paths, minilm, batch_size=batch_size)
    ]
    assert found.shards == len(paths) and found.shard_bytes == sum(Path(path).stat().st_size for path in paths)
    assert (found.texts, found.tokens, found.batches) == (len(words), sum(lengths), len(batches))
    assert (found.lengths.least, found.lengths.most) == (min(lengths), max(lengths))
    assert sorted(lengths)[(len(lengths) - 1) // 2] == found.lengths.median
    assert found.repeated_texts == len(words) - len(set(words))
    assert found.padding_bucketed == pytest.approx(padding(list(chain.from_iterable(batches)), list(map(len, batches))))
    size = round(len(words) / len(batches))
    assert found.padding_in_order == pytest.approx(padding(lengths, sizes(len(words), size)))
    edges = found.length_edges
    assert edges[0] <= min(lengths) < edges[1] and edges[-2] <= max(lengths) < edges[-1]
    for low, high, count in zip(edges, edges[1:], found.length_counts, strict=False):
        assert count == sum(low <= length < high for length in lengths)


def sizes(count: int, size: int) -> list[int]:
    return [min(size, count - start) for start in range(0, count, size)]


def test_texts_that_are_too_long_are_counted_not_refused(minilm_folder: str, tmp_path: Path) -> None:
    shards = write_shards(tmp_path, ["word " * count for count in (3, 28, 30, 60)])
    for overflow in ("error", "truncate"):
        encoder = Encoder.from_pretrained(minilm_folder, max_length=30, overflow=overflow)
        found = inspect_shards(shards, encoder, **QUIET)
        assert (found.long_texts, found.cut_tokens, found.max_length) == (2, 2 + 32, 30)
        assert found.lengths.most == 62 and found.tokens == 5 + 30 + 32 + 62
        assert 31 in found.length_edges and found.batch_tokens.most == 5 + 3 * 30
        assert encoder.tokenizer.overflow == overflow


@pytest.mark.parametrize("text", ["said", "input_ids"])
def test_what_is_stored_as_columns_is_inspected_too(minilm: Encoder, tmp_path: Path, text: str) -> None:
    columns = {"said": ["a bank", "a"], "input_ids": [[101, 1037, 2924, 102], [101, 1037, 102]], "n": [7, 8]}
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for shards in (tmp_path / "a.parquet", table):
        found = inspect_shards(shards, minilm, text=text, **QUIET)
        assert (found.texts, found.tokens) == (2, 7)
        assert found.fields[text] == {"said": "'a bank'", "input_ids": "[101, 1037, 2924, 102]"}[text]
        assert found.fields["n"] == "7"


def test_cache_bytes_are_what_a_cache_takes(minilm: Encoder, tmp_path: Path, sentences: list[str]) -> None:
    shards = write_shards(tmp_path, sentences[:50] + sentences[:10])
    found = inspect_shards(shards, minilm, **QUIET)
    with EmbeddingCache("64MiB") as cache:
        for _ in bertstream.stream(shards, minilm, cache=cache):
            pass
        assert found.cache_bytes["auto"] == cache.stats()["memory_bytes"]
    assert found.cache_bytes["auto"] == found.cache_bytes["float32"] > found.cache_bytes["bfloat16"]


def test_encode_s_is_about_the_time_that_encoding_takes(minilm: Encoder, tmp_path: Path, sentences: list[str]) -> None:
    shards = write_shards(tmp_path, [text for text in sentences if len(text) < 200][:300])
    found = inspect_shards(shards, minilm, progress=False, timed_s=1)
    assert found.encode_s == pytest.approx(found.tokens / found.tokens_per_s)
    with bertstream.stream(shards, minilm) as loader:
        for _ in loader:
            pass
        took = loader.stats()["encode_s"]
    assert took / 4 < found.encode_s < took * 4  # the machine may be busy


def test_a_slow_encoder_is_timed_in_a_loaders_groups_and_for_no_longer_than_timed_s(
    minilm: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, groups = SimpleNamespace(now=0.0), []
    clock.perf_counter = lambda: clock.now
    encode = minilm.encode

    def slow(batch: TokenBatch) -> Embeddings:
        clock.now += batch.num_tokens / 100
        groups.append(batch.num_tokens)
        return encode(batch)

    monkeypatch.setattr("bertstream.jobs.inspection.time", clock)
    monkeypatch.setattr(minilm, "encode", slow)
    shards = write_shards(tmp_path, ["bank " * 8] * 200)  # 10 tokens each
    found = inspect_shards(shards, minilm, batch_size=1, progress=False, timed_s=3)
    assert found.tokens_per_s == pytest.approx(100)
    assert groups[:4] == [10, 10, 20, 40] and max(groups) == 50  # the first one warms up
    assert 300 <= sum(groups[1:]) <= 350


def test_fields_come_from_the_first_record_and_broken_records_are_counted(minilm: Encoder, tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, ["one", "two"])
    with open(path, "a") as file:
        file.write("no json\n")
    with pytest.raises(ShardError, match="record 2"):
        inspect_shards(path, minilm, **QUIET)
    found = inspect_shards(path, minilm, reading=StreamConfig(max_bad_records=1), **QUIET)
    assert found.bad_records == 1 and found.texts == 2
    assert found.fields == {"text": "'one'", "id": "0"}


def test_shards_given_up_are_counted_and_the_first_good_record_is_shown(minilm: Encoder, tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, ["one", "two"])
    Path(path).write_text("no json\n" + Path(path).read_text())
    cut = tmp_path / "a.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "three"}\n')[:5])
    found = inspect_shards([str(cut), path], minilm, reading=StreamConfig(max_bad_records=2), **QUIET)
    assert (found.texts, found.bad_records, found.bad_shards) == (2, 1, 1)
    assert found.fields == {"text": "'one'", "id": "0"}


def test_a_dataset_of_rows_is_inspected_too(minilm: Encoder) -> None:
    rows = [{"text": f"text {i}", "label": i} for i in range(5)]
    found = inspect_shards(rows, minilm, **QUIET)
    assert (found.texts, found.shard_bytes) == (5, 0) and found.fields == {"text": "'text 0'", "label": "0"}


def test_token_ids_are_shown_as_numbers(minilm: Encoder) -> None:
    found = inspect_shards([{"input_ids": [101, *range(2000, 2099), 102]}] * 2, minilm, text="input_ids", **QUIET)
    assert found.fields["input_ids"].startswith("[101, 2000, 2001, ") and len(found.fields["input_ids"]) == 60


def test_both_a_batch_size_and_a_budget_are_refused(minilm: Encoder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one of the two"):
        inspect_shards(write_shards(tmp_path, ["a"]), minilm, batch_size=1, max_tokens=1, **QUIET)


@given(st.lists(st.integers(0, 1000), min_size=1))
def test_a_spread_holds_only_given_numbers(numbers: list[int]) -> None:
    found = Spread.of(np.array(numbers))
    chosen = [found.least, found.median, found.p90, found.p99, found.most]
    assert chosen == sorted(chosen) and set(chosen) <= set(numbers)
