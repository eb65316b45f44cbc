"""The bytes of a shard: on disk, behind a URL or written by a command, as they are or unpacked.

A read behind a URL that fails is tried again from the byte where it broke off. What still fails is a `RemoteReadError`;
a packed file that ends too early is an EOFError, and one that is damaged another OSError: they are never mixed up.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import logging
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar, cast

from fsspec.core import url_to_fs

from .errors import ConfigError, ShardError
from .watchdog import Watch

logger = logging.getLogger(__name__)

T = TypeVar("T")

BUFFER_BYTES = 1 << 16
"""A stream holds many shards open at once, one a lane; larger buffers were no faster."""

# What fsspec reads ahead at once. Its own choice goes up to 50 MiB, for each of up to 32 open shards.
_REMOTE_BLOCK_BYTES = 4 << 20
# A try that breaks off within a block gains nothing, so each further try asks for a quarter of it.
_LEAST_REMOTE_BLOCK_BYTES = 1 << 14
_TRIES = 6
_FIRST_WAIT_S = 0.5  # doubled after each try, so 15.5 s in all: a server is restarted in less
# Packed bytes that are unpacked at once: the most extreme zstd data grows 32,000 times.
_ZSTD_CHUNK_BYTES = 1 << 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """How shards are opened.

    Attributes:
        allow_pipe: whether `pipe:` shards may run their shell commands.
        storage_options: for fsspec, such as credentials; used for URLs only.
        shard_cache: a folder into which a remote shard is downloaded whole when it is first read; None reads remotely.
            It is not bounded, and a copy is never compared with its origin again: delete it to have it renewed. Its
            name is made from the URL alone. Workers and ranks may share the folder.
        stall_warning_s: seconds after which a read of a URL or pipe that is still waiting is named in a warning; None
            is never.
    Raises:
        ConfigError: an argument of a wrong type or out of range.
    """

    allow_pipe: bool = False
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold passwords
    shard_cache: str | os.PathLike[str] | None = None
    stall_warning_s: float | None = 30.0

    def __post_init__(self) -> None:
        if self.shard_cache is not None and not (
            isinstance(self.shard_cache, (str, os.PathLike)) and os.fspath(self.shard_cache)
        ):
            raise ConfigError(f"shard_cache={self.shard_cache!r}: write the path of a folder, or None")
        seconds = self.stall_warning_s
        if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
            raise ConfigError(f"stall_warning_s={seconds!r}: write a number of seconds above 0, or None")


DEFAULT_ACCESS = Access()


class RemoteReadError(OSError):
    """Bytes behind a URL could not be had, however often they were asked for, or changed in the meantime."""


def is_pipe(path: str) -> bool:
    """Whether a shard is what a command writes."""
    return path.startswith("pipe:")


def is_url(path: str) -> bool:
    """Whether a shard is opened through fsspec."""
    return "://" in path and not is_pipe(path)


def is_local(path: str) -> bool:
    """Whether a shard is named by a path."""
    return not is_url(path) and not is_pipe(path)


def check_pipe(path: str, access: Access) -> None:
    """Refuse to run a command that nobody allowed.

    Raises:
        ConfigError: with the command, and how to allow it.
    """
    if not access.allow_pipe:
        raise ConfigError(f"{path!r} would run a shell command: pass allow_pipe=True if you trust it")


def check_installed(path: str, package: str, extra: str) -> None:
    """Refuse a shard whose format needs a package that is missing.

    Raises:
        ConfigError: with the shard, and how to install the package.
    """
    try:
        __import__(package)
    except ImportError as error:
        message = f"{path!r} needs the package {package}: pip install 'bertstream[{extra}]'"
        raise ConfigError(message) from error


def list_url(url: str, access: Access) -> list[str]:
    """The URLs that a URL with `*` matches.

    Raises:
        ShardError: the server cannot be asked.
    """
    chain, separator, _ = url.rpartition("::")

    def matches() -> list[str]:
        filesystem, pattern = url_to_fs(url, **access.storage_options)
        return [chain + separator + filesystem.unstrip_protocol(name) for name in filesystem.glob(pattern)]

    try:
        return _retried(url, matches)
    except Exception as error:  # what a file system behind fsspec raises is its own choice
        raise ShardError(f"{url}: cannot be listed: {named(error)}", path=url) from error


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
        if access.shard_cache is not None and os.path.exists(copy := _copy_path(path, access.shard_cache)):
            return os.stat(copy).st_size

        def size() -> int:
            filesystem, name = url_to_fs(path, **access.storage_options)
            return int(filesystem.info(name).get("size") or 0)

        return _retried(path, size)
    except Exception as error:  # what a file system behind fsspec raises is its own choice
        raise ShardError(f"{path}: cannot be reached: {named(error)}", path=path) from error


def on_disk(path: str, access: Access) -> str | None:
    """The path of a file with a shard's bytes: its own, or that of its copy in the cache, which is made if need be.

    Returns:
        None for a pipe, and for a URL without a cache.
    Raises:
        OSError or another error, of fsspec's choice: the copy cannot be made.
    """
    if is_local(path):
        return path
    return None if is_pipe(path) or access.shard_cache is None else _copied(path, access)


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
            source = _RemoteFile(path, access)
        stream = stack.enter_context(io.BufferedReader(source, BUFFER_BYTES))
        if packing:
            if packing == "zst":
                check_installed(path, "zstandard", "zstd")
            unpacked: Any = stack.enter_context(_Unzipped(fileobj=stream) if packing == "gz" else _Unzstd(stream))
            stream = stack.enter_context(io.BufferedReader(unpacked, BUFFER_BYTES))
        yield stream


def named(error: BaseException) -> str:
    """An error as messages show it."""
    return f"{type(error).__name__}: {error}"


# --- behind a URL -----------------------------------------------------------------------------------------------------


def _retried(path: str, attempt: Callable[[], T], *, position: int = 0, size: int | None = None) -> T:
    """What `attempt` returns, tried again for as long as its errors may pass."""
    place = f"byte {position}" + (f" of {size}" if size else "")
    for number in range(1, _TRIES + 1):
        try:
            return attempt()
        except Exception as error:  # what a file system behind fsspec raises is its own choice
            if getattr(error, "status", None) in (404, 410):
                raise FileNotFoundError(f"the server says that there is no such file: {named(error)}") from error
            if not _may_pass(error):
                raise
            if number == _TRIES:
                message = f"gave up at {place} after {_TRIES} tries; the last one failed with {named(error)}"
                raise RemoteReadError(message) from error
            wait_s = _FIRST_WAIT_S * 2 ** (number - 1)
            logger.warning(
                "%s: try %d of %d failed at %s with %s; the next follows in %.1f s",
                path, number, _TRIES, place, named(error), wait_s,
            )  # fmt: skip
            time.sleep(wait_s)
    raise AssertionError


def _may_pass(error: BaseException) -> bool:
    """Whether an error may be gone at the next try: all are but those that say that the request itself is wrong."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None:
        # fsspec says "not found" of a URL whatever its server answered, and if it did not answer at all.
        of_http = type(cause).__module__.startswith("aiohttp") or isinstance(cause, (OSError, asyncio.TimeoutError))
        return of_http and _may_pass(cause)
    final = (
        RemoteReadError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, ImportError,
        NotImplementedError, AttributeError, LookupError, TypeError, ValueError,
    )  # fmt: skip
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return not refused and not isinstance(error, final)


