"""The bytes of a URL: read with retries, from the byte where a read failed, or downloaded once into a folder."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from ..errors import ShardError, described
from .access import BUFFER_BYTES, Access
from .faults import OutsideError
from .stall_watch import Watch

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The block fsspec reads ahead. Its own default is up to 50 MiB, for each of up to 32 open shards.
_REMOTE_BLOCK_BYTES = 4 << 20
# A block that breaks off is lost as a whole, so each failed try quarters the block size, down to this.
_LEAST_REMOTE_BLOCK_BYTES = 1 << 14
_TRIES = 6
_FIRST_WAIT_S = 0.5  # doubled after each try: 15.5 s in all, enough for a server to restart


class RemoteReadError(OutsideError):
    """The bytes of a URL cannot be read, after several tries, or changed while they were read."""


def list_url(url: str, access: Access) -> list[str]:
    """The URLs that a URL with `*` matches; of a chain such as zip://*.jsonl::s3://bucket/*.zip, in each of its links.

    Raises:
        ShardError: the server cannot list them, or an archive cannot be read.
    """
    try:
        return with_retries(url, lambda: _matches(url, access.storage_options))
    except Exception as error:  # fsspec's file systems may raise anything
        raise ShardError(f"{url}: cannot be listed: {described(error)}", path=url) from error


def _matches(url: str, options: Mapping[str, Any]) -> list[str]:
    first, chained, rest = url.partition("::")
    if chained and ("*" in rest or "://" not in first):
        own = first.partition("://")[0]
        tails = _matches(rest, {name: value for name, value in options.items() if name != own})
        chains = [f"{first}::{tail}" for tail in tails]
        return [name for chain in chains for name in _matches(chain, options)] if "*" in first else chains
    filesystem, pattern = url_to_fs(url, **options)
    return [filesystem.unstrip_protocol(name) + chained + rest for name in filesystem.glob(pattern)]


# --- reading ----------------------------------------------------------------------------------------------------------


def with_retries(path: str, attempt: Callable[[], T], *, position: int = 0, size: int | None = None) -> T:
    """Call `attempt` until it succeeds, with a warning and a pause after each error that may be temporary.

    Args:
        path: the shard, for the messages.
        attempt: what to do.
        position: the byte at which it reads, for the messages.
        size: the shard's bytes, for the messages; None if unknown.
    Raises:
        FileNotFoundError: the server answers that there is no such file.
        RemoteReadError: six tries failed.
        Exception: an error of `attempt` that is not temporary.
    """
    place = f"byte {position}" + (f" of {size}" if size else "")
    for number in range(1, _TRIES + 1):
        try:
            return attempt()
        except Exception as error:  # fsspec's file systems may raise anything
            if getattr(error, "status", None) in (404, 410):
                raise FileNotFoundError(f"the server says there is no such file: {described(error)}") from error
            if not _is_temporary(error):
                raise
            if number == _TRIES:
                message = f"gave up at {place} after {_TRIES} tries; the last one failed with {described(error)}"
                raise RemoteReadError(message) from error
            wait_s = _FIRST_WAIT_S * 2 ** (number - 1)
            logger.warning(
                "%s: try %d of %d failed at %s with %s; the next starts in %.1f s",
                path, number, _TRIES, place, described(error), wait_s,
            )  # fmt: skip
            time.sleep(wait_s)
    raise AssertionError


def _is_temporary(error: BaseException) -> bool:
    """Whether another try may succeed: true unless the error says that the request itself is wrong."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None:
        # fsspec says "not found" of a URL for any answer of its server, and also without an answer.
        of_http = type(cause).__module__.startswith("aiohttp") or isinstance(cause, (OSError, asyncio.TimeoutError))
        return of_http and _is_temporary(cause)
    final = (
        RemoteReadError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, ImportError,
        NotImplementedError, AttributeError, LookupError, TypeError, ValueError,
    )  # fmt: skip
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return not refused and not isinstance(error, final)


