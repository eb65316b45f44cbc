"""Remote shards are read whole over connections that break, and each failure is reported as what it is."""

from __future__ import annotations

import gzip
import io
import multiprocessing
import os
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import zstandard
from servers import CuttingProxy, Server
from shard_files import TAR, read, read_until_error, tar_bytes, texts, texts_tar, write
from torch.utils.data import DataLoader

from bertstream import Encoder, StreamConfig, TextStream, TokenBatch
from bertstream.errors import ShardError
from bertstream.reading import remote
from bertstream.reading.access import BUFFER_BYTES, DEFAULT_ACCESS, Access
from bertstream.reading.files import open_bytes, shard_size
from bertstream.reading.options import ReadOptions
from bertstream.reading.pieces import split_shard
from bertstream.reading.records import read_records
from bertstream.reading.remote import RemoteReadError
from bertstream.reading.shards import Piece, expand_shards
from bertstream.testing import FakeEncoder

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.001)


@pytest.fixture(scope="module")
def lines() -> bytes:
    """Text longer than two of the blocks that are read ahead, without a repeated line."""
    return b"".join(b"%08d %s\n" % (i, b"x" * (i % 200)) for i in range(90_000))


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's in-memory file system, which the process shares."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


def content(path: str, access: Access = DEFAULT_ACCESS, compression: str = "") -> bytes:
    with open_bytes(path, access, compression) as stream:
        return stream.read()


def error_of(path: str, access: Access = DEFAULT_ACCESS, text: str = "text") -> ShardError:
    with pytest.raises(ShardError) as caught:
        list(read_records(Piece(path), ReadOptions(text=text, access=access)))
    assert caught.value.path == path and path in str(caught.value)
    return caught.value


def test_urls_are_read_through_fsspec(tmp_path: Path, memory: Any) -> None:
    for name, data in {"a.txt": b"a\nb\n", "b.txt.gz": gzip.compress(b"c\n"), "c.tar": texts_tar("d", "e")}.items():
        memory.pipe(f"/shards/{name}", data)
    assert expand_shards("memory://shards/*.txt*") == ["memory:///shards/a.txt", "memory:///shards/b.txt.gz"]
    assert texts(read("memory://shards/a.txt")) == ["a", "b"]
    assert texts(read("memory://shards/b.txt.gz")) == ["c"]
    assert texts(read("memory://shards/c.tar", TAR)) == ["d", "e"]
    assert shard_size("memory://shards/a.txt") == 4
    local = write(tmp_path / "a.txt", "x")
    assert texts(read(f"file://{local}")) == ["x"] and shard_size(f"file://{local}") == 1
    cached = expand_shards("simplecache::memory://shards/a*.txt")
    assert cached == ["simplecache::memory:///shards/a.txt"]
    options = ReadOptions(access=Access(storage_options={"simplecache": {"cache_storage": str(tmp_path / "cache")}}))
    assert texts(read(cached[0], options)) == ["a", "b"] and (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["a#1.txt", "why?.txt", "100%.txt", "a b.txt", "a%20b.txt", "é.txt"])
def test_a_name_is_taken_as_it_is_but_for_http(tmp_path: Path, memory: Any, name: str) -> None:
    memory.pipe(f"/{name}", b"a\n")
    write(tmp_path / name, "a\n")
    shards = [f"memory://{name}", f"file://{tmp_path}/{name}", "memory://*.txt"]
    for path in expand_shards(shards):
        assert texts(read(path)) == ["a"]
        assert texts(read(path, ReadOptions(access=Access(shard_cache=tmp_path / "copies")))) == ["a"]


