"""Texts that come as ids are the same from every format, without their padding, and wrong ones name their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_files import texts
from transformers import AutoTokenizer

from bertstream import ShardError, StreamConfig, TextStream, stream
from bertstream.encoding.tokenizer import TextTokenizer
from bertstream.reading.options import ReadOptions
from bertstream.reading.raw import RecordError, values_of
from bertstream.reading.records import read_records
from bertstream.reading.shards import Piece
from bertstream.reading.token_ids import columns_of_ids, ids_of
from bertstream.testing import FakeEncoder, assert_resumes_exactly
from bertstream.tokens import Record, TokenizedText

IDS = ReadOptions(text="input_ids")
RECORDS: list[dict[str, Any]] = [
    {
        "input_ids": [101, 7, 8, 102, 0],
        "attention_mask": [1, 1, 1, 1, 0],
        "token_type_ids": [0, 0, 1, 1, 0],
        "special_tokens_mask": [1, 0, 0, 1, 1],
        "word_ids": [-1, 0, 1, -1, -1],
        "num_words": 3,
        "label": 1,
    },
    {
        "input_ids": [0, 0, 101, 9, 102],
        "attention_mask": [0, 0, 1, 1, 1],
        "token_type_ids": [0, 0, 0, 0, 0],
        "special_tokens_mask": [1, 1, 1, 0, 1],
        "word_ids": [-1, -1, -1, 0, -1],
        "num_words": 1,
        "label": 2,
    },
]


def plain(text: Any) -> dict[str, Any]:
    """A text of ids as plain values."""
    assert isinstance(text, TokenizedText) and text.input_ids.dtype == np.int32
    assert text.special is None or text.special.dtype == np.bool_
    arrays = {name: getattr(text, name) for name in ("input_ids", "special", "token_type_ids", "word_ids")}
    return {name: None if array is None else array.tolist() for name, array in arrays.items()} | {
        "num_words": text.num_words
    }


RIGHT = [
    {
        "input_ids": [101, 7, 8, 102],
        "special": [True, False, False, True],
        "token_type_ids": [0, 0, 1, 1],
        "word_ids": [-1, 0, 1, -1],
        "num_words": 3,
    },
    {
        "input_ids": [101, 9, 102],
        "special": [True, False, True],
        "token_type_ids": None,
        "word_ids": [-1, 0, -1],
        "num_words": 1,
    },
]


def in_jsonl(folder: Path, records: list[dict[str, Any]]) -> str:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)


def in_parquet(folder: Path, records: list[dict[str, Any]], schema: pa.Schema | None = None) -> str:
    path = folder / "a.parquet"
    pq.write_table(pa.Table.from_pylist(records, schema), path, row_group_size=300)
    return str(path)


def read_rows(rows: Any, options: ReadOptions = IDS) -> list[Record]:
    return list(read_records(Piece("rows", 0, len(rows)), ReadOptions(text=options.text, rows=rows)))


def read(path: str, options: ReadOptions = IDS) -> list[Record]:
    return list(read_records(Piece(path), options))


def test_a_record_is_the_same_text_in_every_format(tmp_path: Path) -> None:
    of_hub = datasets.Dataset.from_list(RECORDS)
    found = {
        "jsonl": read(in_jsonl(tmp_path, RECORDS)),
        "parquet": read(in_parquet(tmp_path, RECORDS)),
        "dicts": read_rows(RECORDS),
        **{str(name): read_rows(of_hub.with_format(name)) for name in (None, "numpy", "torch")},
    }
    for name, records in found.items():
        assert [plain(text) for text in texts(records)] == RIGHT, name
        assert [record.fields for record in records] == [{"label": 1}, {"label": 2}], name


LISTS = [pa.list_(pa.int64()), pa.large_list(pa.int16()), pa.list_(pa.uint8(), 5), pa.list_(pa.uint32())]


@pytest.mark.parametrize("kind", LISTS, ids=str)
def test_ids_may_be_of_any_list_of_integers_of_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    schema = pa.schema({"input_ids": kind, "attention_mask": pa.list_(pa.bool_()), "word_ids": kind})
    rows = [
        {
            "input_ids": row["input_ids"],
            "attention_mask": [mask == 1 for mask in row["attention_mask"]],
            "word_ids": [None if word < 0 else word for word in row["word_ids"]],
        }
        for row in RECORDS
    ]
    found = texts(read(in_parquet(tmp_path, rows, schema)))
    assert [text.input_ids.tolist() for text in found] == [right["input_ids"] for right in RIGHT]
    assert [text.word_ids.tolist() for text in found] == [right["word_ids"] for right in RIGHT]


def test_a_field_of_ids_that_fields_names_stays_a_field(tmp_path: Path) -> None:
    options = ReadOptions(text="input_ids", fields=["word_ids"])
    for path in (in_jsonl(tmp_path, RECORDS), in_parquet(tmp_path, RECORDS)):
        records = read(path, options)
        assert [record.fields for record in records] == [{"word_ids": record["word_ids"]} for record in RECORDS]
        assert [plain(text) for text in texts(records)] == RIGHT
    assert [plain(text) for text in texts(read(path, ReadOptions(text="input_ids", fields=())))] == RIGHT


NOT_IN_PARQUET = [
    ({"input_ids": [1.5, 2.0]}, "input_ids", "whole numbers belongs here, not [1.5, 2.0]"),
    ({"input_ids": [True, False]}, "input_ids", "whole numbers belongs here, not [True, False]"),
    ({"input_ids": [1, [2]]}, "input_ids", "whole numbers belongs here, not [1, [2]]"),
    ({"input_ids": [[1, 2]]}, "input_ids", "[[1, 2]] has one dimension too many: the numbers of one text are one list"),
    ({"input_ids": [[1], [2, 3]]}, "input_ids", "whole numbers belongs here, not [[1], [2, 3]]"),
    ({"input_ids": [["a"]]}, "input_ids", "a string or a list of strings, or a list of token ids, not [['a']]"),
    ({"attention_mask": [[1] * 5]}, "attention_mask", "[[1, 1, 1, 1, 1]] has one dimension too many"),
    ({"attention_mask": 1}, "attention_mask", "whole numbers belongs here, not 1"),
]
"""A column of Parquet has values of one type."""

BROKEN = [
    ({"input_ids": [1, None]}, "input_ids", "whole numbers belongs here, not [1, None]"),
    ({"input_ids": [1, 1 << 40]}, "input_ids", "1099511627776 does not fit"),
    ({"input_ids": None}, "input_ids", "not None"),
    ({"attention_mask": [1]}, "attention_mask", "it has 1 entries, 'input_ids' has 5"),
    ({"word_ids": [-1, 1, 0, -1, -1]}, "word_ids", "word 0 comes after a later one"),
    ({"word_ids": [-1, -7, 0, -1, -1]}, "word_ids", "-7 is no word"),
    ({"num_words": 1}, "num_words", "1, but word_ids name 2 words"),
]


@pytest.mark.parametrize(
    ("write", "change", "field", "message"),
    [(in_jsonl, *case) for case in NOT_IN_PARQUET + BROKEN] + [(in_parquet, *case) for case in BROKEN],
)
def test_a_broken_record_names_its_shard_index_field_and_value(
    tmp_path: Path, write: Any, change: dict[str, Any], field: str, message: str
) -> None:
    path = write(tmp_path, [RECORDS[1], RECORDS[0] | change, RECORDS[1]])
    errors: list[ShardError] = []
    good = list(read_records(Piece(path), IDS, on_bad=lambda error: errors.append(error)))
    assert [plain(text) for text in texts(good)] == [RIGHT[1]] * 2
    [error] = errors
    assert (error.path, error.index, error.field) == (path, 1, field)
    assert message in str(error)


@pytest.mark.parametrize("write", [in_jsonl, in_parquet])
def test_padding_without_its_mask_names_its_record(tmp_path: Path, minilm_folder: str, write: Any) -> None:
    encoder: Any = FakeEncoder()
    encoder.tokenizer = TextTokenizer(AutoTokenizer.from_pretrained(minilm_folder), max_length=9)
    path = write(tmp_path, [{"input_ids": [101, 102, *[0] * i], "mask": [1, 1, *[0] * i]} for i in range(3)])
    message = r"record 1, field 'input_ids': the ids end with 1 of the padding token \[PAD\] \(0\): put attention_mask"
    with pytest.raises(ShardError, match=message) as caught:
        list(TextStream(path, encoder, text="input_ids"))
    assert (caught.value.path, caught.value.index, caught.value.field) == (path, 1, "input_ids")

    def with_mask(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": row["input_ids"], "attention_mask": row["mask"]}

    [batch] = TextStream(path, encoder, text="input_ids", map=with_mask)
    assert batch.lengths.tolist() == [2, 2, 2]


numbers = st.integers(0, 5)


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Records of ids, some of them wrong, all with the same fields."""
    names = draw(st.sets(st.sampled_from(["attention_mask", "token_type_ids", "special_tokens_mask", "word_ids"])))
    right = draw(st.booleans())
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        ids = draw(st.lists(numbers, max_size=4))
        row: dict[str, Any] = {"input_ids": ids, "label": 0}
        for name in names:
            size = len(ids) if right else draw(st.integers(0, 4))
            row[name] = draw(st.lists(numbers, min_size=size, max_size=size))
            if name == "word_ids" and right:
                row[name].sort()
        if not right and draw(st.booleans()):
            row[draw(st.sampled_from(["input_ids", *sorted(names)]))] = draw(st.none() | st.just([None]))
        rows.append(row)
    return rows


