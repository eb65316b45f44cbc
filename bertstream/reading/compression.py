"""Compressed bytes, read forwards: which compression it is, and what they hold."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from .access import BUFFER_BYTES, check_installed

# Compressed bytes per decompression step: the most extreme zstd data grows 32,000 times.
_CHUNK_BYTES = 1 << 10

_MAGIC = {"gz": rb"\x1f\x8b\x08", "zst": rb"\x28\xb5\x2f\xfd", "bz2": rb"BZh[1-9]1AY&SY", "xz": rb"\xfd7zXZ\0"}


def compression_in(stream: BinaryIO) -> str:
    """The compression that the next bytes of a buffered stream show, or ""; the stream stays where it is."""
    begin = cast(io.BufferedReader, stream).peek(10)
    return next((name for name, magic in _MAGIC.items() if re.match(magic, begin, re.DOTALL)), "")


def decompressed(stream: BinaryIO, compression: str, name: str) -> BinaryIO:
    """The decompressed bytes of a stream; closing them leaves the stream open.

    All bytes before a cut or damage are read. Reading raises EOFError where the stream is cut off, and OSError, or
    zlib.error, where it is damaged.

    Args:
        stream: of compressed bytes, buffered.
        compression: "gz", "zst", "bz2" or "xz".
        name: of the shard, for messages.
    Raises:
        ConfigError: zstandard is needed and not installed.
    """
    if compression == "zst":
        check_installed(name, "zstandard", "zstd")
    raw: Any = _GzipFile(fileobj=stream) if compression == "gz" else _Frames(stream, compression)
    return io.BufferedReader(raw, BUFFER_BYTES)


def decompress_member(payload: bytes, compression: str, limit: int) -> bytes:
    """The first `limit` + 1 decompressed bytes of a member of a tar.

    Raises:
        OSError, EOFError or zlib.error: it is damaged or cut off.
        ConfigError: zstandard is needed and not installed.
    """
    stream = io.BufferedReader(cast(io.RawIOBase, io.BytesIO(payload)))
    return decompressed(stream, compression, "a member").read(limit + 1)


class _GzipFile(gzip.GzipFile):
    """Returns the bytes it has instead of filling the buffer first, so all records before a cut are read."""

    def readinto(self, buffer: Any) -> int:
        return self.readinto1(buffer)


class _Frames(io.RawIOBase):
    """The decompressed bytes of frames of zstd, bz2 or xz; raises where a file is cut off or something else follows.

    The readers of zstandard end silently where a file is cut off, those of bz2 and lzma where the next frame is broken.
    """

    def __init__(self, source: BinaryIO, compression: str) -> None:
        self._source = cast(io.BufferedReader, source)
        self._name = {"zst": "zstd"}.get(compression, compression)
        self._new_frame, self._error = _decompressor(compression)
        self._frame: Any = None  # the decompressor of the current frame
        self._compressed = b""
        self._decompressed = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decompressed:
            self._compressed = self._compressed or self._source.read1(_CHUNK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError(f"the file is cut off: it ends inside a {self._name} frame")
                return 0
            self._decompressed = memoryview(self._decompress())
        count = min(len(buffer), len(self._decompressed))
        buffer[:count] = self._decompressed[:count]
        self._decompressed = self._decompressed[count:]
        return count

    def _decompress(self) -> bytes:
        if self._frame is None:
            self._frame = self._new_frame()
        try:
            decompressed: bytes = self._frame.decompress(self._compressed)
        except self._error as error:
            raise OSError(f"the file is damaged, or not {self._name}: {error}") from error
        self._compressed = b""
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = None
        return decompressed


def _decompressor(compression: str) -> tuple[Callable[[], Any], type[Exception]]:
    """What makes the decompressor of a frame, and what it raises."""
    if compression == "bz2":
        return bz2.BZ2Decompressor, OSError
    if compression == "xz":
        return lzma.LZMADecompressor, lzma.LZMAError
    import zstandard

    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
