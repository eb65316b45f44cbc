"""Every fault of every format: what is skipped is counted record by record, and the machine's faults always raise."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import pickle
import resource
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_files import COMPRESS, LINES, TAR, read, read_until_error, tar_bytes, texts, texts_tar, write

import bertstream
from bertstream.errors import EncoderError, ShardError
from bertstream.reading import files, remote
from bertstream.reading.access import Access
from bertstream.reading.config import StreamConfig
from bertstream.reading.faults import outside_fault
from bertstream.reading.options import ReadOptions
from bertstream.reading.pieces import split_shard
from bertstream.reading.records import read_records
from bertstream.reading.shards import Piece
from bertstream.testing import FakeEncoder

COUNT = 40
"""Records of a shard, and in a Parquet file ten a row group."""
AT = 13
"""The record at fault, or the first of several."""

Outcome = tuple[Counter[str], int, int]  # records given of each shard, records counted, shards given up


# --- the matrix -------------------------------------------------------------------------------------------------------
# Each fault of a shard, where records can be counted: after it, records given + records counted = records there.
# A stray quote is `"such"as`; an open one is a matter of csv's quoting: test_delimited.py.

COUNTED = [
    *itertools.product(["a broken row"], ["csv", "tsv", "jsonl", "txt", "tar", "parquet"]),
    *itertools.product(["a stray quote"], ["csv", "tsv", "jsonl", "tar"]),
    ("a broken row group", "parquet"),
    ("a link", "tar"),
]

# Only bytes are known: the shard is given up by name, and its records from the fault on are unknown.
BYTES_ALONE = [
    ("a truncated member", "tar"),
    ("a broken header", "tar"),
    *itertools.product(["a truncated gz"], ["csv.gz", "tsv.gz", "jsonl.gz", "txt.gz", "tar.gz"]),
    ("a lost footer", "parquet"),
    # What was cut into pieces has been counted, but for the last piece.
    *itertools.product(["a vanished file"], ["csv", "tsv", "jsonl", "txt", "tar", "parquet"]),
]

FORMATS = ["csv", "tsv", "jsonl", "txt", "tar", "parquet"]
RAISED = {"EMFILE": errno.EMFILE, "ENFILE": errno.ENFILE, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO}


def shard(folder: Path, ending: str, first: int, fault: str = "") -> str:
    """A shard of COUNT records with ids from `first` on, with a fault at the record AT."""
    ids = range(first, first + COUNT)
    bad = first + AT
    path = folder / f"{first:04}.{ending}"
    row, quote = fault == "a broken row", fault == "a stray quote"
    kind, _, compression = ending.partition(".")
    if kind in ("csv", "tsv"):
        delimiter = {"csv": ",", "tsv": "\t"}[kind]
        lines = [f"text {i}{delimiter}{i}\n" for i in ids]
        if row or quote:
            lines[AT] = "a b\n" if row else f'"a"b{delimiter}{bad}\n'
        data = "".join([f"text{delimiter}id\n", *lines]).encode()
    elif kind == "jsonl":
        lines = [json.dumps({"text": f"text {i}", "id": i}) + "\n" for i in ids]
        if row or quote:
            lines[AT] = '{"text": 1}\n' if row else f'{{"text": ""a", "id": {bad}}}\n'
        data = "".join(lines).encode()
    elif kind == "txt":
        data = b"".join(b"\xff\n" if row and i == bad else b"%d\n" % i for i in ids)
    elif kind == "tar":
        members = [(f"{i}.{name}", value) for i in ids for name, value in (("text", b"a b"), ("id", b"%d" % i))]
        if row or quote:
            members[2 * AT + 1] = (f"{bad}.id", b"one" if row else b'"%d' % bad)
        broken = bytearray(tar_bytes(members))
        at = broken.index(b"%d.id" % bad)
        if fault == "a truncated member":
            del broken[at + 513 :]
        elif fault == "a broken header":
            broken[at + 20] ^= 1
        elif fault == "a link":
            info = tarfile.TarInfo(f"{bad}.id")
            info.type, info.linkname = b"2", "0.id"
            broken[at : at + 1024] = info.tobuf()
        data = bytes(broken)
    else:
        columns = {"text": [f"text {i}" if not row or i != bad else None for i in ids], "id": list(ids)}
        pq.write_table(
            pa.table(columns), path, row_group_size=10, compression="none", use_dictionary=False, write_statistics=False
        )
        data = path.read_bytes()
        if fault == "a broken row group":
            place = pq.ParquetFile(path).metadata.row_group(AT // 10).column(0).data_page_offset
            data = data[:place] + b"\xff" * 20 + data[place + 20 :]
        elif fault == "a lost footer":
            data = data[:-5]
    if compression:
        data = COMPRESS[f".{compression}"](data)
    return write(path, data[: len(data) // 2] if fault == "a truncated gz" else data)


def three(folder: Path, ending: str, fault: str) -> list[str]:
    return [shard(folder, ending, first, fault * (first == COUNT)) for first in (0, COUNT, 2 * COUNT)]


def stream(
    shards: Any, *, workers: int = 0, cut: bool = False, limit: float = 1000, number: Callable[[Any], int] = int
) -> bertstream.EmbeddingLoader:
    """Cut, each shard is read in about ten pieces at a time."""
    fields = {"id": number} if ".txt" not in str(shards[0]) else None
    reading = StreamConfig(lanes=2, open_shards=16 if cut else 1, bucket_size=16, max_bad_records=limit)
    return bertstream.stream(shards, FakeEncoder(), batch_size=4, fields=fields, num_workers=workers, reading=reading)


def outcome(loader: bertstream.EmbeddingLoader) -> Outcome:
    with loader:
        places = [
            place for batch in loader for place in zip(batch["__shard__"], batch["__index__"].tolist(), strict=True)
        ]
        stats = loader.stats()
    assert max(Counter(places).values()) == 1
    return Counter(shard for shard, _ in places), stats["bad_records"], stats["bad_shards"]


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize(("fault", "ending"), COUNTED)
def test_records_given_and_records_counted_are_the_records_there(
    tmp_path: Path, fault: str, ending: str, cut: bool
) -> None:
    given, counted, given_up = outcome(stream(three(tmp_path, ending, fault), cut=cut))
    assert given.total() + counted == 3 * COUNT and not given_up
    if fault == "a broken row group":
        assert counted == 10
    else:
        assert counted == 1 or (counted, ending) == (0, "tsv")  # of unquoted tsv, a quote is text


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize(("fault", "ending"), BYTES_ALONE)
def test_where_only_bytes_are_known_the_shard_is_named_as_given_up_and_the_others_are_read(
    tmp_path: Path, fault: str, ending: str, cut: bool, caplog: pytest.LogCaptureFixture
) -> None:
    paths = three(tmp_path, ending, fault)
    if fault == "a lost footer" and cut:
        with pytest.raises(ShardError, match=paths[1]):
            stream(paths, cut=cut)
        return
    loader = stream(paths, cut=cut)
    if fault == "a vanished file":
        os.unlink(paths[1])
    given, counted, given_up = outcome(loader)
    assert given_up == 1 and f"gave up a shard (records lost: unknown): {paths[1]}" in caplog.text
    assert given[paths[0]] == given[paths[2]] == COUNT and given[paths[1]] + counted <= COUNT
    if fault == "a vanished file" and cut and ending != "parquet":
        assert counted > COUNT // 2


@pytest.mark.parametrize("workers", [0, 2])
def test_all_formats_together_have_one_outcome_with_and_without_workers(tmp_path: Path, workers: int) -> None:
    faults = [(fault, ending) for fault, ending in [*COUNTED, *BYTES_ALONE] if ending[:3] != "txt"]
    paths = [shard(tmp_path, ending, COUNT * number, fault) for number, (fault, ending) in enumerate(faults)]
    loader = stream(paths, workers=workers)
    for (fault, _), path in zip(faults, paths, strict=True):
        if fault == "a vanished file":
            os.unlink(path)
    given, counted, given_up = outcome(loader)
    assert given_up == sum(fault in BYTES_ALONE for fault in faults)
    known = [path for path, fault in zip(paths, faults, strict=True) if fault in COUNTED]
    assert sum(given[path] for path in known) + counted == COUNT * len(known)


# --- faults of the machine --------------------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, bool], None]:
    """Makes opening, or reading, the shard of a name fail with an error of the operating system."""

    def fail(path: str, number: int, opening: bool) -> None:
        class Failing(io.FileIO):
            def readinto(self, buffer: Any) -> int:
                read = super().readinto(memoryview(buffer)[:50])
                if self.tell() > 50:
                    raise OSError(number, os.strerror(number))
                return int(read or 0)

        def opened(name: str, mode: str, buffering: int) -> Any:
            if name != path:
                return open(name, mode, buffering)
            if opening:
                raise OSError(number, os.strerror(number), name)
            return Failing(name)

        monkeypatch.setattr(files, "open", opened, raising=False)

    return fail


@pytest.mark.parametrize("opening", [True, False], ids=["opening", "reading"])
@pytest.mark.parametrize("fault", RAISED)
@pytest.mark.parametrize("ending", [*FORMATS, "jsonl.gz", "tar.gz"])
def test_faults_of_the_machine_raise_whatever_is_tolerated(
    tmp_path: Path, ending: str, fault: str, opening: bool, failing: Callable[..., None]
) -> None:
    path = shard(tmp_path, ending, 0)
    failing(path, RAISED[fault], opening)
    bad: list[ShardError] = []
    with pytest.raises(ShardError) as caught:
        list(read_records(Piece(path), ReadOptions(), on_bad=bad.append))
    assert not bad and not caught.value.skippable
    assert caught.value.path == path and os.strerror(RAISED[fault]) in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loop_gets_a_fault_of_the_machine_from_workers_too(
    tmp_path: Path, workers: int, failing: Callable[..., None]
) -> None:
    paths = three(tmp_path, "jsonl", "a broken row")
    failing(paths[1], errno.EMFILE, True)
    with pytest.raises(ShardError, match="Too many open files") as caught:
        outcome(stream(paths, workers=workers))
    assert caught.value.path == paths[1]


def test_a_process_that_has_no_file_handles_left_raises(tmp_path: Path) -> None:
    paths = [shard(tmp_path, "jsonl", COUNT * number) for number in range(30)]
    loader = stream(paths, cut=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(number) for number in os.listdir("/proc/self/fd")}
    free = [number for number in range(soft) if number not in taken]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[10], hard))
        with pytest.raises(ShardError, match="Too many open files"):
            list(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        loader.close()


def test_a_full_disk_below_the_shard_cache_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fsspec.filesystem("memory").pipe("/full/a.jsonl", b'{"text": "a"}\n')
    monkeypatch.setattr(shutil, "copyfileobj", full)
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.001)
    options = ReadOptions(access=Access(shard_cache=tmp_path))
    with pytest.raises(ShardError, match="No space left") as caught:
        list(read_records(Piece("memory://full/a.jsonl"), options, on_bad=pytest.fail))
    assert not caught.value.skippable


@pytest.mark.parametrize(
    ("error", "outside"),
    [
        (OSError(errno.ESTALE, "stale"), True),
        (OSError(errno.ENOMEM, "memory"), True),
        (MemoryError(), True),
        (PermissionError("no credentials"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (remote.RemoteReadError("gave up"), True),
        (FileNotFoundError(errno.ENOENT, "gone"), False),
        (IsADirectoryError(errno.EISDIR, "a folder"), False),
        (OSError(errno.EINVAL, "a seek to before the file"), False),
        (OSError("not zstd"), False),
        (EOFError(), False),
        (ValueError(), False),
    ],
    ids=repr,
)
def test_a_fault_is_the_machines_or_the_datas_also_as_a_cause(error: Exception, outside: bool) -> None:
    assert (outside_fault(error) is error) is outside
    row = ValueError("a row")
    row.__cause__ = error
    assert outside_fault(row) is (error if outside else None)


def test_what_an_error_says_of_its_records_survives_the_way_out_of_a_worker(tmp_path: Path) -> None:
    error = ShardError("a", path="b")
    error.records, error.skippable = 7, False
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.records, copy.skippable, copy.path) == (7, False, "b")


# --- files that change ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1000])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("ending", [*FORMATS[:3], "tar", "parquet", "jsonl.gz"])
def test_a_shard_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path, ending: str, cut: bool, limit: int) -> None:
    paths = three(tmp_path, ending, "")

    def number(value: Any) -> int:
        if int(value) == COUNT + 5:
            os.truncate(paths[1], os.path.getsize(paths[1]) // 2)
        return int(value)

    with pytest.raises(ShardError, match="changed while it was read: .* bytes, modified .* at first") as caught:
        outcome(stream(paths, cut=cut, limit=limit, number=number))
    assert caught.value.path == paths[1]


def test_workers_find_a_shard_that_shrinks(tmp_path: Path) -> None:
    paths = three(tmp_path, "jsonl", "")

    def number(value: int) -> int:
        if value == COUNT + 5:
            os.truncate(paths[1], 0)
        return value

    with pytest.raises(ShardError, match="changed while it was read"):
        outcome(stream(paths, workers=2, number=number))


@pytest.mark.parametrize("how", ["written over", "replaced", "appended to"])
def test_a_shard_that_is_written_while_it_is_read_is_an_error(tmp_path: Path, how: str) -> None:
    path = write(tmp_path / "a.txt", "a\n" * 20)
    os.utime(path, ns=(0, 0))
    records = read_records(Piece(path), LINES)
    next(records)
    if how == "replaced":
        os.replace(write(tmp_path / "b.txt", "b\n" * 20), path)
    else:
        with open(path, "a" if how == "appended to" else "w") as file:
            file.write("b\n" * 20)
    with pytest.raises(ShardError, match="changed while it was read") as caught:
        list(records)
    assert not caught.value.skippable


def test_a_shard_that_is_deleted_while_it_is_open_is_read_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a\n" * 20)
    records = read_records(Piece(path), LINES)
    next(records)
    os.unlink(path)
    assert len(list(records)) == 19


def test_a_shard_that_was_replaced_since_it_was_cut_is_not_read_at_the_old_places(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a\n" * 20)
    first, last = split_shard(path, 2)
    write(tmp_path / "a.txt", "bb\n" * 20)
    for piece in (first, last):
        with pytest.raises(ShardError, match="changed while it was read: 40 bytes.* at first, 60 bytes"):
            list(read_records(piece, LINES))
    assert len(read(path)) == 20, "the whole file may be another one in each epoch"


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("shards", [1, 3], ids=["one shard", "as many as lanes"])
@pytest.mark.parametrize("bucket", [0, 2])
def test_a_place_in_a_shard_that_was_replaced_since_is_refused(
    tmp_path: Path, bucket: int, shards: int, ending: str
) -> None:
    paths = three(tmp_path, ending, "")[:shards]
    reading = StreamConfig(lanes=shards, bucket_size=8)
    loader = bertstream.stream(paths, FakeEncoder(), batch_size=4, fields=["id"], reading=reading)
    with closing(iter(loader)) as batches:
        for _ in range((2 * bucket + 1) * shards):
            next(batches)
    state = loader.state_dict()
    for path in paths:
        os.utime(path, (1, 1))
    loader.load_state_dict(state)
    with pytest.raises(ShardError, match="changed while it was read"):
        next(iter(loader))
    loader.set_epoch(1)
    with closing(iter(loader)) as batches:
        found = len(next(batches)["id"])
    loader.load_state_dict(loader.state_dict())
    found += sum(len(batch["id"]) for batch in loader)
    assert found == COUNT * shards, "all of it may be another one in each epoch"


# --- datasets ---------------------------------------------------------------------------------------------------------


class Rows:
    """A map-style dataset in which one row raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return COUNT

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(COUNT))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == AT:
            raise self.error
        return {"text": f"text {index}", "id": index}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_row_after_one_that_raises_is_the_next(workers: int) -> None:
    given, counted, given_up = outcome(stream(Rows(ValueError("a bad row")), workers=workers))
    assert (given.total(), counted, given_up) == (COUNT - 1, 1, 0)


