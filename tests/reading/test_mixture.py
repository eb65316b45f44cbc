"""Mixtures: sources in proportion to their weights, every record at least or at most once, exact resume."""

from __future__ import annotations

import gzip
import json
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import bertstream
from bertstream import (
    ConfigError,
    EmbeddingCache,
    EmbeddingLoader,
    Mixture,
    ShardError,
    StateError,
    StreamConfig,
    TextStream,
)
from bertstream.cursors import Cursor, OpenPiece, SourcePlace
from bertstream.jobs.inspection import inspect_shards
from bertstream.reading.dataset import StreamItems
from bertstream.reading.state import cursor_from_json, cursor_to_json
from bertstream.testing import FakeEncoder, assert_resumes_exactly
from bertstream.tokens import ReadReport, TokenBatch
from tests.shard_files import tar_bytes, write


def json_lines(source: int, count: int, first: int = 0) -> bytes:
    lines = [json.dumps({"text": "word " * (i % 5), "id": [source, i]}) for i in range(first, first + count)]
    return "".join(line + "\n" for line in lines).encode()


def rows(source: int, count: int) -> list[dict[str, Any]]:
    return [{"text": "word " * (i % 5), "id": [source, i]} for i in range(count)]


def stream(mixture: Any, *, shuffle: bool = False, seed: int = 0, batch_size: int = 4, **reading: Any) -> TextStream:
    return TextStream(
        mixture,
        FakeEncoder(),
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        reading=StreamConfig(**{"bucket_size": 20} | reading),
    )


def ids(batches: Any) -> list[tuple[int, int]]:
    """(source, number) of each record, as the records themselves have it."""
    return [tuple(map(int, record)) for batch in batches for record in batch.fields["id"]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Sources of 60, 45, 30 and 25 records: jsonl in two shards, gz, Parquet in row groups, a tar."""
    folder = tmp_path_factory.mktemp("sources")
    table = pyarrow.table({"text": [f"word {i}" for i in range(30)], "id": [[2, i] for i in range(30)]})
    pyarrow.parquet.write_table(table, folder / "c.parquet", row_group_size=4)
    members = [(f"{i:03}.json", json.dumps({"text": f"word {i}", "id": [3, i]}).encode()) for i in range(25)]
    return [
        [write(folder / "a0.jsonl", json_lines(0, 40)), write(folder / "a1.jsonl", json_lines(0, 20, first=40))],
        write(folder / "b.jsonl.gz", gzip.compress(json_lines(1, 45))),
        str(folder / "c.parquet"),
        write(folder / "d.tar", tar_bytes(members)),
    ]


class Numbers:
    """A dataset of so many rows that takes no room."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"text": "a"}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(self._count))


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.7, 0.2, 0.1), (50, 1)])
@pytest.mark.parametrize("lanes", [1, 16])
def test_shares_of_20_000_records_are_within_one_percent_of_the_weights(weights: tuple[float, ...], lanes: int) -> None:
    mixture = Mixture([(Numbers(30_000), weight) for weight in weights])
    batches = iter(stream(mixture, batch_size=100, lanes=lanes, bucket_size=200))
    counts = Counter[int]()
    while counts.total() < 20_000:
        counts.update(next(batches).fields["__source__"].tolist())
    shares = [counts[number] / counts.total() for number in range(len(weights))]
    assert shares == pytest.approx([weight / sum(weights) for weight in weights], rel=0.01)


def test_weights_hold_over_all_lanes_where_each_draws_few_records() -> None:
    mixture = Mixture([(Numbers(980), 98), (Numbers(1000), 1), (Numbers(1000), 1)])
    counts = Counter(i for batch in stream(mixture, lanes=20) for i in batch.fields["__source__"].tolist())
    assert counts[0] == 980 and all(8 <= counts[number] <= 12 for number in (1, 2))


