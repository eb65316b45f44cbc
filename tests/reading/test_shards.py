"""Patterns expand to names of shards, and the ending of a name gives the format and compression."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from shard_files import COMPRESS, TAR, read, texts, texts_tar, write

import bertstream
from bertstream.errors import ConfigError, ShardError
from bertstream.reading.access import Access
from bertstream.reading.options import ReadOptions
from bertstream.reading.pieces import split_shard
from bertstream.reading.records import read_records
from bertstream.reading.shards import Piece, expand_shards
from bertstream.testing import FakeEncoder


def test_braces_globs_and_lists_can_be_mixed(tmp_path: Path) -> None:
    for name in ("b-01.txt", "b-02.txt", "c2.txt", "c1.txt", "d.csv"):
        write(tmp_path / name, "x")
    names: list[str | Path] = [f"{tmp_path}/b-{{01..02}}.txt", tmp_path / "d.csv", f"{tmp_path}/c?.txt"]
    expected = [str(tmp_path / name) for name in ("b-01.txt", "b-02.txt", "d.csv", "c1.txt", "c2.txt")]
    assert expand_shards(names) == expected
    assert expand_shards(tmp_path / "c*.txt") == expected[3:]
    assert expand_shards(f"{tmp_path}/{{b,c}}*.txt") == expected[:2] + expected[3:]
    assert expand_shards(f"{tmp_path}/**/d.csv") == [expected[2]]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.txt", "b.txt", "~.txt"):
        write(tmp_path / name, "x")
    expected = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for shards in ("~/{a,b}.txt", "~/[a-z].txt", ["~/a.txt", Path("~/b.txt")]):
        assert expand_shards(shards) == expected
    monkeypatch.chdir(tmp_path)
    assert expand_shards("./~.txt") == ["./~.txt"]


def test_a_pattern_that_is_the_name_of_a_file_means_that_file(tmp_path: Path) -> None:
    for name in ("a[1].txt", "{a,b}.txt"):
        path = write(tmp_path / name, "x")
        assert expand_shards(path) == [path]
    assert expand_shards(f"{tmp_path}/{{a,a}}[1].txt") == [str(tmp_path / "a[1].txt")] * 2


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], r"there are no shards: got \[\]"),
        ("", "the name of a shard is a str"),
        ([3], "got 3"),
        ("{folder}/none*.txt", "no file matches"),
        ("{folder}/{{1..3.txt", "braces"),
        ("{folder}", r"is a folder.*\*\.tar"),
        ("memory://nothing/*.txt", "no file matches"),
        ("pipe:cat a.txt", "allow_pipe=True"),
        ("pipe:", "ending"),
    ],
)
def test_patterns_without_a_shard_are_config_errors(tmp_path: Path, shards: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand_shards(shards.format(folder=tmp_path) if isinstance(shards, str) else shards)


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["a.parquet", "b.parquet", "README.md", "x.jsonl"], "*.parquet"),
        (["a.jsonl.gz", "b.JSONL.gz", "c.jsonl.gz"], "*.jsonl.gz"),
        (["README.md"], "*.tar"),
    ],
)
def test_the_hint_for_a_folder_names_the_ending_of_its_shards(tmp_path: Path, names: list[str], hint: str) -> None:
    for name in names:
        write(tmp_path / name, "x")
    with pytest.raises(ConfigError, match=re.escape(f"is a folder: name its shards, as in {str(tmp_path / hint)!r}")):
        expand_shards(tmp_path)


def test_a_folder_of_save_to_disk_is_loaded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a bank"}])
    for saved, folder, hint in [
        (rows, tmp_path / "one", "pass datasets.load_from_disk({!r})"),
        (datasets.DatasetDict(train=rows), tmp_path / "several", "pass one of those of datasets.load_from_disk({!r})"),
    ]:
        saved.save_to_disk(folder)
        with pytest.raises(ConfigError, match=f"is a folder: .*{re.escape(hint.format(str(folder)))}$"):
            expand_shards(folder)
    with pytest.raises(
        ConfigError, match=r"pass datasets\.load_from_disk\(folder\) .*, or pyarrow\.feather\.read_table\('"
    ):
        expand_shards(tmp_path / "one/*.arrow")


def test_an_iterator_of_rows_is_refused_at_its_first_one_and_one_of_paths_is_read(tmp_path: Path) -> None:
    rows = ({"text": "a bank" * 99, "id": i} for i in itertools.count())
    with pytest.raises(
        ConfigError, match=r"shards holds rows, such as \{'text': .*pass a list of them, list\("
    ) as caught:
        bertstream.stream(rows, FakeEncoder())
    assert len(str(caught.value)) < 200 and next(rows)["id"] == 1
    path = write(tmp_path / "a.txt", "x")
    assert expand_shards(tmp_path.glob("*.txt")) == [path]


@pytest.mark.parametrize("texts", [["Win a prize now!"], ["Yes", "Is it {1, 2?"], ["Yes?", "see you"], ["a b" * 5000]])
def test_texts_in_place_of_shards_are_told_apart(texts: list[str]) -> None:
    for given in (texts, pytest.importorskip("pandas").Series(texts)):
        with pytest.raises(ConfigError, match="there is no shard .*look like texts: pass rows, .*DataLoader") as caught:
            bertstream.stream(given, FakeEncoder())
        assert len(str(caught.value)) < 250


def test_names_with_blanks_are_no_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "my data 1.txt", "x")
    assert expand_shards([f"{tmp_path}/my data *", f"{tmp_path}/{{my,my}} data *"]) == [path] * 3
    with pytest.raises(ConfigError, match="ending of .*my data' is unknown"):
        expand_shards(write(tmp_path / "my data", "x"))
    with pytest.raises(ShardError, match="there is no such shard"):
        expand_shards(f"{tmp_path}/my data 2.txt")


def test_a_missing_local_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "0.txt", "x")
    with pytest.raises(ShardError, match="no such shard") as caught:
        expand_shards(f"{tmp_path}/{{0..2}}.txt")
    assert caught.value.path == str(tmp_path / "1.txt")


def test_endings_may_be_in_capitals_and_tgz_is_a_compressed_tar(tmp_path: Path) -> None:
    assert texts(read(write(tmp_path / "A.TXT", "x"))) == ["x"]
    for name, compress in {"a.tgz": ".gz", "a.tzst": ".zst", "a.TBZ2": ".bz2", "a.txz": ".xz"}.items():
        assert texts(read(write(tmp_path / name, COMPRESS[compress](texts_tar("x"))), TAR)) == ["x"]


def test_the_error_for_an_unknown_ending_lists_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", "x")
    for call in (lambda: expand_shards(path), lambda: split_shard(path, 2), lambda: read(path)):
        with pytest.raises(ConfigError, match=r"a\.arrow.*\.tar, .*\.txt.*\.bz2.*StreamConfig\(format=\)"):
            call()


def test_the_ending_is_found_in_urls_with_queries_and_in_chains() -> None:
    expand_shards(["https://host/a.jsonl?token=x.y", "zip://d/a.csv::s3://bucket/b.zip", "filecache::gs://b/a.tar.gz"])
    with pytest.raises(ConfigError, match="ending"):
        expand_shards("https://host/a?name=a.jsonl")
    expand_shards(["s3://bucket/why?.jsonl", "s3://bucket/a#1.jsonl", "gs://b/50%.txt", "file:///a b.csv"])


@pytest.mark.parametrize(
    ("package", "name", "extra"), [("zstandard", "a.txt.zst", "zstd"), ("pyarrow", "a.parquet", "parquet")]
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, name: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"x")
    for module in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    for call in (expand_shards, lambda path: list(read_records(Piece(path), ReadOptions()))):
        with pytest.raises(ConfigError, match=rf"{name}.*needs the package {package}.*bertstream\[{extra}\]"):
            call(str(tmp_path / name))


def test_parquet_from_a_pipe_is_refused() -> None:
    path, access = "pipe:cat a.parquet", Access(allow_pipe=True)
    for call in (lambda: expand_shards(path, access), lambda: read(path, ReadOptions(access=access))):
        with pytest.raises(ConfigError, match="which a pipe cannot do"):
            call()
