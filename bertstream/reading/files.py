"""The bytes of a shard: on disk, behind a URL or written by a command, as they are or unpacked.

A read behind a URL that fails is tried again from the byte where it broke off. What still fails is a `RemoteReadError`;
a packed file that ends too early is an EOFError, and one that is damaged another OSError: they are never mixed up.
"""

from __future__ import annotations

import gzip
import io
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, cast

from fsspec.core import url_to_fs

from ..errors import ShardError, described
from .access import BUFFER_BYTES, Access, check_installed, check_pipe, is_local, is_pipe
from .remote import RemoteFile, copy_path, local_copy, retried
from .stall_watch import Watch

# Packed bytes that are unpacked at once: the most extreme zstd data grows 32,000 times.
_ZSTD_CHUNK_BYTES = 1 << 10


def size_of(path: str, access: Access) -> int:
    """Bytes of a shard as it is stored; 0 where that cannot be known: for a pipe, or a server that does not say.

    Raises:
        ShardError: the shard is missing or cannot be reached.
    """
    if is_pipe(path):
        return 0
    try:
        if is_local(path):
            return os.stat(path).st_size
        if access.shard_cache is not None and os.path.exists(copy := copy_path(path, access.shard_cache)):
            return os.stat(copy).st_size

        def size() -> int:
            filesystem, name = url_to_fs(path, **access.storage_options)
            return int(filesystem.info(name).get("size") or 0)

        return retried(path, size)
    except Exception as error:  # what a file system behind fsspec raises is its own choice
        raise ShardError(f"{path}: cannot be reached: {described(error)}", path=path) from error


def on_disk(path: str, access: Access) -> str | None:
    """The path of a file with a shard's bytes: its own, or that of its copy in the cache, which is made if need be.

    Returns:
        None for a pipe, and for a URL without a cache.
    Raises:
        OSError or another error, of fsspec's choice: the copy cannot be made.
    """
    if is_local(path):
        return path
    return None if is_pipe(path) or access.shard_cache is None else local_copy(path, access)


@contextmanager
def open_bytes(path: str, access: Access, packing: str = "") -> Iterator[BinaryIO]:
    """The shard's bytes, unpacked, buffered; everything is closed on leaving.

    Args:
        path: a path, URL or `pipe:` command.
        access: how it is opened.
        packing: "gz", "zst" or, for none, "".
    Yields:
        A binary stream. It can be sought unless it is a pipe or packed, though behind a server that does not know Range
        only by reading.
    Raises:
        ConfigError: a pipe is not allowed, or zstandard is not installed.
        RemoteReadError: here or while reading: the bytes behind a URL could not be had.
        OSError, EOFError or, for URLs, another error: missing, unreadable, cut off or damaged.
    """
    with ExitStack() as stack:
        source: io.RawIOBase
        if is_pipe(path):
            check_pipe(path, access)
            source = _CommandOutput(path, access)
        elif (file := on_disk(path, access)) is not None:
            source = open(file, "rb", buffering=0)  # noqa: SIM115 - the stack closes it
        else:
            source = RemoteFile(path, access)
        stream = stack.enter_context(io.BufferedReader(source, BUFFER_BYTES))
        if packing:
            if packing == "zst":
                check_installed(path, "zstandard", "zstd")
            unpacked: Any = stack.enter_context(_Unzipped(fileobj=stream) if packing == "gz" else _Unzstd(stream))
            stream = stack.enter_context(io.BufferedReader(unpacked, BUFFER_BYTES))
        yield stream


# --- commands and packed files ----------------------------------------------------------------------------------------


class _Unzipped(gzip.GzipFile):
    """Hands out what it has rather than filling the buffer first, so that all records before a cut are read."""

    def readinto(self, buffer: Any) -> int:
        return self.readinto1(buffer)


class _Unzstd(io.RawIOBase):
    """The contents of zstd frames. zstandard's own readers end silently where a file is cut off."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = cast(io.BufferedReader, source)
        self._frame: Any = None  # the one that has begun and not ended
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._source.read1(_ZSTD_CHUNK_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file is cut off: it ends inside a zstd frame")
                return 0
            self._unpacked = memoryview(self._unpack())
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count

    def _unpack(self) -> bytes:
        import zstandard

        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            unpacked: bytes = self._frame.decompress(self._packed)
        except zstandard.ZstdError as error:
            raise OSError(f"the file is damaged, or not zstd: {error}") from error
        self._packed = b""
        if self._frame.eof:
            self._packed = self._frame.unused_data
            self._frame = None
        return unpacked


class _CommandOutput(io.RawIOBase):
    """What a shell command writes. Its end is an OSError unless the command exited with status 0."""

    def __init__(self, path: str, access: Access) -> None:
        self._command = path.removeprefix("pipe:")
        self._watch = Watch(path, access.stall_warning_s)
        # A session of its own, so that closing can end the shell's children too.
        self._process = subprocess.Popen(
            self._command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._watch:
            read = cast(io.RawIOBase, self._process.stdout).readinto(buffer)
        if not read and self._process.wait() != 0:
            raise OSError(f"the command {self._command!r} ended with status {self._process.returncode}")
        return read or 0

    def close(self) -> None:
        if not self.closed:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            cast(io.RawIOBase, self._process.stdout).close()
            self._process.wait()
            self._watch.close()
        super().close()
