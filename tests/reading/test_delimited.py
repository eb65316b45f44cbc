"""Rows of csv and tsv are records, as people write them: with and without quotes, header, commas and UTF-8."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import logging
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from shard_files import LINES, everything, read, read_until_error, texts, write

import bertstream
from bertstream import StreamConfig
from bertstream.errors import ShardError, StateError
from bertstream.reading.access import Access
from bertstream.reading.options import ReadOptions
from bertstream.reading.pieces import count_records, split_shard
from bertstream.reading.shards import Piece
from bertstream.testing import FakeEncoder
from bertstream.tokens import Record


def with_access(**options: Any) -> ReadOptions:
    return ReadOptions(access=Access(**options))


def shown(path: str, options: ReadOptions = LINES) -> list[Any]:
    """Texts of good records, the index of broken ones; the same from pieces, and when counted."""
    found = everything([Piece(path)], options)
    for parts in (2, 5, 100):
        assert everything(split_shard(path, parts, options.access), options) == found
    assert count_records(path, options) == len(found)
    return [item.text if isinstance(item, Record) else item[0] for item in found]


# --- tsv --------------------------------------------------------------------------------------------------------------


def test_a_tsv_as_glue_writes_it_keeps_quotes_and_rows(tmp_path: Path) -> None:
    rows = ["first\t0", '"Second, said she\t1', "third\t0", 'and he left"\t0', '"To be, or not to be"\t1']
    path = write(tmp_path / "a.tsv", "text\tlabel\n" + "\n".join(rows))
    assert shown(path) == [row[:-2] for row in rows]


def test_a_tsv_as_pandas_writes_it_loses_its_quotes(tmp_path: Path) -> None:
    wanted = ["plain", 'she said "no"', "two\nlines", "a\ttab", "", "last"]
    file = io.StringIO()
    csv.writer(file, delimiter="\t", lineterminator="\n").writerows(
        [["text", "label"], *([text, i] for i, text in enumerate(wanted))]
    )
    assert shown(write(tmp_path / "a.tsv", file.getvalue())) == wanted


def test_a_stray_quote_beyond_the_first_rows_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertstream.reading.delimited._SAMPLE_BYTES", 100)
    rows = [f"sentence {i}" for i in range(50)]
    rows[30] = '"It was a fine day'
    path = write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"{row}\t1\n" for row in rows))
    assert shown(path) == rows


def test_a_field_that_is_quoted_beyond_the_first_rows_is_refused_with_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertstream.reading.delimited._SAMPLE_BYTES", 100)
    rows = [f"sentence {i}\t1" for i in range(30)]
    rows[20] = '"she said ""no"""\t1'
    path = write(tmp_path / "a.tsv", "\n".join(["text\tlabel", *rows]))
    records, error = read_until_error(path)
    assert len(records) == 20 and error.field == "text"
    assert 'write StreamConfig(quoting="standard"), or "none"' in str(error)
    assert texts(read(path, with_access(quoting="standard")))[20] == 'she said "no"'
    assert texts(read(path, with_access(quoting="none")))[20] == '"she said ""no"""'


def test_rows_that_a_quote_would_join_are_an_error_of_the_row_where_it_opens(tmp_path: Path) -> None:
    rows = ['"a ""quoted"" one"\t1', '"open\t0', "next\t0", 'close"\t1', "last\t0"]
    path = write(tmp_path / "a.tsv", '"text"\t"label"\n' + "".join(row + "\n" for row in rows))
    assert shown(path) == ['a "quoted" one', 1, "next", 'close"', "last"]
    _, error = read_until_error(path)
    assert "the row on line 3 cannot be parsed: it spans 3 lines that have 2 fields each" in str(error)
    assert 'StreamConfig(quoting="none")' in str(error)
    assert texts(read(path, with_access(quoting="standard")))[1] == "open\t0\nnext\t0\nclose"


def test_what_a_tsv_was_found_to_be_is_logged_and_named_in_errors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"To be"\t1\n"or\tnot\t0\n')
    with caplog.at_level(logging.INFO, "bertstream"):
        _, error = read_until_error(path)
    note = "quotes are text, as its first rows show (StreamConfig(quoting=) says it for all shards)"
    assert f"{path}: {note}" in caplog.text
    assert "3 fields under a header of 2 columns" in str(error) and note in str(error)


