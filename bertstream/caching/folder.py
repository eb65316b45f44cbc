"""The LMDB folder of a cache: how it is opened and checked, and the layout of its entries.

A text is two entries: its rows under `ROWS` and its key, and its key under `ORDER` and a number. Numbers grow, so the
oldest text has the lowest one.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import lmdb
from lmdb.verify import VerifyError, verify

from ..errors import CacheError

logger = logging.getLogger(__name__)

FORMAT = b"bertstream embedding cache 1"
LEAST_BYTES = 1 << 20
"""The smallest limit of a folder's file."""

_MAX_READERS = 1024
_LOCK_BYTES = 17 << 12
"""Bytes of the lock file, in whole pages: 64 for each reader, and some more."""

_CHECKED_ITEMS = 200_000
"""Entries and tens of pages of the largest folder whose pages are checked when it is opened: one to three seconds."""

# One table for everything: to open a second one, LMDB would wait for another process's write to finish.
FORMAT_KEY, ORDER, ROWS = b"format", b"o", b"r"  # a key, and two prefixes of keys; sorted
_HEADER = struct.Struct("<IIQ")  # checksum, bytes of the rows, number of the text
_NUMBER = struct.Struct(">Q")  # big-endian, so that keys sort as their numbers do


def open_folder(path: str, *, limit_bytes: int, read_only: bool) -> lmdb.Environment:
    """Open a cache's folder, or make one.

    Args:
        path: the folder.
        limit_bytes: the file never grows beyond.
        read_only: open an existing folder without ever writing to it.
    Raises:
        CacheError: the folder cannot be opened, is damaged, of another format, or already open in this process.
    """
    env = None
    try:
        env = _open(path, limit_bytes, read_only)
        _check_length(env, path)
        stat = env.stat()
        # A page costs a tenth of an entry: most hold rows, of which nothing is read.
        if stat["entries"] + live_bytes(stat) // stat["psize"] // 10 <= _CHECKED_ITEMS:
            check_pages(env, path)
        _check_format(env, path, read_only)
        if not read_only:
            env.reader_check()  # frees the reader slots of killed processes, which would keep old pages alive
    except (CacheError, lmdb.Error, OSError) as error:
        if env is not None:
            env.close()
        if isinstance(error, CacheError):
            raise
        raise _cannot_open(path, read_only, error) from error
    return env


