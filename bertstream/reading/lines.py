"""Records of line formats: plain text, JSON lines, csv and tsv."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

from ..errors import ShardError
from .options import ReadOptions
from .raw import BOM, RawRecord, RecordError, excerpt, parse_json, parse_utf8
from .shards import Piece

DELIMITERS = {"csv": ",", "tsv": "\t"}
_BLANK_LINES = (b"\n", b"\r\n", b"\r")


def read_txt(stream: BinaryIO, piece: Piece, options: ReadOptions) -> Iterator[RawRecord]:
    """Every line of a piece, blank ones too.

    Raises:
        ShardError: `options` names another field than "text".
    """
    if options.text != "text":
        message = f"{piece.path}: the only field of a .txt shard is 'text', not {options.text!r}: write text='text'"
        raise ShardError(message, path=piece.path, field=options.text)
    for offset, line in _lines(stream, piece.offset):
        yield RawRecord(_parse_line, line, None, offset)


def _parse_line(line: bytes) -> dict[str, Any]:
    return {"text": parse_utf8(line.removesuffix(b"\n").removesuffix(b"\r"), "text")}


def read_jsonl(stream: BinaryIO, piece: Piece, options: ReadOptions) -> Iterator[RawRecord]:
    """Every line of a piece but blank ones."""
    for offset, line in _lines(stream, piece.offset):
        if line not in _BLANK_LINES:
            yield RawRecord(_parse_object, line, None, offset)


def _parse_object(line: bytes) -> dict[str, Any]:
    value = parse_json(line)
    if not isinstance(value, dict):
        raise RecordError(f"the line is JSON but not an object: {excerpt(value)}")
    return value


def read_csv(stream: BinaryIO, piece: Piece, options: ReadOptions, *, delimiter: str) -> Iterator[RawRecord]:
    """Every row of a piece but blank ones; quoted fields may span lines.

    Raises:
        ShardError: the header is broken, or lacks a required column.
    """
    columns, rows = csv_rows(stream, piece.path, delimiter)
    for name in options.required:
        if columns and name not in columns:
            message = f"{piece.path}, field {name!r}: the header has no such column; it has {excerpt(columns)}"
            raise ShardError(message, path=piece.path, field=name)
    if piece.offset:
        stream.seek(piece.offset)
    parse = partial(_parse_row, columns)
    while True:
        row: list[str] | csv.Error
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:  # the parser resumes at the next line, so this is one broken record
            row = error
        if row:
            yield RawRecord(parse, row)


def csv_rows(stream: BinaryIO, path: str, delimiter: str) -> tuple[list[str], Iterator[list[str]]]:
    """Read the header of a csv file.

    Returns:
        The names of the columns, and an iterator of the rows below; the stream is at the end of the header.
    Raises:
        ShardError: the header cannot be parsed, or names a column twice.
    """
    # The limit is the process's, and another thread may be parsing: only ever raise it.
    csv.field_size_limit(max(csv.field_size_limit(), min(sys.maxsize, 2**31 - 1)))
    # Invalid bytes pass as surrogates and are reported by field later: an exception in here would make the parser lose
    # its place in the row. Strict, because otherwise an unbalanced quote silently joins rows.
    lines = (line.decode("utf-8", "surrogateescape") for _, line in _lines(stream, 0))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        columns = next((row for row in rows if row), [])
    except csv.Error as error:
        raise ShardError(f"{path}: the header is broken: {error}", path=path) from error
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        message = f"{path}, field {twice!r}: the header names it twice: {excerpt(columns)}"
        raise ShardError(message, path=path, field=twice)
    return columns, rows


def _parse_row(columns: list[str], row: list[str] | csv.Error) -> dict[str, Any]:
    if isinstance(row, csv.Error):
        raise RecordError(f'the row cannot be parsed: {row}; a field with a quote is written "such as ""this"""')
    if len(row) != len(columns):
        raise RecordError(f"{len(row)} fields under a header of {len(columns)} columns: {excerpt(row)}")
    return {
        name: value if value.isascii() else parse_utf8(value.encode("utf-8", "surrogateescape"), name)
        for name, value in zip(columns, row, strict=True)
    }


def _lines(stream: BinaryIO, offset: int) -> Iterator[tuple[int, bytes]]:
    """Each line from a byte offset on, with the offset at which it begins; a byte order mark is removed."""
    if offset:
        stream.seek(offset)
    elif first := stream.readline():
        yield 0, first.removeprefix(BOM)
        offset = len(first)
    for line in stream:
        yield offset, line
        offset += len(line)
