"""`tokenize` writes ids whose stream has the batches and vectors of their texts, stopped and killed or not."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fork_server import ENCODERS
from transformers import AutoTokenizer

import bertstream
from bertstream import ConfigError, EmbeddingCache, Encoder, StateError, StreamConfig, TextStream, TokenBatch
from bertstream.encoding.tokenizer import TextTokenizer
from bertstream.testing import FakeEncoder, assert_resumes_exactly, write_shards

IN_ORDER = StreamConfig(lanes=1, bucket_size=64)


class OnlyTokenizer:
    """What a stream of token batches needs of an encoder."""

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        self.tokenizer = TextTokenizer(tokenizer, **{"max_length": 512, "vocab_size": 30522, **options})


@pytest.fixture(scope="module")
def auto(minilm_folder: str) -> Any:
    return AutoTokenizer.from_pretrained(minilm_folder)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> str:
    return write_shards(tmp_path_factory.mktemp("texts"), sentences[:300], shards=1)[0]


def tokenized(shards: Any, encoder: Any, out: Path, **options: Any) -> dict[str, int]:
    return bertstream.tokenize(shards, encoder, out, **{"progress": False, **options})


def contents(batch: TokenBatch) -> dict[str, Any]:
    """All of a batch but the names of its shards."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    fields = {name: value for name, value in values.pop("fields").items() if not name.startswith("__")}
    plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
    plain["report"] = None if batch.report is None else batch.report.read
    return plain | {"cursor": None} | {name: np.asarray(value).tolist() for name, value in fields.items()}


