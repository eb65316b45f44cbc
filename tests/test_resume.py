"""Exactly once, in real processes: ranks, workers, kills and broken data."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fork_server import ENCODERS, ENVIRONMENT, RANKS, Program
from soak import train_and_kill

import bertstream
from bertstream import EmbeddingLoader, ShardError, StateError, StreamConfig, TextStream
from bertstream.testing import FakeEncoder, write_shards

pytestmark = pytest.mark.slow

COUNT = 400
TEXTS = [f"{'word ' * (i * 7 % 13)}{i}" for i in range(COUNT)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Shards of very unequal sizes."""
    folder = tmp_path_factory.mktemp("shards")
    sizes = [3, 150, 1, 30, 200, 16]
    paths = [write_shards(folder / str(number), ["x"] * size)[0] for number, size in enumerate(sizes)]
    first = 0
    for path, size in zip(paths, sizes, strict=True):
        lines = [json.dumps({"text": TEXTS[i], "id": i}) for i in range(first, first + size)]
        Path(path).write_text("".join(line + "\n" for line in lines))
        first += size
    return paths


# One rank: writes the ids of each batch it hands out as a line of JSON, and stops where it is told to.
RANK = """
import json, os, signal, sys, time
import torch.distributed as dist
import bertstream
from bertstream.testing import FakeEncoder

options = json.loads(sys.argv[1])


class Failing(FakeEncoder):
    def encode(self, batch):
        options["calls"] = options.get("calls", 0) + 1
        if options["calls"] >= options.get("encode", 1e9):
            raise bertstream.EncoderError("an odd text")
        return super().encode(batch)


def talk():
    if options["world_size"] > 1:
        init = f"file://{options['store']}"
        dist.init_process_group("gloo", init_method=init, rank=options["rank"], world_size=options["world_size"])


if options.get("talks_late"):
    os.environ.update(RANK=str(options["rank"]), WORLD_SIZE=str(options["world_size"]))
else:
    talk()
reading = bertstream.StreamConfig(**{"lanes": 7, "bucket_size": 40} | options.get("reading", {}))
shards = bertstream.Mixture(options["mixture"], stopping="all") if "mixture" in options else options["shards"]
loader = bertstream.stream(
    shards, Failing(), batch_size=8, shuffle=True, seed=options.get("seed", 0),
    num_workers=options["workers"], reading=reading,
    deterministic=not options["workers"],  # so that groups grow, which by the clock they hardly do with this encoder
)
if options.get("talks_late"):
    talk()
if options.get("state"):
    loader.load_state_dict(options["state"])
for number, batch in enumerate(loader):
    if not batch.get("__repeated__"):
        print(json.dumps(batch["id"].tolist()))
    else:
        print("[]")
    if options.get("states"):
        print(json.dumps(loader.state_dict()))
    if number + 1 == options.get("stop"):
        print(json.dumps(loader.state_dict(after=number + 1 - options.get("held", 0))))
        break
    if number + 1 == options.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if number + 1 == options.get("raise"):
        raise ZeroDivisionError("in the training step")
print(json.dumps(loader.stats()), file=sys.stderr)
"""


