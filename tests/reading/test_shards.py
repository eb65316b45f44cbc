"""Shards are read whole, in pieces and from any record on to the same records, and broken ones say where and why."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import pickle
import sys
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
import webdataset
import zstandard
from hypothesis import assume, given
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from bertstream.errors import ConfigError, ShardError
from bertstream.reading import remote
from bertstream.reading.access import Access
from bertstream.reading.files import shard_size
from bertstream.reading.options import ReadOptions
from bertstream.reading.pieces import count_records, split_shard
from bertstream.reading.records import read_records
from bertstream.reading.shards import Piece, expand_shards
from bertstream.tokens import Record

LINES = ReadOptions(text="text")
TAR = ReadOptions(text="txt")
PIPES = Access(allow_pipe=True)
PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def write(path: Path, data: bytes | str) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def tar_bytes(members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def texts_tar(*texts: str) -> bytes:
    members = ([(f"{i:03}.txt", text.encode()), (f"{i:03}.cls", b"%d" % i)] for i, text in enumerate(texts))
    return tar_bytes(list(itertools.chain.from_iterable(members)))


def read(path: str, options: ReadOptions = LINES, **piece: Any) -> list[Record]:
    return list(read_records(Piece(path, **piece), options))


def texts(records: list[Record]) -> list[Any]:
    return [record.text for record in records]


def read_until_error(path: str, options: ReadOptions = LINES, **piece: Any) -> tuple[list[Record], ShardError]:
    records: list[Record] = []
    with pytest.raises(ShardError) as caught:
        records.extend(read_records(Piece(path, **piece), options))
    return records, caught.value


def everything(pieces: list[Piece], options: ReadOptions) -> list[Record | tuple[int | None, str | None]]:
    """All records of the pieces, and a mark for each broken one, which is passed as the docstring says."""
    found: list[Record | tuple[int | None, str | None]] = []
    for piece in pieces:
        skip = 0
        while True:
            try:
                found.extend(read_records(piece, options, skip=skip))
            except ShardError as error:
                found.append((error.index, error.field))
                if error.index is not None and error.index >= piece.start + skip:
                    skip = error.index - piece.start + 1
                    continue
            break
    return found


def open_files() -> set[str]:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("open files are counted in /proc only")
    return {f"{entry.name} -> {os.readlink(entry)}" for entry in folder.iterdir() if entry.exists()}


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("ending", "data", "text"),
    [
        ("txt", b"one\ntwo\r\n", "text"),
        ("jsonl", b'{"text": "one"}\n{"text": "two"}', "text"),
        ("ndjson", b'{"text": "one"}\r\n\r\n{"text": "two"}\n\n', "text"),
        ("csv", b"text\none\ntwo\n", "text"),
        ("tsv", b"id\ttext\n1\tone\n2\ttwo", "text"),
        ("tar", texts_tar("one", "two"), "txt"),
    ],
)
def test_every_format_is_read_plain_and_packed(
    tmp_path: Path, ending: str, data: bytes, text: str, packing: str
) -> None:
    path = write(tmp_path / f"a.{ending}{packing}", PACK[packing](data))
    records = read(path, ReadOptions(text=text))
    assert texts(records) == ["one", "two"]
    assert [record.index for record in records] == [0, 1]
    assert {record.shard for record in records} == {path}
    assert [record.key for record in records] == (["000", "001"] if ending == "tar" else ["a:0", "a:1"])


def test_endings_are_known_in_capitals_and_as_tgz(tmp_path: Path) -> None:
    assert texts(read(write(tmp_path / "A.TXT", "x"))) == ["x"]
    assert texts(read(write(tmp_path / "a.tgz", gzip.compress(texts_tar("x"))), TAR)) == ["x"]


def test_an_unknown_ending_lists_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", "x")
    for call in (lambda: expand_shards(path), lambda: split_shard(path, 2), lambda: read(path)):
        with pytest.raises(ConfigError, match=r"a\.arrow.*\.tar, .*\.txt"):
            call()


def test_fields_stay_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": [1, null], "text": "x", "b": {"c": 0.5}}')
    assert read(path) == [Record("x", {"a": [1, None], "b": {"c": 0.5}}, "a:0", path, 0)]
    path = write(tmp_path / "a.csv", 'text,label\n"a ""b"", c\nd",7\n')
    assert read(path) == [Record('a "b", c\nd', {"label": "7"}, "a:0", path, 0)]


def test_fields_are_chosen_by_name_and_passed_through_functions(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label,other\nx,7,8\n")
    assert read(path, ReadOptions(fields=["label"]))[0].fields == {"label": "7"}
    assert read(path, ReadOptions(fields={"label": int}))[0].fields == {"label": 7}
    assert read(path, ReadOptions(fields=[]))[0].fields == {}


def test_a_list_of_words_is_a_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": ["New", "York"]}\n{"text": []}')
    assert texts(read(path)) == [["New", "York"], []]


def test_empty_lines_are_texts_in_txt_and_nothing_elsewhere(tmp_path: Path) -> None:
    assert texts(read(write(tmp_path / "a.txt", "\na\n\n"))) == ["", "a", ""]
    assert texts(read(write(tmp_path / "a.jsonl", '\n{"text": ""}\n\r\n{"text": "b"}\n\n'))) == ["", "b"]
    assert texts(read(write(tmp_path / "a.csv", '\ntext\n\n""\n\r\nb\n\n'))) == ["", "b"]


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, ending: str) -> None:
    data = {"txt": "one\ntwo\n", "jsonl": '{"text": "one"}\n{"text": "two"}\n', "csv": "text\none\ntwo\n"}[ending]
    path = write(tmp_path / f"a.{ending}", b"\xef\xbb\xbf" + data.encode())
    assert texts(read(path)) == ["one", "two"]
    assert everything(split_shard(path, 2), LINES) == read(path)


def test_a_text_of_several_megabytes_is_read(tmp_path: Path) -> None:
    long = "wörter " * 500_000
    cases: list[tuple[str, str | bytes, ReadOptions]] = [
        ("txt", long, LINES),
        ("jsonl", json.dumps({"text": long}), LINES),
        ("csv", f'text,b\n"{long}",1\n', LINES),
        ("tar", texts_tar(long), TAR),
    ]
    for ending, data, options in cases:
        assert texts(read(write(tmp_path / f"a.{ending}", data), options)) == [long]


def test_reading_csv_only_raises_the_limit_of_the_process(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\nx\n")
    before = csv.field_size_limit(2**31 + 5)
    try:
        read(path)
        assert csv.field_size_limit() == 2**31 + 5
    finally:
        csv.field_size_limit(before)


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
    ],
)
def test_bad_options_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReadOptions(**arguments)


# --- tar --------------------------------------------------------------------------------------------------------------


def test_what_webdataset_writes_is_what_we_read_and_what_webdataset_reads(tmp_path: Path) -> None:
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
        "meta.json": b'{"a": 1}', "npy": b"\x93NUMPY", "PNG": b"p", "txt.gz": b"q",
    }  # fmt: skip
    path = write(tmp_path / "a.tar", tar_bytes([(f"k.{name}", payload) for name, payload in members.items()]))
    assert read(path, TAR)[0].fields == {
        "en.text": "u", "cls": 7, "class.id": -1, "score": 0.5, "jsn": [1],
        "meta.json": {"a": 1}, "npy": b"\x93NUMPY", "png": b"p", "txt.gz": b"q",
    }  # fmt: skip


def test_the_text_is_found_in_the_json_member_or_under_any_ending(tmp_path: Path) -> None:
    members = [("k.json", b'{"sentence": "in json", "words": ["a", "b"]}'), ("k.de", "außen".encode())]
    path = write(tmp_path / "a.tar", tar_bytes(members))
    assert texts(read(path, ReadOptions(text="sentence"))) == ["in json"]
    assert texts(read(path, ReadOptions(text="words", fields=[]))) == [["a", "b"]]
    assert texts(read(path, ReadOptions(text="de", fields=["sentence"]))) == ["außen"]


def test_members_that_are_not_wanted_are_not_looked_at(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", tar_bytes([("k.cls", b"?"), ("k.txt", b"x"), ("k.id", b"7")]))
    assert read(path, ReadOptions(text="txt", fields=["id"]))[0].fields == {"id": 7}
    assert read_until_error(path, TAR)[1].field == "cls"


def test_folders_hidden_files_and_meta_members_are_no_records(tmp_path: Path) -> None:
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
def test_long_and_foreign_names_are_read_in_every_tar_format(tmp_path: Path, format: int) -> None:
    names = ["f" * 90 + "/" + "k" * 80, "é" * 30, "short"]
    data = tar_bytes([(f"{name}.{end}", b"1") for name in names for end in ("txt", "cls")], format)
    path = write(tmp_path / "a.tar", data)
    assert [record.key for record in read(path, TAR)] == names
    assert everything(split_shard(path, 3), TAR) == read(path, TAR)


def test_nothing_in_a_tar_is_ever_run(tmp_path: Path) -> None:
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
    assert trace.exists()  # so it would have shown


def test_a_tar_cut_anywhere_is_noticed(tmp_path: Path) -> None:
    data = tar_bytes([(f"{i}.json", json.dumps({"txt": "x" * 700 * i}).encode()) for i in range(3)])
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512  # of the last member
    whole = read(write(tmp_path / "a.tar", data), TAR)
    for size in [*range(1, end, 37), *range(512, end + 1, 512)]:
        for path, cut in [(tmp_path / "a.tar", data[:size]), (tmp_path / "a.tar.gz", gzip.compress(data[:size], 1))]:
            records, error = read_until_error(write(path, cut), TAR)
            assert texts(records) == texts(whole)[: len(records)]
            assert "cut off" in str(error), (size, error)
            assert (error.path, error.index) == (str(path), len(records))


def test_a_cut_inside_a_large_member_is_noticed_though_it_is_passed_over(tmp_path: Path) -> None:
    data = tar_bytes([("a.txt", b"a"), ("b.txt", b"b"), ("b.bin", b"x" * 3_000_000)])
    for path, cut in [(tmp_path / "a.tar", data[:2_000_000]), (tmp_path / "a.tar.gz", gzip.compress(data[:2_000_000]))]:
        for options, skip in [(ReadOptions(text="txt", fields=[]), 0), (TAR, 2)]:
            with pytest.raises(ShardError, match="cut off.* inside a member"):
                list(read_records(Piece(write(path, cut)), options, skip=skip))


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_a_broken_header_in_mid_file_is_noticed_even_while_skipping(tmp_path: Path, skip: int) -> None:
    data = bytearray(texts_tar("one", "two", "three"))
    at = data.index(b"001.txt")
    data[at + 20] ^= 1
    path = write(tmp_path / "a.tar", bytes(data))
    with pytest.raises(ShardError, match=rf"no valid tar header at byte {at}.*bad checksum") as caught:
        list(read_records(Piece(path), TAR, skip=skip))
    # Whether record 0 ended before the broken header, nobody can tell, so it is not handed out.
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


def test_a_global_header_is_never_cut_off_from_its_members(tmp_path: Path) -> None:
    first, second = texts_tar("a", "b"), tar_bytes([("last.txt", b"x" * 9000)])
    data = first[: 8 * 512] + tarfile.TarInfo.create_pax_global_header({"path": "renamed.txt"}) + second
    path = write(tmp_path / "a.tar", data)
    assert [record.key for record in read(path, TAR)] == ["000", "001", "renamed"]
    for parts in range(2, 20):
        assert everything(split_shard(path, parts), TAR) == read(path, TAR)


@given(st.binary(max_size=3000), st.integers(0, 7000))
def test_damaged_tars_end_in_shard_errors_only(tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int) -> None:
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


# --- broken records ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "options", "field", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\nnope', LINES, None, "not JSON.*nope"),
        ("a.jsonl", b'{"text": "a"}\n  \n', LINES, None, "not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["text"]', LINES, None, r"not an object: \['text'\]"),
        ("a.jsonl", b'{"text": "a"}\n{"b": 1}', LINES, "text", r"no such field; it has \['b'\]"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}', LINES, "text", "not None"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3.5}', LINES, "text", r"not 3\.5"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ["b", 1]}', LINES, "text", r"not \['b', 1\]"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud83d!"}', LINES, "text", "surrogate"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', LINES, None, "not UTF-8: byte 0xff"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, LINES, None, "not JSON"),
        ("a.jsonl", b'{"text": "a", "n": 1}\n{"text": "b"}', ReadOptions(fields=["n"]), "n", "no such field"),
        (
            "a.jsonl",
            b'{"text": "a", "n": "1"}\n{"text": "b", "n": "one"}',
            ReadOptions(fields={"n": int}),
            "n",
            "raised ValueError.*'one'",
        ),
        ("a.txt", b"a\n\xc3(\n", LINES, "text", "not UTF-8: byte 0xc3"),
        ("a.csv", b"text,b\na,1\nb\n", LINES, None, r"1 fields under a header of 2 columns: \['b'\]"),
        ("a.csv", b"text,b\na,1\nb,2,3\n", LINES, None, "3 fields under a header of 2"),
        ("a.csv", b"text,b\na,1\n\xff,2\n", LINES, "text", "not UTF-8: byte 0xff"),
        ("a.csv", b'text,b\na,1\n"b"c,2\n', LINES, None, "cannot be parsed"),
        ("a.csv", b'text,b\na,1\n"b,2\nc,3\n', LINES, None, "cannot be parsed"),
        ("a.csv", b"text,b\na,1\nb\rc,2\n", LINES, None, "cannot be parsed"),
        ("a.tar", tar_bytes([("0.txt", b"a"), ("1.cls", b"1")]), TAR, "txt", r"no such field; it has \['cls'\]"),
        (
            "a.tar",  # also where only the text is read
            tar_bytes([("0.txt", b"a"), ("1.cls", b"1"), ("1.text", b"b")]),
            ReadOptions(text="txt", fields=()),
            "txt",
            r"no such field; it has \['cls', 'text'\]",
        ),
        ("a.tar", tar_bytes([("0.txt", b"a"), ("1.txt", b"b"), ("1.TXT", b"c")]), TAR, "txt", "two members"),
        (
            "a.tar",
            tar_bytes([("0.txt", b"a"), ("1.txt", b"b"), ("1.cls", b"x")]),
            TAR,
            "cls",
            "read as int, but holds b'x'",
        ),
        ("a.tar", tar_bytes([("0.txt", b"a"), ("1.txt", b"b"), ("1.score", b"")]), TAR, "score", "read as float"),
        ("a.tar", tar_bytes([("0.txt", b"a"), ("1.txt", b"b"), ("1.json", b"{")]), TAR, "json", "not JSON"),
        ("a.tar", tar_bytes([("0.txt", b"a"), ("1.txt", b"\xff")]), TAR, "txt", "not UTF-8"),
        (
            "a.tar",
            tar_bytes([("0.txt", b"a"), ("1.json", b'{"cls": 1}'), ("1.txt", b"b"), ("1.cls", b"1")]),
            TAR,
            "cls",
            "a key of the json member",
        ),
    ],
)
def test_a_broken_record_is_named_with_place_field_and_value(
    tmp_path: Path, name: str, data: bytes, options: ReadOptions, field: str | None, message: str
) -> None:
    path = write(tmp_path / name, data)
    records, error = read_until_error(path, options)
    assert len(records) == 1
    assert (error.path, error.index, error.field) == (path, 1, field)
    with pytest.raises(ShardError, match=f"(?s)a.*, record 1.*: .*{message}"):
        raise error
    assert len(str(error)) < len(path) + 400


def test_reading_goes_on_after_a_broken_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n?\n{"text": "c"}\n!\n{"text": "e"}')
    found = everything([Piece(path)], LINES)
    assert [item.text if isinstance(item, Record) else item for item in found] == ["a", (1, None), "c", (3, None), "e"]
    path = write(tmp_path / "a.csv", b'text,b\na,1\n"b"c,2\nd,\xff\ne,5\n')
    found = everything([Piece(path)], LINES)
    assert [item.text if isinstance(item, Record) else item for item in found] == ["a", (1, None), (2, "b"), "e"]


def test_a_stray_quote_in_the_middle_of_a_csv_field_is_a_quote(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,b\n5" pipe,1\n6" pipe,2\n')
    assert texts(read(path)) == ['5" pipe', '6" pipe']


def test_nul_bytes_in_csv_are_data_or_a_shard_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,b\na\0c,1\nb,2\n")
    taken = "a\0c" if sys.version_info >= (3, 11) else (0, None)  # the parser of Python 3.10 refuses them
    assert [item.text if isinstance(item, Record) else item for item in everything([Piece(path)], LINES)] == [
        taken,
        "b",
    ]


@pytest.mark.parametrize(
    ("data", "field", "message"),
    [
        ("a,b\n1,2\n", "text", r"no such column; it has \['a', 'b'\]"),
        ("text,a,a\n1,2,3\n", "a", "names it twice"),
        ('"text\n', None, "header is broken"),
    ],
)
def test_a_bad_csv_header_is_an_error_of_the_shard(tmp_path: Path, data: str, field: str | None, message: str) -> None:
    path = write(tmp_path / "a.csv", data)
    _, error = read_until_error(path)
    assert (error.path, error.index, error.field) == (path, None, field)
    with pytest.raises(ShardError, match=message):
        raise error


def test_another_text_field_of_a_txt_is_refused_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="not 'sentence': write text='text'"):
        read(write(tmp_path / "a.txt", "x"), ReadOptions(text="sentence"))


def test_the_cause_of_an_error_in_a_users_function_stays_attached(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "n": {}}')
    _, error = read_until_error(path, ReadOptions(fields={"n": lambda value: value["key"]}))
    assert isinstance(error.__cause__, KeyError)


# --- broken shards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize(
    ("ending", "data"),
    [
        ("txt", b""),
        ("jsonl", b""),
        ("jsonl", b"\n\r\n"),
        ("csv", b""),
        ("tsv", b"text\tb\n"),
        ("tar", tar_bytes([])),
        ("tar", tar_bytes([("README", b"x")])),
    ],
)
def test_a_shard_without_records_is_an_error(tmp_path: Path, ending: str, data: bytes, gz: str) -> None:
    path = write(tmp_path / f"a.{ending}{gz}", gzip.compress(data) if gz else data)
    _, error = read_until_error(path, ReadOptions(text="txt" if ending == "tar" else "text"))
    assert "holds no record" in str(error) and error.path == path
    assert split_shard(path, 3) == [Piece(path)]


def test_a_file_of_no_bytes_is_no_tar_and_no_record(tmp_path: Path) -> None:
    assert "cut off" in str(read_until_error(write(tmp_path / "a.tar", b""), TAR)[1])
    assert "no record" in str(read_until_error(write(tmp_path / "a.txt.gz", b""))[1])


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "tar"])
def test_a_truncated_packed_file_names_the_shard_and_the_record(tmp_path: Path, ending: str, packing: str) -> None:
    noise = [os.urandom(20).hex() for _ in range(9000)]
    data = {
        "jsonl": "".join(json.dumps({"text": line}) + "\n" for line in noise).encode(),
        "csv": "\n".join(["text", *noise]).encode(),
        "tar": texts_tar(*noise),
    }[ending]
    packed = PACK[packing](data)
    path = write(tmp_path / f"a.{ending}{packing}", packed[: len(packed) - len(packed) // 4])
    records, error = read_until_error(path, TAR if ending == "tar" else LINES)
    assert 0 < len(records) < 9000 and texts(records) == noise[: len(records)]
    assert (error.path, error.index) == (path, len(records))


@pytest.mark.parametrize("ending", ["txt", "tar"])
def test_a_damaged_gz_is_noticed_even_behind_the_last_record(tmp_path: Path, ending: str) -> None:
    zipped = bytearray(gzip.compress(texts_tar("a") if ending == "tar" else b"a\n"))
    zipped[-6] ^= 255  # in the checksum
    _, error = read_until_error(write(tmp_path / f"a.{ending}.gz", bytes(zipped)), TAR if ending == "tar" else LINES)
    assert isinstance(error.__cause__, gzip.BadGzipFile)
    _, error = read_until_error(write(tmp_path / f"b.{ending}.gz", b"not gz"), TAR if ending == "tar" else LINES)
    assert isinstance(error.__cause__, gzip.BadGzipFile)


def test_a_missing_shard_and_a_folder_are_shard_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path / "folder.txt"):
        if path.stem == "folder":
            path.mkdir()
        _, error = read_until_error(str(path))
        assert error.path == str(path) and isinstance(error.__cause__, OSError)
    with pytest.raises(ShardError, match="none"):
        split_shard(str(tmp_path / "none.txt"), 2)
    with pytest.raises(ShardError, match="none"):
        shard_size(str(tmp_path / "none.txt"))


# --- pieces and skipping ----------------------------------------------------------------------------------------------

pieces_of_lines = st.sampled_from(["a", "é", "\r", "", " ", "x" * 9])
pieces_of_csv = st.sampled_from(["a", ",", '"', '""', '"b,\nc"', "\n", "\r\n", "\r", "é", "\0", ' "', "x" * 9])
json_lines = st.sampled_from(['{"text": "a"}', '{"text": "ü", "n": 1}', "", "\r", " ", "[]", "\x00"])


@st.composite
def contents(draw: st.DrawFn) -> tuple[str, bytes]:
    """A splittable format, and a file of it, which may well be broken."""
    ending = draw(st.sampled_from(["txt", "jsonl", "csv", "tsv", "tar"]))
    mark = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    if ending == "txt":
        return ending, mark + draw(st.lists(pieces_of_lines).map("\n".join)).encode()
    if ending == "jsonl":
        return ending, mark + draw(st.lists(json_lines).map("\n".join)).encode()
    if ending == "tar":
        names = st.sampled_from(["a", "b", "c", "d/" * 60 + "e", "é", "__meta__", ".hidden"])
        fields = st.sampled_from(["txt", "cls", "json", "bin", ""])
        members = draw(st.lists(st.tuples(names, fields, st.sampled_from([b"1", b"x" * 600, b""]))))
        data = tar_bytes([(f"{name}.{field}" if field else name, payload) for name, field, payload in members])
        return ending, data[: len(data) - draw(st.sampled_from([0, 0, 0, 10_000]))]
    separator = "\t" if ending == "tsv" else ","
    body = draw(st.lists(pieces_of_csv | st.just(f"a{separator}b\n") | st.just(f'"a\n""\n"{separator}b\r\n')))
    header = draw(
        st.sampled_from([f"text{separator}b\n", f'\n"te""xt"{separator}text\r\n', f'text{separator}"b\nc"\n'])
    )
    return ending, mark + (header + "".join(body)).encode()


@given(contents(), st.integers(1, 9), st.sampled_from([1, 7, 30, 1 << 20]))
def test_pieces_hold_the_records_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, content: tuple[str, bytes], parts: int, block_bytes: int
) -> None:
    ending, data = content
    path = write(tmp_path_factory.getbasetemp() / f"pieces.{ending}", data)
    options = TAR if ending == "tar" else LINES
    with mock.patch("bertstream.reading.pieces._BLOCK_BYTES", block_bytes):
        pieces = split_shard(path, parts)
    assert 1 <= len(pieces) <= parts
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop is None
    whole = everything([Piece(path)], options)
    assert everything(pieces, options) == whole
    if len(pieces) > 1:
        assert all(everything([piece], options) for piece in pieces)


@given(contents(), st.sampled_from([1, 7, 1 << 20]))
def test_records_are_counted_as_they_are_read(
    tmp_path_factory: pytest.TempPathFactory, content: tuple[str, bytes], block_bytes: int
) -> None:
    ending, data = content
    assume(data != b"\xef\xbb\xbf")  # in a txt, an empty line
    path = write(tmp_path_factory.getbasetemp() / f"count.{ending}", data)
    options = TAR if ending == "tar" else LINES
    bad: list[ShardError] = []
    try:
        good = list(read_records(Piece(path), options, on_bad=bad.append))
    except ShardError:
        return  # of the whole shard: it is cut off, say, or holds no record
    with mock.patch("bertstream.reading.pieces._BLOCK_BYTES", block_bytes):
        assert count_records(path, options) == len(good) + len(bad)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_records_that_would_have_to_be_unpacked_are_not_counted(tmp_path: Path, packing: str) -> None:
    assert count_records(write(tmp_path / f"a.txt{packing}", PACK[packing](b"one")), LINES) is None
    assert count_records("http://nowhere.invalid/a.txt", LINES) is None


def test_all_members_are_counted_behind_a_global_header_too(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "global"}) as tar:
        for name in ("a.txt", "b.txt", "b.cls", "c.txt"):
            tar.addfile(tarfile.TarInfo(name))
    assert count_records(str(path), TAR) == 3


@pytest.mark.parametrize(
    "row",
    [
        '"a"c,"d\ne",f\n',
        'a\rb,"c\nd",e\n',
        'a","b\n',
        'a,b"\n',
        '"a\0b\nc",d\n',
        '"a ""b""\n\n",""""\n',
        '"a"\r,"b\nc"\n',
    ],
)
def test_rows_that_upset_the_parser_are_cut_where_it_takes_up_again(tmp_path: Path, row: str) -> None:
    for ending in ("", '"never closed,\n1,2\n'):
        path = write(tmp_path / "a.csv", "text,b\n" + 'good,"1\n2"\n' * 3 + row + 'good,"1\n2"\n' * 9 + ending)
        whole = everything([Piece(path)], LINES)
        for parts in range(2, 40):
            assert everything(split_shard(path, parts), LINES) == whole


