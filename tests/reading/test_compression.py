"""Compressed bytes are read to their end or to where they break, whatever the name of the file says."""

from __future__ import annotations

import json
import lzma
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zstandard
from shard_files import COMPRESS, read, tar_bytes, texts, texts_tar, write

import bertstream
from bertstream import ConfigError, StateError, StreamConfig
from bertstream.reading.access import DEFAULT_ACCESS, Access
from bertstream.reading.compression import decompress_member
from bertstream.reading.files import open_bytes
from bertstream.reading.options import ReadOptions
from bertstream.reading.pieces import count_records, split_shard
from bertstream.reading.records import read_records
from bertstream.reading.shards import Piece
from bertstream.testing import FakeEncoder, assert_resumes_exactly
from bertstream.tokens import Record

MIB = 1 << 20
FRAMES = ["zst", "bz2", "xz"]
DATA = {
    "txt": b"".join(b"%d words\n" % i for i in range(40)),
    "jsonl": b"".join(b'{"text": "%d words", "n": %d}\n' % (i, i) for i in range(40)),
    "json": b"".join(b'{"text": "%d words", "n": %d}\r\n' % (i, i) for i in range(40)),
    "csv": b"text,n\n" + b"".join(b"%d words,%d\n" % (i, i) for i in range(40)),
    "tar": texts_tar(*(f"{i} words" for i in range(40))),
}


def content(path: Path, compression: str = "") -> bytes:
    with open_bytes(str(path), DEFAULT_ACCESS, compression) as stream:
        return stream.read()


# --- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", FRAMES)
def test_several_frames_are_read(tmp_path: Path, compression: str) -> None:
    compress = COMPRESS[f".{compression}"]
    (tmp_path / "a").write_bytes(compress(b"one\n") + compress(b"") + compress(b"two\n" * 100_000))
    assert content(tmp_path / "a", compression) == b"one\n" + b"two\n" * 100_000


def test_skippable_frames_of_zstd_are_skipped(tmp_path: Path) -> None:
    skip = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    (tmp_path / "a").write_bytes(zstandard.compress(b"one\n") + skip + zstandard.compress(b"two\n") + skip)
    assert content(tmp_path / "a", "zst") == b"one\ntwo\n"


@pytest.mark.parametrize("compression", FRAMES)
def test_a_file_cut_off_at_any_byte_raises(tmp_path: Path, compression: str) -> None:
    compress = COMPRESS[f".{compression}"]
    if compression == "zst":
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
    first = compress(os.urandom(50))
    whole = first + compress(b"b" * 1000)
    for cut in range(1, len(whole)):
        if cut == len(first):  # between two frames: this is a valid file
            continue
        (tmp_path / "a").write_bytes(whole[:cut])
        with pytest.raises(EOFError, match=f"inside a {compression}d? frame"):
            content(tmp_path / "a", compression)


@pytest.mark.parametrize("compression", FRAMES)
def test_damage_and_what_is_not_compressed_are_os_errors_also_after_a_good_frame(
    tmp_path: Path, compression: str
) -> None:
    compress = COMPRESS[f".{compression}"]
    if compression == "zst":
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
    good = compress(b"abc" * 100)
    damaged = bytearray(good)
    damaged[-1 if compression == "zst" else -8] ^= 255
    for data in (bytes(damaged), b"this is not compressed at all", good + b"neither is this"):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(OSError, match=f"damaged, or not {compression}"):
            content(tmp_path / "a", compression)


def test_all_before_a_cut_is_read(tmp_path: Path) -> None:
    noise = os.urandom(20_000).hex().encode()
    (tmp_path / "a").write_bytes(lzma.compress(noise, preset=0)[:15_000])
    with open_bytes(str(tmp_path / "a"), DEFAULT_ACCESS, "xz") as file:
        found = b""
        with pytest.raises(EOFError):
            while part := file.read1(1000):  # type: ignore[attr-defined]
                found += part
    assert len(found) > 20_000 and noise.startswith(found)


