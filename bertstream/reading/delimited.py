"""Records of csv and tsv: rows of fields, in which quotes enclose fields or are text."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, BinaryIO

from ..errors import ShardError, described, shortened
from .access import Access
from .faults import outside_fault
from .files import open_bytes
from .lines import Line, read_lines
from .options import ReadOptions
from .quoting import CARRIAGE_RETURNS, QuotedRows, QuotesFound, look_at_quotes, must_be_quoted
from .raw import BOM, RawRecord, RecordError, broken, check_size, parse_text
from .shards import Piece, read_errors, shard_kind

logger = logging.getLogger(__name__)

DELIMITERS = {"csv": ",", "tsv": "\t"}

# What shows how a tsv is quoted: thousands of sentences. Each piece of a file looks again.
_SAMPLE_BYTES = 1 << 18


def read_csv(stream: BinaryIO, piece: Piece, options: ReadOptions, *, delimiter: str) -> Iterator[RawRecord]:
    """Every row of a piece but blank ones.

    After a row that cannot be parsed, reading continues on the line after the one where it begins.

    Args:
        stream: the shard, at its beginning.
        piece: what to read of it.
        options: what is read of each row.
        delimiter: that of the shard's ending; `options.access.delimiter` takes precedence.
    Raises:
        ShardError: the header is broken, or lacks a required column.
    """
    table = Table(stream, piece.path, options.access, delimiter)
    for name in options.stored:
        if table.columns and name not in table.columns:
            message = f"{piece.path}, field {name!r}: the header has no such column; it has {shortened(table.columns)}"
            raise ShardError(message + table.hint(), path=piece.path, field=name)
    if not piece.offset and table.note:
        logger.info("%s: %s", piece.path, table.note)
    yield from table.records(piece.offset)


class Table:
    """A csv or tsv: its columns, how it is quoted, and its rows.

    Args:
        stream: the file, at its beginning.
        path: its name, for messages.
        access: how it is read.
        delimiter: that of its ending; `access.delimiter` takes precedence.
    Attributes:
        columns: the names of the columns; empty if the file is.
        delimiter: the one in use.
        quoted: whether quotes enclose fields.
        note: how the file's first rows decided that; empty where they were not asked.
        refuses_joined_rows: see `QuotedRows`; where the user says that quotes enclose fields, nothing is refused.
        one_byte_characters: whether a quote's byte is always a quote.
    Raises:
        ShardError: the header cannot be parsed, or names a column twice.
    """

    def __init__(self, stream: BinaryIO, path: str, access: Access, delimiter: str) -> None:
        self.delimiter = access.delimiter or delimiter
        self.quoted = access.quoting != "none"
        self.note = ""
        self._stream, self._path, self._access = stream, path, access
        self._lines = read_lines(stream, 0, access.max_record_bytes)
        self.refuses_joined_rows = _asks_first_rows(access, delimiter)
        self.one_byte_characters = _one_byte_characters(access.encoding)
        self._refuses_enclosed = False
        if self.refuses_joined_rows:
            sample = _FirstLines(self._lines)
            found = sample.quoting(access)
            self.quoted, self.note = found.quoted, found.note
            # A quote that the sample lacks may enclose a field after all: such a field is refused, not guessed at.
            self._refuses_enclosed = not found.seen
            self._lines = iter(sample)
        self._header_lines = 0
        self.columns = self._read_columns()

    def records(self, offset: int) -> Iterator[RawRecord]:
        """The rows; from a byte offset on, or with 0 those below the header. To be called once."""
        lines = read_lines(self._stream, offset, self._access.max_record_bytes) if offset else self._lines
        parse = self._parse_row if self.quoted else self._parse_line
        if not self.quoted:
            for begin, line in lines:
                if line.strip(b"\r\n"):
                    yield RawRecord(parse, line, None, begin)
            return
        lines_before = partial(_count_lines, self._stream, offset) if offset else lambda: self._header_lines
        for row in self._quoted_rows(lines, lines_before, len(self.columns) if self.refuses_joined_rows else 0):
            if isinstance(row, RecordError):
                yield RawRecord(broken, row)
            elif row:
                yield RawRecord(parse, row)

    def seek_rows(self) -> None:
        """Move the stream, which must be seekable, to the end of the header."""
        self._stream.seek(0)
        for _ in range(self._header_lines):
            self._stream.readline()
        if not self._header_lines and self._stream.read(len(BOM)) != BOM:
            self._stream.seek(0)

    def hint(self) -> str:
        """What to write where the only column looks like several."""
        found = [mark for mark in ",;\t|" if len(self.columns) == 1 and mark in self.columns[0]]
        return f": write StreamConfig(delimiter={found[0]!r})?" if found else ""

    def _read_columns(self) -> list[str]:
        header = self._access.header
        if not isinstance(header, bool):
            return [*header]
        used: list[Line] = []
        lines = _noted(self._lines, used)
        rows = iter(self._quoted_rows(lines, lambda: 0, 0)) if self.quoted else map(self._split_or_error, lines)
        # A header that is broken ends the shard; without one, the first whole row shows how many columns there are.
        row = next((row for row in rows if row and (header or not isinstance(row, RecordError))), [])
        if isinstance(row, RecordError):
            raise ShardError(f"{self._path}: the header is broken: {row}", path=self._path) from row
        if not header:
            self._lines = itertools.chain(used, self._lines)
            return [str(number) for number in range(len(row))]
        try:
            for name in row:
                self._decoded(name)
                if "\r" in name and not self.quoted:
                    raise RecordError(CARRIAGE_RETURNS)
        except RecordError as error:
            raise ShardError(f"{self._path}: the header is broken: {error}", path=self._path) from error
        self._header_lines = len(used)
        if len(set(row)) < len(row):
            twice = next(name for name in row if row.count(name) > 1)
            message = f"{self._path}, field {twice!r}: the header names it twice: {shortened(row)}"
            raise ShardError(message, path=self._path, field=twice)
        return row

    def _quoted_rows(self, lines: Iterable[Line], lines_before: Callable[[], int], columns: int) -> QuotedRows:
        return QuotedRows(
            (line for _, line in lines),
            delimiter=self.delimiter,
            encoding=self._access.encoding,
            limit=self._access.max_record_bytes,
            lines_before=lines_before,
            columns=columns,
        )

    def _split(self, line: bytes) -> list[str]:
        check_size(len(line), self._access.max_record_bytes, "the line")
        try:
            text = line.decode(self._access.encoding, "surrogateescape")
        except UnicodeDecodeError:
            text = parse_text(line, None, self._access.encoding)  # raises
        return text.removesuffix("\n").removesuffix("\r").split(self.delimiter)

    def _split_or_error(self, line: Line) -> list[str] | RecordError:
        try:
            return self._split(line[1]) if line[1].strip(b"\r\n") else []
        except RecordError as error:
            return error

    def _parse_line(self, line: bytes) -> dict[str, Any]:
        fields = self._parse_row(self._split(line))
        if self._refuses_enclosed:
            for name, value in fields.items():
                if must_be_quoted(value):
                    message = f"it is in quotes, and the first rows of the file show no quotes: {shortened(value)}"
                    raise RecordError(f'{message}; write StreamConfig(quoting="standard"), or "none"', name)
        return fields

    def _parse_row(self, row: list[str]) -> dict[str, Any]:
        if len(row) != len(self.columns):
            message = f"{len(row)} fields under a header of {len(self.columns)} columns: {shortened(row)}"
            raise RecordError(f"{message}; {self.note}" if self.note else message)
        return {
            name: value if value.isascii() else self._decoded(value, name)
            for name, value in zip(self.columns, row, strict=True)
        }

    def _decoded(self, value: str, name: str | None = None) -> str:
        """A field, or the name of one, that was split off; RecordError if its bytes are not of the encoding."""
        encoding = self._access.encoding
        return parse_text(value.encode(encoding, "surrogateescape"), name, encoding)


def first_rows_decide(path: str, access: Access) -> bool:
    """Whether the first rows of this shard say how it is quoted."""
    kind = shard_kind(path, access)
    return kind.format in DELIMITERS and _asks_first_rows(access, DELIMITERS[kind.format])


def reads_unquoted(path: str, access: Access) -> bool:
    """Whether the first rows of this shard say that quotes are text, where version 0.1.0 let them enclose fields.

    Raises:
        ShardError: the machine or network failed. Faults of the data are left to those who read it.
    """
    if not first_rows_decide(path, access):
        return False
    kind = shard_kind(path, access)
    try:
        with open_bytes(path, access, kind.compression) as stream:
            sample = _FirstLines(read_lines(stream, 0, access.max_record_bytes))
            if sample.failure is not None:
                raise sample.failure
            found = sample.quoting(access)
            return found.seen and not found.quoted
    except read_errors(path, kind) as error:
        if fault := outside_fault(error):
            raise ShardError(f"{path}: cannot be read: {described(fault)}", path=path) from error
        return False


def _asks_first_rows(access: Access, of_ending: str) -> bool:
    return access.quoting == "auto" and (access.delimiter or of_ending) == "\t"


def _one_byte_characters(encoding: str) -> bool:
    """Whether each byte below 128 is a character of its own, as in UTF-8 and in all encodings of one byte."""
    return encoding == "utf-8" or len(bytes(range(256)).decode(encoding, "replace")) == 256


def _noted(lines: Iterator[Line], used: list[Line]) -> Iterator[Line]:
    for line in lines:
        used.append(line)
        yield line


class _FirstLines:
    """The lines that show how a tsv is quoted; iterating over it gives them and then all others.

    Args:
        lines: of the file.
    Attributes:
        failure: what reading them ended with, which iterating raises after the lines before it; or None.
    """

    def __init__(self, lines: Iterator[Line]) -> None:
        self.failure: Exception | None = None
        self._lines = lines
        self._first: list[Line] = []
        self._whole = True
        size = 0
        try:
            for line in lines:
                self._first.append(line)
                size += len(line[1])
                if size >= _SAMPLE_BYTES:
                    self._whole = False
                    break
        except Exception as error:  # the lines before it are whole, whatever it is
            self.failure, self._whole = error, False

    def __iter__(self) -> Iterator[Line]:
        yield from self._first
        if self.failure is not None:
            raise self.failure
        yield from self._lines

    def quoting(self, access: Access) -> QuotesFound:
        """What they show."""
        header = access.header if isinstance(access.header, bool) else tuple(access.header)
        return look_at_quotes(
            [line for _, line in self._first], header=header, encoding=access.encoding, whole=self._whole
        )


def _count_lines(stream: BinaryIO, offset: int) -> int:
    """Lines before a byte; the stream stays where it is."""
    position = stream.tell()
    stream.seek(0)
    count = 0
    while offset > 0 and (block := stream.read(min(offset, 1 << 20))):
        count += block.count(b"\n")
        offset -= len(block)
    stream.seek(position)
    return count