@given(contents(), st.integers(1, 4), st.integers(0, 12))
def test_skipping_is_dropping(
    tmp_path_factory: pytest.TempPathFactory, content: tuple[str, bytes], parts: int, skip: int
) -> None:
    ending, data = content
    path = write(tmp_path_factory.getbasetemp() / f"skip.{ending}", data)
    options = TAR if ending == "tar" else LINES
    for piece in split_shard(path, parts):
        whole = [item for item in everything([piece], options) if isinstance(item, Record)]
        try:
            left = list(read_records(piece, options, skip=skip))
        except ShardError:
            continue  # a later record is broken, or all of the shard
        assert left == [record for record in whole if record.index >= piece.start + skip]


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv", "tar"])
def test_pieces_are_about_equal_in_bytes(tmp_path: Path, ending: str) -> None:
    lines = [f'{i} "quoted"\nß' if ending == "csv" else f"{i}" for i in range(2000)]
    path, options = tmp_path / f"a.{ending}", LINES
    if ending == "txt":
        write(path, "\n".join(lines))
    elif ending == "jsonl":
        write(path, "\n\n".join(json.dumps({"text": line}) for line in lines))
    elif ending == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text", "b"], *([line, i] for i, line in enumerate(lines))])
    else:
        write(path, texts_tar(*lines))
        options = TAR
    pieces = split_shard(str(path), 7)
    size = path.stat().st_size
    assert len(pieces) == 7
    bounds = [*(piece.offset for piece in pieces), size]
    assert all(abs(end - start - size / 7) < 10_000 for start, end in itertools.pairwise(bounds))
    assert texts([record for piece in pieces for record in read_records(piece, options)]) == lines