def test_the_next_record_is_of_the_source_that_is_furthest_below_its_weight() -> None:
    mixture = Mixture([(rows(0, 50), 2), (rows(1, 50), 1)])
    found = [source for source, _ in ids(stream(mixture, batch_size=1, bucket_size=1, lanes=1))]
    assert found[:9] == [0, 1, 0] * 3


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_first_repeats_no_record_and_all_leaves_none_out(data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = data.draw(st.integers(1, 4), "lanes")
    sizes = data.draw(st.lists(st.integers(lanes, 30), min_size=1, max_size=4), "sizes")
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)), "weights")
    stopping = data.draw(st.sampled_from(["first", "all"]))
    shuffle, epoch = data.draw(st.booleans()), data.draw(st.integers(0, 2))
    sources = [rows(number, size) for number, size in enumerate(sizes)]
    found: list[tuple[int, int]] = []
    ranks = data.draw(st.integers(1, lanes), "ranks")
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        mixture = Mixture(zip(sources, weights, strict=True), stopping=stopping)
        one = stream(mixture, shuffle=shuffle, lanes=lanes, bucket_size=data.draw(st.integers(1, 40)))
        one.set_epoch(epoch)
        for batch in one:
            found += ids([batch])
            assert batch.fields["__source__"].tolist() == [source for source, _ in ids([batch])]
    counts = Counter(found)
    everything = {(number, i) for number, size in enumerate(sizes) for i in range(size)}
    if stopping == "first":
        assert set(counts.values()) <= {1}
    else:
        assert counts.keys() == everything
    read = [sum(counts[number, i] for i in range(size)) for number, size in enumerate(sizes)]
    if lanes == 1:  # some source was read whole, or once in the epoch of "all", and all sources in proportion to it
        assert any(count >= size for count, size in zip(read, sizes, strict=True))
        scale = [count / weight for count, weight in zip(read, weights, strict=True)]
        assert all(
            abs(count - weight * scale[0]) <= 1 + weight / weights[0]
            for count, weight in zip(read, weights, strict=True)
        )


def test_records_of_a_source_come_in_the_order_that_it_has_alone(files: list[Any]) -> None:
    """One lane, no buckets: what a mixture changes is when a record comes, not which is next of its source."""
    reading = {"lanes": 1, "bucket_size": 1, "open_shards": 2}
    mixed = ids(stream(Mixture([(files[0], 2), (files[1], 1), (files[3], 1)]), batch_size=1, **reading))
    for number, source in ((0, files[0]), (1, files[1]), (3, files[3])):
        alone = ids(stream(source, batch_size=1, **reading))
        own = [record for record in mixed if record[0] == number]
        assert own == alone[: len(own)] and len(own) >= 15


def test_a_small_source_starts_over_in_another_order_where_the_stream_shuffles() -> None:
    mixture = Mixture([(rows(0, 90), 1), (rows(1, 30), 1)], stopping="all")
    for shuffle in (False, True):
        found = ids(stream(mixture, shuffle=shuffle, batch_size=1, bucket_size=1, lanes=1, open_shards=5))
        small = [record for record in found if record[0] == 1]
        passes = [small[i : i + 30] for i in range(0, 90, 30)]
        assert all(len(set(records)) == 30 for records in passes)
        assert (passes[0] == passes[1] == passes[2]) is not shuffle


@pytest.mark.parametrize("stopping", ["first", "all"])
def test_the_order_is_the_same_for_any_number_of_workers(files: list[Any], stopping: Any) -> None:
    def batches(num_workers: int) -> list[Any]:
        mixture = Mixture([(files[0], 3), (files[1], 1), (files[2], 2), (rows(4, 20), 1)], stopping=stopping)
        one = pickle.loads(pickle.dumps(stream(mixture, shuffle=True, lanes=4)))
        items = DataLoader(StreamItems(one), batch_size=None, num_workers=num_workers)
        return [(ids([item]), item.cursor) for item in items if isinstance(item, TokenBatch)]

    assert len(batches(0)) > 20
    assert batches(0) == batches(1) == batches(3)