def run(
    tmp_path: Path, world_size: int, each: Sequence[dict[str, Any]] = (), *, fresh: bool = False, **options: Any
) -> list[Any]:
    """What every rank printed: (lines, errors, exit status). Fresh ranks are interpreters of their own."""
    store = str(tmp_path / f"store-{time.monotonic_ns()}")
    given = [
        json.dumps({"rank": rank, "world_size": world_size, "store": store} | options | (each[rank] if each else {}))
        for rank in range(world_size)
    ]
    if fresh:
        command, pipe = [sys.executable, "-c", RANK], subprocess.PIPE
        ranks = [
            subprocess.Popen([*command, one], stdout=pipe, stderr=pipe, text=True, env=os.environ | ENVIRONMENT)
            for one in given
        ]
        ended = [(*process.communicate(timeout=100), process.returncode) for process in ranks]
    else:
        ended = [program.finish() for program in [RANKS.start(RANK, one) for one in given]]
    return [([json.loads(line) for line in out.splitlines()], errors, status) for out, errors, status in ended]


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 2), (3, 0)), ((2, 2), (1, 0)), ((3, 0), (2, 2))],  # each number before and after
)
def test_every_record_comes_once_when_ranks_and_workers_change(
    shards: list[str], tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    first = run(tmp_path, before[0], shards=shards, workers=before[1], stop=5)
    ids = [i for lines, errors, status in first for batch in lines[:-1] for i in batch]
    state = first[-1][0][-1]  # any rank's will do: it names the lanes of all
    rest = run(tmp_path, after[0], shards=shards, workers=after[1], state=state)
    assert [status for _, _, status in first + rest] == [0] * (before[0] + after[0]), rest
    ids += [i for lines, _, _ in rest for batch in lines for i in batch]
    assert sorted(ids) == list(range(COUNT))


def gz(folder: Path, count: int) -> list[str]:
    lines = "".join(json.dumps({"text": "word " * (i % 9), "id": i}) + "\n" for i in range(count))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return [str(folder / "a.jsonl.gz")]


def test_three_ranks_share_one_compressed_file_and_resume(tmp_path: Path) -> None:
    shards, options = gz(tmp_path, 200), {"reading": {"lanes": None}}
    first = run(tmp_path, 3, shards=shards, workers=0, stop=4, **options)
    rest = run(tmp_path, 3, shards=shards, workers=2, state=first[-1][0][-1], **options)
    assert [status for _, _, status in first + rest] == [0] * 6, rest
    assert all(len(lines) == 5 and all(lines[:-1]) for lines, _, _ in first)  # each has batches of its own
    batches = [batch for lines, _, _ in first for batch in lines[:-1]]
    batches += [batch for lines, _, _ in rest for batch in lines]
    assert sorted(i for batch in batches for i in batch) == list(range(200))


MIXED = """
import sys
import torch.distributed as dist
import bertstream
from bertstream.testing import FakeEncoder, assert_resumes_exactly

stopping, large, small = sys.argv[3:]
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
reading = bertstream.StreamConfig(lanes=5, bucket_size=17, uneven="stop")


def make(workers=0):
    shards = bertstream.Mixture([(large, 2), (small, 1)], stopping=stopping)
    return bertstream.stream(shards, FakeEncoder(), batch_size=9, shuffle=True, num_workers=workers, reading=reading)


assert_resumes_exactly(make, cuts=[4], resume_with=lambda: make(2))
"""


@pytest.mark.parametrize("stopping", ["first", "all"])
def test_a_mixture_resumes_exactly_on_two_ranks(tmp_path: Path, stopping: str) -> None:
    large, small = write_shards(tmp_path, TEXTS[:150])[0], gz(tmp_path, 60)[0]
    programs = [RANKS.start(MIXED, str(tmp_path / "store"), str(rank), stopping, large, small) for rank in range(2)]
    assert [program.finish() for program in programs] == [("", "", 0)] * 2


def test_a_mixture_leaves_no_record_out_when_ranks_and_workers_change(tmp_path: Path) -> None:
    small = gz(tmp_path, 200)[0]  # the ids below 200, more often than those above
    rows = [{"text": text, "id": 200 + i} for i, text in enumerate(TEXTS[:200])]
    options = {"mixture": [[small, 2], [rows, 1]], "reading": {"lanes": None}}
    first = run(tmp_path, 2, workers=2, stop=5, **options)
    rest = run(tmp_path, 3, workers=0, state=first[-1][0][-1], **options)
    assert [status for _, _, status in first + rest] == [0] * 5, rest
    ids = [i for lines, _, _ in first for batch in lines[:-1] for i in batch]
    ids += [i for lines, _, _ in rest for batch in lines for i in batch]
    counts = Counter(ids)
    assert counts.keys() == set(range(400)) and all(counts[i] == 1 for i in range(200, 400))


def test_fewer_records_than_ranks_are_an_error_on_every_rank(tmp_path: Path) -> None:
    found = run(tmp_path, 3, shards=gz(tmp_path, 2), workers=0, reading={"lanes": None})
    assert all(status and not lines for lines, _, status in found)
    assert all("ShardError: of 3 ranks, [2] have no record in this epoch" in errors for _, errors, _ in found)


def test_ranks_have_the_same_states_and_go_on_in_their_own_order(shards: list[str], tmp_path: Path) -> None:
    """With any number of workers, and also while lanes end on one rank, of which the others do not hear."""
    reading = {"lanes": 5}
    whole = run(tmp_path, 2, shards=shards, workers=0, states=True, reading=reading, fresh=True)
    states = [[line["queues"] for line in lines if isinstance(line, dict)] for lines, _, _ in whole]
    assert len(states[0]) > 20 and states[0] == states[1]
    first = run(tmp_path, 2, shards=shards, workers=2, stop=7, reading=reading)
    rest = run(tmp_path, 2, shards=shards, workers=1, state=first[0][0][-1], reading=reading)
    for rank in range(2):
        batches = [line for line in whole[rank][0] if isinstance(line, list)]
        assert first[rank][0][:-1] + rest[rank][0] == batches


def test_a_state_of_one_rank_is_that_of_all_while_each_holds_batches(shards: list[str], tmp_path: Path) -> None:
    """A trainer's checkpoint keeps the state of rank 0."""
    whole = run(tmp_path, 2, shards=shards, workers=0)
    state = run(tmp_path, 2, shards=shards, workers=0, stop=7, held=2)[0][0][-1]
    rest = run(tmp_path, 2, shards=shards, workers=0, state=state)
    assert [lines for lines, _, _ in rest] == [lines[5:] for lines, _, _ in whole]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_state_taken_while_a_rank_was_padded_goes_on(tmp_path: Path, world_size: int) -> None:
    paths = write_shards(tmp_path / "large", TEXTS, shards=1) + write_shards(tmp_path / "small", TEXTS[:20], shards=1)
    reading = {"open_shards": 1, "lanes": 3}
    first = run(tmp_path, 2, shards=paths, workers=0, stop=20, reading=reading)
    states = [lines[-1] for lines, _, _ in first]
    assert states[0]["queues"] == states[1]["queues"]
    each = [{"state": states[rank % 2]} for rank in range(world_size)]  # each its own, where there are as many
    rest = run(tmp_path, world_size, each, shards=paths, workers=0, reading=reading)
    assert all(status == 0 for _, _, status in rest), rest
    counts = [sum(map(len, batches)) for lines in (first, rest) for batches in [line[0] for line in lines]]
    assert sum(counts) - sum(len(lines[0][-1]) for lines in first) == len(TEXTS) + 20


def test_a_rank_that_fails_at_its_first_record_is_named_at_once(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, TEXTS[:60], shards=2)
    Path(paths[1]).write_text("no json\n" * 30)
    found = run(tmp_path, 2, shards=paths, workers=0, reading={"lanes": 2, "open_shards": 1})
    assert sorted(status for _, _, status in found) == [1, 1]
    assert any("left the epoch" in errors and "not JSON" in errors for _, errors, _ in found)


@pytest.mark.parametrize("uneven", ["pad", "stop"])
def test_ranks_with_unequal_shards_end_together(tmp_path: Path, uneven: str) -> None:
    long = ["word " * 300] * 20  # in steps of one: neither may wait for the other to read on before it handed out
    paths = write_shards(tmp_path / "large", TEXTS, shards=1) + write_shards(tmp_path / "small", long, shards=1)
    script = DDP.replace("UNEVEN", uneven)
    ranks = [ENCODERS.start(script, str(rank), str(tmp_path / "store"), *paths) for rank in range(2)]
    found = [json.loads(rank.finish()[0]) for rank in ranks]
    steps, seen, left = zip(*found, strict=True)
    assert steps[0] == steps[1] == (50 if uneven == "pad" else 3)
    assert sum(seen) + sum(left) == COUNT + 20
    assert (sum(left) > 0) == (uneven == "stop")


# A real DistributedDataParallel step: a rank without a batch would make the other wait for its gradients for good.
DDP = """
import json, sys
import torch
import torch.distributed as dist
import bertstream
from bertstream.testing import FakeEncoder
rank, store, shards = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
reading = bertstream.StreamConfig(lanes=2, open_shards=1, uneven="UNEVEN", rank_timeout_s=20)
loader = bertstream.stream(shards, FakeEncoder(), batch_size=8, deterministic=True, reading=reading)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 2))
steps = seen = 0
for batch in loader:
    model(batch["text"].values).sum().backward()
    steps += 1
    seen += 0 if batch.get("__repeated__") else len(batch["text"])
print(json.dumps([steps, seen, loader.stats()["left_texts"]]))
dist.destroy_process_group()
"""


def test_ranks_with_other_settings_each_are_refused(shards: list[str], tmp_path: Path) -> None:
    """Or some records would come twice and others never."""
    found = run(tmp_path, 2, [{"seed": 0}, {"seed": 1}], shards=shards, workers=0)
    for rank, (lines, errors, status) in enumerate(found):
        assert (lines, status) == ([], 1)
        assert f"ConfigError: rank {1 - rank} streams with seed={1 - rank}, this rank with seed={rank}" in errors


def test_ranks_that_meet_after_the_loader_was_made_end_together(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "large", TEXTS, shards=1) + write_shards(tmp_path / "small", TEXTS[:20], shards=1)
    reading = {"open_shards": 1, "lanes": 2}
    late = run(tmp_path, 2, shards=paths, workers=0, reading=reading, talks_late=True)
    assert [status for _, _, status in late] == [0, 0], late
    assert late[0][0] == run(tmp_path, 2, shards=paths, workers=0, reading=reading)[0][0]
    assert len(late[0][0]) == len(late[1][0])


@pytest.mark.parametrize("way", ["kill", "raise", "stop", "encode"])
def test_a_rank_that_goes_away_makes_the_others_fail_by_name(shards: list[str], tmp_path: Path, way: str) -> None:
    started = time.monotonic()
    (_, errors, status), (_, _, other) = run(
        tmp_path, 2, [{}, {way: 4}], shards=shards, workers=0, reading={"rank_timeout_s": 5}
    )
    assert status == 1 and "bertstream.errors.BertstreamError: rank 1 " in errors
    assert other == {"kill": -signal.SIGKILL, "raise": 1, "stop": 0, "encode": 1}[way]
    if way != "kill":
        assert f"left the epoch: {'EncoderError' if way == 'encode' else 'it stopped iterating'}" in errors
    assert time.monotonic() - started < 60


def test_a_state_that_lacks_other_ranks_lanes_is_refused(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def make(rank: int, world_size: int) -> EmbeddingLoader:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        return bertstream.stream(shards, FakeEncoder(), reading=StreamConfig(lanes=4))

    loader = make(1, 2)
    next(iter(loader))
    state = loader.state_dict()
    loader.close()
    make(1, 2).load_state_dict(state)
    for rank, world_size in ((0, 2), (0, 1)):
        with pytest.raises(StateError, match="lacks the lanes of ranks") as caught:
            make(rank, world_size).load_state_dict(state)
        assert caught.value.key == "queues"


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 4}, "batch_size"),
        ({"shuffle": False}, "shuffle"),
        ({"reading": StreamConfig(lanes=4, bucket_size=7)}, "bucket_size"),
        ({"reading": StreamConfig(lanes=3)}, "lanes"),
    ],
)
def test_a_state_of_another_stream_is_refused_with_the_difference(
    shards: list[str], options: dict[str, Any], key: str
) -> None:
    same: dict[str, Any] = {"shuffle": True, "reading": StreamConfig(lanes=4)}
    state = bertstream.stream(shards, FakeEncoder(), **same).state_dict()
    with pytest.raises(StateError, match=key) as caught:
        bertstream.stream(shards, FakeEncoder(), **same | options).load_state_dict(state)
    stored = {"bucket_size": "window"}.get(key, key)  # its name in states
    assert caught.value.key in (stored, "shards")
    with pytest.raises(StateError, match=f"over other data: {len(shards)} shards, this stream has 1: make"):
        bertstream.stream(shards[:1], FakeEncoder(), **same).load_state_dict(state)
    for broken in ({}, [], {**state, "version": 99}):
        with pytest.raises(StateError) as caught:
            bertstream.stream(shards, FakeEncoder(), **same).load_state_dict(broken)
        assert caught.value.key == "version"


