"""The LMDB folder of a cache: how it is opened and checked, and the layout of its entries.

A text is two entries: its rows under `ROWS` and its key, and its key under `ORDER` and a number. Numbers grow, so the
oldest text has the lowest one.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import lmdb

from ..errors import CacheError

logger = logging.getLogger(__name__)

FORMAT = b"bertstream embedding cache 1"
LEAST_BYTES = 1 << 20
"""The smallest limit of a folder's file."""

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
        _check_length(env, path, read_only)
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
    options: dict[str, Any] = {"map_size": limit_bytes, "max_readers": 1024, "metasync": False}
    if not read_only:
        os.makedirs(path, exist_ok=True)
        return lmdb.open(path, **options)
    try:
        return lmdb.open(path, readonly=True, create=False, **options)
    except (lmdb.ReadonlyError, lmdb.LockError, PermissionError):
        # Not even the lock file may be written. Without it another process could change pages while we read them, but
        # every entry is checked when it is read.
        return lmdb.open(path, readonly=True, create=False, lock=False, **options)


def _cannot_open(path: str, read_only: bool, error: Exception) -> CacheError:
    shown = f"{type(error).__name__}: {error}"
    if "already open in this process" in str(error):
        way_out = (
            "share one EmbeddingCache among all that use the folder, or close it first (a process that is forked while "
            "its parent writes to the folder cannot open it)"
        )
    elif isinstance(error, (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError, lmdb.PanicError)):
        way_out = "the folder is damaged or no cache: delete it, or name another"
    elif isinstance(error, (lmdb.ReadonlyError, lmdb.LockError, PermissionError)) and not read_only:
        way_out = "the folder cannot be written to: name another, or open this one with read_only=True"
    else:
        way_out = "name a folder on a local disk that can be used"
    return CacheError(f"the cache {path} cannot be opened ({shown}): {way_out}", path=path)


def _check_length(env: lmdb.Environment, path: str, read_only: bool) -> None:
    """Extend a file that was cut off: reading missing pages would kill the process, and zeros are no entries."""
    file = Path(path, "data.mdb")
    needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    if file.stat().st_size >= needed:
        return
    message = f"{file} has {file.stat().st_size} bytes, but {needed} are in use: the file was cut off"
    if read_only:
        raise CacheError(f"{message}; copy it again", path=path)
    logger.warning("%s; what is lost is computed again", message)
    os.truncate(file, needed)


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
    rows = bytes(entry[_HEADER.size :])
    return rows if len(rows) == size and zlib.crc32(rows, zlib.crc32(key)) == checksum else None


def live_bytes(stat: Any) -> int:
    """Bytes of the pages that hold data."""
    return int((stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]) * stat["psize"])


def bytes_in_pages(rows_bytes: int) -> int:
    """Bytes that a text takes at most: whole pages for large rows, and some of the index."""
    return -(-(rows_bytes + _HEADER.size + 16) // 4096) * 4096 + 128
