"""`embed` writes each record's vectors exactly once, equal to the encoder's, even if runs are stopped or killed."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import pytest
import torch
import webdataset
from fork_server import ENCODERS
from safetensors import safe_open
from transformers import BertConfig, BertModel

import bertstream
from bertstream import ConfigError, Encoder, ShardError, StateError, StreamConfig
from bertstream.jobs import embed as job
from bertstream.jobs.writers import PartFormat
from bertstream.testing import write_shards

ROOT = Path(__file__).parents[2]
FORMATS: tuple[PartFormat, ...] = get_args(PartFormat)
# Each kill costs a start of Python and torch.
KILLS = int(os.environ.get("BERTSTREAM_KILLS", "1"))

Found = dict[tuple[str, int], npt.NDArray[Any]]


def tiny(tokenizer: Any, **options: Any) -> Encoder:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=30522, **sizes)).eval().requires_grad_(False)
    return Encoder(model, tokenizer, **options)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> list[str]:
    return write_shards(tmp_path_factory.mktemp("shards"), sentences[:90], shards=3)


def in_parquet(path: Path) -> Iterator[tuple[str, str, int, npt.NDArray[Any]]]:
    for row in pyarrow.parquet.read_table(path).to_pylist():
        yield row["key"], row["shard"], row["index"], np.array(row["vector"])


def in_tar(path: Path) -> Iterator[tuple[str, str, int, npt.NDArray[Any]]]:
    with path.open("rb") as file:  # webdataset's readers leave closing to the garbage collector
        records = webdataset.tariterators.group_by_keys(
            webdataset.tariterators.tar_file_expander([{"url": "", "stream": file}])
        )
        for record in map(webdataset.autodecode.Decoder([]), records):
            yield record["json"]["key"], record["json"]["shard"], record["json"]["index"], record["npy"]


def in_safetensors(path: Path) -> Iterator[tuple[str, str, int, npt.NDArray[Any]]]:
    with safe_open(path, "np") as file:
        values, index, about = file.get_tensor("values"), file.get_tensor("index"), file.metadata()
        bounds = file.get_tensor("cu_seqlens") if "cu_seqlens" in file.keys() else None  # noqa: SIM118 - no mapping
    vectors = values if bounds is None else np.split(values, bounds[1:-1])
    yield from zip(json.loads(about["keys"]), json.loads(about["shards"]), index.tolist(), vectors, strict=True)


READ = {".parquet": in_parquet, ".tar": in_tar, ".safetensors": in_safetensors}


def written(folder: Path) -> Found:
    """The vectors by shard and index; fails if a record occurs twice."""
    found: Found = {}
    for path in sorted(folder.glob("part-*")):
        for key, shard, index, vector in READ[path.suffix](path):
            assert key == f"{Path(shard).stem}:{index}" and (shard, index) not in found
            found[shard, index] = vector
    return found


def right(encoder: Encoder, shards: list[str]) -> Found:
    """The vectors of every record, one text at a time."""
    found: Found = {}
    for shard in shards:
        for index, line in enumerate(Path(shard).read_text().splitlines()):
            found[shard, index] = encoder([json.loads(line)["text"]])[0].numpy()
    return found


def assert_same(found: Found, right: Found) -> None:
    assert found.keys() == right.keys()
    for place, vector in right.items():
        assert found[place].shape == vector.shape
        np.testing.assert_allclose(found[place], vector, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "options",
    [{}, {"output": "words"}, {"output": "sentence"}, {"layers": (0, 1), "combine": "stack"}],
    ids=["tokens", "words", "sentence", "stack"],
)
def test_every_record_is_written_once_and_equals_the_encoders_vectors(
    tokenizer: Any, shards: list[str], tmp_path: Path, format: PartFormat, options: dict[str, Any]
) -> None:
    encoder = tiny(tokenizer, **options)
    done = bertstream.embed(shards, encoder, tmp_path / "out", format=format, part_bytes=20_000, progress=False)
    found = written(tmp_path / "out")
    assert_same(found, right(encoder, shards))
    rows = sum(1 if encoder.output == "sentence" else len(vector) for vector in found.values())
    assert (done["texts"], done["rows"], done["texts_before"]) == (90, rows, 0)
    assert done["parts"] == len(list((tmp_path / "out").glob("part-*"))) > (1 if encoder.output != "sentence" else 0)


def test_a_text_of_every_kind_of_length_is_written_in_float16(tokenizer: Any, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", ["", "a", "word " * 200, " "])
    encoder = tiny(tokenizer, output="words", output_dtype=torch.float16)
    for format in FORMATS:
        bertstream.embed(shards, encoder, tmp_path / format, format=format, progress=False)
        found = written(tmp_path / format)
        assert [len(found[shards[0], i]) for i in range(4)] == [0, 1, 200, 0]
    assert found[shards[0], 2].dtype == np.float16  # of safetensors, which came last


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("calls", [0, 1, 3, 5])
def test_a_stopped_run_continues(
    tokenizer: Any,
    shards: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: PartFormat,
    calls: int,
) -> None:
    encoder = tiny(tokenizer, max_forward_tokens=32)  # few batches are encoded together
    encode, left = encoder.encode, iter(range(calls))

    def stopped(batch: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return encode(batch)

    settings: dict[str, Any] = {"format": format, "part_bytes": 10_000, "progress": False}
    monkeypatch.setattr(encoder, "encode", stopped)
    with pytest.raises(KeyboardInterrupt):
        bertstream.embed(shards, encoder, tmp_path, **settings)
    monkeypatch.setattr(encoder, "encode", encode)
    before = json.loads((tmp_path / "_progress.json").read_text())["counts"]
    done = bertstream.embed(shards, encoder, tmp_path, **settings)
    assert done["texts_before"] == before["texts"]
    assert calls > 1 or not before["texts"]  # after more calls, it depends on the clock which parts are written yet
    assert done["texts"] == 90
    assert_same(written(tmp_path), right(encoder, shards))
    # A third run finds nothing to do.
    monkeypatch.setattr(encoder, "encode", lambda batch: pytest.fail("encoded"))
    assert bertstream.embed(shards, encoder, tmp_path, **settings) == done | {"texts_before": 90}


def test_parts_that_a_killed_run_wrote_after_its_last_progress_are_written_again(
    tokenizer: Any, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops at each moment between a part's final name and the progress file that counts it."""
    encoder = tiny(tokenizer)
    expected = right(encoder, shards)
    replace = os.replace
    for stop in range(1, 9):
        folder = tmp_path / str(stop)
        calls = iter(range(stop))

        def stopped(source: Any, target: Any, calls: Iterator[int] = calls) -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            bertstream.embed(shards, encoder, folder, part_bytes=10_000, progress=False)
        monkeypatch.setattr(os, "replace", replace)
        assert bertstream.embed(shards, encoder, folder, part_bytes=10_000, progress=False)["texts"] == 90
        assert_same(written(folder), expected)
        assert not list(folder.glob("*.unfinished"))


