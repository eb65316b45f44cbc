"""The stream: every record once, the same batches for any worker count, places that can be returned to."""

from __future__ import annotations

import gc
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from bertstream import ConfigError, Encoder, ShardError, StreamConfig, TextStream, TokenBatch
from bertstream.cursors import Cursor
from bertstream.reading.dataset import StreamItems
from bertstream.reading.lane_batches import LaneEnd
from bertstream.testing import FakeEncoder


def write_jsonl(path: Path, texts: list[str], first_id: int = 0) -> str:
    lines = [json.dumps({"text": text, "id": first_id + i}) for i, text in enumerate(texts)]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def some_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["bank", "river", "spring", "of", "the", "unbelievable", "bass"]
    return [" ".join(rng.choice(words, rng.integers(0, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five shards of unequal sizes, 403 records with the ids 0 to 402."""
    folder = tmp_path_factory.mktemp("shards")
    sizes = [7, 150, 1, 220, 25]
    texts, first, paths = some_texts(sum(sizes)), 0, []
    for number, size in enumerate(sizes):
        paths.append(write_jsonl(folder / f"{number}.jsonl", texts[first : first + size], first))
        first += size
    return paths


def identity(batches: Iterator[TokenBatch]) -> list[tuple[Any, ...]]:
    """What a batch is, as plain values."""
    return [(batch.fields["id"].tolist(), batch.input_ids.tolist(), batch.cursor) for batch in batches]


def batches_of(items: Iterator[Any]) -> list[TokenBatch]:
    return [item for item in items if isinstance(item, TokenBatch)]


def ids(batches: Iterator[TokenBatch]) -> list[int]:
    return [record for batch in batches for record in batch.fields["id"].tolist()]


def loaded(stream: TextStream, num_workers: int) -> list[TokenBatch]:
    """All batches through real worker processes, in the order that the embedding loader would see."""
    loader = DataLoader(StreamItems(stream), batch_size=None, num_workers=num_workers)
    return [item for item in loader if isinstance(item, TokenBatch)]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_record_is_in_exactly_one_batch_of_exactly_one_rank(
    data: st.DataObject, tmp_path: Path, minilm: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    lanes = data.draw(st.integers(1, 8))
    world = data.draw(st.integers(1, lanes))
    paths, first = [], 0
    for number, size in enumerate(sizes):
        paths.append(write_jsonl(tmp_path / f"{number}.jsonl", some_texts(size, number), first))
        first += size
    budget = data.draw(st.sampled_from([{"batch_size": 1}, {"batch_size": 7}, {"max_tokens": 20}, {"max_tokens": 300}]))
    reading = StreamConfig(lanes=lanes, bucket_size=data.draw(st.integers(1, 50)))
    shuffle, epoch = data.draw(st.booleans()), data.draw(st.integers(0, 3))
    found = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        stream = TextStream(paths, minilm, shuffle=shuffle, reading=reading, **budget)
        stream.set_epoch(epoch)
        for batch in stream:
            found += batch.fields["id"].tolist()
            assert len(batch) <= budget.get("batch_size", len(batch))
            assert len(batch) == 1 or batch.num_tokens <= budget.get("max_tokens", batch.num_tokens)
    assert sorted(found) == list(range(first))


@pytest.mark.parametrize("budget", [{"batch_size": 16}, {"max_tokens": 256}])
@pytest.mark.parametrize("lanes", [1, 3, 7])
def test_the_order_is_the_same_for_any_number_of_workers(
    shards: list[str], minilm: Encoder, budget: dict[str, int], lanes: int
) -> None:
    def stream() -> TextStream:
        return TextStream(
            shards, minilm, shuffle=True, seed=3, reading=StreamConfig(lanes=lanes, bucket_size=40), **budget
        )

    right = identity(stream())
    assert sorted(i for batch in right for i in batch[0]) == list(range(403))
    for num_workers in (1, 3):
        assert identity(loaded(stream(), num_workers)) == right


def test_a_plain_dataloader_around_a_stream_sees_batches_alone(shards: list[str], minilm: Encoder) -> None:
    stream = TextStream(shards, minilm, reading=StreamConfig(lanes=7, bucket_size=40))
    batches = list(DataLoader(stream, batch_size=None, num_workers=2))
    assert all(isinstance(batch, TokenBatch) for batch in batches)
    assert sorted(ids(batches)) == list(range(403))


def test_the_seed_and_the_epoch_choose_the_order_and_nothing_else_does(shards: list[str], minilm: Encoder) -> None:
    def order(seed: int, epoch: int, shuffle: bool = True) -> list[tuple[Any, ...]]:
        stream = TextStream(shards, minilm, shuffle=shuffle, seed=seed, reading=StreamConfig(bucket_size=64, lanes=4))
        stream.set_epoch(epoch)
        return [batch[:2] for batch in identity(stream)]

    torch.manual_seed(0)
    np.random.seed(0)
    first = order(0, 0)
    torch.manual_seed(1)
    np.random.seed(1)
    assert order(0, 0) == first
    assert order(1, 0) != first and order(0, 1) != first
    assert order(0, 0, shuffle=False) == order(5, 7, shuffle=False)


def test_a_lane_goes_on_from_the_cursor_of_any_batch(shards: list[str], minilm: Encoder) -> None:
    stream = TextStream(shards, minilm, batch_size=8, shuffle=True, reading=StreamConfig(lanes=3, bucket_size=30))
    for lane, pieces in enumerate(stream._dealt(stream._layout, 0)):
        *whole, end = stream._batches.read(pieces, Cursor(0, lane))
        assert isinstance(end, LaneEnd) and end.lane == lane
        for done in range(len(whole) + 1):
            start = whole[done - 1].cursor if done else Cursor(0, lane)
            *rest, _ = stream._batches.read(pieces, start)
            assert identity(rest) == identity(whole[done:])


def test_first_buckets_differ_in_size_so_that_lanes_do_not_refill_together(tmp_path: Path, minilm: Encoder) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(800))
    stream = TextStream(path, minilm, batch_size=1, reading=StreamConfig(lanes=4, bucket_size=40))
    first_buckets = []
    for lane, pieces in enumerate(stream._dealt(stream._layout, 0)):
        cursors = [batch.cursor for batch in batches_of(stream._batches.read(pieces, Cursor(0, lane)))]
        first_buckets.append(next(i for i, cursor in enumerate(cursors, 1) if cursor and cursor.batch == 0))
    assert first_buckets == [10, 20, 30, 40]


def test_bucketing_leaves_little_padding(tmp_path: Path, minilm: Encoder) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(1000))

    def padding(**options: Any) -> float:
        batches = list(TextStream(path, minilm, batch_size=20, **options))
        return 1 - sum(b.num_tokens for b in batches) / sum(len(b) * int(b.lengths.max()) for b in batches)

    assert padding(reading=StreamConfig(bucket_size=500)) < 0.1 < padding(reading=StreamConfig(bucket_size=20))


def test_a_window_as_small_as_a_batch_keeps_the_file_order(tmp_path: Path, minilm: Encoder) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(100))
    reading = StreamConfig(bucket_size=8, lanes=1)
    assert ids(TextStream(path, minilm, batch_size=8, reading=reading)) == list(range(100))


def test_one_large_file_is_read_by_several_lanes(
    tmp_path: Path, minilm: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertstream.reading.layout._LANE_BYTES", 256 * 1024)
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(12_000))
    stream = TextStream(path, minilm, max_tokens=4096)
    size = Path(path).stat().st_size
    assert stream.num_lanes == size // (256 * 1024) > 1
    lanes = enumerate(stream._dealt(stream._layout, 0))
    counts = [sum(map(len, batches_of(stream._batches.read(pieces, Cursor(0, lane))))) for lane, pieces in lanes]
    assert sum(counts) == 12_000 and max(counts) < 1.2 * min(counts)


def test_lanes_share_shards_evenly_by_size(tmp_path: Path, minilm: Encoder) -> None:
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", some_texts(count, i)) for i, count in enumerate([300] + [20] * 30)]
    stream = TextStream(paths, minilm, shuffle=True, reading=StreamConfig(lanes=4))
    lanes = [{piece.path for piece in lane} for lane in stream._dealt(stream._layout, 2)]
    sizes = sorted(sum(Path(path).stat().st_size for path in lane) for lane in lanes)
    assert len(set().union(*lanes)) == 31
    # The one large shard is a third of all; the other lanes share the rest.
    assert sizes[2] < 1.25 * sizes[0]


def test_workers_collect_garbage_rarely_and_the_users_process_as_before(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(8, 0))
    before = gc.get_threshold(), gc.get_freeze_count()
    fields = {"id": lambda value: gc.get_freeze_count()}
    loader = DataLoader(TextStream(path, FakeEncoder(), fields=fields), batch_size=None, num_workers=1)
    (batch,) = loader
    assert min(batch.fields["id"]) > 10_000 and before == (gc.get_threshold(), gc.get_freeze_count())


def test_the_default_device_of_the_program_is_not_the_streams(shards: list[str], minilm: Encoder) -> None:
    """On CUDA its worker processes, which are forked, could not read the epoch."""
    with torch.device("meta"):
        stream = TextStream(shards, minilm, batch_size=8, shuffle=True)
        stream.set_epoch(3)
        found = identity(iter(stream))
    again = TextStream(shards, minilm, batch_size=8, shuffle=True)
    again.set_epoch(3)
    assert stream.epoch == 3 and found == identity(iter(again))


def test_the_epoch_reaches_workers_that_are_kept(shards: list[str], minilm: Encoder) -> None:
    stream = TextStream(shards, minilm, shuffle=True, reading=StreamConfig(bucket_size=64, lanes=4))
    loader = DataLoader(stream, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append(ids(loader))
    del loader
    assert orders[0] == orders[2] != orders[1]


def test_the_places_and_the_other_fields_ride_along(tmp_path: Path, minilm: Encoder) -> None:
    rows = [
        {"words": ["a", "bank"], "tags": [1, 2], "score": 0.5, "name": "x"},
        {"words": ["b"], "tags": [3], "score": 2},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (batch,) = TextStream(path, minilm, text="words")
    assert batch.fields["score"].tolist() == [0.5, 2.0] and batch.fields["score"].dtype == np.float64
    assert [tags.tolist() for tags in batch.fields["tags"]] == [[1, 2], [3]]
    assert batch.fields["name"] == ["x", None]
    assert batch.fields["__index__"].tolist() == [0, 1] and batch.fields["__shard__"] == [str(path)] * 2
    assert batch.fields["__key__"] == ["a:0", "a:1"] and "words" not in batch.fields
    (kept,) = TextStream(path, minilm, text="words", fields={"score": str}, keep_text_as="words")
    assert kept.fields["words"] == [["a", "bank"], ["b"]] and kept.fields["score"] == ["0.5", "2"]
    assert "tags" not in kept.fields


def test_a_text_that_is_too_long_names_shard_index_and_field(tmp_path: Path, minilm: Encoder) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["short"] * 300 + ["long " * 200_000] + ["short"])
    for num_workers in (0, 2):
        stream = TextStream(path, minilm)
        loader = DataLoader(StreamItems(stream), batch_size=None, num_workers=num_workers)
        with pytest.raises(
            ShardError, match=r"a\.jsonl, record 300, field 'text': .*200002 tokens.*long long"
        ) as caught:
            for item in loader:
                if isinstance(item, ShardError):
                    raise item
        assert (caught.value.path, caught.value.index, caught.value.field) == (path, 300, "text")
        assert len(str(caught.value)) < 600
        del loader


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_batches_before_a_broken_record_arrive_first(tmp_path: Path, minilm: Encoder, num_workers: int) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(some_texts(40))]
    lines[25] = "{broken"
    path.write_text("\n".join(lines))
    stream = TextStream(path, minilm, batch_size=5, reading=StreamConfig(bucket_size=10, lanes=1))
    items: list[Any] = []
    loader = DataLoader(StreamItems(stream), batch_size=None, num_workers=num_workers)
    try:
        items += loader
    except ShardError as error:
        items.append(error)
    assert [len(item) for item in items[:-1]] == [5] * 4
    assert isinstance(items[-1], ShardError) and items[-1].index == 25 and items[-1].path == str(path)


def test_it_travels_to_workers_without_the_model(shards: list[str], minilm: Encoder) -> None:
    assert len(pickle.dumps(minilm.tokenizer)) < 2_000_000 < sum(p.nbytes for p in minilm.parameters())
    stream = TextStream(shards, minilm, reading=StreamConfig(lanes=2))
    loader = DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert sorted(ids(loader)) == list(range(403))


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"batch_size": 2, "max_tokens": 9}, "one of the two"),
        ({"seed": -1}, "seed=-1"),
        ({"text": ""}, "text"),
        ({"fields": "label"}, r"fields=\['label'\]"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_read(minilm: Encoder, options: dict[str, Any], seen: str) -> None:
    with pytest.raises(ConfigError, match=seen):
        TextStream("does/not/exist.jsonl", minilm, **options)


def test_bad_reading_options_are_refused_with_the_value_seen() -> None:
    for options in ({"bucket_size": 0}, {"lanes": 0}, {"open_shards": 0}):
        with pytest.raises(ConfigError, match="=0: write a whole number of at least 1"):
            StreamConfig(**options)
    assert replace(StreamConfig(), bucket_size=5).bucket_size == 5


def test_the_old_name_of_bucket_size_works_and_warns() -> None:
    with pytest.warns(FutureWarning, match=r"StreamConfig\(window=\) is now StreamConfig\(bucket_size=\)"):
        reading = StreamConfig(window=5)
    assert reading.bucket_size == 5
    assert replace(reading, lanes=2) == StreamConfig(bucket_size=5, lanes=2), "a copy does not warn again"
    with pytest.raises(ConfigError, match="window=5 is the old name of bucket_size=7"):
        StreamConfig(window=5, bucket_size=7)


def test_shards_that_are_named_twice_are_read_twice_and_said(
    shards: list[str], minilm: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    TextStream(shards, minilm)
    assert not caplog.records
    TextStream([*shards, shards[1]], minilm)
    assert f"1 shards are named more than once and are read as many times: {shards[1]}" in caplog.text


def test_more_ranks_than_lanes_are_refused(shards: list[str], minilm: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"4 ranks cannot share 3 lanes.*StreamConfig\(lanes=4\)"):
        TextStream(shards, minilm, reading=StreamConfig(lanes=3))


def test_missing_and_empty_shards_are_named(tmp_path: Path, minilm: Encoder) -> None:
    with pytest.raises(ShardError, match=r"gone\.tar") as caught:
        TextStream(tmp_path / "gone.tar", minilm)
    assert caught.value.path == str(tmp_path / "gone.tar")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(ShardError, match="holds no record"):
        list(TextStream(empty, minilm))