@pytest.mark.parametrize("stopping", ["first", "all"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mixture_resumes_exactly(files: list[Any], num_workers: int, stopping: Any) -> None:
    weights = (3, 2, 2, 2, 0.5)

    def make(workers: int = num_workers) -> EmbeddingLoader:
        return bertstream.stream(
            Mixture(zip((*files, rows(4, 9)), weights, strict=True), stopping=stopping),
            FakeEncoder(),
            batch_size=9,
            shuffle=True,
            num_workers=workers,
            reading=StreamConfig(bucket_size=17, lanes=3),
            prefetch=0,
        )

    assert_resumes_exactly(make, cuts=[3, 11] if num_workers else [0, 1, 6, 10, 15], resume_with=lambda: make(0))


@settings(max_examples=20)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 11), st.integers(0, 4)), min_size=1, max_size=3),
    weights=st.tuples(*[st.sampled_from([0.3, 1.0, 4.0])] * 3),
    stopping=st.sampled_from(["first", "all"]),
    bucket_size=st.integers(1, 12),
    shuffle=st.booleans(),
)
def test_a_lane_goes_on_from_the_cursor_of_any_batch_with_its_counts(
    sizes: list[tuple[int, int]], weights: tuple[float, ...], stopping: Any, bucket_size: int, shuffle: bool
) -> None:
    """Also past broken records, and records that `keep` drops, of which a pass may consist."""
    sources = [
        [{"id": [number, i]} | ({"text": "a " * i} if i % 5 != broken else {}) for i in range(size)]
        for number, (size, broken) in enumerate(sizes)
    ]
    one = TextStream(
        Mixture(list(zip(sources, weights, strict=False)), stopping=stopping),
        FakeEncoder(),
        batch_size=3,
        shuffle=shuffle,
        keep=lambda record: record["id"][1] % 3 != 2,
        reading=StreamConfig(lanes=1, bucket_size=bucket_size, max_bad_records=1000),
    )

    def read(start: Cursor) -> list[tuple[Any, Cursor | None, list[int]]]:
        """Of each item the records, the cursor, and the counts that its report adds."""
        items = list(one._batches.read(one._dealt(one._layout, 0)[0], start))
        reports = [item.report or ReadReport(0) for item in items]
        counts = [[r.read, r.dropped, sum(error.records or 0 for error in r.bad)] for r in reports]
        return [
            (ids([item]), item.cursor, count) if isinstance(item, TokenBatch) else (None, None, count)
            for item, count in zip(items, counts, strict=True)
        ]

    whole = read(Cursor(0, 0))
    for done, (_, cursor, _) in enumerate(whole[:-1], 1):
        assert cursor is not None and read(cursor) == whole[done:]


