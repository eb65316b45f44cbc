"""The bytes of a shard, decompressed: of a file, a URL or a command.

Failures stay apart: bytes of a URL that cannot be read, after retries, are a `RemoteReadError`; a local file that
changes while it is read is an `OutsideError`; a compressed file that is cut off is an EOFError; a damaged one is
another OSError.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, cast

from fsspec.core import url_to_fs

from ..errors import ShardError, described
from .access import BUFFER_BYTES, DEFAULT_ACCESS, Access, check_pipe, is_local, is_pipe
from .compression import compression_in, decompressed
from .faults import Version, unchanged
from .remote import RemoteFile, copy_path, local_copy, with_retries
from .stall_watch import Watch


def shard_size(path: str, access: Access = DEFAULT_ACCESS) -> int:
    """The size of a shard as stored, in bytes: compressed shards count compressed.

    Args:
        path: a path, URL or `pipe:` command.
        access: how it is opened.
    Returns:
        0 if the size is unknown: for a pipe, or if the server does not say.
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

        return with_retries(path, size)
    except Exception as error:  # fsspec's file systems may raise anything
        raise ShardError(f"{path}: cannot be reached: {described(error)}", path=path) from error


def local_path(path: str, access: Access) -> str | None:
    """The path of a local file with a shard's bytes.

    Returns:
        The shard's own path; for a URL with a `shard_cache`, that of its copy, which is downloaded if there is none;
        None for a pipe, and for a URL without a `shard_cache`.
    Raises:
        OSError, or any error of fsspec's file systems: the copy cannot be made.
    """
    if is_local(path):
        return path
    return None if is_pipe(path) or access.shard_cache is None else local_copy(path, access)


@contextmanager
def open_bytes(
    path: str, access: Access, compression: str | None = None, version: Version | None = None
) -> Iterator[BinaryIO]:
    """Open a shard's bytes, decompressed and buffered; leaving the context closes everything.

    Args:
        path: a path, URL or `pipe:` command.
        access: how it is opened.
        compression: "gz", "zst", "bz2" or "xz"; "" for one of them if the first bytes show it, such as those of a
            gzipped tar that is named .tar; None for the bytes as stored.
        version: of a local shard, the version it must have; None for the present one.
    Yields:
        A binary stream. It is seekable unless it is a pipe or compressed; from a server without Range, seeking reads
        the bytes in between.
    Raises:
        ConfigError: a pipe is not allowed, or zstandard is not installed.
        RemoteReadError: bytes of a URL cannot be read; also raised while reading.
        OutsideError: a local shard has changed by the time the context is left, except by closing a generator.
        OSError, EOFError or, for URLs, any other error: missing, unreadable, cut off or damaged; also while reading.
    """
    with ExitStack() as stack:
        source: io.RawIOBase
        if is_pipe(path):
            check_pipe(path, access)
            source = _CommandOutput(path, access)
        elif (file := local_path(path, access)) is not None:
            if is_local(path):  # a copy of a remote shard may be deleted and downloaded again
                stack.enter_context(unchanged(path, version))
            source = open(file, "rb", buffering=0)  # noqa: SIM115 - the stack closes it
        else:
            source = RemoteFile(path, access)
        stream: BinaryIO = stack.enter_context(io.BufferedReader(source, BUFFER_BYTES))
        if compression == "":
            compression = compression_in(stream)
        if compression:
            stream = stack.enter_context(decompressed(stream, compression, path))
        yield stream


def is_file(stream: BinaryIO) -> bool:
    """Whether a stream of `open_bytes` gives a file's own bytes, so that a place in it is one in the file."""
    return isinstance(getattr(stream, "raw", None), io.FileIO)


class _CommandOutput(io.RawIOBase):
    """The output of a shell command; raises OSError at its end unless the command exited with status 0."""

    def __init__(self, path: str, access: Access) -> None:
        self._command = path.removeprefix("pipe:")
        self._watch = Watch(path, access.stall_warning_s)
        # A new session, so that closing can kill the shell's children too.
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
