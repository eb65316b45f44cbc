"""Tars are read as webdataset reads them, and cut, broken or hostile ones raise."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from shard_files import TAR, everything, read, read_until_error, tar_bytes, texts, texts_tar, write
from webdataset.tariterators import group_by_keys, tar_file_expander

from bertstream.errors import ShardError
from bertstream.reading.access import Access
from bertstream.reading.options import ReadOptions
from bertstream.reading.pieces import split_shard
from bertstream.reading.records import read_records
from bertstream.reading.shards import Piece
from bertstream.tokens import Record


def test_a_tar_of_webdataset_reads_as_webdataset_reads_it(tmp_path: Path) -> None:
    path = str(tmp_path / "a.tar")
    with webdataset.TarWriter(path) as writer:
        for i, text in enumerate(["é", "", "b" * 5000]):
            writer.write({"__key__": f"dir/x{i}", "txt": text, "cls": i, "json": {"n": i}, "bin": b"\0\1"})
    records = read(path, TAR)
    with open(path, "rb") as stream:
        theirs = list(group_by_keys(tar_file_expander([{"url": path, "stream": stream}])))
    assert texts(records) == [sample["txt"].decode() for sample in theirs] == ["é", "", "b" * 5000]
    assert [record.key for record in records] == [sample["__key__"] for sample in theirs]
    assert [record.fields for record in records] == [{"bin": b"\0\1", "cls": i, "n": i} for i in range(3)]


def test_members_are_decoded_by_name_only(tmp_path: Path) -> None:
    members = {
        "txt": b"t", "en.text": b"u", "cls": b" 7\n", "class.id": b"-1", "score": b"0.5", "jsn": b"[1]",
        "meta.json": b'{"a": 1}', "npy": b"\x93NUMPY", "PNG": b"p", "bin.gz": b"q",
    }  # fmt: skip
    path = write(tmp_path / "a.tar", tar_bytes([(f"k.{name}", payload) for name, payload in members.items()]))
    assert read(path, TAR)[0].fields == {
        "en.text": "u", "cls": 7, "class.id": -1, "score": 0.5, "jsn": [1],
        "meta.json": {"a": 1}, "npy": b"\x93NUMPY", "png": b"p", "bin.gz": b"q",
    }  # fmt: skip


def test_the_text_may_be_a_member_or_a_key_of_the_json_member(tmp_path: Path) -> None:
    members = [("k.json", b'{"sentence": "in json", "words": ["a", "b"]}'), ("k.de", "außen".encode())]
    path = write(tmp_path / "a.tar", tar_bytes(members))
    assert texts(read(path, ReadOptions(text="sentence"))) == ["in json"]
    assert texts(read(path, ReadOptions(text="words", fields=[]))) == [["a", "b"]]
    assert texts(read(path, ReadOptions(text="de", fields=["sentence"]))) == ["außen"]


def test_unwanted_members_are_not_decoded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", tar_bytes([("k.cls", b"?"), ("k.txt", b"x"), ("k.id", b"7")]))
    assert read(path, ReadOptions(text="txt", fields=["id"]))[0].fields == {"id": 7}
    assert read_until_error(path, TAR)[1].field == "cls"


def test_folders_hidden_files_and_meta_members_are_skipped(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        folder = tarfile.TarInfo("d.x")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("__meta__", "__index__/a.json", "README", ".hidden", "d.x/._k.txt", "d.x/k.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"a"))
    records = read(write(tmp_path / "a.tar", buffer.getvalue()), TAR)
    assert [(record.key, record.text) for record in records] == [("d.x/k", "a")]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_non_ascii_names_are_read_in_every_tar_format(tmp_path: Path, format: int) -> None:
    names = ["f" * 90 + "/" + "k" * 80, "é" * 30, "short"]
    data = tar_bytes([(f"{name}.{end}", b"1") for name in names for end in ("txt", "cls")], format)
    path = write(tmp_path / "a.tar", data)
    assert [record.key for record in read(path, TAR)] == names
    assert everything(split_shard(path, 3), TAR) == read(path, TAR)


def test_nothing_in_a_tar_is_ever_unpickled(tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    class Hostile:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return (open, (str(trace), "w"))

    payload = pickle.dumps(Hostile())
    names = ["pkl", "pyd", "pickle", "pth", "pt", "npy", "mp"]
    members = [("k.txt", b"x"), *((f"k.{name}", payload) for name in names)]
    path = write(tmp_path / "a.tar", tar_bytes(members))
    assert read(path, TAR)[0].fields == dict.fromkeys(names, payload)
    assert not trace.exists()
    pickle.loads(payload).close()
    assert trace.exists()  # so unpickling would have left a trace


def test_a_tar_cut_off_anywhere_raises(tmp_path: Path) -> None:
    data = tar_bytes([(f"{i}.json", json.dumps({"txt": "x" * 700 * i}).encode()) for i in range(3)])
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512  # of the last member
    whole = read(write(tmp_path / "a.tar", data), TAR)
    for size in [*range(1, end, 37), *range(512, end + 1, 512)]:
        for path, cut in [(tmp_path / "a.tar", data[:size]), (tmp_path / "a.tar.gz", gzip.compress(data[:size], 1))]:
            records, error = read_until_error(write(path, cut), TAR)
            assert texts(records) == texts(whole)[: len(records)]
            assert "cut off" in str(error), (size, error)
            assert (error.path, error.index) == (str(path), len(records))


def test_a_cut_inside_a_large_skipped_member_raises(tmp_path: Path) -> None:
    data = tar_bytes([("a.txt", b"a"), ("b.txt", b"b"), ("b.bin", b"x" * 3_000_000)])
    for path, cut in [(tmp_path / "a.tar", data[:2_000_000]), (tmp_path / "a.tar.gz", gzip.compress(data[:2_000_000]))]:
        for options, skip in [(ReadOptions(text="txt", fields=[]), 0), (TAR, 2)]:
            with pytest.raises(ShardError, match="cut off.* inside a member"):
                list(read_records(Piece(write(path, cut)), options, skip=skip))


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_a_broken_header_in_the_middle_raises_even_while_skipping(tmp_path: Path, skip: int) -> None:
    data = bytearray(texts_tar("one", "two", "three"))
    at = data.index(b"001.txt")
    data[at + 20] ^= 1
    path = write(tmp_path / "a.tar", bytes(data))
    with pytest.raises(ShardError, match=rf"no valid tar header at byte {at}.*bad checksum") as caught:
        list(read_records(Piece(path), TAR, skip=skip))
    # Record 0 may go on in the broken header, so it is not yielded.
    assert caught.value.index == (1 if skip else 0)


def test_archives_joined_end_to_end_are_refused(tmp_path: Path) -> None:
    records, error = read_until_error(write(tmp_path / "a.tar", texts_tar("a") + texts_tar("b")), TAR)
    assert len(records) == 1 and "joined archives" in str(error)


@pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, b"Z"])
def test_links_and_special_members_are_refused(tmp_path: Path, type: bytes) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("k.txt")
        info.type, info.linkname = type, "other.txt"
        tar.addfile(info)
    _, error = read_until_error(write(tmp_path / "a.tar", buffer.getvalue()), TAR)
    assert "k.txt" in str(error)


@pytest.mark.parametrize("size", [-1, -600, -(2**40), 2**50, 2**62, 2**80])
def test_a_header_with_an_impossible_size_neither_hangs_nor_fills_the_memory(tmp_path: Path, size: int) -> None:
    data = texts_tar("one", "two")
    at = data.index(b"001.txt")
    info = tarfile.TarInfo("001.txt")
    info.size = size
    header = info.tobuf(tarfile.GNU_FORMAT)
    for skip in (0, 5):
        with pytest.raises(ShardError, match="impossible size|cut off"):
            list(read_records(Piece(write(tmp_path / "a.tar", data[:at] + header + data[at + 512 :])), TAR, skip=skip))


def test_a_sparse_header_with_a_negative_size_does_not_hang(tmp_path: Path) -> None:
    info = tarfile.TarInfo(".hidden")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, -1024
    data = texts_tar("one")
    _, error = read_until_error(
        write(tmp_path / "a.tar", data[:2048] + info.tobuf(tarfile.GNU_FORMAT) + data[2048:]), TAR
    )
    assert "impossible size" in str(error)


def test_a_tar_is_not_cut_after_a_global_header(tmp_path: Path) -> None:
    first, second = texts_tar("a", "b"), tar_bytes([("last.txt", b"x" * 9000)])
    data = first[: 8 * 512] + tarfile.TarInfo.create_pax_global_header({"path": "renamed.txt"}) + second
    path = write(tmp_path / "a.tar", data)
    assert [record.key for record in read(path, TAR)] == ["000", "001", "renamed"]
    for parts in range(2, 20):
        assert everything(split_shard(path, parts), TAR) == read(path, TAR)


@given(st.binary(max_size=3000), st.integers(0, 7000))
def test_damaged_tars_raise_only_shard_errors(tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int) -> None:
    data = bytearray(tar_bytes([("f" * 120 + "é.txt", b"x" * 600), ("b.txt", b""), ("b.json", b'{"a": 1}')]))
    data[at : at + len(noise)] = noise
    path = write(tmp_path_factory.getbasetemp() / "damaged.tar", bytes(data))
    for piece in (Piece(path), *split_shard(path, 3)):
        with contextlib.suppress(ShardError):
            assert len(list(read_records(piece, TAR))) <= 2


def test_memory_stays_flat_over_many_members(tmp_path: Path) -> None:
    path = str(tmp_path / "a.tar")
    with webdataset.TarWriter(path) as writer:
        for i in range(4000):
            writer.write({"__key__": f"{i:06}", "txt": "x"})
    records = read_records(Piece(path), TAR)
    for _ in range(1000):
        next(records)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        assert sum(1 for _ in records) == 3000
        assert tracemalloc.get_traced_memory()[0] - before < 50_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "payload", "value"),
    [
        ("txt", b"one", "one"),
        ("json", b'["one"]', ["one"]),
        ("cls", b"7", 7),
        ("score", b"0.5", 0.5),
        ("text", b"x", "x"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_a_member(tmp_path: Path, name: str, payload: bytes, value: object) -> None:
    members = [("0.sentence", b"\xef\xbb\xbfone"), (f"0.{name}", b"\xef\xbb\xbf" + payload), ("0.bin", b"\xef\xbb\xbf")]
    (record,) = read(write(tmp_path / "a.tar", tar_bytes(members)), ReadOptions(text="sentence"))
    assert (record.text, record.fields) == ("one", {name: value, "bin": b"\xef\xbb\xbf"})


def test_a_record_beyond_max_record_bytes_is_broken_and_its_neighbours_are_read(tmp_path: Path) -> None:
    members = [(f"{i}.{name}", b"x" * (600 if i == 1 else 5)) for i in range(3) for name in ("txt", "bin")]
    path = write(tmp_path / "a.tar", tar_bytes(members))
    options = ReadOptions(text="txt", access=Access(max_record_bytes=1000))
    found = everything([Piece(path)], options)
    assert [item.index if isinstance(item, Record) else item for item in found] == [0, (1, "bin"), 2]
    assert "more than 1000 bytes in its members up to '1.bin'" in str(read_until_error(path, options)[1])
    assert len(read(path, ReadOptions(text="txt", fields=[], access=Access(max_record_bytes=1000)))) == 3
