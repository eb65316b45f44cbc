"""Rows of Parquet are read whole, in pieces and from any row on, and broken ones name their place."""

from __future__ import annotations

import datetime
import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import Server
from shard_files import LINES, read

from bertstream import ShardError
from bertstream.reading import remote
from bertstream.reading.access import Access
from bertstream.reading.options import ReadOptions
from bertstream.reading.pieces import count_records, split_shard
from bertstream.reading.records import read_records
from bertstream.reading.shards import Piece, expand_shards
from bertstream.tokens import Record


def written(path: Path, columns: dict[str, Any] | pa.Table, rows_a_group: int = 1000, **options: Any) -> str:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, row_group_size=rows_a_group, **options)
    return str(path)


def error_of(path: str, options: ReadOptions = LINES, **piece: Any) -> ShardError:
    with pytest.raises(ShardError) as caught:
        read(path, options, **piece)
    assert caught.value.path == path
    return caught.value


def test_a_row_is_a_record_of_plain_values(tmp_path: Path) -> None:
    day = datetime.datetime(2026, 1, 2, 3, 4)
    columns = {
        "text": ["one", "", "drei ü"],
        "label": [1, None, 3],
        "score": [0.5, 1.5, 2.5],
        "raw": [b"a", b"\xff", b""],
        "tags": [["a", "b"], [], None],
        "nested": [{"a": [1]}, {"a": []}, {"a": None}],
        "day": [day] * 3,
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
    }
    path = written(tmp_path / "a.parquet", columns)
    assert read(expand_shards(path)[0]) == [
        Record("one", {"label": 1, "score": 0.5, "raw": b"a", "tags": ["a", "b"], "nested": {"a": [1]}, "day": day,
                       "kind": "x"}, "a:0", path, 0),
        Record("", {"label": None, "score": 1.5, "raw": b"\xff", "tags": [], "nested": {"a": []}, "day": day,
                    "kind": "y"}, "a:1", path, 1),
        Record("drei ü", {"label": 3, "score": 2.5, "raw": b"", "tags": None, "nested": {"a": None}, "day": day,
                          "kind": "x"}, "a:2", path, 2),
    ]  # fmt: skip


def test_a_text_may_be_a_list_of_words(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", {"text": [["New", "York"], []]})
    assert [record.text for record in read(path)] == [["New", "York"], []]


def test_rows_are_counted_without_being_read(tmp_path: Path) -> None:
    assert count_records(written(tmp_path / "a.parquet", {"text": ["a"] * 7}, rows_a_group=3), LINES) == 7
    broken = tmp_path / "b.parquet"
    broken.write_bytes(b"no parquet")
    with pytest.raises(ShardError, match="cannot be read"):
        count_records(str(broken), LINES)


def test_only_wanted_columns_are_read(tmp_path: Path) -> None:
    rows = 3000
    columns = {"text": [f"text {i}" for i in range(rows)], "a.b": list(range(rows)), "other": [bytes(1000)] * rows}
    columns["other"] = [i.to_bytes(4, "big") * 500 for i in range(rows)]
    path = written(tmp_path / "a.parquet", columns, compression="none", use_dictionary=False)
    size = Path(path).stat().st_size
    with Server({"a.parquet": Path(path).read_bytes()}) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "_REMOTE_BLOCK_BYTES", 1 << 16)
        url = f"{server.url}/a.parquet"
        records = read(url, ReadOptions(fields={"a.b": str}))
        assert [(record.text, record.fields) for record in records] == [
            (f"text {i}", {"a.b": str(i)}) for i in range(rows)
        ]
        assert sum(request.sent for request in server.gets()) < size / 3


def test_pieces_are_row_groups_and_hold_all_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", {"text": [f"text {i}" for i in range(1050)]}, rows_a_group=100)
    whole = read(path)
    assert [record.index for record in whole] == list(range(1050))
    for parts in (1, 2, 3, 7, 11, 50):
        pieces = split_shard(path, parts)
        assert len(pieces) == min(parts, 11)
        assert {piece.start % 100 for piece in pieces} == {0} == {piece.offset for piece in pieces}
        assert list(itertools.chain.from_iterable(read_records(piece, LINES) for piece in pieces)) == whole
        rows = [(piece.stop or 1050) - piece.start for piece in pieces]
        assert max(rows) - min(rows) <= 100


@settings(max_examples=60)
@given(data=st.data())
def test_pieces_and_skipping_give_slices_of_the_rows(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    groups = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any))
    rows = sum(groups)
    path = tmp_path_factory.getbasetemp() / "slices.parquet"
    schema = pa.schema({"text": pa.string()})
    texts = map(str, range(rows))
    with pq.ParquetWriter(path, schema) as writer:
        for count in groups:
            group = pa.table({"text": list(itertools.islice(texts, count))}, schema=schema)
            writer.write_table(group, row_group_size=count or 1)
    whole = read(str(path))
    assert [record.text for record in whole] == [str(i) for i in range(rows)]
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start, rows))
    skip = data.draw(st.integers(0, rows + 3))
    assert read(str(path), start=start, stop=stop, skip=skip) == whole[start:stop][skip:]
    assert read(str(path), start=start, skip=skip) == whole[start:][skip:]


