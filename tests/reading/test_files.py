"""Compressed files and the output of commands are read whole, and failures raise."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shard_files import children, open_files, processes, texts, texts_tar, write

from bertstream.errors import ShardError
from bertstream.reading.access import DEFAULT_ACCESS, Access
from bertstream.reading.files import open_bytes, shard_size
from bertstream.reading.options import ReadOptions
from bertstream.reading.records import read_records
from bertstream.reading.shards import Piece, expand_shards
from bertstream.tokens import Record

MIB = 1 << 20


def content(path: str, access: Access = DEFAULT_ACCESS, compression: str = "") -> bytes:
    with open_bytes(path, access, compression) as stream:
        return stream.read()


# --- commands ---------------------------------------------------------------------------------------------------------


def piped(command: str, text: str = "text") -> Iterator[Record]:
    return read_records(Piece(f"pipe:{command}"), ReadOptions(text=text, access=Access(allow_pipe=True)))


def test_an_allowed_pipe_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", texts_tar("x" * 3_000_000, "b"))
    write(tmp_path / "0.txt", "one\n")
    write(tmp_path / "1.txt.gz", gzip.compress(b"two\n"))
    assert texts(list(piped(f"cat {tmp_path}/a.tar", "txt"))) == ["x" * 3_000_000, "b"]
    assert texts(list(piped(f"cat '{tmp_path}/1.txt.gz'"))) == ["two"]
    assert texts(list(piped(f"gzip -dc {tmp_path}/1.txt.gz # .txt"))) == ["two"]
    assert expand_shards(f"pipe:cat {tmp_path}/{{0..1}}.txt", Access(allow_pipe=True)) == [
        f"pipe:cat {tmp_path}/0.txt",
        f"pipe:cat {tmp_path}/1.txt",
    ]
    assert shard_size(f"pipe:cat {tmp_path}/0.txt") == 0


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


@pytest.mark.parametrize("command", ["yes a # .txt", "yes a | cat # .txt", "echo a; sleep 4321.25; : .txt"])
def test_closing_a_pipe_early_kills_its_processes(command: str) -> None:
    before, files = children(), open_files()
    records = piped(command)
    assert next(records).text == "a"
    started = time.monotonic()
    records.close()  # type: ignore[attr-defined]
    while any(b"4321.25" in command for _, _, command in processes()):  # a child of the shell, not of this process
        assert time.monotonic() - started < 5
        time.sleep(0.01)
    assert time.monotonic() - started < 5
    assert children() == before and open_files() == files