def test_archives_in_a_chain_are_read_and_listed(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for archive in ("a", "b"):
        with zipfile.ZipFile(tmp_path / f"{archive}.zip", "w") as zipped:
            for name in ("x", "y"):
                zipped.writestr(f"d/{name}.txt", f"{archive}{name}\n" * 20_000)
    write(tmp_path / "t.tar", tar_bytes([("x.txt", b"tx\n"), ("y.txt.gz", gzip.compress(b"ty\n"))]))
    memory.pipe("/m.zip", (tmp_path / "a.zip").read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    cases = {
        f"zip://d/x.txt::file://{tmp_path}/a.zip": ["ax"],
        "zip://d/*.txt::~/b.zip": ["bx", "by"],
        f"zip://d/*.txt::file://{tmp_path}/*.zip": ["ax", "bx", "ay", "by"],
        f"zip://d/y.txt::simplecache::file://{tmp_path}/*.zip": ["ay", "by"],
        f"tar://*.txt*::file://{tmp_path}/t.tar": ["tx", "ty"],
        "zip://**/x.txt::memory://*.zip": ["ax"],
    }
    for shards, expected in cases.items():
        paths = expand_shards(shards)
        assert [read(path)[-1].text for path in paths] == expected
        assert shard_size(paths[0]) > 0
    whole = f"zip://d/x.txt::file://{tmp_path}/a.zip"
    stream = TextStream(whole, FakeEncoder(), batch_size=1000)
    assert sum(len(batch) for batch in DataLoader(stream, batch_size=None, num_workers=2)) == 20_000
    with pytest.raises(ShardError, match="cannot be listed"):
        expand_shards(f"zip://*.txt::file://{tmp_path}/none.zip")


def test_errors_of_a_file_system_become_shard_errors(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, error = read_until_error("memory://none.txt")
    assert error.path == "memory://none.txt" and isinstance(error.__cause__, FileNotFoundError)
    with pytest.raises(ShardError, match="nosuchprotocol"):
        read("nosuchprotocol://a.txt")
    with pytest.raises(ShardError, match=r"memory://none\.txt: cannot be reached"):
        shard_size("memory://none.txt")

    class LosesConnection(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 4:
                raise RuntimeError("connection lost")
            return super().read(4)

    memory.pipe("/a.txt", b"a\nb\nc\n")
    monkeypatch.setattr(type(memory), "open", lambda self, path, mode, block_size: LosesConnection(b"a\nb\nc\n"))
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.001)
    records, error = read_until_error("memory://a.txt")
    assert texts(records) == ["a", "b"]
    assert error.index == 2 and "connection lost" in str(error)


# --- connections that break -------------------------------------------------------------------------------------------


def test_a_read_that_breaks_off_resumes_at_the_same_byte(lines: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with Server({"a.txt": lines}, cuts=[None, 1000, 0]) as server:
        assert content(f"{server.url}/a.txt") == lines
        first, *again = [request.start for request in server.gets()[1:4]]
        assert 4 * MIB <= again[0] == again[1] <= first < again[0] + BUFFER_BYTES
        assert sum(request.sent for request in server.gets()) < len(lines) + MIB  # the first try's block had four
    said = [record.getMessage() for record in caplog.records if record.name == "bertstream.reading.remote"]
    assert len(said) == 2
    for number, message in enumerate(said, 1):
        assert f"{server.url}/a.txt: try {number} of 6 failed at byte {again[0]} of {len(lines)} with" in message


def test_a_server_that_cuts_every_connection_early_is_read_in_smaller_blocks(lines: bytes) -> None:
    with Server({"a.txt": lines}, always_cut_at=MIB) as server:
        assert content(f"{server.url}/a.txt") == lines
        assert sum(request.sent for request in server.gets()) < len(lines) + 3 * MIB


@pytest.mark.parametrize("says_size", [True, False], ids=["size known", "size unknown"])
def test_without_range_a_shard_is_read_as_one_stream(lines: bytes, says_size: bool) -> None:
    with Server({"a.txt": lines}, ranges=False, says_size=says_size) as server:
        assert content(f"{server.url}/a.txt") == lines
        assert len(server.gets()) <= 3


def test_without_range_a_broken_read_starts_over_and_skips_to_the_byte(
    lines: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with Server({"a.txt": lines}, ranges=False, cuts=[None, None, 6 * MIB, 7 * MIB]) as server:
        assert content(f"{server.url}/a.txt") == lines
        assert [request.start for request in server.gets()] == [0] * 5
    places = re.findall(r"try (\d) of 6 failed at byte (\d+)", caplog.text)
    assert [number for number, _ in places] == ["1", "1"]  # progress in between resets the count
    assert 4 * MIB < int(places[0][1]) < int(places[1][1]) <= 7 * MIB


def test_a_server_that_always_cuts_fails_after_six_tries(lines: bytes) -> None:
    with Server({"a.txt": lines}, always_cut_at=100) as server:
        error = error_of(f"{server.url}/a.txt")
        assert len(server.gets()) == 6
    assert error.index == 0 and isinstance(error.__cause__, RemoteReadError)
    assert f"gave up at byte 0 of {len(lines)} after 6 tries" in str(error)


def test_records_before_a_permanent_failure_are_yielded(lines: bytes) -> None:
    with Server({"a.txt": lines}, cuts=[None, *[10] * 6]) as server:
        records = []
        with pytest.raises(ShardError, match=r"from record (\d+) on.*gave up at byte \d+ of") as caught:
            for record in read_records(Piece(f"{server.url}/a.txt"), ReadOptions()):
                records.append(record)
    assert caught.value.index == len(records) > 30_000
    assert records[-1].text == lines.splitlines()[len(records) - 1].decode()


def test_temporary_server_errors_are_retried(lines: bytes) -> None:
    with Server({"a.txt": lines}, statuses=[503, 500, 429, 502, 200, 503]) as server:
        assert content(f"{server.url}/a.txt") == lines
    with Server({"a.txt": lines}, statuses=[503] * 4) as server:
        assert shard_size(f"{server.url}/a.txt", Access()) == len(lines)


def test_a_server_that_stays_unavailable_is_not_reported_as_a_missing_file() -> None:
    with Server({"a.txt": b"a\n"}, statuses=[503] * 50) as server:
        assert "503" in str(error_of(f"{server.url}/a.txt").__cause__.__cause__.__cause__)  # type: ignore[union-attr]
        with pytest.raises(ShardError, match="cannot be reached.*gave up"):
            shard_size(f"{server.url}/a.txt", Access())


def test_a_server_that_is_gone_is_tried_six_times() -> None:
    with Server({}) as server:
        url = f"{server.url}/a.txt"
    assert "gave up at byte 0 after 6 tries" in str(error_of(url))


def test_a_read_that_times_out_is_retried(lines: bytes, caplog: pytest.LogCaptureFixture) -> None:
    import aiohttp

    access = Access(storage_options={"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_read=0.2)}})
    with Server({"a.txt": lines}, stalls=[30]) as server:
        assert content(f"{server.url}/a.txt", access) == lines
    assert len(re.findall("try 1 of 6 failed at byte 0 of", caplog.text)) == 1


@pytest.mark.parametrize("status", [404, 403, 410])
def test_a_refused_request_is_not_retried(status: int, caplog: pytest.LogCaptureFixture) -> None:
    with Server({"a.txt": b"a\n"}, statuses=[status] * 50) as server:
        error = error_of(f"{server.url}/a.txt")
        assert [request.method for request in server.requests] == ["HEAD", "GET"]
    assert "gave up" not in str(error) and "tries" not in caplog.text
    assert isinstance(error.__cause__, FileNotFoundError)


@pytest.mark.parametrize("cuts", [[], [None, 10]], ids=["between reads", "in a read"])
def test_a_shard_that_vanishes_while_it_is_read_is_not_retried(lines: bytes, cuts: list[int | None]) -> None:
    with Server({"a.txt": lines}, cuts=cuts) as server:
        server.vanish_after = len(cuts) or 1
        error = error_of(f"{server.url}/a.txt")
    assert isinstance(error.__cause__, FileNotFoundError) and error.index
    assert "gave up" not in str(error) and len(server.gets()) == server.vanish_after + 1


@pytest.mark.parametrize("change", [b"0", b""], ids=["longer", "same size"])
def test_a_shard_that_changes_while_it_is_read_is_an_error(lines: bytes, change: bytes) -> None:
    with Server({"a.txt": lines}, cuts=[None, 10]) as server:
        records = read_records(Piece(f"{server.url}/a.txt"), ReadOptions())
        next(records)
        server.files["a.txt"] = lines[::-1] + change
        message = f"it changed while it was read: {len(lines)} bytes.*at first, {len(lines) + len(change)} bytes"
        with pytest.raises(ShardError, match=message):
            list(records)


def test_a_shard_that_shrinks_while_it_is_read_is_an_error(lines: bytes) -> None:
    with Server({"a.txt": lines}) as server:
        records = read_records(Piece(f"{server.url}/a.txt"), ReadOptions())
        next(records)
        server.files["a.txt"] = lines[:1000]
        with pytest.raises(ShardError, match="it changed while it was read.*1000 bytes"):
            list(records)


def test_a_broken_connection_a_truncated_file_and_a_broken_tar_have_different_errors() -> None:
    noise = os.urandom(5000).hex().encode()
    gz, zst = gzip.compress(noise), zstandard.compress(noise)
    whole = {"cut.txt.gz": gz[:2000], "cut.txt.zst": zst[:2000], "broken.tar": b"x" * 5000, "a.txt.gz": gz}
    with Server(whole) as server:
        of_gz = str(error_of(f"{server.url}/cut.txt.gz"))
        of_zst = str(error_of(f"{server.url}/cut.txt.zst"))
        of_tar = str(error_of(f"{server.url}/broken.tar", text="txt"))
        server.always_cut_at = 2000
        of_connection = str(error_of(f"{server.url}/a.txt.gz"))
    words = {
        "gave up at byte": of_connection,
        "end-of-stream": of_gz,
        "inside a zstd frame": of_zst,
        "no valid tar header": of_tar,
    }
    for word, message in words.items():
        assert [other for other in words.values() if word in other] == [message]


def test_a_remote_file_seeks_like_a_local_one(lines: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(lines)
    for ranges in (True, False):
        with (
            Server({"a.txt": lines}, ranges=ranges, cuts=[None, 5]) as server,
            open_bytes(f"{server.url}/a.txt", Access()) as remote,
            open(tmp_path / "a.txt", "rb") as local,
        ):
            for offset, whence in [(-10, 2), (7 * MIB, 0), (100, 1), (-5 * MIB, 1), (0, 0), (5, 2), (0, 1)]:
                assert remote.seek(offset, whence) == local.seek(offset, whence)
                assert remote.read(300) == local.read(300)
            with pytest.raises(OSError, match="no byte -1"):
                remote.raw.seek(-1)  # type: ignore[attr-defined]


# --- S3 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """A moto server with a bucket "shards": its client, storage options, host and port."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
    client.create_bucket(Bucket="shards")
    options = {"key": "a", "secret": "b", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    yield {"client": client, "options": options, "host": host, "port": port}
    client.close()
    server.stop()


def test_s3_shards_are_listed_measured_and_read(s3: dict[str, Any], lines: bytes) -> None:
    s3["client"].put_object(Bucket="shards", Key="0.txt", Body=lines)
    s3["client"].put_object(Bucket="shards", Key="1.txt.gz", Body=gzip.compress(b"a\nb\n"))
    access = Access(storage_options=s3["options"])
    assert expand_shards("s3://shards/*.txt*", access) == ["s3://shards/0.txt", "s3://shards/1.txt.gz"]
    assert shard_size("s3://shards/0.txt", access) == len(lines)
    assert content("s3://shards/0.txt", access) == lines
    records = read_records(Piece("s3://shards/1.txt.gz"), ReadOptions(access=access))
    assert [record.text for record in records] == ["a", "b"]
    missing = error_of("s3://shards/none.txt", access)
    assert isinstance(missing.__cause__, FileNotFoundError)


def test_s3_reads_that_break_off_resume_at_the_same_byte(
    s3: dict[str, Any], lines: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # its own retries would hide the cuts
    s3["client"].put_object(Bucket="shards", Key="cut.txt", Body=lines)
    with CuttingProxy(s3["host"], s3["port"], [6 * MIB, 6 * MIB + 100_000, 6 * MIB + 200_000]) as endpoint:
        options = {**s3["options"], "client_kwargs": {"endpoint_url": endpoint}, "skip_instance_cache": True}
        assert content("s3://shards/cut.txt", Access(storage_options=options)) == lines
    places = re.findall(r"cut.txt: try (\d) of 6 failed at byte (\d+)", caplog.text)
    assert [number for number, _ in places] == ["1", "2", "3"]
    assert 4 * MIB <= int(places[0][1]) < 6 * MIB and len({byte for _, byte in places}) == 1


def test_an_s3_shard_that_changes_raises_although_its_listing_is_cached(s3: dict[str, Any], lines: bytes) -> None:
    s3["client"].put_object(Bucket="shards", Key="changing.txt", Body=lines)
    with CuttingProxy(s3["host"], s3["port"], [6 * MIB]) as endpoint:
        access = Access(storage_options={**s3["options"], "client_kwargs": {"endpoint_url": endpoint}})
        (path,) = expand_shards("s3://shards/chang*.txt", access)
        records = read_records(Piece(path), ReadOptions(access=access))
        next(records)
        s3["client"].put_object(Bucket="shards", Key="changing.txt", Body=lines + b"0")
        with pytest.raises(ShardError, match="it changed while it was read"):
            list(records)


def test_an_s3_server_that_always_cuts_fails_after_six_tries(
    s3: dict[str, Any], lines: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3["client"].put_object(Bucket="shards", Key="cut.txt", Body=lines)
    with CuttingProxy(s3["host"], s3["port"], range(10_000, 1_000_000, 10_000)) as endpoint:
        options = {**s3["options"], "client_kwargs": {"endpoint_url": endpoint}, "skip_instance_cache": True}
        error = error_of("s3://shards/cut.txt", Access(storage_options=options))
    assert f"gave up at byte 0 of {len(lines)} after 6 tries" in str(error)


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_cached_shard_is_downloaded_once_and_read_from_disk(lines: bytes, tmp_path: Path) -> None:
    access = Access(shard_cache=tmp_path / "cache")
    with Server({"a.txt": lines}, cuts=[None, 1000]) as server:
        url = f"{server.url}/a.txt?token=x/y"
        pieces = split_shard(url, 4, access)
        assert len(pieces) == 4 and {piece.path for piece in pieces} == {url}
        downloaded = len(server.requests)
        options = ReadOptions(access=access)
        records = [record for piece in pieces for record in read_records(piece, options)]
        assert [record.text for record in records] == lines.decode().splitlines()
        assert records[5].shard == url and records[5].key == "a:5"
        assert shard_size(url, access) == len(lines)
        assert len(server.requests) == downloaded
    assert [record.text for record in read_records(pieces[1], options)]  # without the server
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".lock", ".txt"]


def length_of(url: str, folder: Path) -> int:
    return len(content(url, Access(shard_cache=folder)))


def test_threads_and_processes_that_share_a_cache_download_a_shard_once(lines: bytes, tmp_path: Path) -> None:
    with Server({"a.txt": lines}) as server, multiprocessing.get_context("fork").Pool(3) as processes:
        url = f"{server.url}/a.txt"
        in_processes = processes.starmap_async(length_of, [(url, tmp_path)] * 3)
        with ThreadPoolExecutor(3) as threads:
            in_threads = list(threads.map(length_of, [url] * 3, [tmp_path] * 3))
        assert in_threads == in_processes.get() == [len(lines)] * 3
        assert sum(request.sent for request in server.gets()) == len(lines)


def test_a_failed_download_leaves_no_copy(lines: bytes, tmp_path: Path) -> None:
    access = Access(shard_cache=tmp_path)
    with Server({"a.txt": lines}, cuts=[None], always_cut_at=10) as server:
        assert "gave up at byte" in str(error_of(f"{server.url}/a.txt", access))
        assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
        server.always_cut_at = None
        assert content(f"{server.url}/a.txt", access) == lines


def test_a_cache_that_cannot_be_written_is_a_shard_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with Server({"a.txt": b"a\n"}) as server:
        assert "file" in str(error_of(f"{server.url}/a.txt", Access(shard_cache=tmp_path / "file")))


def test_local_shards_and_pipes_are_not_copied(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\n")
    access = Access(shard_cache=tmp_path / "cache", allow_pipe=True)
    assert content(str(tmp_path / "a.txt"), access) == content(f"pipe:cat {tmp_path}/a.txt", access) == b"a\n"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("cached", [False, True], ids=["remote", "cached"])
def test_workers_stream_from_a_server(minilm: Encoder, tmp_path: Path, cached: bool) -> None:
    shards = {f"{n}.txt": "".join(f"text {n} {i}\n" for i in range(50)).encode() for n in range(3)}
    with Server(shards) as server:
        paths = [f"{server.url}/{name}" for name in shards]
        reading = StreamConfig(lanes=4 if cached else 2, shard_cache=tmp_path if cached else None)
        stream = TextStream(paths, minilm, reading=reading)
        loader = DataLoader(stream, batch_size=None, num_workers=2)
        places = [
            place
            for batch in loader
            if isinstance(batch, TokenBatch)
            for place in zip(batch.fields["__shard__"], batch.fields["__index__"].tolist(), strict=True)
        ]
    assert sorted(places) == sorted((path, i) for path in paths for i in range(50))
