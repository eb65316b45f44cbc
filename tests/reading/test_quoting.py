"""The first rows of a tsv show whether quotes enclose its fields or are text."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertstream.reading.quoting import QuotedRows, look_at_quotes
from bertstream.reading.raw import RecordError

texts = st.text(st.sampled_from('ab ".\n\t,é'), max_size=12)


def rows_of(data: str, columns: int = 0, limit: int = 1 << 20) -> list[list[str] | None]:
    """The rows that are no blank lines, None for a broken one."""
    rows = QuotedRows(
        iter(data.encode().splitlines(keepends=True)),
        delimiter="\t",
        encoding="utf-8",
        limit=limit,
        lines_before=lambda: 0,
        columns=columns,
    )
    return [None if isinstance(row, RecordError) else row for row in rows if row]


def encloses(data: str, *, header: bool | tuple[str, ...] = True, whole: bool = True) -> bool:
    lines = data.encode().splitlines(keepends=True)
    return look_at_quotes(lines, header=header, encoding="utf-8", whole=whole).quoted


@given(st.lists(st.tuples(texts, texts), min_size=1))
def test_what_a_csv_writer_quotes_is_read_back(rows: list[tuple[str, str]]) -> None:
    file = io.StringIO()
    csv.writer(file, delimiter="\t", lineterminator="\n").writerows([("text", "b"), *rows])
    data = file.getvalue()
    assert rows_of(data)[1:] == [[*row] for row in rows]
    if "\t" not in "".join(map("".join, rows)) and '"' in data:
        assert encloses(data)


@given(st.lists(st.tuples(*[st.text(st.sampled_from('ab "".,é'), max_size=12)] * 2), min_size=1))
def test_text_without_quoting_that_cannot_be_quoted_is_text(rows: list[tuple[str, str]]) -> None:
    data = "text\tb\n" + "".join("\t".join(row) + "\n" for row in rows)
    if None in rows_of(data, columns=2) or any(len(row or ()) != 2 for row in rows_of(data)):
        assert not encloses(data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ('"text"\t"n"\n"To be"\t"1"\n', True),  # R, and csv.QUOTE_ALL
        ('text\tn\n"a ""b"""\t1\n', True),
        ('text\tn\n"a\tb"\t1\n', True),
        ('text\tn\n"a\nb"\t1\n', True),
        ('text\n"a\nb"\nc\n', True),
        ('text\tn\n"To be"\t1\n', False),
        ('text\tn\n"To be\t1\nor not"\t2\n', False),
        ('text\tn\n""Hello"" he said\t1\n', False),
        ('text\tn\n5" pipe\t1\n', False),
        ('text\tn\n"a\tb"\t1\nbroken\n"c\td"\t2\n', True),  # one broken row either way
        ('text\tn\n"To be\t1\nbroken\n"or\t2\n', False),
    ],
)
def test_marks_of_a_writer_of_csv_decide(data: str, expected: bool) -> None:
    assert encloses(data) is expected


def test_a_row_that_the_sample_cuts_off_says_nothing() -> None:
    data = 'text\tn\n"a\tb"\t1\n"and\nso\non'
    assert encloses(data, whole=False)


@given(st.lists(st.sampled_from(['"', '""', "a", "\t", "\n", "b\tc\n", '"d\te"\n']), max_size=30))
def test_after_a_broken_row_reading_continues_on_the_next_line(parts: list[str]) -> None:
    data = "".join(parts) + "\n"
    first = rows_of(data)[:1]
    if first == [None]:
        rest = data.lstrip("\n").partition("\n")[2]
        assert rows_of(data)[1:] == rows_of(rest)


def test_a_thousand_stray_quotes_are_a_thousand_broken_rows_at_most() -> None:
    data = "".join(f'"said {i}\t1\n' if i % 2 else f"{i}\t0\n" for i in range(2000))
    rows = rows_of(data)
    assert len(rows) == 2000 and rows.count(None) == 1000