def test_large_files_are_split_block_by_block(tmp_path: Path) -> None:
    rows = [(f'{"x" * (i * 7919 % 5000)} "{i}"\n\n' if i % 3 else "", str(i)) for i in range(1500)]  # about 2.5 MB
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "b"), *rows])
    pieces = split_shard(str(path), 40)
    assert path.stat().st_size > 2 << 20 and len(pieces) == 40
    found = [record for piece in pieces for record in read_records(piece, LINES)]
    assert [(record.text, record.fields["b"]) for record in found] == rows
    assert [record.index for record in found] == list(range(1500))


def test_what_cannot_be_sought_stays_whole(tmp_path: Path) -> None:
    zipped = write(tmp_path / "a.txt.gz", gzip.compress(b"a\nb\nc\n"))
    squeezed = write(tmp_path / "a.txt.zst", zstandard.compress(b"a\nb\nc\n"))
    for path in (zipped, squeezed, "memory://a.txt", "pipe:cat a.txt", write(tmp_path / "a.txt", "abc")):
        assert split_shard(path, 3) == [Piece(path)]
    with pytest.raises(ConfigError, match="parts=0"):
        split_shard(zipped, 0)


def test_a_piece_without_an_offset_is_counted_from_the_beginning(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"a\nb\nc\nd\n"))
    assert [(r.text, r.index) for r in read(path, start=1, stop=3)] == [("b", 1), ("c", 2)]
    assert texts(list(read_records(Piece(path, start=1), LINES, skip=1))) == ["c", "d"]


