"""Lines of txt and jsonl are records, with the corner cases of each format."""

from __future__ import annotations

from pathlib import Path

import pytest
from shard_files import LINES, everything, read, read_until_error, texts, write

from bertstream.errors import ShardError
from bertstream.reading.access import Access
from bertstream.reading.options import ReadOptions
from bertstream.reading.pieces import count_records, split_shard
from bertstream.reading.shards import Piece


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


def test_a_byte_order_mark_alone_is_no_record(tmp_path: Path) -> None:
    for ending in ("txt", "jsonl", "csv"):
        path = write(tmp_path / f"a.{ending}", b"\xef\xbb\xbf")
        assert "it holds no record" in str(read_until_error(path)[1]) and count_records(path, LINES) == 0


def test_another_text_field_of_a_txt_is_refused_with_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="not 'sentence': write text='text'"):
        read(write(tmp_path / "a.txt", "x"), ReadOptions(text="sentence"))


def test_a_line_of_blanks_is_no_json_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n  \t\r\n   {"text": "b"}\n \n{"text": "c"}\n ')
    assert [(record.text, record.index) for record in read(path)] == [("a", 0), ("b", 1), ("c", 2)]
    assert count_records(path, LINES) == 3


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_line_beyond_max_record_bytes_is_one_broken_record(tmp_path: Path, ending: str, end: str) -> None:
    options = ReadOptions(access=Access(max_record_bytes=30))
    line = {"txt": "{}", "jsonl": '{{"text": "{}"}}'}[ending].format
    path = write(tmp_path / f"a.{ending}", "\n".join(map(line, ["a", "x" * 200, "b", "y" * 31])) + end)
    assert [getattr(item, "text", None) for item in everything([Piece(path)], options)] == ["a", None, "b", None]
    assert everything(split_shard(path, 3, options.access), options) == everything([Piece(path)], options)
    _, error = read_until_error(path, options)
    assert "more than 30 bytes in the line: write StreamConfig(max_record_bytes=)" in str(error)


def test_a_txt_is_decoded_by_its_encoding(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "naïve “quotes”\n€\n".encode("cp1252"))
    assert texts(read(path, ReadOptions(access=Access(encoding="cp1252")))) == ["naïve “quotes”", "€"]
    assert r"StreamConfig(encoding=)" in str(read_until_error(path)[1])


@pytest.mark.parametrize(
    ("ending", "advice"),
    [("jsonl", "re-encode it as UTF-8"), ("txt", r"write StreamConfig\(encoding=\), or re-encode")],
)
def test_advice_for_another_encoding_is_one_that_the_format_can_follow(
    tmp_path: Path, ending: str, advice: str
) -> None:
    path = write(tmp_path / f"a.{ending}", b'{"text": "caf\xe9"}\n')
    with pytest.raises(ShardError, match=rf"not UTF-8: byte 0xe9 in [^:]*: [^:]*: {advice}"):
        read(path)
