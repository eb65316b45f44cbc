"""Shards to records: WebDataset tar, jsonl, csv, tsv and plain text, each also packed, and Parquet; on disk or remote.

    ending                 a record                                                 its key
    .tar .tgz              consecutive members that share a name up to its first    the members' common name
                           dot; a field is named by the rest of the member's name
    .jsonl .ndjson         a line: one JSON object; blank lines are no records      <file name>:<index>
    .csv .tsv              a row under a header row; blank lines are no records     <file name>:<index>
    .txt                   a line, blank ones too; its only field is "text"         <file name>:<index>
    .parquet               a row                                                    <file name>:<index>

Every ending but .parquet, which is packed inside, may be followed by `.gz` or `.zst`. Of a Parquet file only the
columns that are wanted are read, a row group at a time. Members of a tar are decoded by their names, never by a look at
their bytes, and never unpickled: txt, text, transcript to str; cls, cls2, class, count, index, inx, id to int; float,
score, weight to float; json, jsn parsed, and the keys of a member called just `json` or `jsn` that is an object become
fields of the record. All others stay bytes, but for the text, which is always UTF-8. Folders, hidden members, members
without an ending and, as in webdataset, members such as `__meta__` are no part of any record.

`pipe:command` is a shard that a shell command writes to its standard output; the ending of the command's last word says
what it writes (a comment does too: `pipe:zcat a.gz # .tar`).
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, BinaryIO, NamedTuple, TypeAlias, cast

from ..errors import ConfigError, ShardError, check_at_least, described
from ..tokens import Record, Text
from .access import DEFAULT_ACCESS, Access, is_local
from .files import open_bytes
from .parquet import ParquetReader, plain
from .shards import Piece, ShardKind, check_packages, read_errors, shard_kind
from .tar import TarMember, TarReader

DELIMITERS = {"csv": ",", "tsv": "\t"}
_ROWS_AT_ONCE = 256
BOM = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder()
_JSON_BLANKS = " \t\n\r"
_BLANK_LINES = (b"\n", b"\r\n", b"\r")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """What is taken from each record, and how shards are opened. It pickles where its functions do.

    Attributes:
        text: the field that holds the text: a str, or a list of str (words).
        pair: the field that holds the second text, where records are pairs of texts; None where they are not.
        fields: the other fields to keep: None for all as they are, names for only these, or a mapping from names to
            functions that their values are passed through.
        access: how shards are opened.
        rows: a dataset that stands for the shards, see `split_rows`; None for files.
        names: the fields that a record must have.
    Raises:
        ConfigError: an argument of a wrong type, or `fields` names the text.
    """

    text: str = "text"
    pair: str | None = None
    fields: Mapping[str, Callable[[Any], Any]] | Sequence[str] | None = None
    access: Access = DEFAULT_ACCESS
    rows: Any = field(default=None, repr=False)
    names: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise ConfigError(
                f"text names the field that holds the text, a str; got {self.text!r}. Shards are read for one text, or "
                "two as one by pair=; vectors of several fields come from a DataLoader, by wrap(..., text=(...))"
            )
        if self.pair is not None and (not isinstance(self.pair, str) or self.pair in ("", self.text)):
            raise ConfigError(f"pair names the field that holds the second text, another str; got {self.pair!r}")
        if isinstance(self.fields, str):
            raise ConfigError(f"fields takes several names: write fields=[{self.fields!r}]")
        names = list(self.fields or ())
        if not all(isinstance(name, str) for name in names):
            raise ConfigError(f"fields takes names of fields; got {names!r}")
        for text in self.texts:
            if text in names:
                raise ConfigError(f"fields lists the other fields: leave out {text!r}, which is the text")
        if isinstance(self.fields, Mapping) and not all(callable(function) for function in self.fields.values()):
            raise ConfigError(f"fields maps names to functions; got {dict(self.fields)!r}")
        object.__setattr__(self, "names", (*self.texts, *names))

    @property
    def texts(self) -> tuple[str, ...]:
        """The one or two fields that make the text."""
        return (self.text,) if self.pair is None else (self.text, self.pair)


def read_records(
    piece: Piece, options: ReadOptions, *, skip: int = 0, on_bad: Callable[[ShardError], None] | None = None
) -> Generator[Record, None, None]:
    """Read the records of a piece in order.

    It holds one record at a time, and its file is closed when it ends, raises or is closed.

    Args:
        piece: the whole shard, as in `Piece(path)`, or a part of it.
        options: what is taken from each record.
        skip: how many records of the piece to leap over, broken ones included; they are counted but not parsed.
        on_bad: is called with the error of each broken record, which is then passed over; None raises it.
    Yields:
        Records whose `index` is the position in the shard.
    Raises:
        ConfigError: the ending is not known, a `pipe:` is not allowed, or `skip` is negative.
        ShardError: the shard is missing, unreadable, cut off or without any record; or, without `on_bad`, a record is
            broken.
    """
    check_at_least("skip", skip, 0)
    kind = shard_kind(piece.path) if options.rows is None else ShardKind("rows", "", piece.path)
    first = piece.start if piece.offset else 0
    wanted = replace(piece, start=piece.start + skip)
    seekable = options.rows is None and is_local(piece.path) and not kind.packing
    index = first
    check_packages(piece.path, kind)
    try:
        with ExitStack() as stack:
            if options.rows is not None:
                raw_records = _read_rows(options.rows, wanted)
            else:
                stream = stack.enter_context(open_bytes(piece.path, options.access, kind.packing))
                raw_records = READERS[kind.name](stream, wanted, options)
            while piece.stop is None or index < piece.stop:  # asked first: what follows the last one may be broken
                raw = next(raw_records, None)
                if raw is None:
                    break
                if index >= wanted.start:
                    try:
                        text, fields = _take(raw.parse(raw.source), options)
                    except _RecordError as broken:
                        error = _at_record(broken, piece.path, index)
                        if on_bad is None:
                            raise error from broken.__cause__
                        on_bad(error)
                    else:
                        offset = raw.offset if seekable else 0
                        yield Record(text, fields, raw.key or f"{kind.stem}:{index}", piece.path, index, offset)
                index += raw.records
    except (ShardError, ConfigError):
        raise
    except read_errors(piece.path, kind) as failure:
        message = f"{piece.path}: cannot be read from record {index} on: {described(failure)}"
        raise ShardError(message, path=piece.path, index=index) from failure
    if piece.stop is not None and index < piece.stop:
        message = f"{piece.path}: it ends after {index} records, but {piece.stop} were there when it was split"
        raise ShardError(message, path=piece.path, index=index)
    if piece.stop is None and index == first:
        message = f"{piece.path}: it holds no record{f' from {first} on' if first else ''}"
        raise ShardError(message, path=piece.path, index=index)


def _at_record(broken: _RecordError, path: str, index: int) -> ShardError:
    place = f", field {broken.field!r}" if broken.field is not None else ""
    return ShardError(f"{path}, record {index}{place}: {broken}", path=path, index=index, field=broken.field)


# --- raw records, not yet parsed: those to skip cost little, and broken ones can be passed ----------------------------


class _RawRecord(NamedTuple):
    parse: Callable[[Any], dict[str, Any]]
    source: Any  # what `parse` makes the fields of: a `partial` for each record would cost more
    key: str | None = None
    offset: int = 0  # byte at which it begins, where reading can begin anew
    records: int = 1  # a Parquet file's row groups before the first record that is wanted are leapt over as one


# The piece's `start` is the first record that is wanted: those before it are only counted.
_Reader: TypeAlias = Callable[[BinaryIO, Piece, ReadOptions], Iterator[_RawRecord]]


class _RecordError(Exception):
    """The record being read is at fault; `read_records` adds the place."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def _lines(stream: BinaryIO, offset: int) -> Iterator[tuple[int, bytes]]:
    """Each line with the byte at which it begins."""
    if offset:
        stream.seek(offset)
    elif first := stream.readline():
        yield 0, first.removeprefix(BOM)
        offset = len(first)
    for line in stream:
        yield offset, line
        offset += len(line)