def test_a_mixture_with_steps_per_epoch_goes_on_where_the_last_epoch_stopped(files: list[Any]) -> None:
    def make(**steps: int) -> EmbeddingLoader:
        mixture, reading = Mixture([(files[0], 2), (files[1], 1)], stopping="all"), StreamConfig(lanes=3)
        return bertstream.stream(
            mixture, FakeEncoder(), batch_size=9, shuffle=True, reading=reading, prefetch=0, **steps
        )

    with make() as loader:
        right = [batch["__key__"] for _ in range(2) for batch in loader]
    with make(steps_per_epoch=7) as loader:
        found = [batch["__key__"] for _ in range(len(right) // 7) for batch in loader]
    assert len(found) > 20 and found == right[: len(found)]
    assert_resumes_exactly(lambda: make(steps_per_epoch=7), cuts=[0, 4, 7])


def test_stats_count_the_texts_of_each_source_and_batches_say_which_it_is(files: list[Any]) -> None:
    with bertstream.stream(Mixture([(files[0], 2), (files[1], 1)]), FakeEncoder(), fields=(), prefetch=0) as loader:
        found = Counter[int]()
        for batch in loader:
            assert set(batch) == {"text", "__source__", "__key__", "__shard__", "__index__"}
            found.update(batch["__source__"].tolist())
        stats = loader.stats()
    assert (stats["source_0_texts"], stats["source_1_texts"]) == (found[0], found[1]) == (60, 30)
    assert "  source_1_texts" in str(stats)
    # What "first" left of the second source, as the docstring of `Mixture` says.
    assert bertstream.stream(files[2], FakeEncoder()).count_records() == 30


def test_a_stream_of_one_source_has_no_numbers_of_sources_and_may_have_a_field_of_that_name() -> None:
    data = [{"text": "a", "__source__": "wiki"}] * 3
    with bertstream.stream(data, FakeEncoder(), prefetch=0) as loader:
        assert [batch["__source__"] for batch in loader] == [["wiki"] * 3]
        assert not [name for name in loader.stats() if name.startswith("source_")]
    assert not {"weights", "stopping"} & stream(data).settings.keys()
    with pytest.raises(ShardError, match="field '__source__': each batch has a field of this name"):
        list(stream(Mixture([(data, 1)])))
    with pytest.raises(ConfigError, match="'__source__' is a field that each batch has"):
        TextStream(Mixture([(data, 1)]), FakeEncoder(), fields=["__source__"])


# --- sources and lanes ------------------------------------------------------------------------------------------------


def test_every_lane_has_a_share_of_a_source_that_cannot_be_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines(1, 40)))
    one = stream(Mixture([(rows(0, 400), 1), (path, 1)], stopping="all"), lanes=8)
    for lane, pieces in enumerate(one._dealt(one._layout, 0)):
        batches = one._batches.read(pieces, Cursor(0, lane))
        found = Counter(ids(item for item in batches if isinstance(item, TokenBatch)))
        own = {record for record in found if record[0] == 1}
        assert len(own) == 5 and found.total() >= 100


def test_many_small_shards_are_spread_over_all_lanes(tmp_path: Path) -> None:
    shards = [gzip.compress(json_lines(1, 3, first=3 * i)) for i in range(8)]
    paths = [write(tmp_path / f"{i}.jsonl.gz", shard) for i, shard in enumerate(shards)]
    one = stream(Mixture([(rows(0, 400), 1), (paths, 1)]), lanes=12)
    own = [[p for p in lane if p.source == 1] for lane in one._dealt(one._layout, 0)]
    records = [sum(len(range(p.share, 3, p.shares)) for p in lane) for lane in own]
    assert records == [2] * 12


def test_there_are_no_more_lanes_than_a_large_source_has_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertstream.reading.layout._LANE_BYTES", 1000)
    monkeypatch.setattr("bertstream.reading.layout._SOURCE_BYTES", 10)
    large = [write(tmp_path / f"{i}.jsonl.gz", gzip.compress(json_lines(1, 200, 200 * i))) for i in range(3)]
    mixture = Mixture([(rows(0, 900), 1), (large, 1)], stopping="all")
    assert stream(mixture).num_lanes == 32
    monkeypatch.setattr("bertstream.reading.layout._SHARED_BYTES", 100)
    one = stream(mixture)
    assert one.num_lanes == 3 and len(set(ids(one))) == 1500


def test_small_sources_make_few_lanes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertstream.reading.layout._LANE_BYTES", 1000)
    small = write(tmp_path / "a.jsonl", json_lines(1, 300))
    assert stream(Mixture([(rows(0, 2000), 1), (small, 1)])).num_lanes == Path(small).stat().st_size // 4096 == 2
    assert stream(Mixture([(rows(0, 2000), 1), (rows(1, 5), 1)])).num_lanes == 5


def test_a_streaming_dataset_is_a_source_and_shuffles_itself_in_each_pass() -> None:
    datasets = pytest.importorskip("datasets")
    streaming = (
        datasets.Dataset.from_list(rows(1, 20)).to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=20)
    )
    mixture = Mixture([(rows(0, 60), 1), (streaming, 1)], stopping="all")
    assert stream(mixture).num_lanes == 2
    one = stream(mixture, batch_size=1, bucket_size=1, lanes=1)
    found = [record for record in ids(one) if record[0] == 1]
    passes = [found[i : i + 20] for i in range(0, 60, 20)]
    assert [len(set(records)) for records in passes] == [20] * 3 and passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize("stopping", ["first", "all"])