# The command line, in a group of processes of its own.
COMMAND = """
import os, sys
os.setsid()
from bertstream import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def alive(group: int) -> bool:
    """Whether a process of the group still runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_killed_run_continues_and_ends_as_an_undisturbed_one(
    minilm: Encoder, sentences: list[str], tmp_path: Path
) -> None:
    texts = [text for text in sentences if len(text) < 100][:200]
    shards = write_shards(tmp_path / "shards", texts, shards=3)
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    bertstream.embed(shards, minilm, undisturbed, part_bytes=250_000, progress=False)
    command = ["embed", *shards, "--out", str(out), "--part-size", "250000"]
    command += ["--model", "all-MiniLM-L6-v2", "--dtype", "float32", "--num-workers", "1", "--json"]
    rng = random.Random(0)
    groups = []
    for _ in range(KILLS):
        parts = len(list(out.glob("part-*.parquet")))
        program = ENCODERS.start(COMMAND, *command)
        groups.append(program.pid)
        deadline = time.monotonic() + 60
        while len(list(out.glob("part-*.parquet"))) == parts and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(program.pid, signal.SIGKILL)
        _, errors, status = program.finish()
        assert status == -signal.SIGKILL, errors
    printed, errors, status = ENCODERS.start(COMMAND, *command).finish()
    assert status == 0, errors
    done = json.loads(printed)
    assert done["texts"] == 200 and done["texts_before"] > 0
    assert_same(written(out), written(undisturbed))
    deadline = time.monotonic() + 15  # orphaned workers look for their parent about every second
    while (left := [group for group in groups if alive(group)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def test_a_part_is_written_after_a_time_however_small(
    tokenizer: Any, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_PART_S", 0.0)
    monkeypatch.setattr(job, "_BATCH_TOKENS", 256)
    assert bertstream.embed(shards, tiny(tokenizer), tmp_path, progress=False)["parts"] > 3
    assert_same(written(tmp_path), right(tiny(tokenizer), shards))


def test_each_rank_writes_its_share(
    tokenizer: Any, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, reading = tiny(tokenizer), StreamConfig(lanes=4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    texts = []
    for rank in (0, 1, 0):
        monkeypatch.setenv("RANK", str(rank))
        done = bertstream.embed(shards, encoder, tmp_path, reading=reading, progress=False)
        texts.append(done["texts"])
    assert texts[0] + texts[1] == 90 and min(texts) > 0 and done["texts_before"] == texts[0] == texts[2]
    assert_same(written(tmp_path), right(encoder, shards))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="holds other files"):
        bertstream.embed(shards, encoder, tmp_path, reading=reading, progress=False)


def test_ranks_write_one_row_group_by_record(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"word {i}" for i in range(21)]}), path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1, 1):
        monkeypatch.setenv("RANK", str(rank))
        done = bertstream.embed(path, tiny(tokenizer), tmp_path / "out", progress=False)
        assert done["texts"] == (11, 10)[rank]
    assert sorted(written(tmp_path / "out")) == [(str(path), i) for i in range(21)]


def test_broken_and_cut_texts_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path / "shards", ["a word", "word " * 30, "word"])
    with open(path, "a") as file:
        file.write("no json\n")
    encoder = tiny(tokenizer, overflow="truncate", max_length=16)
    with pytest.raises(ShardError, match="record 3"):
        bertstream.embed(path, encoder, tmp_path / "out", progress=False)
    done = bertstream.embed(path, encoder, tmp_path / "out", reading=StreamConfig(max_bad_records=1), progress=False)
    assert (done["texts"], done["cut_texts"], done["bad_records"]) == (3, 1, 1)