def test_a_tiny_file_of_large_contents_is_never_held_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(zstandard.compress(bytes(200 * MIB)))
    tracemalloc.start()
    try:
        with open_bytes(str(tmp_path / "a"), Access(), "zst") as file:
            assert sum(len(part) for part in iter(lambda: file.read(MIB), b"")) == 200 * MIB
        assert tracemalloc.get_traced_memory()[1] < 100 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", [".gz", ".zst", ".bz2", ".xz"])
def test_no_more_of_a_member_than_its_limit_is_decompressed(compression: str) -> None:
    packed = COMPRESS[compression](b"ab" * 500_000)
    assert decompress_member(packed, compression[1:], 100) == b"ab" * 50 + b"a"


# --- names and contents -----------------------------------------------------------------------------------------------


def without_place(records: list[Record]) -> list[Any]:
    return [(record.text, record.fields, record.key.rpartition(":")[2], record.index) for record in records]


@pytest.mark.parametrize("ending", DATA)
@pytest.mark.parametrize("compression", COMPRESS)
def test_a_shard_reads_as_its_plain_twin_by_its_ending_by_its_content_or_by_format(
    tmp_path: Path, ending: str, compression: str
) -> None:
    plain = ReadOptions(text="txt" if ending == "tar" else "text")
    named = ReadOptions(text=plain.text, access=Access(format=ending))
    fully = ReadOptions(text=plain.text, access=Access(format=f"{ending}{compression}"))
    twin = read(write(tmp_path / f"twin.{ending}", DATA[ending]), plain)
    data = COMPRESS[compression](DATA[ending])
    cases = [
        (f"a.{ending}{compression}", plain),
        (f"b.{ending}", plain),
        (f"part-0000{compression}", named),
        ("part-0001", named),
        (f"c.{ending}.1", named),
        ("d.txt", fully),
        ("e", fully),
    ]
    for name, options in cases:
        path = write(tmp_path / name, data)
        assert without_place(read(path, options)) == without_place(twin), name
        assert without_place(read(path, options, skip=7)) == without_place(twin[7:]), name
        pieces = split_shard(path, 3, options.access)
        assert len(pieces) == (1 if compression else 3), name
        again = [record for piece in pieces for record in read(path, options, start=piece.start, stop=piece.stop)]
        assert without_place(again) == without_place(twin), name
        assert count_records(path, options) == (None if compression else 40), name


@pytest.mark.parametrize("compression", [".gz", ".bz2"])
def test_a_shard_whose_name_hides_its_compression_resumes_exactly(tmp_path: Path, compression: str) -> None:
    paths = [write(tmp_path / f"part-{i}", COMPRESS[compression](DATA["jsonl"])) for i in range(2)]
    paths.append(write(tmp_path / "plain", DATA["jsonl"]))

    def make() -> bertstream.EmbeddingLoader:
        reading = StreamConfig(format="jsonl", lanes=2, bucket_size=16)
        return bertstream.stream(paths, FakeEncoder(), batch_size=8, shuffle=True, reading=reading)

    assert_resumes_exactly(make, cuts=[0, 2, 7])


def test_a_pipe_is_decompressed_by_its_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a", COMPRESS[".xz"](DATA["csv"]))
    records = read(f"pipe:cat {path} # .csv", ReadOptions(access=Access(allow_pipe=True)))
    assert len(records) == 40


def test_the_key_is_the_name_without_what_is_known_of_its_ending(tmp_path: Path) -> None:
    for name, key in {"part-0": "part-0:0", "a.txt.1": "a.txt.1:0", "b.jsonl.gz": "b:0", "c.log.gz": "c.log:0"}.items():
        data = COMPRESS[".gz"](b"one") if name.endswith(".gz") else b"one"
        assert read(write(tmp_path / name, data), ReadOptions(access=Access(format="txt")))[0].key == key


@pytest.mark.parametrize("value", ["", "json5", ".jsonl", "a.jsonl", "gz", "jsonl.tgz", "parquet.gz", 3])
def test_a_format_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"format=.*: write an ending without its dot, of \.tar, \.jsonl"):
        StreamConfig(format=value)