def test_all_records_before_a_cut_in_the_first_rows_of_a_gz_are_read(tmp_path: Path) -> None:
    data = gzip.compress("".join(f'"{i}\t{hash(str(i))}\n' for i in range(3000)).encode())
    path = write(tmp_path / "a.tsv.gz", data[: len(data) // 2])
    records, error = read_until_error(path, with_access(header=["text", "n"]))
    assert len(records) > 500 and error.index == len(records)


# --- csv --------------------------------------------------------------------------------------------------------------


def test_an_open_quote_loses_its_own_row_only(tmp_path: Path) -> None:
    rows = ["a,1", '"It was,2', "b,3", '"two\nlines",4', "c,5"]
    path = write(tmp_path / "a.csv", "text,n\n" + "\n".join(rows) + "\n")
    assert shown(path) == ["a", 1, "b", "two\nlines", "c"]
    _, error = read_until_error(path)
    assert "the row on line 3 cannot be parsed" in str(error) and 'StreamConfig(quoting="none")' in str(error)
    records, error = read_until_error(write(tmp_path / "b.csv", 'text,n\na,1\n\n"b,2\nc,3\n'))
    assert texts(records) == ["a"] and "a quote that opens on line 4 does not end its field" in str(error)


def test_an_error_in_a_later_piece_names_the_line_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,n\n" + '"two\nlines",1\n' * 50 + '"open,2\nb,3\n')
    last = split_shard(path, 4)[-1]
    assert last.offset
    _, error = read_until_error(path, start=last.start, offset=last.offset)
    assert "the row on line 102 cannot" in str(error)


def test_an_open_quote_takes_no_more_memory_than_max_record_bytes(tmp_path: Path) -> None:
    rows = ["good,1", '"open,2', *(f"row {i},3" for i in range(200)), "x" * 500 + ",4", "last,5"]
    path = write(tmp_path / "a.csv", "\n".join(["text,n", *rows]))
    options = with_access(max_record_bytes=400)
    assert shown(path, options) == ["good", 1, *(f"row {i}" for i in range(200)), 202, "last"]
    assert "more than 400 bytes in the row" in str(read_until_error(path, options)[1])


def test_quotes_of_a_csv_are_text_if_the_user_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,n\n"a,1\n\nb"c",2\n"d",3\n')
    assert shown(path, with_access(quoting="none")) == ['"a', 'b"c"', '"d"']


@pytest.mark.parametrize("quoting", ["auto", "none", "standard"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_columns_are_named_by_the_user_or_numbered_where_no_header_names_them(
    tmp_path: Path, quoting: str, mark: bytes
) -> None:
    for ending, delimiter in (("csv", ","), ("tsv", "\t")):
        path = write(tmp_path / f"a.{ending}", mark + f"one{delimiter}1\ntwo{delimiter}2\n".encode())
        named = with_access(header=["text", "n"], quoting=quoting)
        assert shown(path, named) == ["one", "two"]
        assert [record.fields for record in read(path, named)] == [{"n": "1"}, {"n": "2"}]
        numbered = ReadOptions(text="0", access=Access(header=False, quoting=quoting))
        assert shown(path, numbered) == ["one", "two"]
        assert [record.fields for record in read(path, numbered)] == [{"1": "1"}, {"1": "2"}]


@pytest.mark.parametrize("quoting", ["standard", "none"])
def test_a_broken_first_row_without_a_header_is_one_broken_record(tmp_path: Path, quoting: str) -> None:
    options = ReadOptions(text="0", access=Access(header=False, quoting=quoting, max_record_bytes=30))
    for first in ['"a"b,1', "x" * 40 + ",1"][quoting == "none" :]:
        path = write(tmp_path / "a.csv", f"{first}\nb,2\nc,3\n")
        assert shown(path, options) == [0, "b", "c"]


@pytest.mark.parametrize("delimiter", [";", "|", "\t"])
def test_another_delimiter_is_written_or_named_by_the_error(tmp_path: Path, delimiter: str) -> None:
    path = write(tmp_path / "a.csv", f'text{delimiter}n\n"a, b"{delimiter}1\n"c ""d"""{delimiter}2\n')
    assert shown(path, with_access(delimiter=delimiter)) == ["a, b", 'c "d"']
    assert f"write StreamConfig(delimiter={delimiter!r})?" in str(read_until_error(path)[1])


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "gbk", "shift_jis", "utf-8-sig"])
@pytest.mark.parametrize("quoting", ["none", "standard"])
def test_fields_are_decoded_by_their_encoding(tmp_path: Path, encoding: str, quoting: str) -> None:
    wanted = "表示 能 \u4e58" if encoding in ("gbk", "shift_jis") else "é ü ß"
    path = write(tmp_path / "a.csv", f"text|n\n{wanted}|1\nb|2\n".encode(encoding))
    assert shown(path, with_access(encoding=encoding, quoting=quoting, delimiter="|")) == [wanted, "b"]


def test_a_byte_that_is_not_of_the_encoding_is_a_broken_record_with_its_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"text,n\na,1\n\x81,2\nb,3\n")
    assert shown(path, with_access(encoding="cp1252")) == ["a", 1, "b"]
    _, error = read_until_error(path, with_access(encoding="cp1252"))
    assert error.field == "text" and "not CP1252: byte 0x81" in str(error)
    assert shown(write(tmp_path / "b.csv", b"text,n\na,1\n\x81\x20,2\nb,3\n"), with_access(encoding="gbk")) == [
        "a",
        1,
        "b",
    ]


# --- states -----------------------------------------------------------------------------------------------------------


def test_a_state_is_refused_where_rows_are_read_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"{i}\t1\n" for i in range(99)))
    default = bertstream.stream(path, FakeEncoder())
    unquoted = bertstream.stream(path, FakeEncoder(), reading=StreamConfig(quoting="none"))
    for stream, other in ((default, unquoted), (unquoted, default)):
        with pytest.raises(StateError, match="quoting"):
            stream.load_state_dict(other.state_dict())


