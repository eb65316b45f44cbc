"""The command line: what it prints, its errors and its exit status."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
import transformers

import bertstream
from bertstream import EmbeddingCache, Encoder, cli
from bertstream.encoding import pretrained
from bertstream.testing import write_shards

ROOT = Path(__file__).parents[1]
MODEL = ("--model", "SMALL", "--dtype", "float32")
"""What `call` puts the folder of a small model for."""

VERBS = ("inspect", "embed", "tokenize", "warm", "cache", "doctor")

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], small_folder: str) -> Call:
    """Call the command: its exit status, and what it printed on standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            status = cli.main([small_folder if argument == "SMALL" else str(argument) for argument in arguments])
        except SystemExit as stopped:  # argparse
            status = int(stopped.code or 0)
        transformers.utils.logging.enable_progress_bar()
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), sentences[:40])[0]


def test_the_installed_command_is_this_one() -> None:
    setup = ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg", "utf-8")
    assert setup["options.entry_points"]["console_scripts"].split() == ["bertstream", "=", "bertstream.cli:main"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_its_exit_status(call: Call, verb: str) -> None:
    status, out, _ = call(verb, "--help")
    assert status == 0 and f"usage: bertstream {verb}" in out and "exit status:" in out
    assert verb in call("--help")[1]


def test_every_option_of_an_encoder_has_one_on_the_command_line(call: Call) -> None:
    names = set(Encoder.__init__.__kwdefaults__ or ()) | set(Encoder.from_pretrained.__kwdefaults__ or ())
    shown = re.findall(r"--(?:no-)?([\w-]+)", call("embed", "--help")[1])
    # A function cannot be typed on a command line, `packed` is for tests, and others could read a token there.
    assert {name.replace("_", "-") for name in names - {"word_splitter", "split", "packed", "token"}} <= set(shown)


def test_inspect_prints_what_the_library_finds(call: Call, shard: str, tmp_path: Path) -> None:
    status, out, err = call("inspect", shard, *MODEL, "--batch-size", 8, "--json", "--plot", tmp_path / "plot.png")
    found = json.loads(out)
    assert (status, err) == (0, "") and found["texts"] == 40 and found["batches"] >= 5
    assert found["tokens_per_s"] > 0 and (tmp_path / "plot.png").stat().st_size > 1000
    status, out, _ = call("inspect", shard, *MODEL)
    assert status == 0 and re.search(rf"^tokens +{found['tokens']:,};", out, re.MULTILINE)
    assert "packed equals one by one" in out and "  id: 0" in out


def test_embed_writes_and_continues(call: Call, shard: str, tmp_path: Path, small: Encoder) -> None:
    command = ("embed", shard, "--out", tmp_path / "out", *MODEL, "--output", "sentence", "--format", "safetensors")
    status, out, err = call(*command)
    assert (status, err) == (0, "") and "40 vectors of 32 in 1 file in" in out
    status, out, _ = call(*command, "--json")
    assert status == 0 and json.loads(out)["texts_before"] == 40
    assert (tmp_path / "out" / "part-000000.safetensors").exists()
    status, _, err = call(*command, "--progress")
    assert status == 0


def test_tokenize_writes_and_continues(call: Call, shard: str, tmp_path: Path, small: Encoder) -> None:
    command = ("tokenize", shard, "--out", tmp_path / "out", *MODEL, "--fields", "id", "--max-length", 16)
    status, out, err = call(*command)
    assert (status, err) == (0, "") and re.search(
        r"^40 texts, [\d,]+ tokens in 1 file in .* \(text='input_ids' reads them\); texts .* takes: \d", out
    )
    assert json.loads(call(*command, "--json")[1])["texts_before"] == 40
    loader = bertstream.stream(str(tmp_path / "out" / "*.parquet"), small, text="input_ids")
    assert sum(len(batch["id"]) for batch in loader) == 40


def test_cut_texts_and_skipped_records_are_reported(call: Call, tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, ["word " * 30, "word"])
    with open(path, "a") as file:
        file.write("no json\n")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "word"}\n' * 20_000)[:-40])
    options = ("--overflow", "truncate", "--max-length", 16, "--max-bad-records", 2)
    command = ("embed", path, cut, "--out", tmp_path / "out", *MODEL, "--layers", 0, *options)
    status, out, err = call(*command)
    assert status == 0 and "; texts cut off: 1; broken records skipped: 1; broken shards given up: 1\n" in out
    assert "record 2" in err and "gave up a shard" in err  # named in the log
    again = json.loads(call(*command, "--json")[1])
    assert (again["cut_texts"], again["bad_records"], again["bad_shards"]) == (1, 1, 1)
    status, out, _ = call("warm", path, cut, "--cache", tmp_path / "cache", *MODEL, "--layers", 0, *options)
    assert status == 0 and "; broken records skipped: 1; broken shards given up: 1\n" in out


