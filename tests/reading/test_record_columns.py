"""Whether records come one by one or as columns changes nothing: the order, the batches, the errors, the states."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bertstream
from bertstream.errors import ShardError
from bertstream.reading import raw, records
from bertstream.reading.options import ReadOptions
from bertstream.reading.record_columns import MISSING, Gathering, RecordColumns
from bertstream.reading.records import read_columns, read_records
from bertstream.reading.shards import Piece
from bertstream.testing import FakeEncoder, write_shards
from bertstream.tokens import Record, TokenizedText

COLUMNS = {
    "small": (pa.int8(), st.integers(-128, 127)),
    "unsigned": (pa.uint64(), st.integers(0, 2**64 - 1)),
    "half": (pa.float32(), st.floats(width=32, allow_nan=False)),
    "flag": (pa.bool_(), st.booleans()),
    "name": (pa.string(), st.text(max_size=3)),
    "tags": (pa.list_(pa.int32()), st.lists(st.integers(0, 9), max_size=2)),
    "day": (pa.timestamp("ms"), st.sampled_from([0, 2**52])),  # the second is no time of Python's
}
TEXTS = [
    (pa.string(), st.text(max_size=4)),
    (pa.large_string(), st.text(max_size=4)),
    (pa.binary(), st.sampled_from([b"a", "ü".encode(), b"\xff"])),
    (pa.list_(pa.string()), st.lists(st.text(max_size=2), max_size=3)),
    (pa.list_(pa.int64()), st.lists(st.integers(0, 2**31), max_size=3)),
]


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """Rows with some fields; a value may be missing, or one that Python or the stream refuses."""
    rows = draw(st.integers(1, 12))
    kind, texts = draw(st.sampled_from(TEXTS))
    columns = {"text": (kind, texts)}
    columns |= {name: COLUMNS[name] for name in sorted(draw(st.sets(st.sampled_from(sorted(COLUMNS)), max_size=3)))}
    may_lack = draw(st.booleans())
    return pa.table(
        {
            name: pa.array(draw(st.lists(st.none() | value if may_lack else value, min_size=rows, max_size=rows)), kind)
            for name, (kind, value) in columns.items()
        }
    )


def one_by_one() -> Any:
    """While this is open, every record is looked at by itself."""
    return mock.patch.object(records, "take_columns", return_value=None)


def found(piece: Piece, options: ReadOptions, skip: int = 0) -> list[Any]:
    """The records as plain values, and what is said of the broken ones."""
    out: list[Any] = []
    for record in read_records(piece, options, skip=skip, on_bad=lambda error: out.append(said(error))):
        text = record.text if isinstance(record.text, (str, list, tuple)) else record.text.input_ids.tolist()
        fields = {name: (type(value), value) for name, value in record.fields.items()}
        out.append((text, fields, record.key, record.shard, record.index))
    return out


def said(error: ShardError) -> Any:
    return error.index, error.field, error.records


@given(data=st.data(), table=tables(), a_group=st.integers(1, 12))
def test_columns_hold_the_records_that_are_there_one_by_one(
    data: st.DataObject, table: pa.Table, a_group: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "columns.parquet"
    pq.write_table(table, path, row_group_size=a_group)
    start = data.draw(st.integers(0, len(table) - 1))
    stop = data.draw(st.none() | st.integers(start + 1, len(table)))
    shares = data.draw(st.integers(1, 3))
    piece = Piece(str(path), start, stop, share=data.draw(st.integers(0, shares - 1)), shares=shares)
    fields = data.draw(st.sampled_from([None, (), {"name": len}, {"small": lambda value: 1 / value}]))
    if isinstance(fields, dict) and not fields.keys() <= set(table.column_names):
        fields = None
    options, skip = ReadOptions(fields=fields), data.draw(st.integers(0, 3))
    as_columns = found(piece, options, skip)
    with one_by_one():
        assert found(piece, options, skip) == as_columns


def test_columns_stay_columns_but_where_a_record_is_broken(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    rows = [{"text": f"text {i}", "n": i} for i in range(700)]
    rows[300]["text"] = None  # type: ignore[assignment]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=256)
    bad: list[ShardError] = []
    items = list(read_columns(Piece(path), ReadOptions(), on_bad=bad.append))
    columns = [item for item in items if isinstance(item, RecordColumns)]
    assert [(int(part.indices[0]), len(part)) for part in columns] == [(0, 256), (512, 188)]
    assert sum(isinstance(item, Record) for item in items) == 255 and [error.index for error in bad] == [300]


def test_a_shard_whose_columns_are_all_taken_apart_is_read_as_fast_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [raw.RawColumns({"text": ["a"]}, 1)] * 24_000
    monkeypatch.setattr(records, "read_rows", lambda *args: iter(runs))
    found = read_records(Piece("list"), ReadOptions(rows=[{}], keep=bool))

    def seconds() -> float:
        started = time.process_time()
        assert len(list(itertools.islice(found, 2_000))) == 2_000
        return time.process_time() - started

    first, *_, last = [seconds() for _ in range(12)]
    assert last < 5 * first


FIELDS = st.dictionaries(st.sampled_from("abc"), st.integers(0, 3) | st.none())


@given(st.lists(FIELDS, min_size=1, max_size=5))
@example([{}, {}])
def test_records_become_columns_and_records_again(fields: list[dict[str, Any]]) -> None:
    some = [Record(f"text {i}", own, f"k{i}", "a.tar", i) for i, own in enumerate(fields)]
    columns = RecordColumns.of(some)
    assert len(columns) == len(some)
    for record, again in zip(some, columns.records(), strict=True):
        there = {name: value for name, value in again.fields.items() if value is not MISSING}
        assert Record(again.text, there, again.key, again.shard, again.index) == record


# Streams.


def written(folder: Path, sizes: list[int], a_group: int) -> list[str]:
    """Shards of Parquet that differ in the type of a field, which one has and others lack."""
    paths, count = [], 0
    for shard, size in enumerate(sizes):
        numbers = range(count, count + size)
        count += size
        kind = (pa.int16(), pa.int64(), pa.float64())[shard % 3]
        columns: dict[str, Any] = {"text": [" ".join(["a"] * (1 + i % 4)) for i in numbers]}
        columns |= {"id": pa.array(numbers), "n": pa.array(numbers, kind)}
        if shard % 2:
            columns["only"] = [str(i) for i in numbers]
        paths.append(str(folder / f"{shard}.parquet"))
        pq.write_table(pa.table(columns), paths[-1], row_group_size=a_group)
    return paths


def contents(batch: Any) -> Any:
    fields = {
        name: (str(column.dtype), column.tolist()) if isinstance(column, np.ndarray) else list(column)
        for name, column in batch.fields.items()
    }
    return batch.input_ids.tolist(), batch.cu_seqlens.tolist(), fields, batch.cursor, repr(batch.report)


def batches(shards: Any, start: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    stream = bertstream.TextStream(shards, FakeEncoder(), **options)
    if start is not None:
        stream.load_state_dict(start)
    for batch in stream:
        yield contents(batch), stream.state_dict()


READING = st.fixed_dictionaries(
    {"lanes": st.integers(1, 2), "open_shards": st.integers(1, 4), "bucket_size": st.integers(1, 60)}
)


def check_columns_are_records(shards: Any, shuffle: bool, stop: int, reading: dict[str, Any]) -> None:
    """A stream has the batches that it has record by record, also from the state after the batch `stop`."""
    config = bertstream.StreamConfig(**reading)
    options: dict[str, Any] = {"shuffle": shuffle, "batch_size": 4, "reading": config, "keep_text_as": "text"}
    as_columns = list(batches(shards, **options))
    with one_by_one():
        assert list(batches(shards, **options)) == as_columns
    stop = min(stop, len(as_columns) - 1)
    rest = [batch[:4] for batch, _ in batches(shards, as_columns[stop][1], **options)]
    assert rest == [batch[:4] for batch, _ in as_columns[stop + 1 :]]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 20), st.booleans(), st.integers(0, 10), READING
)
def test_a_stream_of_columns_is_that_of_its_records_also_from_a_state_on(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    a_group: int,
    shuffle: bool,
    stop: int,
    reading: dict[str, Any],
) -> None:
    paths = written(tmp_path_factory.mktemp("shards"), sizes, a_group)
    lanes = min(reading["lanes"], sum(sizes))
    check_columns_are_records(paths, shuffle, stop, reading | {"lanes": lanes})


@pytest.mark.parametrize("field", ["text", "input_ids"])
def test_a_text_that_the_tokenizer_refuses_costs_itself_alone(tmp_path: Path, minilm_folder: str, field: str) -> None:
    encoder = bertstream.Encoder.from_pretrained(minilm_folder, device="cpu", max_length=5, overflow="error")
    texts = ["a b", "c", "a b c d e", "b"] * 100
    shard = str(tmp_path / "a.parquet")
    ids = [text.input_ids.tolist() for text in encoder.tokenizer.whole()(texts)]
    pq.write_table(pa.table({"text": texts, "input_ids": ids, "n": range(400)}), shard)
    path = f"{shard}, record 2, field '{field}': text"
    with pytest.raises(ShardError, match=path):
        list(bertstream.TextStream(shard, encoder, text=field))
    stream = bertstream.TextStream(shard, encoder, text=field, reading=bertstream.StreamConfig(max_bad_records=0.5))
    numbers = [n for batch in stream for n in batch.fields["n"].tolist()]
    assert sorted(numbers) == [i for i in range(400) if i % 4 != 2]
    assert stream.progress.bad.records == 100


def mixture(folder: Path, sizes: list[int], a_group: int, stopping: Any) -> bertstream.Mixture:
    """Of two shards of Parquet, json lines, a table with a broken record, and a list of rows."""
    paths, texts = written(folder, [sizes[0], sizes[0]], a_group), [f"line {i}" for i in range(sizes[1])]
    table = pa.table({"text": [None, *["a b"] * sizes[2]], "n": range(sizes[2] + 1)})
    rows = [{"text": "row", "tags": [i]} for i in range(sizes[3])]
    sources = [(paths, 3), (write_shards(folder / "lines", texts), 1), (table, 0.7), (rows, 0.5)]
    return bertstream.Mixture(sources, stopping=stopping)


@settings(max_examples=15)
@given(
    st.lists(st.integers(2, 30), min_size=4, max_size=4),
    st.integers(1, 20),
    st.sampled_from(["first", "all"]),
    st.booleans(),
    st.integers(0, 10),
    READING,
)
def test_a_mixture_of_columns_is_that_of_their_records_also_from_a_state_on(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    a_group: int,
    stopping: str,
    shuffle: bool,
    stop: int,
    reading: dict[str, Any],
) -> None:
    mixed = mixture(tmp_path_factory.mktemp("mixed"), sizes, a_group, stopping)
    check_columns_are_records(mixed, shuffle, stop, reading | {"max_bad_records": 1000})


def test_columns_of_a_mixture_are_never_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(records: list[Record]) -> RecordColumns:
        assert not records
        return RecordColumns([], {}, [], [], np.zeros(0, np.int64))

    monkeypatch.setattr(RecordColumns, "of", of)
    monkeypatch.setattr(RecordColumns, "records", pytest.fail)
    datasets = pytest.importorskip("datasets")
    table = pa.table({"text": ["a"] * 300, "n": range(300)})
    path = str(tmp_path / "a.parquet")
    pq.write_table(table, path)
    sources = [path, table, table.to_pandas(), datasets.Dataset(table)]
    stream = bertstream.TextStream(bertstream.Mixture((source, 1) for source in sources), FakeEncoder())
    assert sum(map(len, stream)) == 1200


@given(st.permutations(range(9)), st.lists(st.booleans(), min_size=9, max_size=9), st.integers(1, 4))
@example([*range(9)][::-1], [True] * 9, 1)
def test_records_are_put_together_in_the_order_of_their_places(
    order: list[int], alone: list[bool], a_part: int
) -> None:
    """However they come: one by one in any order, or as columns of places that increase."""
    some = [Record(f"text {i}", {"i": i}, f"k{i}", "a.tar", i) for i in range(9)]
    gathering = Gathering()
    for i in order:
        if alone[i]:
            gathering.alone[i] = some[i]
    rest = [i for i in order if not alone[i]]
    for first in range(0, len(rest), a_part):
        places = sorted(rest[first : first + a_part])
        gathering.parts.append((places, RecordColumns.of([some[i] for i in places])))
    assert list(gathering.columns().records()) == some


class CountingEncoder(FakeEncoder):
    """Notes how many texts are tokenized in each call."""

    def __init__(self) -> None:
        super().__init__()
        plain, self.calls = self.tokenizer, []  # type: ignore[var-annotated]

        def counted(texts: Any) -> Any:
            self.calls.append(len(texts))
            return plain(texts)

        self.tokenizer = counted  # type: ignore[assignment]


def test_a_lane_of_several_formats_tokenizes_many_texts_at_a_time(tmp_path: Path) -> None:
    paths = written(tmp_path, [500], 100) + write_shards(tmp_path / "lines", ["a"] * 500)
    encoder = CountingEncoder()
    reading = bertstream.StreamConfig(lanes=1, open_shards=2)
    found = [n for batch in bertstream.TextStream(paths, encoder, reading=reading) for n in batch.fields["id"].tolist()]
    assert sorted(found) == sorted([*range(500)] * 2)
    assert len(encoder.calls) == -(-1000 // 256)


def test_a_first_batch_waits_for_its_bucket_alone_however_large_the_blocks_of_its_shards_are(tmp_path: Path) -> None:
    encoder = CountingEncoder()
    reading = bertstream.StreamConfig(lanes=1, open_shards=8, bucket_size=64)
    next(iter(bertstream.TextStream(written(tmp_path, [300] * 8, 300), encoder, reading=reading)))
    assert sum(encoder.calls) == 64


def test_ids_of_shards_that_say_which_are_special_stay_apart_from_others(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{shard}.parquet") for shard in range(2)]
    ids = [[101, 7, 102, 8, 102]] * 20
    pq.write_table(pa.table({"input_ids": ids, "special_tokens_mask": [[1, 0, 0, 0, 1]] * 20}), paths[0])
    pq.write_table(pa.table({"input_ids": ids}), paths[1])
    reading = ReadOptions(text="input_ids")
    parts = [next(iter(read_columns(Piece(path), reading))) for path in paths]
    assert all(isinstance(part, RecordColumns) for part in parts)
    joined = RecordColumns.concat(parts)  # type: ignore[arg-type]
    said = [None if text.special is None else text.special.tolist() for text in joined.texts]  # type: ignore[union-attr]
    assert said == [[True, False, False, False, True]] * 20 + [None] * 20


def test_empty_lists_beside_fields_of_ids_are_no_lists_of_words() -> None:
    streamed = pytest.importorskip("datasets").IterableDataset.from_generator(
        lambda: iter([{"text": [], "attention_mask": []}] * 3)
    )
    kinds = {type(record.text) for record in read_records(Piece("x shard 0 of 1"), ReadOptions(rows=streamed))}
    assert kinds == {TokenizedText}


def test_rows_of_many_bytes_become_columns_a_few_at_a_time(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a"] * 100, "image": [bytes(100_000)] * 100}), path)
    sizes = [len(part) for part in read_columns(Piece(path), ReadOptions()) if isinstance(part, RecordColumns)]
    assert sum(sizes) == 100 and max(sizes) <= 11