def test_a_shard_that_shrank_since_it_was_split_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a\nb\nc\nd\n")
    first, last = split_shard(path, 2)
    write(tmp_path / "a.txt", "a\n")
    assert "ends after 1 records, but had 2" in str(read_until_error(path, stop=first.stop)[1])
    _, error = read_until_error(path, start=last.start, offset=last.offset)
    assert "no record from 2 on" in str(error)


def test_a_negative_skip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="-1"):
        list(read_records(Piece(write(tmp_path / "a.txt", "a")), LINES, skip=-1))


# --- names ------------------------------------------------------------------------------------------------------------


def test_braces_globs_and_lists_mix(tmp_path: Path) -> None:
    for name in ("b-01.txt", "b-02.txt", "c2.txt", "c1.txt", "d.csv"):
        write(tmp_path / name, "x")
    names: list[str | Path] = [f"{tmp_path}/b-{{01..02}}.txt", tmp_path / "d.csv", f"{tmp_path}/c?.txt"]
    expected = [str(tmp_path / name) for name in ("b-01.txt", "b-02.txt", "d.csv", "c1.txt", "c2.txt")]
    assert expand_shards(names) == expected
    assert expand_shards(tmp_path / "c*.txt") == expected[3:]
    assert expand_shards(f"{tmp_path}/{{b,c}}*.txt") == expected[:2] + expected[3:]
    assert expand_shards(f"{tmp_path}/**/d.csv") == [expected[2]]