class RemoteFile(io.RawIOBase):
    """The file of a URL; where a read fails, it is opened again at the same byte.

    Args:
        path: the URL.
        access: how it is opened.
    Raises:
        RemoteReadError: the bytes cannot be read, or changed since it was opened; also raised while reading.
        Exception: the file is missing or refused; fsspec's file systems may raise anything.
    """

    def __init__(self, path: str, access: Access) -> None:
        self._path = path
        self._options = access.storage_options
        self._watch = Watch(path, access.stall_warning_s)
        self._file: Any = None
        self._filesystem: Any = None
        self._position = 0
        self._block_bytes = _REMOTE_BLOCK_BYTES
        self._has_range = True
        self._version: tuple[int | None, str | None] | None = None  # size in bytes and ETag, if the server tells
        try:
            self._with_retries(self._open)
        except BaseException:
            self.close()
            raise

    def readable(self) -> bool:
        """Always True."""
        return True

    def seekable(self) -> bool:
        """Always True."""
        return True

    def tell(self) -> int:
        """The byte at which the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a byte; nothing is read."""
        if whence == os.SEEK_END and self._size is None:
            message = "the server does not say its size, so it cannot be read from its end: set shard_cache="
            raise io.UnsupportedOperation(message)
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size or 0}[whence]
        if start + offset < 0:
            raise OSError(f"there is no byte {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read up to a buffer of bytes; 0 at the end."""
        if not len(buffer) or (self._size is not None and self._position >= self._size):
            return 0
        data = self._with_retries(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Close the connection."""
        if not self.closed:
            self._drop()
            self._watch.close()
        super().close()

    @property
    def _size(self) -> int | None:
        return self._version[0] if self._version is not None else None

    def _with_retries(self, attempt: Callable[[], T]) -> T:
        def from_scratch() -> T:
            try:
                return attempt()
            except Exception:
                self._drop()
                self._block_bytes = max(self._block_bytes // 4, _LEAST_REMOTE_BLOCK_BYTES)
                raise

        return with_retries(self._path, from_scratch, position=self._position, size=self._size)

    def _drop(self) -> None:
        if self._file is not None:
            with suppress(Exception):  # a broken connection may fail to close
                self._file.close()
            self._file = self._filesystem = None

    def _open(self) -> None:
        with self._watch:
            filesystem, name = url_to_fs(self._path, **self._options)
            if self._version is not None:
                filesystem.invalidate_cache()
            info = filesystem.info(name)
            # Some servers say 0 for an unknown size. HTTP and S3 write ETag, others etag.
            version = (int(info.get("size") or 0) or None, info.get("ETag") or info.get("etag"))
            if self._version is not None and version != self._version:
                was, now = (f"{size} bytes, ETag {tag}" for size, tag in (self._version, version))
                raise RemoteReadError(f"it changed while it was read: {was} at first, {now} now")
            self._version = version
            self._filesystem = filesystem  # an archive's closes its files when it is collected
            # A block size of 0 tells fsspec to stream the file from its beginning in one request.
            self._file = filesystem.open(name, "rb", block_size=self._block_bytes if self._has_range else 0)

    def _read(self, count: int) -> bytes:
        try:
            return self._read_once(count)
        except ValueError:  # fsspec raises it if a server answers a Range request with the whole file
            if not self._has_range:
                raise
            logger.info("%s: the server does not support Range, so it is read as one stream", self._path)
            self._has_range = False
            self._drop()
            return self._read_once(count)

    def _read_once(self, count: int) -> bytes:
        if self._file is None or (not self._has_range and self._file.tell() > self._position):
            self._drop()
            self._open()
        with self._watch:
            if self._has_range:
                if self._file.tell() != self._position:
                    self._file.seek(self._position)
            else:
                while (missing := self._position - self._file.tell()) > 0:
                    self._read_some(min(missing, BUFFER_BYTES))
            return self._read_some(min(count, self._block_bytes))

    def _read_some(self, count: int) -> bytes:
        data: bytes = self._file.read(count)
        if not data and self._size is not None:
            raise ConnectionError(f"the connection ended at byte {self._file.tell()} of {self._size}")
        return data


# --- copies -----------------------------------------------------------------------------------------------------------


def copy_path(url: str, folder: str | os.PathLike[str]) -> str:
    """The path of a remote shard's copy, which depends only on the URL and the folder."""
    base = re.split("[?#]", url.partition("::")[0])[0].rpartition("/")[2]
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:32]}-{re.sub(r'[^A-Za-z0-9._-]', '_', base)[-100:]}"
    return os.path.join(os.fspath(folder), name)


def local_copy(url: str, access: Access) -> str:
    """The path of a remote shard's copy in `access.shard_cache`; downloads the shard if there is none.

    Raises:
        RemoteReadError, OSError, or any error of fsspec's file systems: the copy cannot be made.
    """
    assert access.shard_cache is not None
    path = copy_path(url, access.shard_cache)
    if os.path.exists(path):
        return path
    os.makedirs(access.shard_cache, exist_ok=True)
    with _locked(f"{path}.lock"):
        if not os.path.exists(path):  # another process may have made it in the meantime
            unfinished = f"{path}.{uuid.uuid4().hex}.part"
            try:
                with open(unfinished, "xb") as copy, RemoteFile(url, access) as original:
                    shutil.copyfileobj(original, copy, _REMOTE_BLOCK_BYTES)
                os.replace(unfinished, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(unfinished)
                raise
    return path


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Let in one thread of one process at a time; on a file system without locks, the copy may be made twice."""
    with open(path, "ab") as lock:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