def test_a_cache_is_filled_shown_checked_and_dropped(call: Call, shard: str, tmp_path: Path, small: Encoder) -> None:
    folder = tmp_path / "cache"
    command = ("warm", shard, "--cache", folder, "--limit", "64MiB", *MODEL)
    status, out, err = call(*command)
    assert (status, err) == (0, "") and out.startswith("40 texts, 40 of them computed now")
    assert json.loads(call(*command, "--json")[1])["computed"] == 0
    with EmbeddingCache("1MiB", folder, "64MiB", read_only=True) as cache:  # as a training run opens it
        name = cache.fingerprint(small)
    status, out, _ = call("cache", folder, "--json")
    assert status == 0 and json.loads(out)["fingerprints"] == {name: 40}
    assert call("cache", folder, "--verify")[:2][0] == 0
    with lmdb.open(str(folder)) as env, env.begin(write=True) as transaction, transaction.cursor() as cursor:
        cursor.set_range(b"r")
        key, entry = cursor.item()
        transaction.put(key, entry[:-1] + bytes([entry[-1] ^ 1]))
    status, out, _ = call("cache", folder, "--verify")
    assert status == 1 and "1 entries were damaged" in out
    assert json.loads(call("cache", folder, "--drop", name, "--json")[1])["dropped"] == {name: 39}
    call(*command)
    status, out, _ = call("cache", folder, "--drop", "all")
    assert status == 0 and "40 texts dropped" in out and "0 texts" in out


def test_warm_reports_a_cache_that_is_too_small(call: Call, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [f"{'word ' * 400}{i}" for i in range(100)])
    wide = ("--model", "all-MiniLM-L6-v2", "--layers", 0)
    status, out, _ = call("warm", *shards, "--cache", tmp_path / "cache", "--limit", "16MiB", *wide)
    assert status == 1 and "raise --limit" in out


def test_doctor_describes_models_and_fails_if_one_cannot_be_loaded(call: Call) -> None:
    status, out, _ = call("doctor", *MODEL)
    assert status == 0 and "runs: fused" in out and f"torch {version('torch')}" in out
    status, out, _ = call("doctor", "--model", "no-such-model", "--json")
    assert status == 1 and "no model" in json.loads(out)["models"]["no-such-model"]["error"]