@pytest.mark.parametrize(
    ("difference", "key"),
    [
        ({"format": "safetensors"}, "format"),
        ({"part_bytes": 30_000}, "part_bytes"),
        ({"encoder": {"layers": (1,)}}, "encoder"),
        ({"shards": 2}, "shards"),
        ({"reading": StreamConfig(bucket_size=7)}, "window"),
    ],
    ids=str,
)
def test_a_folder_begun_with_other_settings_is_refused_and_the_difference_named(
    tokenizer: Any, shards: list[str], tmp_path: Path, difference: dict[str, Any], key: str
) -> None:
    bertstream.embed(shards, tiny(tokenizer), tmp_path, part_bytes=20_000, progress=False)
    encoder = tiny(tokenizer, **difference.pop("encoder", {}))
    others = shards[: difference.pop("shards", 3)]
    with pytest.raises(StateError, match=f"{tmp_path} was started with .*{key}") as caught:
        bertstream.embed(others, encoder, tmp_path, **{"part_bytes": 20_000, "progress": False} | difference)
    assert caught.value.key == key


def test_the_difference_between_two_encoders_is_shown(tokenizer: Any, shards: list[str], tmp_path: Path) -> None:
    bertstream.embed(shards, tiny(tokenizer), tmp_path, progress=False)
    with pytest.raises(StateError, match=r"encoder Encoder\(.*'tokens'.*, and this is Encoder\(.*'sentence'"):
        bertstream.embed(shards, tiny(tokenizer, output="sentence"), tmp_path, progress=False)
    other = tiny(tokenizer)
    next(other.parameters()).data.add_(1)
    with pytest.raises(StateError, match="other weights or settings of Encoder"):
        bertstream.embed(shards, other, tmp_path, progress=False)


def test_a_folder_of_parquet_is_a_dataset_of_files_of_about_the_size_asked_for(
    tokenizer: Any, shards: list[str], tmp_path: Path
) -> None:
    done = bertstream.embed(shards, tiny(tokenizer), tmp_path, part_bytes=20_000, progress=False)
    assert done["parts"] > 3 and len(pyarrow.parquet.read_table(tmp_path)) == done["texts"]
    sizes = [pyarrow.parquet.read_metadata(path).row_group(0).total_byte_size for path in tmp_path.glob("*.parquet")]
    assert sorted(sizes)[-1] < 1.25 * 20_000 + 8_000, "with keys and shards"


