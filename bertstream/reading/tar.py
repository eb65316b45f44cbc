"""Records of a WebDataset tar, read forwards with flat memory.

Consecutive members that share a name up to its first dot are a record. Members are decoded by name, never by a look at
their bytes, and never unpickled: txt, text, transcript to str; cls, cls2, class, count, index, inx, id to int; float,
score, weight to float, unless `fields` lists labels for them; json, jsn parsed. The keys of a member called just `json`
or `jsn` that is an object become fields of the record. All other members stay bytes, except the text, which is always
UTF-8. One of those that are decoded may be compressed: `txt.gz` is read as `txt`, unless `fields` names it as it is.
Folders, hidden members, members without an ending and, as in webdataset, those such as `__meta__` belong to no record.
"""

from __future__ import annotations

import itertools
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, BinaryIO, NamedTuple, cast

from ..errors import described, shortened
from ..labels import NumberOf, as_listed
from .compression import decompress_member
from .endings import COMPRESSIONS
from .options import ReadOptions, check_required
from .raw import BOM, RawRecord, RecordError, check_size, parse_json, parse_text
from .shards import Piece

_BUFFER_BYTES = 1 << 20

_TEXTS, _JSON = ("txt", "text", "transcript"), ("json", "jsn")
_INTS, _FLOATS = ("cls", "cls2", "class", "count", "index", "inx", "id"), ("float", "score", "weight")
_DECODED = frozenset((*_TEXTS, *_JSON, *_INTS, *_FLOATS))


def read_tar(stream: BinaryIO, piece: Piece, options: ReadOptions) -> Iterator[RawRecord]:
    """The records of a piece. The parser reads the payloads, so those of skipped records are not read.

    A broken header ends the archive: nothing says how many records follow, or whether bytes that look like a header are
    one or part of a member.
    """
    if piece.offset:
        stream.seek(piece.offset)
    tar = TarReader(stream, piece.offset)
    parse = partial(_parse_members, tar, options)
    for key, members in itertools.groupby(tar.members(), lambda member: member.key):
        first = next(members)
        # Reading must not resume after a global header, which applies to all later members.
        offset = 0 if tar.pax_headers else first.info.offset
        all_members = itertools.chain([first], members)  # noqa: B031 - one iterator, in two steps
        yield RawRecord(parse, all_members, key, offset)
    tar.check_nothing_follows()


def _parse_members(tar: TarReader, options: ReadOptions, members: Iterable[TarMember]) -> dict[str, Any]:
    wanted = None if options.wanted is None else options.wanted | {"json", "jsn"}
    fields: dict[str, Any] = {}
    unread: list[str] = []
    objects: list[dict[str, Any]] = []
    size = 0
    for member in members:
        name, compression = _field_of(member.field, options)
        if wanted is not None and name not in wanted:
            unread.append(member.field)
            continue
        if not member.info.isreg() or member.info.issparse():
            message = f"member {member.info.name!r} is a link, sparse or special: store the file itself"
            raise RecordError(message, member.field)
        size += member.info.size
        check_size(size, options.access.max_record_bytes, f"its members up to {member.info.name!r}", member.field)
        payload = tar.payload(member)
        if compression:
            payload = _decompressed(payload, compression, options.access.max_record_bytes, member.field)
            name_in_archive = f"member {member.info.name!r}"
            check_size(len(payload), options.access.max_record_bytes, name_in_archive, member.field)
        value = _decode(name, payload, options)
        if name in ("json", "jsn") and isinstance(value, dict):
            objects.append(value)
        elif name in fields:
            raise RecordError(f"two members of record {member.key!r} have this name", name)
        else:
            fields[name] = value
    for keys in objects:
        for name in keys:
            if name in fields:
                raise RecordError("it is both a member and a key of the json member: rename one", name)
        fields |= keys
    if unread:
        check_required(options, fields, unread)
    return fields


def _field_of(member: str, options: ReadOptions) -> tuple[str, str]:
    """The field that a member becomes, and the compression to remove, or ""."""
    inner, _, ending = member.rpartition(".")
    if ending not in COMPRESSIONS or not inner:
        return member, ""
    if member in options.texts:
        return member, ending
    read = inner in options.texts or inner.rpartition(".")[2] in _DECODED
    return (inner, ending) if read and member not in options.required else (member, "")


def _decompressed(payload: bytes, compression: str, limit: int, name: str) -> bytes:
    try:
        return decompress_member(payload, compression, limit)
    except (OSError, EOFError, zlib.error) as error:
        raise RecordError(f"it cannot be decompressed: {described(error)}", name) from error


def _decode(name: str, payload: bytes, options: ReadOptions) -> Any:
    ending = name.rpartition(".")[2]
    text = payload.removeprefix(BOM)
    if ending in _TEXTS:
        return parse_text(text, name)
    if ending in _JSON:
        return parse_json(text, name)
    number: type[int] | type[float]
    if ending in _INTS:
        number = int
    elif ending in _FLOATS:
        number = float
    else:
        return payload
    try:
        return number(text)
    except ValueError as error:
        if isinstance(options.named, Mapping) and isinstance(options.named.get(name), NumberOf):
            return payload
        raise RecordError(
            f"a member of this name is read as {number.__name__}, but holds {shortened(payload)}: {as_listed(name)}, "
            "or name the fields to read, without it, in fields=",
            name,
        ) from error


