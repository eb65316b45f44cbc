"""The pieces of a shard hold its records, each once, and counting agrees with reading."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
import tarfile
import tracemalloc
from pathlib import Path
from unittest import mock

import pytest
import zstandard
from hypothesis import assume, given
from hypothesis import strategies as st
from shard_files import COMPRESS, LINES, TAR, everything, read, read_until_error, tar_bytes, texts, texts_tar, write

from bertstream.errors import ConfigError, ShardError
from bertstream.reading.access import Access
from bertstream.reading.options import ReadOptions
from bertstream.reading.pieces import count_records, split_shard
from bertstream.reading.records import read_records
from bertstream.reading.shards import Piece
from bertstream.tokens import Record

lines_of_txt = st.sampled_from(["a", "é", "\r", "", " ", "x" * 9])
parts_of_csv = st.sampled_from(["a", ",", '"', '""', '"b,\nc"', "\n", "\r\n", "\r", "é", "\0", ' "', "x" * 9])
lines_of_jsonl = st.sampled_from(['{"text": "a"}', '{"text": "ü", "n": 1}', "", "\r", " ", "[]", "\x00"])


@st.composite
def contents(draw: st.DrawFn) -> tuple[str, bytes]:
    """A format that can be cut, and the bytes of a file of it, which is often broken."""
    ending = draw(st.sampled_from(["txt", "jsonl", "csv", "tsv", "tar"]))
    mark = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    if ending == "txt":
        return ending, mark + draw(st.lists(lines_of_txt).map("\n".join)).encode()
    if ending == "jsonl":
        return ending, mark + draw(st.lists(lines_of_jsonl).map("\n".join)).encode()
    if ending == "tar":
        names = st.sampled_from(["a", "b", "c", "d/" * 60 + "e", "é", "__meta__", ".hidden"])
        fields = st.sampled_from(["txt", "cls", "json", "bin", ""])
        members = draw(st.lists(st.tuples(names, fields, st.sampled_from([b"1", b"x" * 600, b""]))))
        data = tar_bytes([(f"{name}.{field}" if field else name, payload) for name, field, payload in members])
        return ending, data[: len(data) - draw(st.sampled_from([0, 0, 0, 10_000]))]
    separator = "\t" if ending == "tsv" else ","
    body = draw(st.lists(parts_of_csv | st.just(f"a{separator}b\n") | st.just(f'"a\n""\n"{separator}b\r\n')))
    header = draw(
        st.sampled_from([f"text{separator}b\n", f'\n"te""xt"{separator}text\r\n', f'text{separator}"b\nc"\n'])
    )
    return ending, mark + (header + "".join(body)).encode()


accesses = st.builds(
    Access,
    quoting=st.sampled_from(["auto", "standard", "none"]),
    header=st.sampled_from([True, ["text", "b"]]),
    max_record_bytes=st.sampled_from([20, 1 << 20]),
)


@given(contents(), accesses, st.integers(1, 9), st.sampled_from([1, 7, 30, 1 << 20]))
def test_the_pieces_of_a_shard_hold_all_its_records(
    tmp_path_factory: pytest.TempPathFactory, content: tuple[str, bytes], access: Access, parts: int, block_bytes: int
) -> None:
    ending, data = content
    path = write(tmp_path_factory.getbasetemp() / f"pieces.{ending}", data)
    options = ReadOptions(text="txt" if ending == "tar" else "text", access=access)
    try:
        with mock.patch("bertstream.reading.pieces._BLOCK_BYTES", block_bytes):
            pieces = split_shard(path, parts, access)
    except ShardError as error:
        with pytest.raises(ShardError, match=re.escape(str(error))):
            read(path, options)
        return
    assert 1 <= len(pieces) <= parts
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop is None
    whole = everything([Piece(path)], options)
    assert everything(pieces, options) == whole
    if len(pieces) > 1:
        assert all(everything([piece], options) for piece in pieces)


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv", "tar"])
def test_pieces_are_about_equal_in_bytes(tmp_path: Path, ending: str) -> None:
    lines = [f'{i} "quoted"\nß' if ending == "csv" else f"{i}" for i in range(2000)]
    path, options = tmp_path / f"a.{ending}", LINES
    if ending == "txt":
        write(path, "\n".join(lines))
    elif ending == "jsonl":
        write(path, "\n\n".join(json.dumps({"text": line}) for line in lines))
    elif ending == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text", "b"], *([line, i] for i, line in enumerate(lines))])
    else:
        write(path, texts_tar(*lines))
        options = TAR
    pieces = split_shard(str(path), 7)
    size = path.stat().st_size
    assert len(pieces) == 7
    bounds = [*(piece.offset for piece in pieces), size]
    assert all(abs(end - start - size / 7) < 10_000 for start, end in itertools.pairwise(bounds))
    assert texts([record for piece in pieces for record in read_records(piece, options)]) == lines


def test_large_files_are_cut_block_by_block(tmp_path: Path) -> None:
    rows = [(f'{"x" * (i * 7919 % 5000)} "{i}"\n\n' if i % 3 else "", str(i)) for i in range(1500)]  # about 2.5 MB
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "b"), *rows])
    pieces = split_shard(str(path), 40)
    assert path.stat().st_size > 2 << 20 and len(pieces) == 40
    found = [record for piece in pieces for record in read_records(piece, LINES)]
    assert [(record.text, record.fields["b"]) for record in found] == rows
    assert [record.index for record in found] == list(range(1500))


@pytest.mark.parametrize(
    "row",
    [
        '"a"c,"d\ne",f\n',
        'a\rb,"c\nd",e\n',
        'a","b\n',
        'a,b"\n',
        '"a\0b\nc",d\n',
        '"a ""b""\n\n",""""\n',
        '"a"\r,"b\nc"\n',
    ],
)
def test_csv_rows_that_break_the_parse_are_cut_where_the_parser_resumes(tmp_path: Path, row: str) -> None:
    for ending in ("", '"never closed,\n1,2\n'):
        path = write(tmp_path / "a.csv", "text,b\n" + 'good,"1\n2"\n' * 3 + row + 'good,"1\n2"\n' * 9 + ending)
        whole = everything([Piece(path)], LINES)
        for parts in range(2, 40):
            assert everything(split_shard(path, parts), LINES) == whole