def test_a_run_killed_while_it_made_its_folder_starts_again(tokenizer: Any, shards: list[str], tmp_path: Path) -> None:
    for name in (".lock", "._progress.json.unfinished"):
        (tmp_path / name).touch()
    assert bertstream.embed(shards, tiny(tokenizer), tmp_path, progress=False)["texts"] == 90


def test_a_folder_with_other_files_is_left_alone(tokenizer: Any, shards: list[str], tmp_path: Path) -> None:
    other = tmp_path / "part-000000.parquet"
    other.write_text("precious")
    with pytest.raises(ConfigError, match=r"holds other files, such as 'part-000000.parquet'"):
        bertstream.embed(shards, tiny(tokenizer), tmp_path, progress=False)
    assert other.read_text() == "precious"


def test_a_folder_that_lost_a_part_or_its_progress_is_refused(
    tokenizer: Any, shards: list[str], tmp_path: Path
) -> None:
    bertstream.embed(shards, tiny(tokenizer), tmp_path, progress=False)
    progress = (tmp_path / "_progress.json").read_text()
    (tmp_path / "part-000000.parquet").unlink()
    with pytest.raises(StateError, match=r"lacks part-000000.parquet"):
        bertstream.embed(shards, tiny(tokenizer), tmp_path, progress=False)
    for broken in (progress[:50], "[]", "{}"):
        (tmp_path / "_progress.json").write_text(broken)
        with pytest.raises(StateError, match="damaged"):
            bertstream.embed(shards, tiny(tokenizer), tmp_path, progress=False)


def test_two_processes_do_not_write_into_one_folder(tokenizer: Any, shards: list[str], tmp_path: Path) -> None:
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        with pytest.raises(ConfigError, match="another process"):
            bertstream.embed(shards, tiny(tokenizer), tmp_path, progress=False)
        process.communicate(b"\n")
    assert bertstream.embed(shards, tiny(tokenizer), tmp_path, progress=False)["texts"] == 90


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"format": "csv"}, "format='csv'"),
        ({"part_bytes": "much"}, "part_bytes='much'"),
        ({"part_bytes": 0}, "part_bytes=0"),
        ({"out": "s3://bucket/x"}, "is a URL"),
        ({"num_workers": -1}, "num_workers=-1"),
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_before_any_file_is_made(
    tokenizer: Any, shards: list[str], tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    out = wrong.pop("out", tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        bertstream.embed(shards, tiny(tokenizer), out, **{"progress": False} | wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_the_format_lacks_and_trainable_weights_are_refused(
    tokenizer: Any, shards: list[str], tmp_path: Path
) -> None:
    encoder = tiny(tokenizer, output_dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="bfloat16"):
        bertstream.embed(shards, encoder, tmp_path, progress=False)
    assert bertstream.embed(shards, encoder, tmp_path, format="safetensors", progress=False)["texts"] == 90
    with pytest.raises(ConfigError, match="require gradients: call encoder.freeze"):
        bertstream.embed(shards, tiny(tokenizer).requires_grad_(True), tmp_path / "out", progress=False)


def test_the_bar_shows_the_total_and_the_rate(
    tokenizer: Any, shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bertstream.embed(shards, tiny(tokenizer), tmp_path)
    shown = capsys.readouterr().err
    assert "90/90" in shown and "tokens/s" in shown


@pytest.mark.parametrize("file", ["_progress.json", "part-000000.parquet"])
def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_none_of_it(
    tokenizer: Any, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    def full(descriptor: int) -> None:
        if any(tmp_path.glob(f"out/.{file}.unfinished")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/out/{file}'"):
        bertstream.embed(shards, tiny(tokenizer), tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out/*unfinished"))


def test_only_kept_records_are_written_and_the_others_are_counted_over_runs(
    tokenizer: Any, shards: list[str], tmp_path: Path
) -> None:
    def keep(record: dict[str, Any]) -> bool:
        return bool(record["id"] % 3)

    for _ in range(2):
        counts = bertstream.embed(shards, tiny(tokenizer), tmp_path / "out", keep=keep, progress=False)
        assert (counts["texts"], counts["dropped_records"]) == (60, 30)
    with pytest.raises(StateError, match="another keep: name another folder"):
        bertstream.embed(shards, tiny(tokenizer), tmp_path / "out", progress=False)