def _read_txt(stream: BinaryIO, piece: Piece, options: ReadOptions) -> Iterator[_RawRecord]:
    if options.text != "text":
        message = f"{piece.path}: the only field of a .txt shard is 'text', not {options.text!r}: write text='text'"
        raise ShardError(message, path=piece.path, field=options.text)
    for offset, line in _lines(stream, piece.offset):
        yield _RawRecord(_parse_line, line, None, offset)


def _parse_line(line: bytes) -> dict[str, Any]:
    return {"text": _utf8(line.removesuffix(b"\n").removesuffix(b"\r"), "text")}


def _read_jsonl(stream: BinaryIO, piece: Piece, options: ReadOptions) -> Iterator[_RawRecord]:
    for offset, line in _lines(stream, piece.offset):
        if line not in _BLANK_LINES:
            yield _RawRecord(_parse_object, line, None, offset)


def _parse_object(line: bytes) -> dict[str, Any]:
    value = _json(line)
    if not isinstance(value, dict):
        raise _RecordError(f"the line is JSON but not an object: {_shown(value)}")
    return value


def _read_csv(stream: BinaryIO, piece: Piece, options: ReadOptions, *, delimiter: str) -> Iterator[_RawRecord]:
    columns, rows = csv_rows(stream, piece.path, delimiter)
    for name in (*options.texts, *(options.fields or ())):
        if columns and name not in columns:
            message = f"{piece.path}, field {name!r}: the header has no such column; it has {_shown(columns)}"
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
        except csv.Error as error:  # the parser starts anew on the next line, so the count goes on
            row = error
        if row:
            yield _RawRecord(parse, row)