# --- the archive ------------------------------------------------------------------------------------------------------


class TarMember(NamedTuple):
    """One file of the archive: its record's key, the name of its field in the record, and its header."""

    key: str
    field: str
    info: tarfile.TarInfo


class TarReader:
    """Read a tar forwards and raise where it is cut off or broken; `tarfile` silently ends there.

    It also has the attributes and methods of a TarFile that `TarInfo.fromtarfile` uses, which parses long names and pax
    headers.

    Args:
        stream: the archive, at byte `offset`.
        offset: where the first header begins.
    Attributes:
        offset: where the next header begins; `fromtarfile` sets it.
        pax_headers: the global pax headers so far; `fromtarfile` sets them.
    """

    encoding = "utf-8"
    errors = "surrogateescape"

    def __init__(self, stream: BinaryIO, offset: int) -> None:
        self.fileobj = self
        self.pax_headers: dict[str, str] = {}
        self.offset = offset
        self._stream = stream
        self._position = offset
        self._at_end = False

    def members(self) -> Iterator[TarMember]:
        """The members that belong to records; a payload is skipped unless `payload` reads it.

        Raises:
            EOFError: the archive is cut off.
            tarfile.ReadError: a header is invalid.
        """
        while (info := self._next_header()) is not None:
            folder, slash, base = info.name.rpartition("/")
            stem, _, name = base.partition(".")
            if info.isdir() or not stem or not name or re.match(r"__[^/]*__(/|$)", info.name):
                continue
            yield TarMember(folder + slash + stem, name.lower(), info)

    def payload(self, member: TarMember) -> bytes:
        """The bytes of the latest member.

        Raises:
            EOFError: the archive is cut off.
        """
        payload = self.read(member.info.size)
        if self._at_end:
            raise EOFError(f"the archive is cut off inside member {member.info.name!r}")
        return payload

    def check_nothing_follows(self) -> None:
        """Refuse archives joined end to end: members after the first end marker would be lost.

        Raises:
            tarfile.ReadError: anything but zeros follows the end marker.
        """
        while block := self.read(_BUFFER_BYTES):
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"more follows the end marker, before byte {self._position}: joined archives?")

    def tell(self) -> int:
        """The byte at which the next read begins."""
        return self._position

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, in steps: a broken header may promise more bytes than there is memory."""
        parts = [b""]
        while size and (part := self._stream.read(min(size, 1 << 26))):
            parts.append(part)
            size -= len(part)
        self._at_end = size > 0
        data = parts[1] if len(parts) == 2 else b"".join(parts)
        self._position += len(data)
        return data

    def _next_header(self) -> tarfile.TarInfo | None:
        self._skip_to(self.offset)
        start = self.offset
        try:
            info = _TarHeader.fromtarfile(cast(tarfile.TarFile, self))
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return None
        except (tarfile.HeaderError, ValueError, ArithmeticError, RecursionError) as error:
            if self._at_end:
                raise EOFError(f"the archive is cut off after byte {self._position}, without an end marker") from error
            raise tarfile.ReadError(f"there is no valid tar header at byte {start}: {error}") from error
        if not 0 <= info.size < 1 << 40 or self.offset < self._position:  # a negative size would loop forever
            raise tarfile.ReadError(f"the tar header at byte {start} has an impossible size")
        return info

    def _skip_to(self, target: int) -> None:
        if target - self._position > _BUFFER_BYTES and self._stream.seekable():
            self._position = self._stream.seek(target - 1)  # reading the last byte shows whether the file is that long
        while self._position < target:
            if not self.read(min(target - self._position, _BUFFER_BYTES)):
                raise EOFError(f"the archive is cut off before byte {target}, inside a member")


class _TarHeader(tarfile.TarInfo):
    """A header; of a plain file with a short name, only the name and size are parsed.

    Records of two small members are read at 44 thousand a second, with TarInfo's own parser at 13 thousand.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _TarHeader:
        """The header of one block."""
        size, checksum = buf[124:136].rstrip(b"\0 "), buf[148:156].rstrip(b"\0 ")
        # The checksum counts its own field as blanks.
        plain = len(buf) == tarfile.BLOCKSIZE and buf[156:157] == tarfile.REGTYPE and buf[345:346] == b"\0"
        if (
            plain
            and size.isdigit()
            and checksum.isdigit()
            and int(checksum, 8) == sum(buf) - sum(buf[148:156]) + 8 * 32
        ):
            info = cls(buf[:100].partition(b"\0")[0].decode(encoding, errors))
            info.size = int(size, 8)
            return info
        return super().frombuf(buf, encoding, errors)