@pytest.mark.parametrize("text", ["plain", '"a ""b"""', '"To be"', '"To'])
@pytest.mark.parametrize("where", ["{}", "memory://states/a.tsv"])
def test_a_state_of_version_0_1_0_resumes_unless_quotes_are_now_found_to_be_text(
    tmp_path: Path, text: str, where: str
) -> None:
    path = write(tmp_path / "a.tsv", data := "text\tlabel\n" + f"{text}\t1\n" * 9)
    fsspec.filesystem("memory").pipe("/states/a.tsv", data.encode())
    where = where.format(path)
    now = bertstream.stream(where, FakeEncoder())
    before = bertstream.stream(where, FakeEncoder(), reading=StreamConfig(quoting="standard"))
    state = before.state_dict()
    assert "quoting" not in state["settings"], "as in version 0.1.0"
    if text.startswith('"To'):
        with pytest.raises(StateError, match="saved with quoting='standard', this stream has quoting='auto'"):
            now.load_state_dict(state)
    else:
        now.load_state_dict(state)


def test_a_state_is_made_without_opening_shards_and_a_fault_of_the_machine_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"To be"\t1\n')
    now = bertstream.stream(path, FakeEncoder())
    before = bertstream.stream(path, FakeEncoder(), reading=StreamConfig(quoting="standard")).state_dict()

    def failing(*_: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("bertstream.reading.delimited.open_bytes", failing)
    now.load_state_dict(now.state_dict())
    with pytest.raises(ShardError, match=f"{path}: cannot be read: .*Too many open files"):
        now.load_state_dict(before)


# --- the parser -------------------------------------------------------------------------------------------------------


def test_reading_csv_never_lowers_the_field_size_limit_of_the_process(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\nx\n")
    before = csv.field_size_limit(2**31 + 5)
    try:
        read(path)
        assert csv.field_size_limit() == 2**31 + 5
    finally:
        csv.field_size_limit(before)


def test_a_quote_in_the_middle_of_an_unquoted_csv_field_is_part_of_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,b\n5" pipe,1\n6" pipe,2\n')
    assert texts(read(path)) == ['5" pipe', '6" pipe']


def test_nul_bytes_in_csv_are_data_or_a_broken_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,b\na\0c,1\nb,2\n")
    taken = "a\0c" if sys.version_info >= (3, 11) else (0, None)  # Python 3.10's parser refuses them
    assert [item.text if isinstance(item, Record) else item for item in everything([Piece(path)], LINES)] == [
        taken,
        "b",
    ]


@pytest.mark.parametrize(
    ("data", "field", "message"),
    [
        ("a,b\n1,2\n", "text", r"no such column; it has \['a', 'b'\]"),
        ("text,a,a\n1,2,3\n", "a", "names it twice"),
        ('"text\n', None, "header is broken"),
    ],
)
def test_a_bad_csv_header_is_an_error_of_the_shard(tmp_path: Path, data: str, field: str | None, message: str) -> None:
    path = write(tmp_path / "a.csv", data)
    _, error = read_until_error(path)
    assert (error.path, error.index, error.field) == (path, None, field)
    with pytest.raises(ShardError, match=message):
        raise error