def test_doctor_names_a_model_that_is_no_text_encoder_and_still_describes_the_others(
    call: Call, small_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = transformers.ViTModel(transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    others: dict[str, torch.nn.Module] = {"images": images, "linear": torch.nn.Linear(1, 1)}
    find = pretrained.find_pretrained

    def find_others(name: str, hub: pretrained.HubOptions) -> pretrained.Pretrained:
        if name not in others:
            return find(name, hub)
        config = getattr(others[name], "config", None)
        pretrained.check_config(config, type(others[name]).__name__)
        return pretrained.Pretrained(name, name, config, None, None)

    monkeypatch.setattr("bertstream.encoding.encoder.find_pretrained", find_others)
    status, out, _ = call("doctor", "--model", *others, "SMALL", "--dtype", "float32", "--json")
    models = json.loads(out)["models"]
    assert status == 1 and "Linear is not a transformers text encoder" in models["linear"]["error"]
    assert "ViTModel is not a transformers text encoder" in models["images"]["error"]
    assert models[small_folder]["runs"] == "fused"


MISTAKES: list[tuple[tuple[Any, ...], int, str]] = [
    (("inspect", "none.jsonl", *MODEL), 1, "there is no such shard"),
    (("inspect", "*.nothing", *MODEL), 2, "no file matches"),
    (("inspect", "SHARD", "--text", "body", *MODEL), 1, "--text names the field"),
    (("inspect", "SHARD", *MODEL, "--plot", "x.foo"), 2, "ends in .png"),
    (("inspect", "SHARD", *MODEL, "--max-tokens", -1), 2, "max_tokens=-1"),
    (("embed", "SHARD", "--out", "OUT", "--model", "no-such-model"), 1, "no model 'no-such-model'"),
    (("embed", "SHARD", "--out", "OUT", *MODEL, "--pooling", "mean"), 2, "token output is not pooled"),
    (("embed", "SHARD", "--out", "OUT", *MODEL, "--max-length", 4), 1, "overflow='truncate'"),
    (("embed", "SHARD", "--out", "OUT", *MODEL, "--part-size", "big"), 2, "part_bytes='big'"),
    (("embed", "SHARD", "--out", "SHARD/x", *MODEL), 2, "no folder can be made at"),
    (("warm", "SHARD", "--cache", "SHARD", *MODEL), 1, "cannot be opened"),
    (("cache", "OUT"), 1, "is no cache"),
    (("doctor", "--dtype", "float32"), 2, "dtype='float32', device='auto': they are for models, name one (--model)"),
    (("doctor", "--device", "cpu"), 2, "name one (--model)"),
    (("doctor", "--model", "no-such-model", "--dtype", "int8"), 2, "dtype='int8'"),
    (("doctor", *MODEL, "--device", "gpu"), 2, "device='gpu'"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line_that_says_what_to_do(
    call: Call, shard: str, tmp_path: Path, arguments: tuple[Any, ...], status: int, message: str
) -> None:
    places = {"SHARD": shard, "OUT": str(tmp_path / "out"), "SHARD/x": f"{shard}/x"}
    found, out, err = call(*(places.get(argument, argument) for argument in arguments))
    assert (found, out) == (status, "") and message in err
    assert err.count("\n") == 1 and err.startswith(f"bertstream {arguments[0]}: ")


@pytest.mark.parametrize("arguments", [(), ("bench",), ("embed", "x"), ("inspect", "x", *MODEL, "--layers", "last")])
def test_arguments_that_argparse_refuses_exit_with_2(call: Call, arguments: tuple[Any, ...]) -> None:
    status, out, err = call(*arguments)
    assert (status, out) == (2, "") and err.startswith("bertstream") and err.endswith("(--help says what it takes)\n")
    assert err.count("\n") == 1


def test_ctrl_c_prints_no_traceback(call: Call, shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "inspect_shards", interrupted)
    assert call("inspect", shard, *MODEL) == (130, "", "bertstream inspect: interrupted\n")


def test_a_bug_keeps_its_traceback(call: Call, shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "inspect_shards", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("inspect", shard, *MODEL)


def test_a_reader_that_closes_the_pipe_is_no_error(small: Encoder, tmp_path: Path, shard: str) -> None:
    with EmbeddingCache(0, tmp_path, "64MiB") as cache:
        bertstream.warm(shard, small, cache, progress=False)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "bertstream", "cache", str(tmp_path)]
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=100
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_csv_is_read_as_the_arguments_say_from_the_home_folder(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.csv").write_bytes('1\t"café\n2\tno"\n'.encode("cp1252"))
    options = ("--delimiter", r"\t", "--quoting", "none", "--header", "id,text", "--encoding", "cp1252")
    status, out, err = call(
        "embed", "~/a.csv", *options, *MODEL, "--output", "sentence", "--out", "~/vectors", "--json", "--no-progress"
    )
    assert (status, json.loads(out)["texts"]) == (0, 2), err
    assert (tmp_path / "vectors" / "part-000000.parquet").exists()
    status, out, err = call(
        "warm", "~/a.csv", *options, *MODEL, "--cache", "~/cache", "--limit", "64MiB", "--no-progress"
    )
    assert status == 0 and call("cache", "~/cache")[0] == 0, err
    assert not (tmp_path / "~").exists()
    assert call("inspect", "~/a.csv", "--delimiter", "||", *MODEL)[0] == 2


def test_odd_endings_and_nested_texts_are_read_by_every_verb(call: Call, tmp_path: Path, small: Encoder) -> None:
    shard = tmp_path / "part-0000"
    shard.write_bytes(gzip.compress(b"".join(b'{"data": {"text": "text %d"}}\n' % i for i in range(5))))
    where = (shard, "--shard-format", "jsonl", "--text", "data.text", *MODEL)
    assert json.loads(call("inspect", *where, "--json")[1])["texts"] == 5
    assert "5 texts" in call("embed", *where, "--out", tmp_path / "out", "--format", "parquet")[1]
    assert "5 texts" in call("warm", *where, "--cache", tmp_path / "cache", "--limit", "64MiB")[1]
    status, _, err = call("inspect", shard, *MODEL)
    assert status == 2 and "StreamConfig(format=)" in err
    status, _, err = call("inspect", shard, "--shard-format", "yaml", *MODEL)
    assert status == 2 and "format='yaml': write an ending" in err