def test_a_file_whose_name_looks_like_a_pattern_is_taken_as_it_is(tmp_path: Path) -> None:
    for name in ("a[1].txt", "{a,b}.txt"):
        path = write(tmp_path / name, "x")
        assert expand_shards(path) == [path]
    assert expand_shards(f"{tmp_path}/{{a,a}}[1].txt") == [str(tmp_path / "a[1].txt")] * 2


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], r"there are no shards: got \[\]"),
        ("", "the name of a shard is a str"),
        ([3], "got 3"),
        ("{folder}/none*.txt", "no file matches"),
        ("{folder}/{{1..3.txt", "braces"),
        ("{folder}", r"is a folder.*\*\.tar"),
        ("memory://nothing/*.txt", "no file matches"),
        ("pipe:cat a.txt", "allow_pipe=True"),
        ("pipe:", "ending"),
    ],
)
def test_names_that_stand_for_nothing_are_config_errors(tmp_path: Path, shards: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand_shards(shards.format(folder=tmp_path) if isinstance(shards, str) else shards)


def test_a_missing_local_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "0.txt", "x")
    with pytest.raises(ShardError, match="no such shard") as caught:
        expand_shards(f"{tmp_path}/{{0..2}}.txt")
    assert caught.value.path == str(tmp_path / "1.txt")


