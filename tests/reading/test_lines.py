"""Lines of txt, jsonl, csv and tsv are records, with the corner cases of each format."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
from shard_files import LINES, everything, read, read_until_error, texts, write

from bertstream.errors import ShardError
from bertstream.reading.options import ReadOptions
from bertstream.reading.pieces import split_shard
from bertstream.reading.shards import Piece
from bertstream.tokens import Record


def test_empty_lines_are_texts_in_txt_and_skipped_in_other_formats(tmp_path: Path) -> None:
    assert texts(read(write(tmp_path / "a.txt", "\na\n\n"))) == ["", "a", ""]
    assert texts(read(write(tmp_path / "a.jsonl", '\n{"text": ""}\n\r\n{"text": "b"}\n\n'))) == ["", "b"]
    assert texts(read(write(tmp_path / "a.csv", '\ntext\n\n""\n\r\nb\n\n'))) == ["", "b"]


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv"])
def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path, ending: str) -> None:
    data = {"txt": "one\ntwo\n", "jsonl": '{"text": "one"}\n{"text": "two"}\n', "csv": "text\none\ntwo\n"}[ending]
    path = write(tmp_path / f"a.{ending}", b"\xef\xbb\xbf" + data.encode())
    assert texts(read(path)) == ["one", "two"]
    assert everything(split_shard(path, 2), LINES) == read(path)


def test_another_text_field_of_a_txt_is_refused_with_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="not 'sentence': write text='text'"):
        read(write(tmp_path / "a.txt", "x"), ReadOptions(text="sentence"))


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
