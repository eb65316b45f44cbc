"""Records of every format are read alike, broken ones name their place, and files are always closed."""

from __future__ import annotations

import gzip
import json
import os
import threading
from pathlib import Path

import pytest
from shard_files import (
    COMPRESS,
    LINES,
    TAR,
    children,
    everything,
    open_files,
    read,
    read_until_error,
    tar_bytes,
    texts,
    texts_tar,
    write,
)

from bertstream.errors import ConfigError, ShardError
from bertstream.reading.access import Access
from bertstream.reading.files import shard_size
from bertstream.reading.options import ReadOptions
from bertstream.reading.pieces import split_shard
from bertstream.reading.records import read_records
from bertstream.reading.shards import Piece
from bertstream.tokens import Record


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(
    ("ending", "data", "text"),
    [
        ("txt", b"one\ntwo\r\n", "text"),
        ("jsonl", b'{"text": "one"}\n{"text": "two"}', "text"),
        ("json", b'{"text": "one"}\n{"text": "two"}\n', "text"),
        ("ndjson", b'{"text": "one"}\r\n\r\n{"text": "two"}\n\n', "text"),
        ("csv", b"text\none\ntwo\n", "text"),
        ("tsv", b"id\ttext\n1\tone\n2\ttwo", "text"),
        ("tar", texts_tar("one", "two"), "txt"),
    ],
)
def test_every_format_is_read_plain_and_compressed(
    tmp_path: Path, ending: str, data: bytes, text: str, compression: str
) -> None:
    path = write(tmp_path / f"a.{ending}{compression}", COMPRESS[compression](data))
    records = read(path, ReadOptions(text=text))
    assert texts(records) == ["one", "two"]
    assert [record.index for record in records] == [0, 1]
    assert {record.shard for record in records} == {path}
    assert [record.key for record in records] == (["000", "001"] if ending == "tar" else ["a:0", "a:1"])


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


def test_several_threads_can_read_at_the_same_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\n" + f'"{"x" * 200_000}"\n' * 20)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(read(path)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [20] * 4


def test_a_negative_skip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="-1"):
        list(read_records(Piece(write(tmp_path / "a.txt", "a")), LINES, skip=-1))


# --- broken records ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "options", "field", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\nnope', LINES, None, "not JSON.*nope"),
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


def test_reading_continues_after_a_broken_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n?\n{"text": "c"}\n!\n{"text": "e"}')
    found = everything([Piece(path)], LINES)
    assert [item.text if isinstance(item, Record) else item for item in found] == ["a", (1, None), "c", (3, None), "e"]
    path = write(tmp_path / "a.csv", b'text,b\na,1\n"b"c,2\nd,\xff\ne,5\n')
    found = everything([Piece(path)], LINES)
    assert [item.text if isinstance(item, Record) else item for item in found] == ["a", (1, None), (2, "b"), "e"]


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


def test_an_empty_file_is_an_error_in_every_format(tmp_path: Path) -> None:
    assert "cut off" in str(read_until_error(write(tmp_path / "a.tar", b""), TAR)[1])
    assert "no record" in str(read_until_error(write(tmp_path / "a.txt.gz", b""))[1])


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "tar"])
def test_a_truncated_compressed_file_names_shard_and_record(tmp_path: Path, ending: str, compression: str) -> None:
    noise = [os.urandom(20).hex() for _ in range(6000)]
    make = {
        "jsonl": lambda: "".join(json.dumps({"text": line}) + "\n" for line in noise).encode(),
        "csv": lambda: "\n".join(["text", *noise]).encode(),
        "tar": lambda: texts_tar(*noise),
    }[ending]
    compressed = COMPRESS[compression](make())
    path = write(tmp_path / f"a.{ending}{compression}", compressed[: len(compressed) - len(compressed) // 4])
    records, error = read_until_error(path, TAR if ending == "tar" else LINES)
    assert 0 < len(records) < 6000 and texts(records) == noise[: len(records)]
    assert (error.path, error.index) == (path, len(records))


@pytest.mark.parametrize("ending", ["txt", "tar"])
def test_a_damaged_gz_raises_even_after_the_last_record(tmp_path: Path, ending: str) -> None:
    damaged = bytearray(gzip.compress(texts_tar("a") if ending == "tar" else b"a\n"))
    damaged[-6] ^= 255  # in the checksum
    _, error = read_until_error(write(tmp_path / f"a.{ending}.gz", bytes(damaged)), TAR if ending == "tar" else LINES)
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


# --- closing files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl.gz", "a.csv", "a.tar", "a.tar.gz", "a.tar.zst", "a.csv.bz2", "a.jsonl.xz", "pipe"]
)
@pytest.mark.parametrize("ending", ["closed", "exhausted", "broken", "stopped", "missing field"])
def test_files_are_closed_however_reading_ends(tmp_path: Path, name: str, ending: str) -> None:
    broken = ending == "broken"
    data = {
        "txt": b"a\n" * 9 + b"\xff" * broken,
        "jsonl": b'{"text": "a"}\n' * 9 + b"?" * broken,
        "csv": b"text\n" + b"a\n" * 9 + b"a,b" * broken,
        "tar": texts_tar(*"aaaaaaaaa")[: -15_000 if broken else None],
    }[name.split(".")[1] if "." in name else "txt"]
    compress = COMPRESS.get(Path(name).suffix, bytes)
    path = write(tmp_path / (name if "." in name else "a.txt"), compress(data))
    field = "txt" if ".tar" in name else "text"
    options = ReadOptions(
        text=field, fields=["none"] if ending == "missing field" else None, access=Access(allow_pipe=True)
    )
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