def test_row_groups_before_and_after_the_wanted_rows_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{i:04} " + "x" * 50 for i in range(100)]
    written(path, {"text": texts}, rows_a_group=10, compression="none", use_dictionary=False, write_statistics=False)
    data = path.read_bytes()
    group = pq.ParquetFile(path).metadata.row_group(3).column(0)
    place = group.data_page_offset
    path.write_bytes(data[:place] + b"\xff" * 20 + data[place + 20 :])  # the fourth group's page header
    assert [record.text for record in read(str(path), stop=30)] == texts[:30]
    assert [record.text for record in read(str(path), skip=40)] == texts[40:]
    assert [record.text for record in read(str(path), start=40, skip=5)] == texts[45:]
    assert error_of(str(path)).index == 30 and error_of(str(path), start=20).index == 30


def test_a_null_text_and_a_value_without_a_python_type_name_row_and_field(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", {"text": ["a", None, "c"]})
    error = error_of(path)
    assert (error.index, error.field) == (1, "text") and "not None" in str(error)
    assert [record.text for record in read(path, skip=2)] == ["c"]
    error = error_of(written(tmp_path / "b.parquet", {"text": [["a"], ["b", None]]}))
    assert (error.index, error.field) == (1, "text")
    error = error_of(written(tmp_path / "c.parquet", {"text": ["a", "b"], "n": [1, 2]}), ReadOptions(text="n"))
    assert (error.index, error.field) == (0, "n") and "not 1" in str(error)
    times = pa.array([0, 2**52], pa.timestamp("ms"))
    error = error_of(written(tmp_path / "d.parquet", {"text": ["a", "b"], "time": times}))
    assert (error.index, error.field) == (1, "time")


def test_missing_and_repeated_columns_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", {"text": ["a"], "label": [1]})
    error = error_of(path, ReadOptions(text="txt"))
    assert error.field == "txt" and "['text', 'label']" in str(error)
    assert error_of(path, ReadOptions(fields=["none"])).field == "none"
    twice = written(tmp_path / "b.parquet", pa.table([["a"], [1], [2]], names=["text", "n", "n"]))
    assert error_of(twice).field == "n" and "several columns" in str(error_of(twice))
    assert [record.text for record in read(twice, ReadOptions(fields=[]))] == ["a"]


def test_a_truncated_file_and_a_file_that_is_not_parquet_are_shard_errors(tmp_path: Path) -> None:
    path = Path(written(tmp_path / "a.parquet", {"text": ["a", "b"]}))
    data = path.read_bytes()
    for part in (b"", b"x", data[: len(data) // 2], data[:-1], b"x" * 1000):
        path.write_bytes(part)
        assert error_of(str(path)).index == 0
        with pytest.raises(ShardError, match=r"a\.parquet: cannot be read"):
            split_shard(str(path), 2)
    empty = written(tmp_path / "b.parquet", {"text": pa.array([], pa.string())})
    assert "holds no record" in str(error_of(empty)) and split_shard(empty, 3) == [Piece(empty)]


@pytest.mark.parametrize("ranges", [True, False], ids=["range", "no range"])
def test_remote_parquet_is_cut_into_pieces_and_survives_broken_connections(
    tmp_path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.001)
    rows = [f"text {i} " + "x" * (i % 100) for i in range(20_000)]
    path = Path(written(tmp_path / "a.parquet", {"text": rows}, 5000, compression="none", use_dictionary=False))
    with Server({"a.parquet": path.read_bytes()}, ranges=ranges, cuts=[None, None, 3000, None, 3000]) as server:
        pieces = split_shard(f"{server.url}/a.parquet", 4)
        assert len(pieces) == 4
        assert [record.text for piece in pieces for record in read_records(piece, LINES)] == rows


def test_a_server_that_always_cuts_is_not_reported_as_broken_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.001)
    path = Path(written(tmp_path / "a.parquet", {"text": ["a"] * 100}))
    with Server({"a.parquet": path.read_bytes()}, always_cut_at=10) as server:
        error = error_of(f"{server.url}/a.parquet")
    assert "gave up at byte" in str(error) and isinstance(error.__cause__, remote.RemoteReadError)


def test_a_server_that_does_not_say_the_size_needs_a_shard_cache(tmp_path: Path) -> None:
    path = Path(written(tmp_path / "a.parquet", {"text": ["a"]}))
    with Server({"a.parquet": path.read_bytes()}, ranges=False, says_size=False) as server:
        url = f"{server.url}/a.parquet"
        assert "set shard_cache=" in str(error_of(url))
        options = ReadOptions(access=Access(shard_cache=tmp_path / "cache"))
        assert [record.text for record in read(url, options)] == ["a"]


def test_a_footer_is_read_once_for_all_pieces_of_a_file_and_again_when_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[bool] = []
    parquet_file = pq.ParquetFile

    def counted(stream: Any, *, metadata: Any, **options: Any) -> Any:
        opened.append(metadata is not None)
        return parquet_file(stream, metadata=metadata, **options)

    monkeypatch.setattr(pq, "ParquetFile", counted)
    for rows in (["a", "b", "c"], ["d", "e", "f", "g"]):
        path = written(tmp_path / "a.parquet", {"text": rows}, rows_a_group=1)
        pieces = split_shard(path, 10)
        opened.clear()
        assert [record.text for piece in pieces for record in read_records(piece, LINES)] == rows
        assert opened == [False] + [True] * (len(rows) - 1)
