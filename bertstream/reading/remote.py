"""Bytes behind a URL: retried at the byte where a read failed, or downloaded once into a folder."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from ..errors import ShardError, described
from .access import BUFFER_BYTES, Access
from .stall_watch import Watch

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What fsspec reads ahead at once. Its own choice goes up to 50 MiB, for each of up to 32 open shards.
_REMOTE_BLOCK_BYTES = 4 << 20
# A try that breaks off within a block gains nothing, so each further try asks for a quarter of it.
_LEAST_REMOTE_BLOCK_BYTES = 1 << 14
_TRIES = 6
_FIRST_WAIT_S = 0.5  # doubled after each try, so 15.5 s in all: a server is restarted in less


class RemoteReadError(OSError):
    """Bytes behind a URL could not be had, however often they were asked for, or changed in the meantime."""


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
        return retried(url, matches)
    except Exception as error:  # what a file system behind fsspec raises is its own choice
        raise ShardError(f"{url}: cannot be listed: {described(error)}", path=url) from error


# --- behind a URL -----------------------------------------------------------------------------------------------------


def retried(path: str, attempt: Callable[[], T], *, position: int = 0, size: int | None = None) -> T:
    """What `attempt` returns, tried again for as long as its errors may pass."""
    place = f"byte {position}" + (f" of {size}" if size else "")
    for number in range(1, _TRIES + 1):
        try:
            return attempt()
        except Exception as error:  # what a file system behind fsspec raises is its own choice
            if getattr(error, "status", None) in (404, 410):
                raise FileNotFoundError(f"the server says that there is no such file: {described(error)}") from error
            if not _may_pass(error):
                raise
            if number == _TRIES:
                message = f"gave up at {place} after {_TRIES} tries; the last one failed with {described(error)}"
                raise RemoteReadError(message) from error
            wait_s = _FIRST_WAIT_S * 2 ** (number - 1)
            logger.warning(
                "%s: try %d of %d failed at %s with %s; the next follows in %.1f s",
                path, number, _TRIES, place, described(error), wait_s,
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


class RemoteFile(io.RawIOBase):
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
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The byte at which the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a byte; nothing is read."""
        if whence == os.SEEK_END and self._size is None:
            message = "the server does not say how long it is, so it cannot be read from its end: set shard_cache="
            raise io.UnsupportedOperation(message)
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size or 0}[whence]
        if start + offset < 0:
            raise OSError(f"there is no byte {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as one read goes."""
        if not len(buffer) or (self._size is not None and self._position >= self._size):
            return 0
        data = self._retried(lambda: self._read(len(buffer)))
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

    def _retried(self, attempt: Callable[[], T]) -> T:
        def from_scratch() -> T:
            try:
                return attempt()
            except Exception:
                self._drop()
                self._block_bytes = max(self._block_bytes // 4, _LEAST_REMOTE_BLOCK_BYTES)
                raise

        return retried(self._path, from_scratch, position=self._position, size=self._size)

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


def copy_path(url: str, folder: str | os.PathLike[str]) -> str:
    """Where a remote shard's copy is kept; the name is made from the URL alone."""
    base = re.split("[?#]", url.partition("::")[0])[0].rpartition("/")[2]
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:32]}-{re.sub(r'[^A-Za-z0-9._-]', '_', base)[-100:]}"
    return os.path.join(os.fspath(folder), name)


def local_copy(url: str, access: Access) -> str:
    """The path of the shard's copy, which is downloaded if there is none."""
    assert access.shard_cache is not None
    path = copy_path(url, access.shard_cache)
    if os.path.exists(path):
        return path
    os.makedirs(access.shard_cache, exist_ok=True)
    with _locked(f"{path}.lock"):
        if not os.path.exists(path):  # nobody else has made it meanwhile
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
    """One thread of one process at a time, on file systems that know locks; elsewhere the copy may be made twice."""
    with open(path, "ab") as lock:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
