"""`keep=` and `map=` choose and make records in the workers."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from shard_files import read, read_until_error, tar_bytes, texts, write
from torch.utils.data import DataLoader

import bertstream
from bertstream import ConfigError, ShardError, StateError, StreamConfig, TextStream
from bertstream.reading.options import ReadOptions
from bertstream.testing import FakeEncoder, assert_resumes_exactly, write_shards

COUNT = 300


def mostly_odd(record: dict[str, Any]) -> bool:
    """Drops every other record, all from 100 to 179, and the last ones of the data."""
    return record["id"] % 2 == 1 and not 100 <= record["id"] < 180 and record["id"] < 290


def halved(record: dict[str, Any]) -> dict[str, Any] | None:
    if record["id"] % 5 == 0:
        return None
    return {"text": f"half {record['id'] // 2} {'of ' * (record['id'] % 7)}", "id": record["id"], "made": True}


KEPT = [i for i in range(COUNT) if mostly_odd({"id": i}) and i % 5]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_shards(tmp_path_factory.mktemp("shards"), [f"text {i}" for i in range(COUNT)], shards=4)


def loader(shards: Any, workers: int = 0, **options: Any) -> bertstream.EmbeddingLoader:
    reading = options.pop("reading", StreamConfig(lanes=3, bucket_size=20))
    options = {"keep": mostly_odd, "map": halved, "shuffle": True, "batch_size": 8} | options
    return bertstream.stream(shards, FakeEncoder(), num_workers=workers, reading=reading, **options)


def ids(batches: Any) -> list[int]:
    return sorted(itertools.chain.from_iterable(batch["id"].tolist() for batch in batches))


# --- the records ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_kept_comes_as_mapped_once_and_the_rest_is_counted(shards: list[str], workers: int) -> None:
    with loader(shards, workers, into="vectors") as stream:
        batches = list(stream)
        assert ids(batches) == KEPT
        for text, number in zip(batches[0]["text"], batches[0]["id"].tolist(), strict=True):
            assert text == halved({"id": number})["text"]
        assert batches[0]["made"].all()
        assert stream.stats()["dropped_records"] == COUNT - len(KEPT)
        assert stream.stats()["bad_records"] == 0
        assert ids(stream) == KEPT  # the epoch after it
        assert stream.stats()["dropped_records"] == 2 * (COUNT - len(KEPT))


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_exact_where_records_and_whole_buckets_are_dropped(shards: list[str], workers: int) -> None:
    assert_resumes_exactly(lambda: loader(shards, workers), cuts=[5] if workers else None)


@pytest.mark.parametrize("cut", [0, 1, 5, 100])
def test_the_count_of_dropped_records_goes_with_the_state(shards: list[str], cut: int) -> None:
    with loader(shards) as stream:
        for _ in itertools.islice(stream, cut):
            pass
        state = json.loads(json.dumps(stream.state_dict()))
    with loader(shards, 2) as stream:
        stream.load_state_dict(state)
        for _batch in stream:
            last = stream.state_dict()
        assert cut == 100 or last["bad"]["dropped"] + 5 >= COUNT - len(KEPT)  # some come with the ends of lanes


def test_broken_records_and_dropped_ones_are_counted_apart(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"a {i}", "id": i}) if i % 10 else "no json" for i in range(100)]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))

    def at_most_50(record: dict[str, Any]) -> bool:
        return bool(record["id"] <= 50)

    def make() -> bertstream.EmbeddingLoader:
        reading = StreamConfig(max_bad_records=10, bucket_size=16, lanes=2)
        return loader(path, keep=at_most_50, map=None, reading=reading)

    with make() as stream:
        assert ids(stream) == [i for i in range(51) if i % 10]
        stats = stream.stats()
        assert (stats["bad_records"], stats["dropped_records"]) == (10, 45)
    assert_resumes_exactly(make)


def test_keep_is_asked_before_map_which_may_drop_what_was_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"n": n}) + "\n" for n in range(6)))
    asked: list[Any] = []

    def keep(record: dict[str, Any]) -> int:
        asked.append(("keep", record["n"]))
        return record["n"] % 2  # type: ignore[no-any-return]

    def mapped(record: dict[str, Any]) -> dict[str, Any] | None:
        asked.append(("map", record["n"]))
        return {"text": f"{record['n']}"} if record["n"] != 3 else None

    records = read(path, ReadOptions(keep=keep, map=mapped))
    assert [(record.text, record.index, record.key) for record in records] == [("1", 1, "a:1"), ("5", 5, "a:5")]
    assert [n for name, n in asked if name == "map"] == [1, 3, 5] and len(asked) == 9


def test_the_functions_see_all_fields_and_fields_picks_from_what_they_make(tmp_path: Path) -> None:
    rows = [{"text": b"a", "n": 1, "other": "x"}, {"text": b"b", "n": 2, "other": "y"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    members = [("0.txt", b"a"), ("0.other", b"x"), ("0.json", b'{"n": 1}'), ("1.txt", b"b"), ("1.json", b'{"n": 2}')]
    paths = {
        write(tmp_path / "a.csv", "text,n,other\na,1,x\nb,2,y\n"): "text",
        write(tmp_path / "a.jsonl", '{"text": "a", "n": 1, "other": "x"}\n{"text": "b", "n": 2}'): "text",
        str(tmp_path / "a.parquet"): "text",
        write(tmp_path / "a.tar", tar_bytes(members)): "txt",
        write(tmp_path / "b.tar", tar_bytes([(name.replace("txt", "odd"), data) for name, data in members])): "odd",
    }
    for path, text in paths.items():
        seen: list[dict[str, Any]] = []

        def doubled(record: dict[str, Any], text: str = text, seen: list[Any] = seen) -> dict[str, Any]:
            seen.append(dict(record))
            return record | {text: record[text] * 2, "twice": int(record["n"]) * 2}

        records = read(path, ReadOptions(text=text, fields=["twice"], map=doubled))
        assert texts(records) == ["aa", "bb"]
        assert [record.fields for record in records] == [{"twice": 2}, {"twice": 4}]
        assert set(seen[0]) == {text, "n", "other"}


def test_map_may_make_the_text_and_fields_of_every_format(tmp_path: Path) -> None:
    rows = [{"title": "a", "body": "b"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    paths = [
        write(tmp_path / "a.csv", "title,body\na,b\n"),
        write(tmp_path / "a.jsonl", json.dumps(rows[0])),
        str(tmp_path / "a.parquet"),
        write(tmp_path / "a.tar", tar_bytes([("0.json", json.dumps(rows[0]).encode())])),
    ]

    def joined(record: dict[str, Any]) -> dict[str, Any]:
        return {"whole": f"{record['title']}: {record['body']}", "size": 2}

    for path in paths:
        assert texts(read(path, ReadOptions(text="whole", fields=["size"], map=joined))) == ["a: b"]
    path = write(tmp_path / "a.txt", "1 one\n2 two\n")
    records = read(path, ReadOptions(text="name", map=lambda record: {"name": record["text"][2:], "i": 7}))
    assert texts(records) == ["one", "two"] and records[1].fields == {"i": 7}


def test_what_map_returns_is_not_changed(tmp_path: Path) -> None:
    same = {"text": "a", "n": 1}
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n{"text": "y"}')
    assert texts(read(path, ReadOptions(map=lambda record: same))) == ["a", "a"]
    assert same == {"text": "a", "n": 1}


@pytest.mark.parametrize("rows", ["list", "dataset", "iterable"])
def test_rows_are_chosen_like_shards(rows: str) -> None:
    data: Any = [{"text": f"text {i}", "id": i} for i in range(COUNT)]
    if rows != "list":
        data = datasets.Dataset.from_list(data)
    if rows == "iterable":
        data = data.to_iterable_dataset(num_shards=3)

    def make() -> bertstream.EmbeddingLoader:
        return loader(data)

    with make() as stream:
        assert ids(stream) == KEPT
        assert stream.count_records() is None
    assert_resumes_exactly(make, cuts=[0, 3, 9])


def test_the_records_of_a_shared_piece_are_asked_once_over_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": "a", "id": i}) + "\n" for i in range(COUNT)))
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(Path(path).read_bytes()))
    monkeypatch.setenv("WORLD_SIZE", "3")
    kept, dropped = [], 0
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        stream = TextStream(path, FakeEncoder(), keep=mostly_odd, map=halved)
        kept += [i for batch in stream for i in batch.fields["id"].tolist()]
        dropped += stream.progress.bad.dropped
    assert sorted(kept) == KEPT and dropped == COUNT - len(KEPT)


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_an_epoch_whose_records_are_all_dropped_is_an_error(shards: list[str], workers: int | None) -> None:
    options: dict[str, Any] = {"keep": lambda record: None, "map": None}
    with pytest.raises(ShardError, match=f"^keep= dropped each of the {COUNT} records that were .*without a return"):
        list(TextStream(shards, FakeEncoder(), **options) if workers is None else loader(shards, workers, **options))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"map": lambda record: None}, "map="),
        ({"map": lambda record: None, "keep": bool, "drop_last": True}, "keep= or map= or drop_last"),
    ],
)
def test_only_what_may_have_dropped_all_records_is_named(
    shards: list[str], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ShardError, match=f"^{named} dropped each of the {COUNT} records"):
        list(TextStream(shards, FakeEncoder(), **options))


def test_a_rank_whose_records_are_all_dropped_says_so_in_the_log(
    shards: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert list(TextStream(shards, FakeEncoder(), keep=lambda record: False)) == []
    assert "keep= dropped each of the " in caplog.text


def test_a_shard_whose_records_are_all_dropped_is_no_broken_shard(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", json.dumps({"text": name, "id": 1})) for name in "abc"]
    with loader(paths, keep=lambda record: record["text"] != "b", map=None) as stream:
        assert sorted(key for batch in stream for key in batch["__key__"]) == ["a:0", "c:0"]
        assert stream.stats()["dropped_records"] == 1


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": lambda record: record["m"] > 0}, r"keep=<lambda> raised KeyError: 'm' on {'text': 'b'"),
        (
            {"map": lambda record: {"text": record["text"][9]}},
            r"map=<lambda> raised IndexError: .* on {'text': 'b', 'n': 5}",
        ),
        (
            {"map": lambda record: "b"},
            r"map=<lambda> returned 'b' for {'text': 'b', 'n': 5}: return the record as a dict, or None",
        ),
        ({"map": lambda record: [record]}, r"map=<lambda> returned \[{"),
        ({"map": lambda record: {"n": 1}}, r"field 'text': the record has no such field after map=; it has \['n'\]"),
        (
            {"map": lambda record: {"text": 3}},
            r"field 'text': a text is a string or a list of strings, or a list of token ids, not 3",
        ),
        (
            {"map": lambda record: {"text": "b", "__key__": "x"}},
            r"field '__key__': each batch has a field of this name",
        ),
        (
            {"map": lambda record: {"text": "b"}, "fields": ["n"]},
            r"field 'n': the record has no such field after map=; it has \['text'\]",
        ),
    ],
)
def test_an_error_of_a_function_names_the_record_and_is_skipped_like_other_broken_ones(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "n": 0, "m": 1}\n{"text": "b", "n": 5}\n{"text": "c", "m": 1}')
    if "map" in options:  # for one of the records
        of_b = options["map"]
        options = options | {"map": lambda record: of_b(record) if record.get("n") == 5 else record | {"n": 0}}
    _, error = read_until_error(path, ReadOptions(**options))
    assert re.search(message, str(error)), error
    assert (error.path, error.index) == (path, 1) and f"{path}, record 1" in str(error)
    reading = StreamConfig(max_bad_records=1)
    with bertstream.stream(path, FakeEncoder(), reading=reading, **options) as stream:
        assert sum(len(batch["__key__"]) for batch in stream) == 2
        assert stream.stats()["bad_records"] == 1 and stream.stats()["dropped_records"] == 0


def test_an_error_in_a_worker_is_a_shard_error_with_the_cause_in_its_text(shards: list[str]) -> None:
    message = "map=<lambda> raised KeyError: 'nothing' on {'text': 'text 80'"
    with (
        loader(shards, 2, keep=None, map=lambda record: record["nothing"]) as stream,
        pytest.raises(ShardError, match=message) as caught,
    ):
        list(stream)
    assert caught.value.path == shards[1] and caught.value.index == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "odd"}, "keep='odd': pass a function of a record, a dict, that says whether to keep it"),
        ({"map": {"a": 1}}, "map={'a': 1}: pass a function from a record, a dict, to a dict, or None to drop it"),
    ],
)
def test_what_is_no_function_is_refused(shards: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bertstream.stream(shards, FakeEncoder(), **options)


def test_a_state_fits_streams_with_the_same_functions_and_has_no_entry_without_any(shards: list[str]) -> None:
    with loader(shards, keep=None, map=None) as stream:
        plain = stream.state_dict()
        assert not {"keep", "map"} & set(plain["settings"]) and "dropped" not in plain["bad"]
    with loader(shards) as stream:
        assert stream.state_dict()["settings"]["map"] == "halved"
        with pytest.raises(StateError, match="keep=None and map=None, this stream has keep='mostly_odd' and"):
            stream.load_state_dict(plain)


def spawned(shards: list[str], encoder: FakeEncoder | None = None, **options: Any) -> bertstream.EmbeddingLoader:
    stream = TextStream(shards, encoder or FakeEncoder(), batch_size=50, **options)
    context = {"num_workers": 1, "multiprocessing_context": "spawn"}
    return bertstream.wrap(DataLoader(stream, batch_size=None, **context), FakeEncoder())


def test_functions_of_a_module_reach_workers_that_are_spawned(shards: list[str]) -> None:
    with spawned(shards, keep=mostly_odd, map=halved) as stream:
        assert ids(stream) == KEPT


@pytest.mark.filterwarnings("ignore:Got pickle error")
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"keep": lambda record: True}, "keep=<lambda>"),
        ({"map": lambda record: record}, "map=<lambda>"),
        ({"keep": mostly_odd, "fields": {"id": lambda value: value}}, r"fields\['id'\]=<lambda>"),
        ({}, "the encoder's tokenizer, or its word_splitter=,"),
    ],
)
def test_a_function_that_workers_cannot_be_sent_is_named_with_the_way_out(
    shards: list[str], options: dict[str, Any], name: str
) -> None:
    encoder = FakeEncoder()
    if not options:
        encoder.tokenizer.word_splitter = lambda text: text.split()  # type: ignore[attr-defined]
    message = rf"^{name} cannot be sent to worker processes, .*def makes at the top level of a module.*num_workers=0"
    with spawned(shards, encoder, **options) as stream, pytest.raises(ConfigError, match=message):
        next(iter(stream))


def test_a_function_of_a_notebook_is_refused_before_workers_are_spawned(
    shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)  # a test process of xdist has none
    with spawned(shards, keep=mostly_odd) as stream:
        monkeypatch.setattr(mostly_odd, "__module__", "__main__")
        with pytest.raises(
            ConfigError, match="keep=mostly_odd is of a notebook .*: write it to a module and import it"
        ):
            next(iter(stream))