def test_a_row_that_raises_is_named_with_its_error() -> None:
    with pytest.raises(ShardError, match=r"Rows, record 13: the dataset raised ValueError: a bad row") as caught:
        outcome(stream(Rows(ValueError("a bad row")), limit=0))
    assert caught.value.index == AT


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "handles"), OSError(errno.ENOSPC, "full"), MemoryError("all")])
def test_a_row_that_raises_for_the_machine_is_not_skipped(error: Exception) -> None:
    with pytest.raises(ShardError, match=r"Rows, record 13: \w+: .*(handles|full|all)"):
        outcome(stream(Rows(error)))


def test_rows_that_are_no_mappings_or_are_gone_are_counted() -> None:
    rows: list[Any] = [{"text": "a b", "id": i} for i in range(COUNT)]
    rows[AT] = None
    loader = stream(rows, number=lambda i: int(i) if i != 5 else int(rows.pop()["id"] * 0 + 5))
    assert outcome(loader) == (Counter({"list": COUNT - 2}), 2, 0)


@pytest.mark.parametrize("fault", ["a transform", "a null"])
def test_rows_of_a_hugging_face_dataset_are_counted_one_by_one(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {"text": [None if fault == "a null" and i == AT else f"text {i}" for i in range(COUNT)], "id": range(COUNT)}
    )

    def transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if AT in batch["id"]:
            raise ValueError("a bad row")
        return batch

    found = outcome(stream(rows.with_transform(transform) if fault == "a transform" else rows))
    assert found == (Counter(Dataset=COUNT - 1), 1, 0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [0, 1, AT, 300])