@given(tables())
def test_whole_columns_give_what_each_record_gives(rows: list[dict[str, Any]]) -> None:
    schema = pa.schema({name: pa.int8() if name == "label" else pa.list_(pa.int32()) for name in rows[0]})
    [batch] = pa.Table.from_pylist([rows[0], *rows], schema).slice(1).to_batches()
    columns = columns_of_ids(batch, "input_ids", ())
    ids = columns.pop("input_ids")
    names = ["input_ids", *columns]
    values = [list(values_of(ids)), *(c.to_pylist() for c in columns.values())]
    for row, *entries in zip(rows, *values, strict=True):
        ids = np.zeros(0, np.int32) if row["input_ids"] == [] else row["input_ids"]
        assert outcome(dict(zip(names, entries, strict=True))) == outcome(row | {"input_ids": ids})


def outcome(record: dict[str, Any]) -> Any:
    """A record's text, or what is wrong with it; a list that is missing is said otherwise."""
    try:
        ids = ids_of(record["input_ids"], record, "input_ids")
    except RecordError as error:
        return error.field if "belongs here" in str(error) else (str(error), error.field)
    return None if ids is None else plain(ids)


def records_of(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": [1 + (i * k) % 97 for k in range(1 + i % 11)], "label": i} for i in range(count)]


@pytest.mark.parametrize(("write", "num_workers"), [(in_jsonl, 0), (in_parquet, 0), (in_parquet, 2)])
def test_a_stream_of_ids_resumes_exactly(tmp_path: Path, write: Any, num_workers: int) -> None:
    path = write(tmp_path, records_of(900))
    reading = StreamConfig(bucket_size=100, lanes=3)

    def make_loader() -> Any:
        return stream(path, FakeEncoder(), text="input_ids", shuffle=True, num_workers=num_workers, reading=reading)

    assert_resumes_exactly(make_loader, cuts=[0, 8] if num_workers else [0, 1, 8, 20])


def test_ids_and_texts_of_every_kind_share_a_bucket(tmp_path: Path) -> None:
    rows = [{"x": "a b"}, {"x": [5, 6, 7]}, {"x": ["a", "b c"]}, {"x": [8]}]
    [batch] = TextStream(rows, FakeEncoder(), text="x", batch_size=9)
    [alone] = TextStream([rows[0], rows[2]], FakeEncoder(), text="x", batch_size=9)
    assert batch.lengths.tolist() == [2, 3, 3, 1]
    assert batch.hashes is not None and alone.hashes is not None
    assert batch.hashes[[0, 2]].tolist() == alone.hashes.tolist()
    assert batch.input_ids[2:5].tolist() == [5, 6, 7] and batch.num_words.tolist() == [0, 0, 2, 0]


def test_ids_stay_in_the_batch_under_their_name_where_the_vectors_go_elsewhere(tmp_path: Path) -> None:
    [batch] = stream(RECORDS, FakeEncoder(), text="input_ids", into="vectors")
    assert [ids.tolist() for ids in batch["input_ids"]] == [right["input_ids"] for right in RIGHT]
    assert batch["vectors"].lengths.tolist() == [4, 3]


def test_two_ranks_share_out_the_ids_of_one_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = in_parquet(tmp_path, records_of(21))
    monkeypatch.setenv("WORLD_SIZE", "2")
    labels = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        [batch] = TextStream(path, FakeEncoder(), text="input_ids")
        labels += batch.fields["label"].tolist()
        assert len(batch) > 9
    assert sorted(labels) == list(range(21))


def test_ids_in_a_nested_object_come_with_what_is_beside_them(tmp_path: Path) -> None:
    nested = [{"data": {name: value for name, value in row.items() if name != "label"}} for row in RECORDS]
    for path in (in_jsonl(tmp_path, nested), in_parquet(tmp_path, nested)):
        assert [plain(text) for text in texts(read(path, ReadOptions(text="data.input_ids")))] == RIGHT


def test_keep_and_map_see_plain_lists(tmp_path: Path) -> None:
    options = ReadOptions(
        text="input_ids",
        keep=lambda row: row["label"] == 1,
        map=lambda row: {"input_ids": row["input_ids"][1:3], "n": row["attention_mask"]},
    )
    for path in (in_jsonl(tmp_path, RECORDS), in_parquet(tmp_path, RECORDS)):
        [record] = read(path, options)
        assert record.text.input_ids.tolist() == [7, 8] and record.fields == {"n": [1, 1, 1, 1, 0]}


def test_ids_with_pair_are_refused() -> None:
    with pytest.raises(ShardError, match=r"record 0, field 'input_ids': ids are of both texts of a pair"):
        list(TextStream([row | {"other": "x"} for row in RECORDS], FakeEncoder(), text="input_ids", pair="other"))
