"""Records of formats with a line each: plain text and JSON lines."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO, TypeAlias, cast

from ..errors import ShardError, shortened
from .access import file_name
from .options import ReadOptions
from .raw import BOM, RawRecord, RecordError, check_size, parse_json, parse_text
from .shards import Piece

BLANKS = b" \t\r\n"
"""What a line of jsonl that is no record may hold."""

Line: TypeAlias = tuple[int, bytes]
"""The byte at which a line begins, and the line."""


def read_txt(stream: BinaryIO, piece: Piece, options: ReadOptions) -> Iterator[RawRecord]:
    """Every line of a piece, blank ones too.

    Raises:
        ShardError: `options` names another field than "text", which no `map` makes.
    """
    if options.text != "text" and options.map is None:
        message = f"{piece.path}: the only field of a .txt shard is 'text', not {options.text!r}: write text='text'"
        raise ShardError(message, path=piece.path, field=options.text)
    limit = options.access.max_record_bytes
    parse = partial(_parse_line, limit, options.access.encoding)
    for offset, line in read_lines(stream, piece.offset, limit):
        yield RawRecord(parse, line, None, offset)


def _parse_line(limit: int, encoding: str, line: bytes) -> dict[str, Any]:
    check_size(len(line), limit, "the line", "text")
    return {"text": parse_text(line.removesuffix(b"\n").removesuffix(b"\r"), "text", encoding)}


def read_jsonl(stream: BinaryIO, piece: Piece, options: ReadOptions) -> Iterator[RawRecord]:
    """Every line of a piece but blank ones."""
    limit = options.access.max_record_bytes
    parse = partial(_parse_object, limit)
    for offset, line in read_lines(stream, piece.offset, limit):
        if line.strip(BLANKS):
            yield RawRecord(parse, line, None, offset)


def read_json(stream: BinaryIO, piece: Piece, options: ReadOptions) -> Iterator[RawRecord]:
    """As `read_jsonl`.

    Raises:
        ShardError: the file is one array, or one object over several lines.
    """
    if not piece.offset:
        check_json_lines(stream, piece.path)
    return read_jsonl(stream, piece, options)


def check_json_lines(stream: BinaryIO, path: str) -> None:
    """Refuse a .json file, at its beginning, that is one JSON value over several lines.

    Raises:
        ShardError: with a command that makes lines of it.
    """
    begin = cast(io.BufferedReader, stream).peek(1).removeprefix(BOM).lstrip(BLANKS)
    name = file_name(path)
    for pattern, what, each in ((rb"\[", "an array", ".[]"), (rb"\{[ \t\r]*\n", "an object over several lines", ".")):
        if re.match(pattern, begin):
            message = f"it is {what}, but a record is an object on a line: jq -c '{each}' {name} > {name}l makes lines"
            raise ShardError(f"{path}: {message}", path=path)


def _parse_object(limit: int, line: bytes) -> dict[str, Any]:
    check_size(len(line), limit, "the line")
    value = parse_json(line)
    if not isinstance(value, dict):
        raise RecordError(f"the line is JSON but not an object: {shortened(value)}")
    return value


def read_lines(stream: BinaryIO, offset: int, limit: int) -> Iterator[Line]:
    """Each line from a byte offset on, with the offset at which it begins; a byte order mark is removed.

    Of a line with more than `limit` bytes, the first `limit` + 1 come: `check_size` refuses it, and memory stays flat.
    """
    if offset:
        stream.seek(offset)
    for line in iter(partial(stream.readline, limit + 1), b""):
        begin = offset
        offset += len(line)
        if len(line) > limit:
            part = line
            while part and not part.endswith(b"\n"):
                part = stream.readline(limit)
                offset += len(part)
        if not begin:
            line = line.removeprefix(BOM)
        if line:  # a file may be a byte order mark alone
            yield begin, line