@pytest.mark.parametrize(("workers", "kills"), [(0, 1), (2, 2)])
def test_a_training_that_is_killed_goes_on_where_its_checkpoint_was(
    shards: list[str], tmp_path: Path, workers: int, kills: int
) -> None:
    def start(program: str, *arguments: str) -> Program:
        return RANKS.start(f"import os; os.setsid()\n{program}", *arguments)

    found = train_and_kill(tmp_path, shards, kills=kills, workers=workers, start=start)
    assert found["exact"] and found["status"] == 0 and len(found["resumed_from"]) == kills
    assert not found["processes_left"] and not found["shared_memory_left"]


def test_a_training_that_never_ends_is_ended_and_told(shards: list[str], tmp_path: Path) -> None:
    def start(program: str, *arguments: str) -> Program:
        return RANKS.start("import os, time; os.setsid(); time.sleep(600)")

    (tmp_path / "log").touch()
    found = train_and_kill(tmp_path, shards, kills=0, workers=0, start=start, limit_s=0.5)
    assert found["status"] == -9 and not found["exact"] and not found["processes_left"]


# --- broken data ------------------------------------------------------------------------------------------------------

FAULTS = (
    "a bad line",
    "a field that is missing",
    "bytes that are no UTF-8",
    "a truncated gz",
    "a broken tar header",
    "a vanished file",
)


