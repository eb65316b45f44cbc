"""The text and the wanted fields of a record are chosen by name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from shard_files import read, read_until_error, tar_bytes, texts, write

import bertstream
from bertstream import ShardError, StreamConfig
from bertstream.errors import ConfigError
from bertstream.reading.access import Access
from bertstream.reading.options import PLACE, ReadOptions
from bertstream.testing import FakeEncoder, assert_resumes_exactly, write_shards
from bertstream.tokens import Record


def test_all_fields_are_kept_unchanged_by_default(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": [1, null], "text": "x", "b": {"c": 0.5}}')
    assert read(path) == [Record("x", {"a": [1, None], "b": {"c": 0.5}}, "a:0", path, 0)]
    path = write(tmp_path / "a.csv", 'text,label\n"a ""b"", c\nd",7\n')
    assert read(path) == [Record('a "b", c\nd', {"label": "7"}, "a:0", path, 0)]


def test_fields_are_chosen_by_name_and_passed_through_functions(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label,other\nx,7,8\n")
    assert read(path, ReadOptions(fields=["label"]))[0].fields == {"label": "7"}
    assert read(path, ReadOptions(fields={"label": int}))[0].fields == {"label": 7}
    assert read(path, ReadOptions(fields=[]))[0].fields == {}


def test_a_text_may_be_a_list_of_words(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": ["New", "York"]}\n{"text": []}')
    assert texts(read(path)) == [["New", "York"], []]


def test_options_pickle_and_hide_passwords() -> None:
    options = ReadOptions(text="a", fields={"b": int}, access=Access(storage_options={"password": "xyzzy"}))
    assert pickle.loads(pickle.dumps(options)) == options
    assert "xyzzy" not in repr(options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "text names the field"),
        ({"text": ["a"]}, r"text names the field.*For vectors of several fields, use a DataLoader"),
        ({"fields": "label"}, r"fields=\['label'\]"),
        ({"fields": [1]}, "names of fields"),
        ({"fields": {"label": "int"}}, "names to functions"),
        ({"text": "a", "fields": ["a"]}, "leave out 'a'"),
        ({"fields": ["__none__", "__key__"]}, "fields names '__key__', and '__none__', which leaves it out: write one"),
        ({"fields": {"label": 7}}, "fields maps names to functions, or to lists of labels; got 'label': 7"),
        ({"fields": ["__repeated__"]}, "'__repeated__' is a field that each batch has of its own"),
        ({"text": "__index__"}, "'__index__' is a field"),
        ({"pair": "__shard__"}, "'__shard__' is a field"),
    ],
)
def test_bad_options_are_refused_by_the_constructor(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReadOptions(**arguments)


def test_an_error_in_a_users_function_is_kept_as_the_cause(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "n": {}}')
    _, error = read_until_error(path, ReadOptions(fields={"n": lambda value: value["key"]}))
    assert isinstance(error.__cause__, KeyError)


@pytest.mark.parametrize("name", ["__key__", "__index__", "__shard__", "__repeated__"])
def test_a_field_that_would_be_replaced_by_the_batchs_own_is_refused_unless_it_is_left_out(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "a", "{name}": 17, "n": 1}}')
    _, error = read_until_error(path)
    assert error.field == name and "rename it, or name others with fields=" in str(error)
    assert read(path, ReadOptions(fields=["n"]))[0].fields == {"n": 1}


# --- nested places ----------------------------------------------------------------------------------------------------

ROWS = [
    {"data": {"text": f"text {i}", "about": {"label": i}}, "turns": [{"said": f"turn {i}"}], "n": i} for i in range(9)
]


def nested(folder: Path, kind: str) -> Any:
    """The rows, and where in them the text is."""
    if kind == "jsonl":
        return write(folder / "a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet", row_group_size=4)
        return str(folder / "a.parquet")
    if kind == "tar":
        members = [(f"{i}.json", json.dumps(row).encode()) for i, row in enumerate(ROWS)]
        return write(folder / "a.tar", tar_bytes(members))
    return datasets.Dataset.from_list(ROWS) if kind == "dataset" else ROWS


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar", "dataset", "rows"])
def test_a_nested_text_reads_as_a_flat_one(tmp_path: Path, kind: str) -> None:
    flat = write(
        tmp_path / "flat.jsonl",
        "".join(json.dumps({"text": f"text {i}", "pair": f"turn {i}", "label": i}) + "\n" for i in range(9)),
    )
    encoder, shards = FakeEncoder(), nested(tmp_path, kind)
    right = next(iter(bertstream.stream(flat, encoder, pair="pair")))
    batch = next(
        iter(bertstream.stream(shards, encoder, text="data.text", pair="turns.0.said", fields=["data.about.label"]))
    )
    assert torch.equal(batch["data.text"].values, right["text"].values)
    assert batch["data.about.label"].tolist() == right["label"].tolist()


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar", "rows"])
def test_without_fields_what_holds_the_text_stays_whole(tmp_path: Path, kind: str) -> None:
    batch = next(iter(bertstream.stream(nested(tmp_path, kind), FakeEncoder(), text="data.text")))
    assert sorted(batch["n"].tolist()) == list(range(9)) and len(batch["data.text"]) == 9
    assert all(data["text"] == f"text {data['about']['label']}" for data in batch["data"])
    assert ROWS[0]["data"] == {"text": "text 0", "about": {"label": 0}}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar", "rows"])
@pytest.mark.parametrize("field", ["data.txt", "text", "data.about.label.x", "turns.1.said"])
def test_a_place_that_is_missing_names_the_fields_that_are_there(tmp_path: Path, kind: str, field: str) -> None:
    with pytest.raises(
        ShardError, match=rf"field '{field}': the (record|file) has no such (field|column); it has .*data"
    ) as caught:
        next(iter(bertstream.stream(nested(tmp_path, kind), FakeEncoder(), text=field)))
    assert caught.value.field == field


def test_a_column_that_has_the_dot_itself_wins(tmp_path: Path) -> None:
    rows = [{"data.text": "flat", "data": {"text": "nested"}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (
        str(tmp_path / "a.parquet"),
        write(tmp_path / "a.jsonl", json.dumps(rows[0])),
        write(tmp_path / "a.csv", "data.text,data\nflat,nested\n"),
        write(tmp_path / "a.tar", tar_bytes([("0.data.text", b"flat"), ("0.data", b"nested")])),
    ):
        assert texts(read(path, ReadOptions(text="data.text", fields=[]))) == ["flat"]


def test_only_the_columns_of_nested_places_are_read(tmp_path: Path) -> None:
    assert ReadOptions(text="a.b.c", fields=["d"]).wanted == {"a.b.c", "a.b", "a", "d"}
    assert ReadOptions(text="a").wanted is None


@pytest.mark.parametrize("column", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())])
def test_binary_texts_are_decoded_and_invalid_ones_are_broken_records(tmp_path: Path, column: Any) -> None:
    values = ["außen".encode(), b"\xef\xbb\xbfmark", b"bad \xff", b"last"]
    if isinstance(column, pa.DictionaryType):
        array = pa.array(values, pa.binary()).dictionary_encode()
    else:
        array = pa.array(values, column)
    pq.write_table(pa.table({"text": array, "raw": array}), tmp_path / "a.parquet")
    for shards in (str(tmp_path / "a.parquet"), [{"text": value, "raw": value} for value in values]):
        reading = StreamConfig(max_bad_records=1)
        with bertstream.stream(shards, FakeEncoder(), into="vectors", reading=reading) as loader:
            batch = next(iter(loader))
            assert sorted(batch["text"]) == ["außen", "last", "mark"]
            assert all(isinstance(value, bytes) for value in batch["raw"])
            assert loader.stats()["bad_records"] == 1
        with pytest.raises(ShardError, match="record 2, field 'text': not UTF-8: byte 0xff in b'bad"):
            list(bertstream.stream(shards, FakeEncoder()))


def test_fields_may_choose_among_those_that_say_where_a_record_is_from(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "n": 1}\n{"text": "b", "n": 2}')
    found = read(path, ReadOptions(fields=["n", "__index__"]))
    assert [record.fields for record in found] == [{"n": 1, "__index__": 0}, {"n": 2, "__index__": 1}]
    chosen = {"__shard__": [path], "__key__": lambda key: int(key.split(":")[1])}
    assert [record.fields for record in read(path, ReadOptions(fields=chosen))] == [
        {"__shard__": 0, "__key__": 0},
        {"__shard__": 0, "__key__": 1},
    ]
    _, error = read_until_error(path, ReadOptions(fields={"__index__": lambda index: 1 / index}))
    assert error.field == "__index__" and error.index == 0 and "ZeroDivisionError" in str(error)
    own = write(tmp_path / "b.jsonl", '{"text": "a", "__index__": 7}')
    _, error = read_until_error(own, ReadOptions(fields=["__index__"]))
    assert error.field == "__index__" and "each batch has a field of this name" in str(error)
    assert read(own, ReadOptions(fields=["__key__"]))[0].fields == {"__key__": "b:0"}


@pytest.mark.parametrize("ending", ["csv", "parquet", "rows"])
def test_no_shard_needs_columns_of_these_names(tmp_path: Path, ending: str) -> None:
    rows: Any = [{"text": "a b", "n": "1"}, {"text": "c", "n": "2"}]
    if ending == "csv":
        rows = write(tmp_path / "a.csv", "text,n\na b,1\nc,2\n")
    elif ending == "parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        pq.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), tmp_path / "a.parquet")
        rows = tmp_path / "a.parquet"
    choices: list[tuple[Any, Any]] = [
        ([], PLACE),
        (["n"], ("n", *PLACE)),
        (["n", "__none__"], ["n"]),
        (["__none__"], []),
        ({"__none__": None, "n": str}, ["n"]),
        (["n", "__index__"], ("n", "__index__")),
    ]
    for fields, names in choices:
        [batch] = bertstream.stream(rows, FakeEncoder(), fields=fields)
        assert isinstance(batch, dict) and batch.keys() == {"text", *names}
    assert batch["__index__"].tolist() == [0, 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_without_its_places_resumes_exactly(tmp_path: Path, num_workers: int) -> None:
    paths = write_shards(tmp_path, [f"text {i}" for i in range(40)], shards=3)
    choices: list[Any] = [{"id": int, "__index__": int}, ["id", "__none__"]]
    for fields in choices:
        assert_resumes_exactly(
            lambda fields=fields: bertstream.stream(  # type: ignore[misc]
                paths, FakeEncoder(), fields=fields, batch_size=8, num_workers=num_workers
            ),
            cuts=[2],
        )