def csv_rows(stream: BinaryIO, path: str, delimiter: str) -> tuple[list[str], Iterator[list[str]]]:
    """The header's names, and all further rows; leaves the stream where the header ends."""
    # The limit belongs to the process and other threads may be parsing, so it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), min(sys.maxsize, 2**31 - 1)))
    # A bad byte must not upset the parser, which would then look for the next row at another place: it is found later,
    # by field. Strict, since otherwise an unbalanced quote joins rows without a word.
    lines = (line.decode("utf-8", "surrogateescape") for _, line in _lines(stream, 0))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        columns = next((row for row in rows if row), [])
    except csv.Error as error:
        raise ShardError(f"{path}: the header is broken: {error}", path=path) from error
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        message = f"{path}, field {twice!r}: the header names it twice: {_shown(columns)}"
        raise ShardError(message, path=path, field=twice)
    return columns, rows


def _parse_row(columns: list[str], row: list[str] | csv.Error) -> dict[str, Any]:
    if isinstance(row, csv.Error):
        raise _RecordError(f'the row cannot be parsed: {row}; a field with a quote is written "such as ""this"""')
    if len(row) != len(columns):
        raise _RecordError(f"{len(row)} fields under a header of {len(columns)} columns: {_shown(row)}")
    return {
        name: value if value.isascii() else _utf8(value.encode("utf-8", "surrogateescape"), name)
        for name, value in zip(columns, row, strict=True)
    }


def _read_tar(stream: BinaryIO, piece: Piece, options: ReadOptions) -> Iterator[_RawRecord]:
    if piece.offset:
        stream.seek(piece.offset)
    tar = TarReader(stream, piece.offset)
    # Payloads are read by the parser, so those of skipped records are passed over.
    parse = partial(_parse_members, tar, options)
    for key, members in itertools.groupby(tar.members(), lambda member: member.key):
        first = next(members)
        # A global header speaks for all members that follow, so reading cannot begin behind it.
        offset = 0 if tar.pax_headers else first.info.offset
        all_members = itertools.chain([first], members)  # noqa: B031 - one iterator, in two steps
        yield _RawRecord(parse, all_members, key, offset)
    tar.check_nothing_follows()


def _parse_members(tar: TarReader, options: ReadOptions, members: Iterable[TarMember]) -> dict[str, Any]:
    wanted = None if options.fields is None else {*options.texts, "json", "jsn", *options.fields}
    fields: dict[str, Any] = {}
    others: list[str] = []
    objects: list[dict[str, Any]] = []
    for member in members:
        if wanted is not None and member.field not in wanted:
            others.append(member.field)
            continue
        value = _decode(member.field, tar.payload(member))
        if member.field in ("json", "jsn") and isinstance(value, dict):
            objects.append(value)
        elif member.field in fields:
            raise _RecordError(f"two members of record {member.key!r} have this name", member.field)
        else:
            fields[member.field] = value
    for keys in objects:
        for name in keys:
            if name in fields:
                raise _RecordError("it is a member, and a key of the json member too: rename one", name)
        fields |= keys
    if others:
        _check_names(options, fields, others)
    for name in options.texts:
        if isinstance(fields.get(name), bytes):
            fields[name] = _utf8(fields[name], name)
    return fields


def _decode(name: str, payload: bytes) -> Any:
    ending = name.rpartition(".")[2]
    if ending in ("txt", "text", "transcript"):
        return _utf8(payload, name)
    if ending in ("json", "jsn"):
        return _json(payload, name)
    number: type[int] | type[float]
    if ending in ("cls", "cls2", "class", "count", "index", "inx", "id"):
        number = int
    elif ending in ("float", "score", "weight"):
        number = float
    else:
        return payload
    try:
        return number(payload)
    except ValueError as error:
        message = f"a member of this name is read as {number.__name__}, but holds {_shown(payload)}"
        raise _RecordError(message, name) from error