# --- URLs and pipes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Any]:
    """The in-memory file system of fsspec, which is one for the process."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


def test_urls_are_read_through_fsspec(tmp_path: Path, memory: Any) -> None:
    for name, data in {"a.txt": b"a\nb\n", "b.txt.gz": gzip.compress(b"c\n"), "c.tar": texts_tar("d", "e")}.items():
        memory.pipe(f"/shards/{name}", data)
    assert expand_shards("memory://shards/*.txt*") == ["memory:///shards/a.txt", "memory:///shards/b.txt.gz"]
    assert texts(read("memory://shards/a.txt")) == ["a", "b"]
    assert texts(read("memory://shards/b.txt.gz")) == ["c"]
    assert texts(read("memory://shards/c.tar", TAR)) == ["d", "e"]
    assert shard_size("memory://shards/a.txt") == 4
    local = write(tmp_path / "a.txt", "x")
    assert texts(read(f"file://{local}")) == ["x"] and shard_size(f"file://{local}") == 1
    cached = expand_shards("simplecache::memory://shards/a*.txt")
    assert cached == ["simplecache::memory:///shards/a.txt"]
    options = ReadOptions(access=Access(storage_options={"simplecache": {"cache_storage": str(tmp_path / "cache")}}))
    assert texts(read(cached[0], options)) == ["a", "b"] and (tmp_path / "cache").exists()


def test_queries_and_chains_do_not_hide_the_ending(memory: Any) -> None:
    expand_shards(["https://host/a.jsonl?token=x.y", "zip://d/a.csv::s3://bucket/b.zip", "filecache::gs://b/a.tar.gz"])
    with pytest.raises(ConfigError, match="ending"):
        expand_shards("https://host/a?name=a.jsonl")


def test_what_a_file_system_raises_becomes_a_shard_error(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, error = read_until_error("memory://none.txt")
    assert error.path == "memory://none.txt" and isinstance(error.__cause__, FileNotFoundError)
    with pytest.raises(ShardError, match="nosuchprotocol"):
        read("nosuchprotocol://a.txt")
    with pytest.raises(ShardError, match=r"memory://none\.txt: cannot be reached"):
        shard_size("memory://none.txt")

    class LosesConnection(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 4:
                raise RuntimeError("connection lost")
            return super().read(4)

    memory.pipe("/a.txt", b"a\nb\nc\n")
    monkeypatch.setattr(type(memory), "open", lambda self, path, mode, block_size: LosesConnection(b"a\nb\nc\n"))
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.001)
    records, error = read_until_error("memory://a.txt")
    assert texts(records) == ["a", "b"]
    assert error.index == 2 and "connection lost" in str(error)


def piped(command: str, text: str = "text") -> Iterator[Record]:
    return read_records(Piece(f"pipe:{command}"), ReadOptions(text=text, access=PIPES))


def test_a_pipe_is_read_where_it_is_allowed(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", texts_tar("x" * 3_000_000, "b"))
    write(tmp_path / "0.txt", "one\n")
    write(tmp_path / "1.txt.gz", gzip.compress(b"two\n"))
    assert texts(list(piped(f"cat {tmp_path}/a.tar", "txt"))) == ["x" * 3_000_000, "b"]
    assert texts(list(piped(f"cat '{tmp_path}/1.txt.gz'"))) == ["two"]
    assert texts(list(piped(f"gzip -dc {tmp_path}/1.txt.gz # .txt"))) == ["two"]
    assert expand_shards(f"pipe:cat {tmp_path}/{{0..1}}.txt", PIPES) == [
        f"pipe:cat {tmp_path}/0.txt",
        f"pipe:cat {tmp_path}/1.txt",
    ]
    assert shard_size(f"pipe:cat {tmp_path}/0.txt") == 0


def test_a_pipe_that_is_not_allowed_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allow_pipe=True"):
        read(f"pipe:touch {tmp_path}/trace; echo a.txt")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("command", "index", "status"),
    [
        ("echo a; exit 3 # .txt", 1, 3),
        ("exit 4 # .tar", 0, 4),
        ("head -c 1000 {tar}; exit 5 # .tar", 0, 5),
        ("cat {tar}; exit 6 # .tar", 2, 6),
        ("nosuchcommand 2> {tar}.log # .jsonl.gz", 0, 127),
    ],
)
def test_a_command_that_fails_is_an_error_with_its_status(
    tmp_path: Path, command: str, index: int, status: int
) -> None:
    tar = write(tmp_path / "a.tar", texts_tar("a", "b"))
    with pytest.raises(ShardError, match=f"ended with status {status}") as caught:
        list(piped(command.format(tar=tar), "txt" if command.endswith(".tar") else "text"))
    assert caught.value.index == index


def processes() -> Iterator[tuple[int, int, bytes]]:
    """(id, parent's id, command line) of every process, zombies included."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            parent = (folder / "stat").read_bytes().rpartition(b")")[2].split()[1]
            yield int(folder.name), int(parent), (folder / "cmdline").read_bytes()


def children() -> set[int]:
    return {process for process, parent, _ in processes() if parent == os.getpid()}


@pytest.mark.parametrize("command", ["yes a # .txt", "yes a | cat # .txt", "echo a; sleep 4321.25; : .txt"])
def test_a_pipe_that_is_left_early_is_ended_at_once(command: str) -> None:
    before, files = children(), open_files()
    records = piped(command)
    assert next(records).text == "a"
    started = time.monotonic()
    records.close()  # type: ignore[attr-defined]
    while any(b"4321.25" in command for _, _, command in processes()):  # the shell's own child, which is not ours
        assert time.monotonic() - started < 5
        time.sleep(0.01)
    assert time.monotonic() - started < 5
    assert children() == before and open_files() == files


# --- leaving nothing open ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.csv", "a.tar", "a.tar.gz", "a.tar.zst", "pipe"])
@pytest.mark.parametrize("ending", ["closed", "exhausted", "broken", "stopped", "missing field"])
def test_files_are_closed_however_reading_ends(tmp_path: Path, name: str, ending: str) -> None:
    broken = ending == "broken"
    data = {
        "txt": b"a\n" * 9 + b"\xff" * broken,
        "jsonl": b'{"text": "a"}\n' * 9 + b"?" * broken,
        "csv": b"text\n" + b"a\n" * 9 + b"a,b" * broken,
        "tar": texts_tar(*"aaaaaaaaa")[: -15_000 if broken else None],
    }[name.split(".")[1] if "." in name else "txt"]
    pack = PACK.get(Path(name).suffix, bytes)
    path = write(tmp_path / (name if "." in name else "a.txt"), pack(data))
    field = "txt" if ".tar" in name else "text"
    options = ReadOptions(text=field, fields=["none"] if ending == "missing field" else None, access=PIPES)
    files, before = open_files(), children()
    records = read_records(
        Piece(f"pipe:cat {path}" if name == "pipe" else path, stop=2 if ending == "stopped" else None), options
    )
    if ending == "closed":
        next(records)
        assert open_files() > files
        records.close()  # type: ignore[attr-defined]
    elif ending in ("broken", "missing field"):
        with pytest.raises(ShardError):
            list(records)
    else:
        assert len(list(records)) == (2 if ending == "stopped" else 9)
    assert open_files() == files and children() == before


def test_several_threads_read_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\n" + f'"{"x" * 200_000}"\n' * 20)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(read(path)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [20] * 4