WORDS = [["the", "unbelievable", "", "\ufffd"], ["river"], [], ["naïve", "東京"] * 4]
PAIRS = [{"text": f"question {i} [SEP]", "other": "its answer " * (i % 5), "label": i} for i in range(70)]
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "strings": ([{"text": "a bank " * (i % 9), "label": i} for i in range(70)], {}, {}),
    "written special tokens": ([{"text": f"a [SEP] {i}", "label": i} for i in range(70)], {}, {}),
    "lists of words": ([{"text": WORDS[i % 4], "label": i} for i in range(70)], {}, {}),
    "strings in words": ([{"text": "a bank " * (i % 9)} for i in range(70)], {}, {"word_splitter": str.split}),
    "pairs": (PAIRS, {"pair": "other"}, {}),
    "pairs without segments": (PAIRS, {"pair": "other"}, {"segments": False}),
    "truncated words": ([{"text": WORDS[i % 4]} for i in range(70)], {}, {"overflow": "truncate", "max_length": 6}),
    "windows of pairs": (PAIRS, {"pair": "other"}, {"overflow": "windows", "max_length": 11, "stride": 1}),
    "a prompt": ([{"text": f"bank {i}"} for i in range(70)], {}, {"prompt": "query: ", "prompt_counts": False}),
    "a prompt of words": (
        [{"text": "bank " * (i % 3)} for i in range(70)],
        {},
        {"prompt": "find: ", "word_splitter": str.split},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stream_of_the_ids_has_the_batches_of_the_texts(auto: Any, tmp_path: Path, case: str) -> None:
    rows, pair, options = CASES[case]
    encoder = OnlyTokenizer(auto, **options)
    counts = tokenized(rows, encoder, tmp_path / "out", reading=IN_ORDER, **pair)
    settings: dict[str, Any] = {"batch_size": 8, "reading": IN_ORDER}
    right = [contents(batch) for batch in TextStream(rows, encoder, **pair, **settings)]
    found = TextStream(str(tmp_path / "out" / "*.parquet"), encoder, text="input_ids", **settings)
    assert [contents(batch) for batch in found] == right
    assert counts["texts"] == len(rows) and counts["parts"] == 1
    assert (counts["long_texts"] > 0) == ("overflow" in options)


def test_texts_of_all_kinds_are_written_and_read_together(auto: Any, tmp_path: Path) -> None:
    rows = [{"text": ["a bank", WORDS[0], WORDS[2]][i % 3]} for i in range(70)]
    encoder = OnlyTokenizer(auto)
    tokenized(rows, encoder, tmp_path, reading=IN_ORDER)
    settings: dict[str, Any] = {"batch_size": 8, "reading": IN_ORDER}
    right = list(TextStream(rows, encoder, **settings))
    found = list(TextStream(str(tmp_path / "*.parquet"), encoder, text="input_ids", **settings))
    for batch in (*right, *found):
        if batch.word_ids is None:  # strings alone, whose ids came with words of none
            batch.word_ids = np.full(batch.num_tokens, -1, np.int32)
    assert list(map(contents, found)) == list(map(contents, right))


def test_columns_are_written_where_texts_need_them(auto: Any, tmp_path: Path) -> None:
    needed = {
        "strings": [],
        "written special tokens": ["special_tokens_mask"],
        "lists of words": ["word_ids", "num_words"],
        "pairs": ["token_type_ids", "special_tokens_mask"],
        "pairs without segments": ["special_tokens_mask"],
    }
    for case, names in needed.items():
        rows, pair, options = CASES[case]
        tokenized(rows, OnlyTokenizer(auto, **options), tmp_path / case, fields={"label": str}, **pair)
        table = pq.read_table(tmp_path / case / "part-000000.parquet")
        assert table.column_names == ["input_ids", *names, "label"]
        assert table["label"].to_pylist() == [str(i) for i in range(70)]
        assert table.schema.field("input_ids").type == pa.list_(pa.int32())


def test_vectors_of_real_weights_are_equal_and_a_cache_serves_both(minilm: Encoder, shard: str, tmp_path: Path) -> None:
    tokenized(shard, minilm, tmp_path / "out", reading=IN_ORDER)
    cache = EmbeddingCache("64MiB")
    ids = str(tmp_path / "out" / "*.parquet")
    settings: dict[str, Any] = {"reading": IN_ORDER, "batch_size": 32, "deterministic": True}
    texts = list(bertstream.stream(shard, minilm, cache=cache, **settings))
    computed = cache.stats()["misses"]
    for found in (
        list(bertstream.stream(ids, minilm, text="input_ids", **settings)),
        list(bertstream.stream(ids, minilm, text="input_ids", cache=cache, **settings)),
    ):
        assert len(found) == len(texts)
        for there, here in zip(texts, found, strict=True):
            torch.testing.assert_close(here["input_ids"].values, there["text"].values)
            assert here["id"].tolist() == there["id"].tolist()
    assert cache.stats()["misses"] == computed


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tokenized_shards_resume_exactly(auto: Any, shard: str, tmp_path: Path, num_workers: int) -> None:
    encoder: Any = FakeEncoder()
    encoder.tokenizer = OnlyTokenizer(auto).tokenizer
    reading = StreamConfig(lanes=2, bucket_size=40)
    tokenized(shard, encoder, tmp_path, reading=reading, part_bytes=8_000)
    assert len(list(tmp_path.glob("*.parquet"))) > 2

    def make_loader() -> Any:
        options: dict[str, Any] = {"num_workers": num_workers, "reading": reading, "shuffle": True}
        return bertstream.stream(str(tmp_path / "*.parquet"), encoder, text="input_ids", **options)

    assert_resumes_exactly(make_loader, cuts=[3])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stopped_run_ends_with_the_files_of_an_undisturbed_one(
    auto: Any, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    encoder = OnlyTokenizer(auto)
    options: dict[str, Any] = {"part_bytes": 5_000, "reading": StreamConfig(bucket_size=40, lanes=2)}
    right = tokenized(shard, encoder, tmp_path / "right", **options)
    assert right["parts"] > 3
    replace = os.replace
    for stop in (2, 5) if num_workers else (1, 2, 5, 8):
        calls = iter(range(stop))

        def stopped(source: Any, target: Any, calls: Any = calls) -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            tokenized(shard, encoder, tmp_path / str(stop), num_workers=num_workers, **options)
        monkeypatch.setattr(os, "replace", replace)
        done = tokenized(shard, encoder, tmp_path / str(stop), num_workers=num_workers, **options)
        assert done | {"texts_before": 0} == right and (done["texts_before"] > 0) == (stop > 2)
        assert files(tmp_path / str(stop)) == files(tmp_path / "right")
    assert tokenized(shard, encoder, tmp_path / "right", **options) == right | {"texts_before": 300}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


PROGRAM = """
import sys
from types import SimpleNamespace
from transformers import AutoTokenizer
import bertstream
from bertstream.encoding.tokenizer import TextTokenizer
folder, shard, out = sys.argv[1:]
encoder = SimpleNamespace(tokenizer=TextTokenizer(AutoTokenizer.from_pretrained(folder), max_length=512))
bertstream.tokenize(shard, encoder, out, part_bytes=5_000, reading=bertstream.StreamConfig(bucket_size=40, lanes=2),
                    num_workers=1, progress=False)
"""


def test_a_killed_run_ends_with_the_files_of_an_undisturbed_one(
    auto: Any, minilm_folder: str, shard: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    reading = StreamConfig(bucket_size=40, lanes=2)
    tokenized(shard, OnlyTokenizer(auto), tmp_path / "right", part_bytes=5_000, reading=reading)
    for kills in range(2):
        known = len(list(out.glob("part-*")))
        program = ENCODERS.start(PROGRAM, minilm_folder, shard, str(out))
        deadline = time.monotonic() + 60
        while len(list(out.glob("part-*"))) == known and kills < 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        if kills < 1:
            os.kill(program.pid, signal.SIGKILL)
        _, errors, status = program.finish()
        assert status == (-signal.SIGKILL if kills < 1 else 0), errors
        assert kills == 1 or not json.loads((out / "_progress.json").read_text())["done"]
    assert files(out) == files(tmp_path / "right")


def test_each_rank_writes_its_share(auto: Any, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, labels = OnlyTokenizer(auto), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1, 1):
        monkeypatch.setenv("RANK", str(rank))
        done = tokenized(shard, encoder, tmp_path, reading=StreamConfig(lanes=4))
    assert done["texts_before"] == done["texts"] > 100
    for path in tmp_path.glob("*.parquet"):
        labels += pq.read_table(path)["id"].to_pylist()
    assert sorted(labels) == list(range(300))


@pytest.mark.parametrize(("count", "rows"), [(99, 99), (640, 100), (12_800, 200)])
def test_a_file_has_64_row_groups_that_shuffle_and_that_workers_share(
    auto: Any, tmp_path: Path, count: int, rows: int
) -> None:
    tokenized([{"text": "a"}] * count, OnlyTokenizer(auto), tmp_path, reading=StreamConfig(lanes=1))
    [path] = tmp_path.glob("*.parquet")
    assert pq.read_metadata(path).row_group(0).num_rows == rows
    layout = TextStream(str(path), OnlyTokenizer(auto), text="input_ids", shuffle=True)._layout
    assert len(layout.pieces) == -(-count // rows)


def test_records_that_keep_drops_are_counted_and_map_makes_fields(auto: Any, tmp_path: Path) -> None:
    options = {"keep": lambda row: row["label"] % 2, "map": lambda row: {"text": row["text"], "n": row["label"] * 10}}
    counts = tokenized(CASES["strings"][0], OnlyTokenizer(auto), tmp_path, **options)
    assert (counts["texts"], counts["dropped_records"]) == (35, 35)
    assert pq.read_table(tmp_path / "part-000000.parquet")["n"].to_pylist() == list(range(10, 700, 20))


def test_an_encoder_without_a_tokenizer_reads_ids_and_no_texts(minilm: Encoder, auto: Any, tmp_path: Path) -> None:
    rows = CASES["strings"][0]
    tokenized(rows, OnlyTokenizer(auto), tmp_path)
    alone, settings = Encoder(minilm.model, None), {"batch_size": 8, "shuffle": True}
    for shards in (str(tmp_path / "*.parquet"), [{"input_ids": auto(row["text"])["input_ids"]} for row in rows]):
        found = list(bertstream.stream(shards, alone, text="input_ids", **settings))
        assert sum(len(batch["input_ids"]) for batch in found) == 70
    with pytest.raises(ConfigError, match=r"text='text': the encoder has no tokenizer .* or name a field of ids"):
        bertstream.stream(rows, alone)
    with pytest.raises(bertstream.ShardError, match=r"record 1, field 'input_ids': .*30522"):
        list(bertstream.stream([{"input_ids": [1]}, {"input_ids": [30522]}], alone, text="input_ids"))


def test_another_tokenizer_and_another_prompt_are_refused_by_name(
    auto: Any, minilm_folder: str, tmp_path: Path
) -> None:
    tokenized([{"text": "a bank"}], OnlyTokenizer(auto, prompt="query: "), tmp_path)
    path = str(tmp_path / "part-000000.parquet")
    with pytest.raises(ConfigError, match=rf"{path}: its ids were made with prompt='query: ', this encoder's .*=''"):
        list(TextStream(path, OnlyTokenizer(auto), text="input_ids"))
    other = AutoTokenizer.from_pretrained(minilm_folder)
    other.add_tokens(["newword"])
    with pytest.raises(ConfigError, match=rf"{path}: its ids were made with vocabulary="):
        list(TextStream(path, OnlyTokenizer(other, prompt="query: "), text="input_ids"))
    [batch] = TextStream(
        path, OnlyTokenizer(auto, prompt="query: ", max_length=9, overflow="windows"), text="input_ids"
    )
    assert len(batch) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"part_bytes": 0}, ConfigError, "part_bytes=0"),
        ({"num_workers": -1}, ConfigError, "num_workers=-1"),
        ({"out": "s3://bucket/x"}, ConfigError, "is a URL"),
        ({"encoder": FakeEncoder()}, ConfigError, "tokenizer is a FakeTokenizer: files name the tokenizer"),
        ({"fields": ["__index__"]}, ConfigError, "fields names '__index__', which a stream of the files has"),
        ({"shards": [{"text": "a", "word_ids": 1}]}, ConfigError, "own field 'word_ids' would be taken"),
        *(
            (
                {"shards": [{"text": "a", "x": x}, {"text": "a", "x": y}], "reading": StreamConfig(bucket_size=1)},
                ConfigError,
                "field 'x' cannot be a column",
            )
            for x, y in ((1, "b"), (True, 3), (2**53 + 1, 0.5))  # one a bucket
        ),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(
    auto: Any, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    call = {"shards": [{"text": "a"}], "encoder": OnlyTokenizer(auto), "out": tmp_path / "out", "progress": False}
    with pytest.raises(error, match=message):
        bertstream.tokenize(**call | options)
    assert not list(tmp_path.glob("out/part*"))


def test_a_folder_that_was_started_otherwise_is_refused_and_the_difference_named(
    auto: Any, shard: str, tmp_path: Path
) -> None:
    tokenized(shard, OnlyTokenizer(auto), tmp_path)
    for key, options in {
        "fields": {"fields": ()},
        "part_bytes": {"part_bytes": 1},
        "window": {"reading": IN_ORDER},
    }.items():
        with pytest.raises(StateError, match=f"was started with .*{key}"):
            tokenized(shard, OnlyTokenizer(auto), tmp_path, **options)
    with pytest.raises(StateError, match="was started with tokenizer"):
        tokenized(shard, OnlyTokenizer(auto, prompt="x: "), tmp_path)


def test_a_stopped_run_continues_with_its_own_labels_and_functions_alone(auto: Any, tmp_path: Path) -> None:
    rows = [{"text": "a bank", "label": name} for name in "abab"]
    tokenized(rows, OnlyTokenizer(auto), tmp_path, fields={"label": ["a", "b"]})
    assert tokenized(rows, OnlyTokenizer(auto), tmp_path, fields={"label": ["a", "b"]})["texts_before"] == 4
    for label in (["b", "a"], str):
        with pytest.raises(StateError, match=r"was started with fields \{'label': \['a', 'b'\]\}, and this is"):
            tokenized(rows, OnlyTokenizer(auto), tmp_path, fields={"label": label})