def test_a_streaming_dataset_gives_the_rows_before_the_one_that_raises(
    at: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    datasets = pytest.importorskip("datasets")

    def rows(numbers: list[int]) -> Iterator[dict[str, Any]]:
        for number in numbers:
            for i in range(310):
                if (number, i) == (1, at):
                    raise ValueError("a bad row")
                yield {"text": f"text {i}", "id": i}

    source = datasets.IterableDataset.from_generator(rows, gen_kwargs={"numbers": [0, 1]})
    given, _, given_up = outcome(stream(source, workers=workers))
    assert given_up == 1
    assert sorted(given.values()) == [n for n in (at, 310) if n]
    with pytest.raises(ShardError, match=f"from record {at} on: ValueError: a bad row") as caught:
        outcome(stream(source, limit=0))
    assert caught.value.index == at


# --- the limit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("good_before", [0, 30])
def test_reading_stops_soon_after_the_limit_and_the_log_names_a_dozen(
    good_before: int, workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' * good_before + "{}\n" * 3000)
    reading = StreamConfig(lanes=1, max_bad_records=20, bucket_size=16)
    loader = bertstream.stream(path, FakeEncoder(), batch_size=4, num_workers=workers, reading=reading)
    received = 0
    with pytest.raises(ShardError, match="21 broken records and 0 broken shards among") as caught:
        for batch in loader:
            received += len(batch["text"])
    assert caught.value.index == good_before + 20
    assert received == good_before // 16 * 16, "whole buckets alone"
    logged = [record for record in caplog.records if record.name == "bertstream.reading.bad_records"]
    assert len(logged) == 13 and "and 9 more" in caplog.text


def test_texts_that_cannot_be_tokenized_count_towards_the_limit_of_a_lane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any, texts: list[Any]) -> Any:
        raise EncoderError("too long", records=[len(texts) - 1])

    monkeypatch.setattr("bertstream.reading.token_ids.tokenize_batch", refuse)
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' * 600)
    with pytest.raises(ShardError, match="^256 broken records .* among 256 records"):
        list(bertstream.stream(path, FakeEncoder(), reading=StreamConfig(lanes=1, max_bad_records=3)))


# --- places -----------------------------------------------------------------------------------------------------------


def test_a_row_group_that_breaks_after_some_rows_counts_those_that_are_left(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{i:04} " + "x" * 50 for i in range(2000)]})
    pq.write_table(
        table, path, 1000, compression="none", use_dictionary=False, write_statistics=False, data_page_size=4000,
        write_batch_size=50,
    )  # fmt: skip
    data = path.read_bytes()
    at = data.index(b"0600 ")
    start = data.rindex(b"0500 ", 0, at)
    path.write_bytes(data[:start] + b"\xff" * (at - start) + data[at:])
    for skip in (0, 100, 300, 999):
        bad: list[ShardError] = []
        found = list(read_records(Piece(str(path)), LINES, skip=skip, on_bad=bad.append))
        (error,) = bad
        assert error.records is not None and len(found) + error.records == 2000 - skip
        assert texts(found)[-1000:] == table["text"].to_pylist()[1000:]
        assert error.index == 1000 - error.records
        assert f"record{f's {error.index} to' * (error.records > 1)} 999: row group 0" in str(error)


def test_a_link_in_a_tar_is_one_broken_record_among_others(tmp_path: Path) -> None:
    path = shard(tmp_path, "tar", 0, "a link")
    bad: list[ShardError] = []
    options = ReadOptions(fields=["id"])
    assert len(list(read_records(Piece(path), options, on_bad=bad.append))) == COUNT - 1
    (error,) = bad
    assert (error.index, error.field) == (AT, "id") and "is a link" in str(error)
    assert len(read(path, ReadOptions(fields=[]))) == COUNT, "a member that nobody wants is not at fault"


def test_the_records_left_in_a_piece_are_counted_where_they_are_known(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", texts_tar(*"abcdef"))
    pieces = split_shard(path, 3)
    os.truncate(path, os.path.getsize(path) - 1)
    os.unlink(path)
    lost = [read_until_error(path, TAR, start=piece.start, stop=piece.stop)[1].records for piece in pieces]
    assert lost[:-1] == [(piece.stop or 0) - piece.start for piece in pieces[:-1]] and lost[-1] is None
