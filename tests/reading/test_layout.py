"""Ranks have data of their own: small data that cannot be cut is shared out by record, larger data is refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bertstream
from bertstream import ConfigError, EmbeddingLoader, ShardError, StateError, StreamConfig, TextStream
from bertstream.reading.layout import Layout, lay_out
from bertstream.reading.shards import Piece
from bertstream.reading.state import layout_ranks_of
from bertstream.testing import FakeEncoder, assert_resumes_exactly
from tests.shard_files import tar_bytes, write

COUNT = 50
AsRank = Callable[[int, int], None]


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> AsRank:
    def set_environment(rank: int, ranks: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))

    return set_environment


def json_lines(count: int = COUNT, first: int = 0) -> bytes:
    return "".join(json.dumps({"text": "word " * (i % 7), "id": first + i}) + "\n" for i in range(count)).encode()


def quoted_csv() -> bytes:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerows([("text", "id"), *((f"word {i}", i) for i in range(COUNT))])
    return out.getvalue().encode().replace(b"word 0,", b'"word\r0",', 1)  # a bare carriage return: nobody cuts it


def one_row_group(path: Path) -> str:
    table = pyarrow.table({"text": [f"word {i}" for i in range(COUNT)], "id": list(range(COUNT))})
    pyarrow.parquet.write_table(table, path)
    return str(path)


def remote(path: Path) -> str:
    fsspec.filesystem("memory").pipe("/layout/a.jsonl", json_lines())
    return "memory://layout/a.jsonl"


def tar(path: Path) -> str:
    members = [(f"{i:03}.json", json.dumps({"text": f"word {i}", "id": i}).encode()) for i in range(COUNT)]
    return write(path, zstandard.compress(tar_bytes(members)))


UNCUT: dict[str, Callable[[Path], str]] = {
    "a.jsonl.gz": lambda path: write(path, gzip.compress(json_lines())),
    "a.tar.zst": tar,
    "a.parquet": one_row_group,
    "a.csv": lambda path: write(path, quoted_csv()),
    "a URL": remote,
}


def stream(shards: Any, **reading: Any) -> TextStream:
    return TextStream(shards, FakeEncoder(), batch_size=4, shuffle=True, reading=StreamConfig(**reading))


def ids(batches: TextStream) -> list[int]:
    return [int(i) for batch in batches for i in batch.fields["id"]]


@pytest.mark.parametrize("name", UNCUT)
def test_each_rank_has_its_share_of_data_that_cannot_be_cut(name: str, tmp_path: Path, as_rank: AsRank) -> None:
    path, found = UNCUT[name](tmp_path / name), []
    for rank in range(3):
        as_rank(rank, 3)
        own = ids(stream(path))
        assert COUNT // 3 <= len(own) <= COUNT // 3 + 1
        found += own
    assert sorted(found) == list(range(COUNT))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    ranks=st.integers(1, 6),
    lanes=st.none() | st.integers(6, 9),
    epoch=st.integers(0, 3),
)
def test_every_record_comes_to_exactly_one_rank(
    sizes: list[int], ranks: int, lanes: int | None, epoch: int, tmp_path: Path, as_rank: AsRank
) -> None:
    paths, found = [], []
    for number, size in enumerate(sizes):
        paths.append(write(tmp_path / f"{number}.jsonl.gz", gzip.compress(json_lines(size, first=sum(sizes[:number])))))
    for rank in range(ranks):
        as_rank(rank, ranks)
        one = stream(paths, lanes=lanes)
        one.set_epoch(epoch)
        found += ids(one)
        dealt = one._dealt(one._layout, epoch)[rank::ranks]
        read = [piece.path for lane in dealt for piece in lane]
        assert read and len(set(read)) == len(read)  # no rank is without data, none reads a shard twice
    assert sorted(found) == list(range(sum(sizes)))


def test_data_is_shared_out_only_where_a_rank_would_have_none(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.jsonl.gz", gzip.compress(json_lines(5))) for i in range(3)]

    def layout(ranks: int) -> Any:
        return lay_out(paths, None, StreamConfig(lanes=8), shuffle=True, ranks=ranks)

    assert layout(1) == layout(2) == layout(3) and layout(1).ranks == 1
    assert layout(1).digest == layout(3).digest != layout(4).digest
    assert [(piece.share, piece.shares) for piece, _ in layout(4).pieces] == [(i, 4) for i in range(4)] * 3


def test_small_data_that_can_be_cut_has_a_lane_for_each_rank(tmp_path: Path) -> None:
    layout = lay_out([write(tmp_path / "a.jsonl", json_lines())], None, StreamConfig(), shuffle=False, ranks=3)
    assert layout.lanes == 3 and all(layout.deal(None, 0))
    assert {piece.shares for piece, _ in layout.pieces} == {1}


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (
            lambda folder: one_row_group(folder / "a.parquet"),
            r"3 ranks cannot share 1 piece of data, 0\.0 MiB in all: .*a\.parquet cannot be cut.*only up to 0 MiB.*"
            r"at least 3 shards.*row_group_size",
        ),
        (lambda folder: "pipe:zcat a.jsonl.gz # .jsonl", "1 piece of data, an unknown number of bytes in all: pipe:"),
        (lambda folder: [{"text": "a"}, {"text": "b"}], "3 ranks cannot share 2 rows of list"),
        (lambda folder: write(folder / "a.jsonl", b""), r"a\.jsonl: no shard holds a record"),
    ],
    ids=["Parquet", "pipe", "rows", "empty"],
)
def test_what_cannot_be_shared_is_refused_with_the_numbers(
    make: Callable[[Path], Any], seen: str, tmp_path: Path, as_rank: AsRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertstream.reading.layout._SHARED_BYTES", 100)
    as_rank(2, 3)
    with pytest.raises(ConfigError, match=seen):
        stream(make(tmp_path), allow_pipe=True)


def test_a_streaming_dataset_with_fewer_shards_than_ranks_is_refused(as_rank: AsRank) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a"}] * 9).to_iterable_dataset(num_shards=2)
    as_rank(0, 3)
    with pytest.raises(ConfigError, match=r"3 ranks cannot share 2 shards of IterableDataset.*num_shards=3"):
        stream(rows)


def test_ranks_that_do_not_wait_for_each_other_may_have_no_data_and_it_is_said(
    tmp_path: Path, as_rank: AsRank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bertstream.reading.layout._SHARED_BYTES", 100)
    path = one_row_group(tmp_path / "a.parquet")
    found = []
    for rank in range(2):
        as_rank(rank, 2)
        found.append(sorted(ids(stream(path, uneven="leave"))))
    assert found == [list(range(COUNT)), []]
    assert "some ranks have no data: 2 ranks cannot share 1 piece" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shared_file_resumes_exactly(num_workers: int, tmp_path: Path, as_rank: AsRank) -> None:
    paths = [
        write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines(90))),
        write(tmp_path / "b.jsonl.gz", gzip.compress(json_lines(40, first=90))),
    ]
    as_rank(1, 3)

    def make(workers: int = num_workers) -> EmbeddingLoader:
        reading = StreamConfig(bucket_size=15, lanes=6)
        return bertstream.stream(
            paths, FakeEncoder(), batch_size=4, shuffle=True, num_workers=workers, reading=reading, prefetch=0
        )

    assert_resumes_exactly(make, cuts=[0, 4, 7] if num_workers else None, resume_with=lambda: make(0))


def test_a_state_from_before_files_were_shared_resumes_in_its_own_layout(
    tmp_path: Path, as_rank: AsRank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines()))
    state: Any = None
    with monkeypatch.context() as before:
        before.setattr("bertstream.reading.layout._SHARED_BYTES", 0)
        as_rank(0, 2)
        old = stream(path, lanes=2, uneven="leave")
        batches = iter(old)
        taken = [int(i) for _ in range(3) for i in next(batches).fields["id"]]
        state = old.state_dict()
        rest = ids(batches)  # type: ignore[arg-type]
    assert "layout_ranks" not in state
    state["queues"][1] = [[1, 0, [], 0]]  # as every rank's state had it where ranks talk

    found = []
    for rank in range(2):
        as_rank(rank, 2)
        new = stream(path, lanes=2)
        new.load_state_dict(state)
        assert new.state_dict() == state
        found.append(ids(new))
        new.set_epoch(1)
        assert new.state_dict()["layout_ranks"] == 2
        assert len(ids(new)) == COUNT // 2
    assert found == [rest, []] and sorted(taken + rest) == list(range(COUNT))
    assert "rank 1 of 2 has no data in the rest of epoch 0" in caplog.text


def test_a_state_of_shared_files_resumes_on_one_rank_and_then_has_that_ones_layout(
    tmp_path: Path, as_rank: AsRank
) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines()))
    found, queues, state = [], [], {}
    for rank in range(3):
        as_rank(rank, 3)
        three = stream(path)
        batches = iter(three)
        found += [int(i) for i in next(batches).fields["id"]]
        state = three.state_dict()
        queues.append(state["queues"][rank])
    as_rank(0, 1)
    one = stream(path)
    one.load_state_dict(state | {"queues": queues})
    again = one.state_dict()
    assert again["layout_ranks"] == 3
    found += ids(one)
    assert sorted(found) == list(range(COUNT))
    one.set_epoch(1)
    assert "layout_ranks" not in one.state_dict() and sorted(ids(one)) == list(range(COUNT))


@pytest.mark.parametrize("ranks", [0, "3", True])
def test_a_damaged_number_of_ranks_is_refused(ranks: Any) -> None:
    with pytest.raises(StateError, match="layout_ranks"):
        layout_ranks_of({"layout_ranks": ranks})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_record_of_a_shared_file_is_counted_by_one_rank(
    num_workers: int, tmp_path: Path, as_rank: AsRank
) -> None:
    lines = json_lines().splitlines(keepends=True)
    lines[7], lines[20] = b"{\n", b'{"id": 20}\n'
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b"".join(lines)))
    found, counts = [], []
    for rank in range(3):
        as_rank(rank, 3)
        reading = StreamConfig(max_bad_records=2)
        with bertstream.stream(
            path, FakeEncoder(), batch_size=4, num_workers=num_workers, reading=reading, prefetch=0
        ) as loader:
            found += [i for batch in loader for i in batch["id"].tolist()]
            counts.append(loader.stats()["bad_records"])
    assert sorted(found) == [i for i in range(COUNT) if i not in (7, 20)]
    assert counts == [0, 1, 1]


def test_a_broken_row_group_of_shared_files_is_counted_once_over_all_ranks(
    tmp_path: Path, as_rank: AsRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{i} {'word ' * 50}" for i in range(COUNT)], "id": list(range(COUNT))})
    pyarrow.parquet.write_table(table, path, row_group_size=25, use_dictionary=False, compression="zstd")
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    at = column.data_page_offset
    data[at + 40 : at + column.total_compressed_size] = bytes(column.total_compressed_size - 40)
    path.write_bytes(data)
    found, bad = [], 0
    for rank in range(3):
        as_rank(rank, 3)
        one = stream(path, max_bad_records=COUNT)
        found += ids(one)
        bad += one.progress.bad.records
    assert sorted(found) == list(range(25)) and bad == 25


def test_a_shared_file_that_breaks_is_an_error_on_every_rank(tmp_path: Path, as_rank: AsRank) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines())[:-20])
    for rank in range(2):
        as_rank(rank, 2)
        with pytest.raises(ShardError, match=r"a\.jsonl\.gz: cannot be read"):
            ids(stream(path))


def test_workers_without_data_are_said_once_with_the_number_to_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines()))
    for num_workers, said in ((0, 0), (1, 0), (3, 1)):
        caplog.clear()
        with bertstream.stream(path, FakeEncoder(), num_workers=num_workers, prefetch=0) as loader:
            if num_workers == 3:
                assert len(list(loader)) == len(list(loader))
        warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == said
    assert warnings == ["num_workers=3, but the data is enough for 1 of them: write num_workers=1"]


@pytest.mark.parametrize(
    ("lanes", "by_user", "busy", "ranks", "message"),
    [
        (1, False, 1, 1, "the data is enough for 1 of them: write num_workers=1"),
        (4, False, 2, 2, "the data is enough for 2 of them on rank 1: write num_workers=2"),
        (6, True, 6, 1, "there are 6 lanes for them: write num_workers=6, or reading=StreamConfig(lanes=8), which "),
        (
            32,
            False,
            4,
            8,
            "there are 4 lanes on rank 1 for them: write num_workers=4, or reading=StreamConfig(lanes=64)",
        ),
        (
            32,
            False,
            1,
            1,
            "the data has only 1 piece for them and cannot be cut further: write num_workers=1, or write ",
        ),
        (
            8,
            True,
            0,
            1,
            "the data has only 0 pieces for them and cannot be cut further: write num_workers=1, or write ",
        ),
        (8, False, 8, 1, None),
        (32, False, 32, 1, None),
    ],
)
def test_idle_workers_are_told_what_to_write(
    lanes: int, by_user: bool, busy: int, ranks: int, message: str | None
) -> None:
    found = Layout([], lanes, 1).idle_workers(8, busy, min(1, ranks - 1), ranks, lanes_by_user=by_user)
    assert found is None if message is None else (found or "").startswith(f"num_workers=8, but {message}")


def test_idle_workers_over_parquet_are_told_of_row_groups() -> None:
    found = Layout([(Piece("a.parquet"), 1)], 32, 1).idle_workers(8, 1, 0, 1, lanes_by_user=False)
    assert (found or "").endswith("8 shards or row groups (smaller row groups, as in to_parquet(row_group_size=1000))")


def rows_in_groups(rows: int, group: int) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["word"] * rows}), out, row_group_size=group)
    return out.getvalue()


NOISE = b"".join(b'{"text": "%s"}\n' % os.urandom(1500).hex().encode() for _ in range(120))
SMALL = StreamConfig(bucket_size=32)


@pytest.mark.parametrize(
    ("name", "data", "options", "way"),
    [
        ("a.parquet", rows_in_groups(400, 400), {}, "write smaller row groups, as in to_parquet(row_group_size=1000)"),
        ("a.parquet", rows_in_groups(400, 100), {}, "of 4 pieces in all"),
        ("a.jsonl.gz", gzip.compress(NOISE), {}, "write it uncompressed, or to more shards (tools/make_shards.py)"),
        ("a.parquet", rows_in_groups(400, 40), {}, None),
        ("a.parquet", rows_in_groups(60, 60), {}, None),
        ("a.jsonl", NOISE, {}, None),
        ("a.parquet", rows_in_groups(400, 400), {"shuffle": False}, None),
        ("a.parquet", rows_in_groups(400, 400), {"reading": StreamConfig(bucket_size=32, open_shards=1)}, None),
    ],
)
def test_a_shuffled_stream_over_few_large_pieces_says_so_once(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    data: bytes,
    options: dict[str, Any],
    way: str | None,
) -> None:
    (tmp_path / name).write_bytes(data)
    options = {"shuffle": True, "reading": SMALL} | options
    for shards in (str(tmp_path / name), bertstream.Mixture([(str(tmp_path / name), 1), ([{"text": "b"}] * 99, 1)])):
        caplog.clear()
        loader = bertstream.stream(shards, FakeEncoder(), **options)
        next(iter(loader))
        said = [record.getMessage() for record in caplog.records if "mixes the records" in record.getMessage()]
        assert len(said) == (way is not None)
        assert way is None or (way in said[0] and name in said[0])
