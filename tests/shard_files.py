"""Shards of every format for tests, and ways to read them whole."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import itertools
import lzma
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from bertstream.errors import ShardError
from bertstream.reading.options import ReadOptions
from bertstream.reading.records import read_records
from bertstream.reading.shards import Piece
from bertstream.tokens import Record

LINES = ReadOptions(text="text")
TAR = ReadOptions(text="txt")
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


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


def read(path: str, options: ReadOptions = LINES, *, skip: int = 0, **piece: Any) -> list[Record]:
    return list(read_records(Piece(path, **piece), options, skip=skip))


def texts(records: list[Record]) -> list[Any]:
    return [record.text for record in records]


def read_until_error(path: str, options: ReadOptions = LINES, **piece: Any) -> tuple[list[Record], ShardError]:
    records: list[Record] = []
    with pytest.raises(ShardError) as caught:
        records.extend(read_records(Piece(path, **piece), options))
    return records, caught.value


def everything(pieces: list[Piece], options: ReadOptions) -> list[Record | tuple[int | None, str | None]]:
    """All records of the pieces; a broken one is (index, field), and reading continues with `skip`."""
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
        pytest.skip("open files can be counted only in /proc")
    return {f"{entry.name} -> {os.readlink(entry)}" for entry in folder.iterdir() if entry.exists()}


def processes() -> Iterator[tuple[int, int, bytes]]:
    """(id, parent's id, command line) of every process, zombies included."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended
            parent = (folder / "stat").read_bytes().rpartition(b")")[2].split()[1]
            yield int(folder.name), int(parent), (folder / "cmdline").read_bytes()


def children() -> set[int]:
    return {process for process, parent, _ in processes() if parent == os.getpid()}