def _read_parquet(stream: BinaryIO, piece: Piece, options: ReadOptions) -> Iterator[_RawRecord]:
    file = ParquetReader(stream)
    wanted = None if options.fields is None else [*options.texts, *options.fields]
    for name in wanted or options.texts:
        if name not in file.columns:
            message = f"{piece.path}, field {name!r}: the file has no such column; it has {_shown(file.columns)}"
            raise ShardError(message, path=piece.path, field=name)
    for name in wanted or file.columns:
        if file.columns.count(name) > 1:
            message = f"{piece.path}, field {name!r}: several columns have this name: {_shown(file.columns)}"
            raise ShardError(message, path=piece.path, field=name)
    group = bisect_right(file.first_rows, piece.start, hi=len(file.sizes)) - 1 if file.sizes else 0
    if group:
        yield _RawRecord(dict, (), records=file.first_rows[group])
    for row in file.rows(group, wanted):
        yield _RawRecord(_parse_row_values, row)


def _read_rows(rows: Any, piece: Piece) -> Iterator[_RawRecord]:
    if hasattr(rows, "__len__"):
        if piece.start:
            yield _RawRecord(dict, (), records=piece.start)
        run = range(piece.start, len(rows) if piece.stop is None else piece.stop)
        # Hugging Face's own iterator reads many rows at a time.
        source: Iterable[Any] = rows.select(run) if hasattr(rows, "select") else (rows[i] for i in run)
    else:
        number, count = (int(word) for word in piece.path.split()[-3::2])
        # By batches: its iterator of rows would share them out to DataLoader workers once more.
        batches = rows.shard(num_shards=count, index=number).iter(_ROWS_AT_ONCE)
        source = (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
    for row in source:
        yield _RawRecord(dict, row)  # a copy: the rows may be the user's own


def _parse_row_values(row: dict[str, Any]) -> dict[str, Any]:
    for name, value in row.items():
        try:
            row[name] = plain(value)
        except Exception as error:  # what pyarrow raises is its own choice
            raise _RecordError(f"Python has no value for it: {described(error)}", name) from error
    return row


READERS: dict[str, _Reader] = {
    "tar": _read_tar,
    "jsonl": _read_jsonl,
    "ndjson": _read_jsonl,
    "csv": partial(_read_csv, delimiter=DELIMITERS["csv"]),
    "tsv": partial(_read_csv, delimiter=DELIMITERS["tsv"]),
    "txt": _read_txt,
    "parquet": _read_parquet,
}


# --- parsing ----------------------------------------------------------------------------------------------------------


def _take(values: dict[str, Any], options: ReadOptions) -> tuple[Text, dict[str, Any]]:
    """Part a record's text from its other fields, and take those that are wanted."""
    _check_names(options, values)
    text: Text = _checked_text(values.pop(options.text), options.text)
    if options.pair is not None:
        second = _checked_text(values.pop(options.pair), options.pair)
        if type(second) is not type(text):
            raise _RecordError("of a pair both texts are strings, or both lists of words", options.pair)
        text = cast(Text, (text, second))
    if options.fields is None:
        return text, values
    if not isinstance(options.fields, Mapping):
        return text, {name: values[name] for name in options.fields}
    fields = {}
    for name, function in options.fields.items():
        try:
            fields[name] = function(values[name])
        except Exception as error:  # the user's function may raise anything; the cause stays attached
            message = f"the function given for it raised {described(error)} on {_shown(values[name])}"
            raise _RecordError(message, name) from error
    return text, fields


def _check_names(options: ReadOptions, values: Mapping[str, Any], others: Sequence[str] = ()) -> None:
    """Refuse a record without a field that is wanted; `others` were left unread."""
    for name in options.names:
        if name not in values:
            raise _RecordError(f"the record has no such field; it has {_shown(sorted([*values, *others]))}", name)


def _checked_text(text: Any, name: str) -> str | list[str]:
    if type(text) is str and text.isascii():  # nearly all are: the rest costs a microsecond
        return text
    words = [text] if isinstance(text, str) else text
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise _RecordError(f"a text is a string or a list of strings, not {_shown(text)}", name)
    for word in words:
        if not word.isascii():
            try:
                word.encode()
            except UnicodeEncodeError as error:
                raise _RecordError(f"the text has half a surrogate pair: {_shown(word)}", name) from error
    return cast("str | list[str]", text)


def _utf8(data: bytes, name: str | None = None) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        near = data[max(error.start - 20, 0) : error.start + 20]
        raise _RecordError(f"not UTF-8: byte 0x{data[error.start]:02x} in {_shown(near)}", name) from error


def _json(data: bytes, name: str | None = None) -> Any:
    text = _utf8(data, name).strip(_JSON_BLANKS)
    try:
        value, end = _DECODER.raw_decode(text)  # `decode` looks for blanks by regular expressions: a microsecond more
        return value if end == len(text) else _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _RecordError(f"not JSON: {error}: {_shown(text)}", name) from error


def _shown(value: object) -> str:
    text = repr(value[:80] if isinstance(value, (str, bytes, list)) else value)
    return text if len(text) <= 80 else text[:80] + "..."