def test_a_state_of_another_format_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", DATA["jsonl"])
    state = bertstream.stream(path, FakeEncoder()).state_dict()
    assert "format" not in state["settings"]
    with pytest.raises(StateError, match="format"):
        bertstream.stream(path, FakeEncoder(), reading=StreamConfig(format="jsonl")).load_state_dict(state)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            json.dumps([{"text": "a"}]),
            "it is an array, but a record is an object on a line: jq -c '.[]' a.json > a.jsonl",
        ),
        ('\ufeff\n [\n{"text": "a"}]', "it is an array"),
        (json.dumps({"text": "a"}, indent=2), "it is an object over several lines.*jq -c '.' a.json > a.jsonl"),
    ],
)
def test_a_json_file_that_is_not_lines_says_how_to_make_them(tmp_path: Path, data: str, message: str) -> None:
    path = write(tmp_path / "a.json", data)
    for call in (
        lambda: read(path),
        lambda: read(write(tmp_path / "a.json.gz", COMPRESS[".gz"](data.encode()))),
        lambda: split_shard(path, 3),
        lambda: count_records(path, ReadOptions()),
    ):
        with pytest.raises(bertstream.ShardError, match=message.replace("[", r"\[").replace(" a.json", r" a\S+")):
            call()


# --- members of tars --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [".gz", ".zst", ".bz2", ".xz"])
def test_compressed_members_read_as_plain_ones(tmp_path: Path, compression: str) -> None:
    members = [
        (f"{i}.{name}", data)
        for i in range(3)
        for name, data in [("txt", b"a%d" % i), ("json", b'{"n": %d}' % i), ("cls", b"7")]
    ]
    plain = read(write(tmp_path / "a.tar", tar_bytes(members)), ReadOptions(text="txt"))
    packed = tar_bytes([(name + compression, COMPRESS[compression](data)) for name, data in members])
    path = write(tmp_path / "b.tar", packed)
    for fields in (None, ["n", "cls"]):
        found = read(path, ReadOptions(text="txt", fields=fields))
        assert [(r.text, r.fields, r.key) for r in found] == [(r.text, r.fields, r.key) for r in plain]
    assert texts(read(path, ReadOptions(text=f"txt{compression}", fields=["cls"]))) == ["a0", "a1", "a2"]
    as_it_is = read(path, ReadOptions(text="txt", fields=[f"cls{compression}"]))[0].fields
    assert as_it_is == {f"cls{compression}": COMPRESS[compression](b"7")}


def test_a_compressed_text_of_another_ending_is_read_and_other_members_stay_bytes(tmp_path: Path) -> None:
    packed = COMPRESS[".gz"]("außen".encode())
    path = write(tmp_path / "a.tar", tar_bytes([("0.de.gz", packed), ("0.npy.gz", b"anything")]))
    assert read(path, ReadOptions(text="de"))[0] == Record("außen", {"npy.gz": b"anything"}, "0", path, 0)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"no gz", "field 'txt.gz': it cannot be decompressed: BadGzipFile"),
        (COMPRESS[".gz"](b"long text")[:-9], "field 'txt.gz': it cannot be decompressed: EOFError"),
        (COMPRESS[".gz"](b"a" * 5000), "field 'txt.gz': more than 2000 bytes in member '1.txt.gz'"),
        (COMPRESS[".gz"](b"\xff"), "field 'txt': not UTF-8: byte 0xff"),
    ],
    ids=["no gz", "cut", "large", "not UTF-8"],  # a gz holds the time
)
def test_a_member_that_does_not_decompress_is_a_broken_record(tmp_path: Path, payload: bytes, message: str) -> None:
    path = write(tmp_path / "a.tar", tar_bytes([("0.txt", b"a"), ("1.txt.gz", payload), ("2.txt", b"c")]))
    bad: list[Any] = []
    options = ReadOptions(text="txt", access=Access(max_record_bytes=2000))
    assert texts(list(read_records(Piece(path), options, on_bad=bad.append))) == ["a", "c"]
    assert len(bad) == 1 and f"{path}, record 1, {message}" in str(bad[0])