def test_a_lane_without_a_record_of_a_source_is_an_error_that_names_it(tmp_path: Path, stopping: Any) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines(1, 2)))
    mixture = Mixture([(rows(0, 90), 1), (path, 1)], stopping=stopping)
    with pytest.raises(ShardError, match=r"source 1 .*a\.jsonl\.gz, has no good record for lane 2: .*lanes=") as caught:
        list(stream(mixture, lanes=3))
    assert caught.value.path == path


def test_weights_are_of_the_records_that_keep_leaves_and_the_others_are_counted() -> None:
    mixture, reading = Mixture([(rows(0, 90), 2), (rows(1, 120), 1)]), StreamConfig(lanes=1)
    one = TextStream(mixture, FakeEncoder(), keep=lambda record: record["id"][1] % 3 == 0, reading=reading)
    found = ids(one)
    assert Counter(source for source, _ in found) == {0: 30, 1: 15} and all(i % 3 == 0 for _, i in found)
    assert one.progress.bad.dropped == 60 + 28 and one.progress.bad.read == 45 + 60 + 28


def test_a_source_that_keep_drops_whole_is_an_error_that_names_it() -> None:
    mixture = Mixture([(rows(0, 9), 1), (rows(1, 9), 1)], stopping="all")
    with pytest.raises(ShardError, match="source 1 .* has no good record for lane 0"):
        list(TextStream(mixture, FakeEncoder(), keep=lambda record: record["id"][0] == 0))


def test_broken_records_are_counted_as_in_a_plain_stream(tmp_path: Path) -> None:
    lines = json_lines(1, 30).splitlines(keepends=True)
    lines[3] = lines[20] = b"{\n"
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b"".join(lines)))
    for stopping, skipped in (("first", 2), ("all", 2)):
        one = stream(Mixture([(rows(0, 30), 1), (path, 1)], stopping=stopping), lanes=2, max_bad_records=4)
        found = ids(one)
        assert (1, 3) not in found and one.progress.bad.records == skipped
    with pytest.raises(ShardError, match="record 3"):
        list(stream(Mixture([(rows(0, 30), 1), (path, 1)]), lanes=1))
    with pytest.raises(ShardError, match="more than max_bad_records=1 allows"):
        list(stream(Mixture([(rows(0, 30), 1), (path, 1)]), lanes=1, max_bad_records=1))


def test_a_source_of_broken_records_is_left_out_by_all_and_ends_first(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"{\n" * 5)
    for stopping, records in (("first", 0), ("all", 30)):
        one = stream(Mixture([(rows(0, 30), 1), (path, 1)], stopping=stopping), lanes=1, max_bad_records=9)
        assert len(set(ids(one)) - {(0, 0)}) == max(0, records - 1)
        assert one.progress.bad.records == 5


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "seen"),
    [
        ([], r"sources is \[\]"),
        ("a.jsonl", "sources is 'a.jsonl': pass pairs"),
        (["a.jsonl"], "source 0 is 'a.jsonl': write a pair"),
        ([("a.jsonl", 1), ("b.jsonl",)], "source 1 is"),
        ([("a.jsonl", 1), ("b.jsonl", 0)], "source 1 has the weight 0: write a number above 0"),
        ([("a.jsonl", -0.5)], "source 0 has the weight -0.5"),
        ([("a.jsonl", float("nan"))], "the weight nan"),
        ([("a.jsonl", float("inf"))], "the weight inf"),
        ([("a.jsonl", "3")], "the weight '3'"),
        ([("a.jsonl", True)], "the weight True"),
        ([(Mixture([("a.jsonl", 1)]), 1)], "source 0 is a Mixture itself"),
    ],
)
def test_bad_sources_are_refused_with_their_number(sources: Any, seen: str) -> None:
    with pytest.raises(ConfigError, match=seen):
        Mixture(sources)


def test_another_word_for_the_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="stopping='last': write one of 'first', 'all'"):
        Mixture([("a.jsonl", 1)], stopping="last")  # type: ignore[arg-type]


