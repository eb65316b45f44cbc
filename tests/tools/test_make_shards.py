"""`tools/make_shards.py` turns files into WebDataset tars that hold the same records."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from bertstream.reading.options import ReadOptions
from bertstream.reading.records import read_records
from bertstream.reading.shards import Piece, expand_shards
from bertstream.tokens import Record

TOOL = Path(__file__).parents[2] / "tools" / "make_shards.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_shards", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "in.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = [[f"text {i}, é\n", ["cat", "ant", "bee"][i % 3], str(i)] for i in range(7)]
        csv.writer(file).writerows([["text", "animal", "extra"], *rows])
    return path


def read(pattern: Path | str, text: str = "txt") -> list[Record]:
    options = ReadOptions(text=text)
    return [record for path in expand_shards(pattern) for record in read_records(Piece(path), options)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_record_arrives_in_order_with_its_class_and_fields(
    tool: ModuleType, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tool.main([str(table), "--out", f"{out}/train-%03d.tar", "--label", "animal", "--per-shard", "3"])
    assert sorted(os.listdir(out)) == ["labels.json", "train-000.tar", "train-001.tar", "train-002.tar"]
    assert json.loads((out / "labels.json").read_text("utf-8")) == {"ant": 0, "bee": 1, "cat": 2}
    records = read(out / "*.tar")
    assert [record.text for record in records] == [f"text {i}, é\n" for i in range(7)]
    assert [record.fields for record in records] == [{"cls": [2, 0, 1][i % 3], "extra": str(i)} for i in range(7)]
    assert len({record.key for record in records}) == 7
    assert "7 records in 3 shards" in capsys.readouterr().out


def test_webdataset_reads_the_shards(tool: ModuleType, table: Path, tmp_path: Path) -> None:
    tool.main([str(table), "--out", str(tmp_path / "out/"), "--label", "extra"])
    (path,) = expand_shards(tmp_path / "out-*.tar")
    with open(path, "rb") as stream:
        samples = list(group_by_keys(tar_file_expander([{"url": path, "stream": stream}])))
    assert [(sample["txt"].decode(), sample["cls"]) for sample in samples] == [
        (f"text {i}, é\n", b"%d" % i) for i in range(7)
    ]


def test_integer_classes_stay_as_they_are(tool: ModuleType, table: Path, tmp_path: Path) -> None:
    tool.main([str(table), "--out", f"{tmp_path}/out/", "--label", "extra"])
    assert os.listdir(tmp_path / "out") == ["000000.tar"]
    assert [record.fields["cls"] for record in read(tmp_path / "out/*.tar")] == list(range(7))


def test_word_lists_and_text_files_are_accepted(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"words": ["New", "York"], "tags": [1, 2]}\n{"words": [], "tags": []}')
    tool.main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "words"), "--text", "words"])
    records = read(tmp_path / "words-*.tar", "words")
    assert [(record.text, record.fields) for record in records] == [
        (["New", "York"], {"tags": [1, 2]}),
        ([], {"tags": []}),
    ]
    (tmp_path / "a.txt").write_text("one\n\n")
    (tmp_path / "b.txt").write_text("two\n")
    tool.main([str(tmp_path / "{a,b}.txt"), "--out", str(tmp_path / "lines")])
    assert [(record.text, record.fields) for record in read(tmp_path / "lines-*.tar")] == [
        ("one", {}),
        ("", {}),
        ("two", {}),
    ]


def test_the_same_input_gives_the_same_bytes(tool: ModuleType, table: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tool.main([str(table), "--out", f"{tmp_path}/{name}/", "--label", "animal", "--shuffle", "--seed", "3"])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_shuffling_keeps_every_record_and_follows_the_seed(tool: ModuleType, table: Path, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        tool.main([str(table), "--out", f"{tmp_path}/{seed}/", "--shuffle", "--seed", seed])
    first, second = ([record.text for record in read(f"{tmp_path}/{seed}/*.tar")] for seed in "01")
    assert sorted(first) == sorted(second) == [f"text {i}, é\n" for i in range(7)]
    assert first != second


def test_a_second_set_uses_the_numbers_of_the_first(tool: ModuleType, table: Path, tmp_path: Path) -> None:
    tool.main([str(table), "--out", f"{tmp_path}/train-%06d.tar", "--label", "animal"])
    (tmp_path / "test.csv").write_text("text,animal\nx,cat\n")
    arguments = [str(tmp_path / "test.csv"), "--out", f"{tmp_path}/test-%06d.tar", "--label", "animal"]
    with pytest.raises(SystemExit, match="numbers other classes: reuse it with --labels"):
        tool.main(arguments)
    tool.main([*arguments, "--labels", f"{tmp_path}/labels.json"])
    assert [record.fields for record in read(tmp_path / "test-*.tar")] == [{"cls": 2}]


def test_existing_shards_are_replaced_only_when_asked(tool: ModuleType, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [str(table), "--out", f"{out}/train-%06d.tar"]
    tool.main([*arguments, "--per-shard", "2"])
    (out / "train-old.tar").write_text("another's")
    before = contents(out)
    with pytest.raises(SystemExit, match=r"train-000000\.tar is there already: pass --overwrite"):
        tool.main(arguments)
    assert contents(out) == before
    tool.main([*arguments, "--overwrite"])
    assert sorted(os.listdir(out)) == ["train-000000.tar", "train-old.tar"]
    assert len(read(out / "train-0*.tar")) == 7


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "x", "animal": "dog"}', "record 1, field 'animal': class 'dog' is not in"),
        ('{"text": "x", "animal": null}', "record 1, field 'animal': a class is a string or an integer, not None"),
        ('{"text": "x", "animal": ""}', "record 1, field 'animal': a class is"),
        ('{"text": "x"}', "record 1, field 'animal': a class is"),
        ('{"text": "x", "animal": "cat", "cls": 1}', "record 1, field 'cls': a field of this name would hide"),
        ('{"text": 1, "animal": "cat"}', "record 1, field 'text'"),
        ("?", "record 1: not JSON"),
    ],
)
def test_a_broken_record_leaves_no_shards(tool: ModuleType, tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "x", "animal": "cat"}\n' + row)
    (tmp_path / "labels.json").write_text('{"cat": 7}')
    arguments = [str(tmp_path / "in.jsonl"), "--out", f"{tmp_path}/out/", "--label", "animal", "--per-shard", "1"]
    with pytest.raises(SystemExit, match=message):
        tool.main([*arguments, "--labels", str(tmp_path / "labels.json")])
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{folder}/a.tar"], r"train-%06d\.tar; got"),
        (["--out", "{folder}/%d-%d.tar"], r"train-%06d\.tar; got"),
        (["--out", "{folder}/%s.tar"], r"train-%06d\.tar; got"),
        (["--out", "{folder}/a%b"], "--out is a local path"),
        (["--out", "memory://a-%d.tar"], "local path"),
        (["--out", "{folder}/a", "--per-shard", "0"], "--per-shard is at least 1; got 0"),
        (["--out", "{folder}/a", "--labels", "{folder}/labels.json"], "--label"),
        (["--out", "{folder}/a", "--label", "animal", "--labels", "{folder}/list.json"], "is not an object"),
        (["--out", "{folder}/a", "--label", "animal", "--labels", "{folder}/none.json"], "No such file"),
        (["--out", "{folder}/a", "--text", "sentence"], "field 'sentence'"),
    ],
)
def test_bad_arguments_end_with_one_line(
    tool: ModuleType, table: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(SystemExit, match=f"^make_shards: .*{message}"):
        tool.main([str(table), *(argument.format(folder=tmp_path) for argument in arguments)])
    assert sorted(os.listdir(tmp_path)) == ["in.csv", "list.json"]


def test_it_runs_as_a_command(table: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), str(table), "--out", f"{tmp_path}/100%/", "--label", "animal"]
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 classes numbered in" in done.stdout
    assert len(read(tmp_path / "100%" / "*.tar")) == 7
