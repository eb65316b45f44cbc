"""Tell faults of the data, which `max_bad_records` may skip, from those of the machine or network, which may not be."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

Version: TypeAlias = tuple[int, int]
"""Of a local file: its bytes, and when it was last modified, in nanoseconds since 1970."""

# What the operating system says of the name of a shard, or of a seek that broken data asked for. Any other number is
# the machine's: too many open files, a full or failing disk, no memory, a lost network share or permission.
_OF_THE_SHARD = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
_GONE = (404, 410)


class OutsideError(OSError):
    """Bytes cannot be read, or changed while they were read: that says nothing about the data in them."""


def outside_fault(error: BaseException | None) -> BaseException | None:
    """The failure of the machine or network that an error comes from, itself or in its chain of causes.

    Returns:
        None for a fault of the data: broken bytes, a missing file, an exception of a dataset's own.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        number = error.errno if isinstance(error, OSError) else None
        status = getattr(error, "status", None)  # of an HTTP answer
        if (
            isinstance(error, (MemoryError, ConnectionError, TimeoutError, PermissionError, OutsideError))
            or (isinstance(number, int) and number not in _OF_THE_SHARD)
            or (isinstance(status, int) and 400 <= status < 600 and status not in _GONE)
        ):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def file_version(path: str) -> Version | None:
    """The version of a local file; None if there is none, or for a named pipe or device, which has no end."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _described(version: Version) -> str:
    size, nanoseconds = version
    return f"{size} bytes, modified {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(nanoseconds / 1e9))}"


@contextmanager
def unchanged(path: str, version: Version | None = None) -> Iterator[None]:
    """Refuse what was read of a local file that is written or replaced meanwhile; deleting it is harmless.

    Args:
        path: the file.
        version: the version it must have; None for the present one.
    Raises:
        OutsideError: it changed; also instead of an exception that leaves the context, as changed bytes look broken.
    """
    version = version or file_version(path)

    def check() -> None:
        now = file_version(path)
        if now is not None and version is not None and now != version:
            raise OutsideError(
                f"the file changed while it was read: {_described(version)} at first, {_described(now)} now: read it "
                "again from the start, and write new data to new files"
            )

    check()
    try:
        yield
    except Exception:
        check()
        raise
    check()