def test_a_source_that_cannot_be_opened_is_named_by_its_number(tmp_path: Path) -> None:
    for source, seen in (
        (str(tmp_path / "*.tar"), "source 1 of the mixture: no file matches"),
        ({"train": rows(1, 3)}, "source 1 of the mixture: shards is a dict"),
        ("a.doc", "source 1 of the mixture: the ending of 'a.doc' is unknown"),
    ):
        with pytest.raises(ConfigError, match=seen):
            stream(Mixture([(rows(0, 9), 1), (source, 1)]))


def test_sources_that_cannot_be_shared_are_refused_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines(1, 40)))
    datasets = pytest.importorskip("datasets")
    streaming = datasets.Dataset.from_list(rows(1, 20)).to_iterable_dataset(num_shards=2)
    monkeypatch.setattr("bertstream.reading.layout._SHARED_BYTES", 100)
    for source, seen in (
        (path, r"source 1 of the mixture, .*a\.jsonl\.gz, has 1 piece for 3 lanes.*lanes=1\)"),
        (rows(1, 2), r"source 1 of the mixture, list, has 2 rows for 3 lanes.*lanes=2\)"),
        (streaming, r"IterableDataset, has 2 shards for 3 lanes"),
    ):
        with pytest.raises(ConfigError, match=seen):
            stream(Mixture([(rows(0, 90), 1), (source, 1)]), lanes=3)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for source, seen in (
        (path, "has 1 piece for 3 ranks.*write it to at least 3 shards"),
        (rows(1, 2), "has 2 rows for 3 ranks.*give it more rows"),
        (streaming, r"2 shards for 3 ranks.*num_shards=3"),
    ):
        with pytest.raises(ConfigError, match=seen):
            stream(Mixture([(rows(0, 90), 1), (source, 1)]))


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (lambda a, b: Mixture([(a, 2), (b, 1)]), "weights"),
        (lambda a, b: Mixture([(a, 1), (b, 1)], stopping="all"), "stopping"),
        (lambda a, b: Mixture([(b, 1), (a, 1)]), "shards"),
        (lambda a, b: Mixture([(a, 1)]), "weights"),
        (lambda a, b: [*a, b], "shards"),
    ],
)
def test_a_state_of_another_mixture_is_refused_by_what_differs(files: list[Any], other: Any, key: str) -> None:
    state = stream(Mixture([(files[0], 1), (files[1], 1)])).state_dict()
    with pytest.raises(StateError) as caught:
        stream(other(files[0], files[1])).load_state_dict(state)
    assert caught.value.key == key


def test_jobs_that_read_every_record_once_refuse_a_mixture(tmp_path: Path) -> None:
    mixture = Mixture([(rows(0, 9), 1)])
    encoder: Any = FakeEncoder()
    for job in (
        lambda: bertstream.embed(mixture, encoder, tmp_path / "out"),
        lambda: bertstream.warm(mixture, encoder, EmbeddingCache(memory="1MiB")),  # type: ignore[arg-type]
        lambda: inspect_shards(mixture, encoder),
        lambda: bertstream.tokenize(mixture, encoder, tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match="reads every record once, and a Mixture .*call it for each"):
            job()


def test_the_records_of_an_epoch_are_not_counted_ahead() -> None:
    with bertstream.stream(Mixture([(rows(0, 9), 1)]), FakeEncoder(), prefetch=0) as loader:
        assert loader.count_records() is None
        with pytest.raises(TypeError):
            len(loader)


def test_a_cursor_goes_through_json_and_that_of_one_source_has_no_further_entry() -> None:
    plain = Cursor(3, 1, 2, (OpenPiece(0, 7, 512),), 5)
    mixed = Cursor(3, 1, sources=(SourcePlace(7, 1, 2, (OpenPiece(1, 4),)), SourcePlace()), batch=2)
    assert cursor_to_json(plain) == [1, 2, [[0, 7, 512]], 5]
    for cursor in (plain, mixed):
        assert cursor_from_json(json.loads(json.dumps(cursor_to_json(cursor))), 3) == cursor
