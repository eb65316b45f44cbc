"""Rows of a file in which quotes enclose fields, and whether a tsv is such a file."""

from __future__ import annotations

import csv
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .raw import RecordError, check_size

_FIELD = re.compile(r'(?:^|(?<=\t))"([^"]*(?:""[^"]*)*)"(?=\t|\r?$)', re.MULTILINE)
_OPENING = re.compile(r'(?:^|\t)"', re.MULTILINE)
_OTHER = "(StreamConfig(quoting=) says it for all shards)"
_ENCLOSED = re.compile(r'"[^"]*(?:""[^"]*)+"')


class QuotedRows:
    """Rows in which quotes enclose fields, as in RFC 4180; blank lines are empty rows.

    A row that cannot be parsed comes as an error, and reading continues on the line after the one where it begins: a
    quote that is never closed loses its own row only.

    Args:
        lines: without a byte order mark. Bytes that are not of the encoding pass as surrogates, to be refused by field.
        delimiter: between fields.
        encoding: of the lines.
        limit: the most bytes of a row; memory holds as many.
        lines_before: the number of lines before `lines`, for messages; called at the first error.
        columns: where a row spans lines that each hold this many fields, rows were joined by a quote that is text, and
            it is an error. 0 does not look.
    """

    def __init__(
        self,
        lines: Iterator[bytes],
        *,
        delimiter: str,
        encoding: str,
        limit: int,
        lines_before: Callable[[], int],
        columns: int = 0,
    ) -> None:
        self._lines = lines
        self._delimiter, self._encoding, self._limit = delimiter, encoding, limit
        self._lines_before = lines_before
        self.columns = columns
        self.ran_out = False
        """Whether the lines ended while the last row was parsed."""
        self._again: deque[bytes] = deque()  # lines of a broken row after its first
        self._taken: list[bytes] = []  # lines of the row that is being parsed
        self._first_line: int | None = None
        self.lines_read = 0
        """Lines of all rows so far."""

    def __iter__(self) -> Iterator[list[str] | RecordError]:
        # The limit is the process's, and another thread may be parsing: only ever raise it.
        csv.field_size_limit(max(csv.field_size_limit(), min(sys.maxsize, 2**31 - 1)))
        taken = self._taken
        while True:
            try:
                # Strict, because otherwise an unbalanced quote silently joins rows.
                for row in csv.reader(self._feed(), delimiter=self._delimiter, strict=True):
                    if len(taken) > 1:
                        self._check_not_joined()
                    self.lines_read += len(taken)
                    taken.clear()
                    yield row
                return
            except (csv.Error, RecordError, UnicodeDecodeError) as error:
                broken = self._broken(error)
                self._again.extendleft(reversed(taken[1:]))
                self.lines_read += 1
                taken.clear()
            yield broken

    def _feed(self) -> Iterator[str]:
        # Every row passes here: names of its own instead of attributes.
        taken, limit, encoding = self._taken, self._limit, self._encoding
        self.ran_out = False
        size = 0  # of the row so far, in bytes
        for line in self._all_lines():
            size = size + len(line) if taken else len(line)
            taken.append(line)
            if size > limit:
                check_size(size, limit, "the row")
            yield line.decode(encoding, "surrogateescape")
        self.ran_out = True

    def _all_lines(self) -> Iterator[bytes]:
        while self._again:
            yield self._again.popleft()
        # Not `yield from`: closing this would close the lines too.
        for line in self._lines:  # noqa: UP028
            yield line

    def _check_not_joined(self) -> None:
        if self.columns > 1:
            delimiter = self._delimiter.encode()
            if all(line.count(delimiter) == self.columns - 1 for line in self._taken):
                raise RecordError(f"it spans {len(self._taken)} lines that have {self.columns} fields each")

    def _broken(self, error: Exception) -> RecordError:
        if self._first_line is None:
            self._first_line = 1 + self._lines_before()
        line = self._first_line + self.lines_read
        message = f"the row on line {line} cannot be parsed: {error}"
        if len(self._taken) > 1:
            message += f"; a quote that opens on line {line} does not end its field"
        if any(b'"' in taken for taken in self._taken):
            message += (
                '. Inside quotes a quote is doubled: "such as ""this"""; where quotes are text, write '
                'StreamConfig(quoting="none")'
            )
        return RecordError(message)


class QuotesFound(NamedTuple):
    """How a tsv is quoted.

    Attributes:
        quoted: whether quotes enclose fields.
        seen: whether a field of the sample begins with a quote; otherwise the sample is the same either way.
        note: a sentence about it, for the log and for errors.
    """

    quoted: bool
    seen: bool
    note: str


def look_at_quotes(sample: list[bytes], *, header: bool | tuple[str, ...], encoding: str, whole: bool) -> QuotesFound:
    """Tell from the first lines of a tsv whether quotes enclose fields (pandas, R) or are text (GLUE).

    They do where the header is in quotes. Else the way that gives more rows as many fields as the header has is right.
    If both are equally good, quotes enclose fields where a writer of csv has left its mark: a doubled quote, or a line
    break in the only column. Otherwise nothing needed the quotes that are there, and they are text.

    Args:
        sample: whole lines, without a byte order mark.
        header: as in `Access`.
        encoding: of the lines.
        whole: whether they are all lines of the file.
    """
    text = b"".join(sample).decode(encoding, "replace")
    if not _OPENING.search(text):
        return QuotesFound(False, False, f"no field of its first rows begins with a quote, so quotes are text {_OTHER}")
    quotes = QuotesFound(True, True, f"quotes enclose fields, as its first rows show {_OTHER}")
    body = text.lstrip("\r\n")
    enclosed = [*_FIELD.finditer(body)]
    if header is True and enclosed and enclosed[0].start() < body.find("\n"):
        return quotes
    lines = [line.rstrip(b"\r\n") for line in sample]
    quoted_faults, used = _quoted_faults(sample, header, encoding, whole)
    rows = [line.count(b"\t") + 1 for line in lines[:used] if line]
    columns = len(header) if isinstance(header, tuple) else rows[0] if rows else 0
    faults = sum(count != columns for count in rows)
    marked = any('""' in field[1] or (columns == 1 and "\n" in field[1]) for field in enclosed)
    if quoted_faults < faults or (quoted_faults == faults and marked):
        return quotes
    return QuotesFound(False, True, f"quotes are text, as its first rows show {_OTHER}")


def must_be_quoted(field: str) -> bool:
    """Whether a field is enclosed in quotes and holds doubled ones, as hardly any text does."""
    return field[:1] == '"' and _ENCLOSED.fullmatch(field) is not None


def _quoted_faults(
    sample: list[bytes], header: bool | tuple[str, ...], encoding: str, whole: bool
) -> tuple[float, int]:
    """Broken rows if quotes enclose fields, and how many lines were read to count them."""
    rows = QuotedRows(
        iter(sample), delimiter="\t", encoding=encoding, limit=sum(map(len, sample)), lines_before=lambda: 0
    )
    columns = len(header) if isinstance(header, tuple) else 0
    faults = 0
    for row in rows:
        if isinstance(row, RecordError):
            if rows.ran_out and not whole:  # the sample ends inside a row
                return faults, rows.lines_read - 1
            if not columns:
                return float("inf"), len(sample)
            faults += 1
        elif row:
            rows.columns = columns = columns or len(row)
            faults += len(row) != columns
    return faults, len(sample)