def test_shards_that_cannot_be_cut_are_one_piece(tmp_path: Path) -> None:
    gz = write(tmp_path / "a.txt.gz", gzip.compress(b"a\nb\nc\n"))
    zst = write(tmp_path / "a.txt.zst", zstandard.compress(b"a\nb\nc\n"))
    for path in (gz, zst, "memory://a.txt", "pipe:cat a.txt", write(tmp_path / "a.txt", "abc")):
        assert split_shard(path, 3) == [Piece(path)]
    with pytest.raises(ConfigError, match="parts=0"):
        split_shard(gz, 0)


@given(contents(), st.integers(1, 4), st.integers(0, 12))
def test_skipping_records_gives_the_rest_unchanged(
    tmp_path_factory: pytest.TempPathFactory, content: tuple[str, bytes], parts: int, skip: int
) -> None:
    ending, data = content
    path = write(tmp_path_factory.getbasetemp() / f"skip.{ending}", data)
    options = TAR if ending == "tar" else LINES
    for piece in split_shard(path, parts):
        whole = [item for item in everything([piece], options) if isinstance(item, Record)]
        try:
            left = list(read_records(piece, options, skip=skip))
        except ShardError:
            continue  # a later record, or the whole shard, is broken
        assert left == [record for record in whole if record.index >= piece.start + skip]


def test_a_piece_without_an_offset_is_read_from_the_beginning(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"a\nb\nc\nd\n"))
    assert [(r.text, r.index) for r in read(path, start=1, stop=3)] == [("b", 1), ("c", 2)]
    assert texts(list(read_records(Piece(path, start=1), LINES, skip=1))) == ["c", "d"]


def test_a_shard_that_shrank_since_it_was_cut_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a\nb\nc\nd\n")
    first, last = split_shard(path, 2)
    write(tmp_path / "a.txt", "a\n")
    assert "ends after 1 records, but had 2" in str(read_until_error(path, stop=first.stop)[1])
    _, error = read_until_error(path, start=last.start, offset=last.offset)
    assert "no record from 2 on" in str(error)


# --- counting ---------------------------------------------------------------------------------------------------------


@given(contents(), st.sampled_from([1, 7, 1 << 20]))
def test_counting_agrees_with_reading(
    tmp_path_factory: pytest.TempPathFactory, content: tuple[str, bytes], block_bytes: int
) -> None:
    ending, data = content
    assume(data != b"\xef\xbb\xbf")  # an empty line in a txt
    path = write(tmp_path_factory.getbasetemp() / f"count.{ending}", data)
    options = TAR if ending == "tar" else LINES
    bad: list[ShardError] = []
    try:
        good = list(read_records(Piece(path), options, on_bad=bad.append))
    except ShardError:
        return  # the whole shard is broken, or has no records
    with mock.patch("bertstream.reading.pieces._BLOCK_BYTES", block_bytes):
        assert count_records(path, options) == len(good) + len(bad)


@pytest.mark.parametrize("compression", [".gz", ".xz"])
def test_records_of_compressed_or_remote_shards_are_not_counted(tmp_path: Path, compression: str) -> None:
    assert count_records(write(tmp_path / f"a.txt{compression}", COMPRESS[compression](b"one")), LINES) is None
    assert count_records("http://nowhere.invalid/a.txt", LINES) is None


def test_records_after_a_global_header_are_counted_too(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "global"}) as tar:
        for name in ("a.txt", "b.txt", "b.cls", "c.txt"):
            tar.addfile(tarfile.TarInfo(name))
    assert count_records(str(path), TAR) == 3


@pytest.mark.parametrize("ending", ["jsonl", "txt", "csv"])
def test_a_file_without_newlines_is_not_read_into_memory_to_be_cut(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a.{ending}", b"text\n[1]\n" + b"x" * (24 << 20) + b"\n[2]\n[3]")
    access = Access(max_record_bytes=1 << 16)
    tracemalloc.start()
    try:
        pieces = split_shard(path, 8, access)
        count = count_records(path, ReadOptions(access=access)) if ending != "csv" else 4
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    assert count == (5 if ending != "csv" else 4)
    found = everything(pieces, ReadOptions(access=access))
    assert found == everything([Piece(path)], ReadOptions(access=access)) and len(found) == count