def _open(path: str, limit_bytes: int, read_only: bool) -> lmdb.Environment:
    options: dict[str, Any] = {"map_size": limit_bytes, "max_readers": _MAX_READERS, "metasync": False}
    if not read_only:
        os.makedirs(path, exist_ok=True)
        _take_lock_file(path)
        data = Path(path, "data.mdb")
        is_new = not data.exists()
        if not is_new and not data.stat().st_size:  # or a process was killed while it made the file
            logger.warning("%s is empty: the cache starts without texts; if it held some, the file was cut off", data)
        try:
            return lmdb.open(path, **options)
        except lmdb.Error as error:
            if is_new and has_no_room(error):
                data.unlink(missing_ok=True)  # half of a header: it would pass for damaged once there is room
            raise
    try:
        _take_lock_file(path)
        return lmdb.open(path, readonly=True, create=False, **options)
    except (lmdb.ReadonlyError, lmdb.LockError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        # Not even the lock file may be written. Without it another process could change pages while we read them, but
        # every entry is checked when it is read.
        return lmdb.open(path, readonly=True, create=False, lock=False, **options)


def _take_lock_file(path: str) -> None:
    """Make the lock file with all of its blocks, or fail with the error of the disk.

    LMDB makes it without blocks and writes to it in memory: on a full disk that ends the process (SIGBUS).
    """
    with open(Path(path, "lock.mdb"), "ab") as file:
        size = os.fstat(file.fileno()).st_size
        file.write(bytes(max(0, _LOCK_BYTES - size)))
        file.flush()
        if not size or not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # it may lack blocks: an earlier version made it, or a copy
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot
                raise


def has_no_room(error: Exception) -> bool:
    """Whether the disk or quota is full; LMDB says EIO where only a part of its pages fits."""
    number = getattr(error, "errno", None) or getattr(error, "code", None)
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def free_room(path: str) -> str:
    """What is free on a folder's disk, as part of a message: LMDB says "Input/output error" of a full one."""
    try:
        return f"its disk has {shutil.disk_usage(path).free:,} bytes free: if it is full, make room on it"
    except OSError:
        return "if its disk is full, make room on it"


def _cannot_open(path: str, read_only: bool, error: Exception) -> CacheError:
    shown = f"{type(error).__name__}: {error}"
    if "already open in this process" in str(error):
        way_out = (
            "share one EmbeddingCache among all that use the folder, or close it first (a process that is forked while "
            "its parent writes to the folder cannot open it)"
        )
    elif has_no_room(error):
        way_out = "make room on the disk, or name a folder on another"
    elif isinstance(error, (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError, lmdb.PanicError)):
        way_out = "the folder is damaged or no cache: delete it, or name another"
    elif not read_only and (
        isinstance(error, (lmdb.ReadonlyError, lmdb.LockError, PermissionError))
        or getattr(error, "errno", None) == errno.EROFS
    ):
        way_out = "the folder cannot be written to: name another, or open this one with read_only=True"
    else:
        way_out = "name a folder on a local disk that can be used"
    return CacheError(f"the cache {path} cannot be opened ({shown}): {way_out}", path=path)


def _check_length(env: lmdb.Environment, path: str) -> None:
    """Refuse a file that was cut off: reading a page that is not there would end the process."""
    file = Path(path, "data.mdb")
    needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    found = file.stat().st_size
    if found < needed:
        raise CacheError(
            f"{file} has {found} bytes, but {needed} are in use: the file was cut off; copy it again, or delete the "
            "folder",
            path=path,
        )


def check_pages(env: lmdb.Environment, path: str) -> None:
    """Check LMDB's own pages, without LMDB: it ends the process at some damages. Rows are not read.

    Raises:
        CacheError: a page is damaged.
    """
    problems: list[str] = []
    for _ in range(3):
        with env.begin() as snapshot:  # other processes keep its pages meanwhile
            try:
                problems = verify(path)  # type: ignore[no-untyped-call]
            except VerifyError as error:
                problems = [str(error)]
            at = snapshot.id()
        # Some versions of LMDB forget free pages, which is harmless.
        problems = [problem for problem in problems if "a leak" not in problem]
        if not problems or env.info()["last_txnid"] == at:
            break  # else another process wrote meanwhile, and the file's length or header was read in between
    if problems:
        more = f" and {len(problems) - 1} more faults" if problems[1:] else ""
        raise CacheError(
            f"the cache {path} is damaged ({problems[0]}{more}): delete the folder, or copy it again", path=path
        )


def _check_format(env: lmdb.Environment, path: str, read_only: bool) -> None:
    """Refuse a folder that is no cache of this format; mark a new folder as one."""
    with env.begin() as transaction:
        found = transaction.get(FORMAT_KEY)
    if found is None and not read_only and not env.stat()["entries"]:
        with env.begin(write=True) as transaction:
            transaction.put(FORMAT_KEY, FORMAT)
    elif found != FORMAT:
        seen = "another kind of LMDB folder, or empty"
        if found is not None:
            seen = f"a cache of the format {found.decode(errors='replace')!r}"
        raise CacheError(
            f"{path} is {seen}, and this version reads {FORMAT.decode()!r}: name another folder, or delete this one",
            path=path,
        )


def put_text(transaction: Any, key: bytes, rows: memoryview, number: int) -> bool:
    """Write a text unless it is there already.

    Returns:
        Whether it was written, and its number is used.
    """
    header = _HEADER.pack(zlib.crc32(rows, zlib.crc32(key)), len(rows), number)
    written = bool(transaction.put(ROWS + key, b"".join((header, rows)), overwrite=False))
    if written:
        transaction.put(ORDER + _NUMBER.pack(number), key)
    return written


def delete_text(transaction: Any, key: bytes) -> bool:
    """Delete a text and its number.

    Returns:
        Whether it was there.
    """
    entry = transaction.get(ROWS + key)
    if entry is None:
        return False
    if len(entry) >= _HEADER.size:
        number = ORDER + _NUMBER.pack(_HEADER.unpack_from(entry)[2])
        if transaction.get(number) == key:  # a damaged entry may name another text's number
            transaction.delete(number)
    return bool(transaction.delete(ROWS + key))


def delete_oldest(transaction: Any, cursor: Any) -> bool:
    """Delete the oldest text.

    Args:
        transaction: the transaction.
        cursor: one of its cursors.
    Returns:
        False where there is none.
    """
    if not (cursor.set_range(ORDER) and cursor.key().startswith(ORDER)):
        return False
    key = cursor.value()
    cursor.delete()
    transaction.delete(ROWS + key)
    return True


def next_number(transaction: Any) -> int:
    """The number of the next text to be written."""
    with transaction.cursor() as cursor:
        if not (cursor.prev() if cursor.set_range(ROWS) else cursor.last()) or not cursor.key().startswith(ORDER):
            return 0
        return int(_NUMBER.unpack(cursor.key()[1:])[0]) + 1


def checked_rows(key: bytes, entry: Any) -> bytes | None:
    """A copy of an entry's rows; None where its size or checksum is wrong."""
    if len(entry) < _HEADER.size:
        return None
    checksum, size, _ = _HEADER.unpack_from(entry)
    if len(entry) - _HEADER.size != size:  # before the copy: a damaged size may reach beyond the file
        return None
    rows = bytes(entry[_HEADER.size :])
    return rows if zlib.crc32(rows, zlib.crc32(key)) == checksum else None


def live_bytes(stat: Any) -> int:
    """Bytes of the pages that hold data."""
    return int((stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]) * stat["psize"])


def bytes_in_pages(rows_bytes: int) -> int:
    """Bytes that a text takes at most: whole pages for large rows, and some of the index."""
    return -(-(rows_bytes + _HEADER.size + 16) // 4096) * 4096 + 128