class _RemoteFile(io.RawIOBase):
    """A file behind a URL, opened again at the same byte where a read fails."""

    def __init__(self, path: str, access: Access) -> None:
        self._path = path
        self._options = access.storage_options
        self._watch = Watch(path, access.stall_warning_s)
        self._file: Any = None
        self._position = 0
        self._block_bytes = _REMOTE_BLOCK_BYTES
        self._knows_range = True
        self._version: tuple[int | None, str | None] | None = None  # size in bytes and ETag, where the server tells
        try:
            self._retried(self._open)
        except BaseException:
            self.close()
            raise

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END and self._size is None:
            message = "the server does not say how long it is, so it cannot be read from its end: set shard_cache="
            raise io.UnsupportedOperation(message)
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size or 0}[whence]
        if start + offset < 0:
            raise OSError(f"there is no byte {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        if not len(buffer) or (self._size is not None and self._position >= self._size):
            return 0
        data = self._retried(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._drop()
            self._watch.close()
        super().close()

    @property
    def _size(self) -> int | None:
        return self._version[0] if self._version is not None else None

    def _retried(self, attempt: Callable[[], T]) -> T:
        def from_scratch() -> T:
            try:
                return attempt()
            except Exception:
                self._drop()
                self._block_bytes = max(self._block_bytes // 4, _LEAST_REMOTE_BLOCK_BYTES)
                raise

        return _retried(self._path, from_scratch, position=self._position, size=self._size)

    def _drop(self) -> None:
        if self._file is not None:
            with suppress(Exception):  # it is broken or not wanted any more
                self._file.close()
            self._file = None

    def _open(self) -> None:
        with self._watch:
            filesystem, name = url_to_fs(self._path, **self._options)
            if self._version is not None:
                filesystem.invalidate_cache()
            info = filesystem.info(name)
            # Some servers say 0 where they do not know. HTTP and S3 write ETag, others etag.
            version = (int(info.get("size") or 0) or None, info.get("ETag") or info.get("etag"))
            if self._version is not None and version != self._version:
                was, now = (f"{size} bytes, ETag {tag}" for size, tag in (self._version, version))
                raise RemoteReadError(f"it changed while it was read: {was} at first, {now} now")
            self._version = version
            # fsspec's word for one request that streams the file from its beginning is a block of 0.
            self._file = filesystem.open(name, "rb", block_size=self._block_bytes if self._knows_range else 0)

    def _read(self, count: int) -> bytes:
        try:
            return self._read_once(count)
        except ValueError:  # what fsspec raises when a server answers a Range with the whole file
            if not self._knows_range:
                raise
            logger.info("%s: the server does not know Range, so it is read as one stream", self._path)
            self._knows_range = False
            self._drop()
            return self._read_once(count)

    def _read_once(self, count: int) -> bytes:
        if self._file is None or (not self._knows_range and self._file.tell() > self._position):
            self._drop()
            self._open()
        with self._watch:
            if self._knows_range:
                if self._file.tell() != self._position:
                    self._file.seek(self._position)
            else:
                while (missing := self._position - self._file.tell()) > 0:
                    self._some(min(missing, BUFFER_BYTES))
            return self._some(min(count, self._block_bytes))

    def _some(self, count: int) -> bytes:
        data: bytes = self._file.read(count)
        if not data and self._size is not None:
            raise ConnectionError(f"the connection ended at byte {self._file.tell()} of {self._size}")
        return data


# --- copies -----------------------------------------------------------------------------------------------------------


def _copy_path(url: str, folder: str | os.PathLike[str]) -> str:
    base = re.split("[?#]", url.partition("::")[0])[0].rpartition("/")[2]
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:32]}-{re.sub(r'[^A-Za-z0-9._-]', '_', base)[-100:]}"
    return os.path.join(os.fspath(folder), name)


def _copied(url: str, access: Access) -> str:
    """The path of the shard's copy, which is downloaded if there is none."""
    assert access.shard_cache is not None
    path = _copy_path(url, access.shard_cache)
    if os.path.exists(path):
        return path
    os.makedirs(access.shard_cache, exist_ok=True)
    with _locked(f"{path}.lock"):
        if not os.path.exists(path):  # nobody else has made it meanwhile
            unfinished = f"{path}.{uuid.uuid4().hex}.part"
            try:
                with open(unfinished, "xb") as copy, _RemoteFile(url, access) as original:
                    shutil.copyfileobj(original, copy, _REMOTE_BLOCK_BYTES)
                os.replace(unfinished, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(unfinished)
                raise
    return path


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """One thread of one process at a time, on file systems that know locks; elsewhere the copy may be made twice."""
    with open(path, "ab") as lock:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