def broken_shards(folder: Path, fault: str, place: str) -> tuple[list[str], set[int], int, int]:
    """Three shards with a fault in one; ids that must come, at least; and how many records and shards are at fault."""
    number = {"first": 0, "middle": 1, "last": 2}[place]
    paths = write_shards(folder, TEXTS[:90], shards=3)
    good = set(range(90))
    path = Path(paths[number])
    lines = path.read_bytes().splitlines(keepends=True)
    if fault == "a truncated gz":
        packed = gzip.compress(b"".join(lines))
        path.unlink()
        path = path.with_name(path.name + ".gz")
        path.write_bytes(packed[: len(packed) // 2])
        paths[number] = str(path)
        return paths, good - set(range(30 * number, 30 * number + 30)), 0, 1
    if fault == "a broken tar header":
        path.unlink()
        path = path.with_suffix(".tar")
        with tarfile.open(path, "w") as tar:
            for i, line in enumerate(lines):
                header = tarfile.TarInfo(f"{i}.json")
                header.size = len(line)
                tar.addfile(header, io.BytesIO(line))
        data = bytearray(path.read_bytes())
        data[1024 * 20 : 1024 * 20 + 100] = b"x" * 100  # a header and a short member take a block of 512 bytes each
        path.write_bytes(data)
        paths[number] = str(path)
        return paths, good - set(range(30 * number, 30 * number + 30)), 0, 1
    if fault == "a vanished file":
        return paths, good - set(range(30 * number, 30 * number + 30)), 0, 1
    lines[7] = {
        "a bad line": b'{"text": \n',
        "a field that is missing": b'{"id": 7}\n',
        "bytes that are no UTF-8": b'{"text": "\xff", "id": 7}\n',
    }[fault]
    path.write_bytes(b"".join(lines))
    return paths, good - {30 * number + 7}, 1, 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_an_error_or_is_counted_and_nothing_else_is_lost(
    tmp_path: Path, fault: str, place: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    paths, good, records, broken = broken_shards(tmp_path, fault, place)

    def make(max_bad_records: float) -> EmbeddingLoader:
        reading = StreamConfig(lanes=2, bucket_size=16, max_bad_records=max_bad_records)
        return bertstream.stream(paths, FakeEncoder(), batch_size=4, shuffle=True, num_workers=workers, reading=reading)

    def ids(loader: EmbeddingLoader) -> list[int]:
        return [i for batch in loader for i in batch["id"].tolist()]

    strict = make(0)
    gone = paths[{"first": 0, "middle": 1, "last": 2}[place]]
    if fault == "a vanished file":  # the records before its last cut were counted when it was cut
        assert strict._stream is not None
        records = max(piece.start for piece, _ in strict._stream._layout.pieces if piece.path == gone)
    tolerant = make(records + broken)
    if fault == "a vanished file":
        os.unlink(gone)
    with pytest.raises(ShardError) as caught:
        ids(strict)
    assert caught.value.path in paths
    found = ids(tolerant)
    assert max(Counter(found).values()) == 1 and good <= set(found)
    stats = tolerant.stats()
    assert (stats["bad_records"], stats["bad_shards"]) == (records, broken)
    assert str(caught.value).split(":")[0].split(",")[0] in caplog.text


def test_above_the_limit_the_error_names_the_first_ones(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, TEXTS[:50])
    lines = Path(path).read_text().splitlines()
    for i in (3, 20, 30):
        lines[i] = "no json"
    Path(path).write_text("\n".join(lines))
    reading = StreamConfig(max_bad_records=2, bucket_size=8)
    loader = bertstream.stream(path, FakeEncoder(), batch_size=4, reading=reading)
    with pytest.raises(ShardError, match="3 broken records") as caught:
        list(loader)
    assert "record 3" in str(caught.value) and "record 20" in str(caught.value) and caught.value.index == 30
    fraction = bertstream.stream(path, FakeEncoder(), batch_size=4, reading=StreamConfig(max_bad_records=0.01))
    assert sum(len(batch["text"]) for batch in fraction) == 47
    assert fraction.stats()["bad_records"] == 3


def test_an_epoch_without_any_good_record_is_an_error(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, TEXTS[:50])
    loader = bertstream.stream(path, FakeEncoder(), text="body", reading=StreamConfig(max_bad_records=0.5))
    with pytest.raises(ShardError, match="every record of the epoch was broken"):
        list(loader)


def test_counts_of_broken_records_go_on_with_the_state(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, TEXTS[:60])
    lines = Path(path).read_text().splitlines()
    for i in (3, 50):
        lines[i] = "no json"
    Path(path).write_text("\n".join(lines))
    reading = StreamConfig(max_bad_records=2, bucket_size=8)
    loader = bertstream.stream(path, FakeEncoder(), batch_size=4, reading=reading)
    iteration = iter(loader)
    for _ in range(5):
        next(iteration)
    state = loader.state_dict()
    assert state["bad"]["records"] == 1
    again = bertstream.stream(path, FakeEncoder(), batch_size=4, reading=reading)
    again.load_state_dict(state)
    batches = iter(again)
    next(batches)
    assert again.state_dict()["bad"]["records"] == 1
    list(batches)
    assert again._stream is not None and again.stats()["bad_records"] == 1
    assert list(again) and again.stats()["bad_records"] == 3  # an epoch counts anew
    loader.close()


def test_a_bare_stream_counts_too(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, TEXTS[:20])
    lines = Path(path).read_text().splitlines()
    Path(path).write_text("\n".join(["no json", *lines]))
    stream = TextStream(path, FakeEncoder(), reading=StreamConfig(max_bad_records=1))
    assert sum(map(len, stream)) == 20 and stream.progress.bad.records == 1


@pytest.mark.parametrize("value", [-1, 1.5])
def test_a_bad_limit_is_refused(value: float) -> None:
    with pytest.raises(bertstream.ConfigError, match=f"max_bad_records={value}"):
        StreamConfig(max_bad_records=value)


# The cookbook's recipe of a whole checkpoint, and a kill at one place.
TRAINING = """
import json, os, signal, sys
from pathlib import Path
import torch
from torch import nn
import bertstream
from bertstream.testing import FakeEncoder

folder, way, at, *shards = json.loads(sys.argv[1])
os.chdir(folder)
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

class DiesHalfway:
    def __init__(self, file):
        self.file = file
    def write(self, data):
        self.file.write(bytes(data)[: len(data) // 2])
        self.file.flush()
        die()

torch.manual_seed(0)
loader = bertstream.stream(shards, FakeEncoder(), batch_size=2, shuffle=True, layout="padded")
model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1))
optimizer = torch.optim.AdamW(model.parameters(), 0.1)
parts = {"model": model, "optimizer": optimizer, "loader": loader}
saved, done = Path("training.pt"), 0
if saved.exists():
    states = torch.load(saved, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(states[name])
    torch.set_rng_state(states["generator"])
    done = states["done"]
while loader.epoch < 2:
    for batch in loader:
        optimizer.zero_grad()
        loss = model(batch["text"] / 30_000).square().mean()
        loss.backward()
        if (way, at) == ("step", done):
            die()
        optimizer.step()
        done += 1
        print(json.dumps([done, batch["id"].tolist(), loss.item()]), flush=True)
        if done % 3 == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            with open("training.new", "wb") as file:
                target = DiesHalfway(file) if (way, at) == ("write", done) else file
                torch.save(states | {"generator": torch.get_rng_state(), "done": done}, target)
            if (way, at) == ("replace", done):
                die()
            os.replace("training.new", saved)
"""


def train(folder: Path, shards: list[str], way: str = "", at: int = 0) -> tuple[list[Any], int]:
    """The steps of a training in this folder, and its exit status."""
    given = json.dumps([str(folder), way, at, *shards])
    # Optimizers import half of torch when the first is made, which this server has done.
    printed, _, status = ENCODERS.start(TRAINING, given).finish()
    return [json.loads(line) for line in printed.splitlines()], status


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[Any]]:
    """Small shards, and the steps of a training on them that nothing stops."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shards = write_shards(folder / "shards", TEXTS[:16], shards=2)
    steps, status = train(folder, shards)
    assert status == 0 and [step[0] for step in steps] == list(range(1, 17))
    return shards, steps


@pytest.mark.parametrize(
    ("way", "at", "kept"), [("step", 4, 3), ("step", 8, 6), ("write", 3, 0), ("write", 9, 6), ("replace", 6, 3)]
)
def test_a_training_that_is_killed_continues_with_the_losses_of_the_undisturbed_one(
    undisturbed: tuple[list[str], list[Any]], tmp_path: Path, way: str, at: int, kept: int
) -> None:
    """In a step, in the middle of writing a checkpoint, and between writing it and giving it its name."""
    shards, whole = undisturbed
    assert train(tmp_path, shards, way, at) == (whole[:at], -signal.SIGKILL)
    assert train(tmp_path, shards) == (whole[kept:], 0)
