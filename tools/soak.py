"""Checks that run too long for the tests; each prints one JSON line, and exits with 1 if its claim does not hold.

python tools/soak.py kill        kill a training program at random moments; it resumes from its checkpoints
python tools/soak.py memory      memory after a quarter and after all of two million records
python tools/soak.py worker      10,000 batches through the encode thread: memory, and how long close() takes
python tools/soak.py restore     time to the first batch: of a fresh epoch, and of one restored in the middle
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

import bertstream
from bertstream.testing import FakeEncoder, write_shards

ROOT = Path(__file__).resolve().parent.parent

# A training program that saves a checkpoint atomically after every third batch and resumes from it when restarted. It
# logs the batches it trained on, and the checkpoint it started from.
TRAINING = """
import json, os, sys, time
import bertstream
from bertstream.testing import FakeEncoder

folder, workers, shards = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
reading = bertstream.StreamConfig(lanes=5, bucket_size=30)
loader = bertstream.stream(shards, FakeEncoder(), batch_size=4, shuffle=True, num_workers=workers, reading=reading)
step, path = 0, os.path.join(folder, "checkpoint.json")
if os.path.exists(path):
    saved = json.load(open(path))
    step = saved["step"]
    loader.load_state_dict(saved["loader"])
with open(os.path.join(folder, "log"), "a", buffering=1) as log:
    print(json.dumps({"from": step}), file=log)
    for batch in loader:
        print(json.dumps({"step": step, "ids": batch["id"].tolist()}), file=log)
        time.sleep(0.002)
        step += 1
        if step % 3 == 0:
            with open(path + ".new", "w") as file:
                json.dump({"step": step, "loader": loader.state_dict()}, file)
            os.replace(path + ".new", path)
    print(json.dumps({"done": step}), file=log)
"""


def new_python(program: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a program in a Python of its own, as the first process of its session."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment, start_new_session=True)


def train_and_kill(
    folder: Path,
    shards: list[str],
    *,
    kills: int,
    workers: int,
    seed: int = 0,
    start: Callable[..., Any] = new_python,
    limit_s: float = 300,
) -> dict[str, Any]:
    """Kill the training program at random moments, let it finish, and compare its batches with an undisturbed epoch.

    Args:
        folder: for the log and the checkpoint.
        shards: to train on.
        kills: how often.
        workers: of the training program's loader.
        seed: of the moments.
        start: starts a program as the first process of its session, and returns an object with `pid` and `wait()`.
        limit_s: seconds for a run's first batch, and for the whole of the last run; what takes longer is killed.

    Returns:
        The number of batches of an epoch; the checkpoints that runs resumed from; whether the batches that counted (up
        to each checkpoint used, then those after the last start) are the undisturbed epoch in order; the exit status of
        the last run; and the processes and shared memory files that remain after 15 seconds.
    """
    reading = bertstream.StreamConfig(lanes=5, bucket_size=30)
    with closing(bertstream.stream(shards, FakeEncoder(), batch_size=4, shuffle=True, reading=reading)) as loader:
        undisturbed = [batch["id"].tolist() for batch in loader]
    rng = random.Random(seed)
    log = folder / "log"
    shared = shared_memory()
    sessions = set()
    for number in range(kills + 1):
        trained = log_lines(log, "ids")
        process = start(TRAINING, str(folder), str(workers), *shards)
        sessions.add(process.pid)
        if number < kills:
            deadline = time.monotonic() + limit_s
            while log_lines(log, "ids") == trained and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.08))
            os.kill(process.pid, signal.SIGKILL)
        alarm = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
        alarm.start()
        status = process.wait()
        alarm.cancel()
    trained: list[Any] = []
    starts: list[int] = []
    for line in map(json.loads, log.read_text().splitlines()):
        if "from" in line:
            starts.append(line["from"])
            del trained[line["from"] :]  # batches after the checkpoint are trained on again
        elif "ids" in line:
            trained.append(line["ids"])
    deadline = time.monotonic() + 15
    while (left := processes_of(sessions)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return {
        "kills": kills,
        "workers": workers,
        "batches": len(undisturbed),
        "resumed_from": starts[1:],
        "exact": trained == undisturbed and len(starts) == kills + 1,
        "status": status,
        "processes_left": len(left),
        "shared_memory_left": len({name for name in shared_memory() - shared if "torch" in name}),
    }


def log_lines(log: Path, kind: str) -> int:
    """Number of lines of a kind in the training program's log."""
    return log.read_text().count(f'"{kind}"') if log.exists() else 0


def processes_of(sessions: set[int]) -> list[int]:
    """Processes of these sessions that run: the training program and its workers."""
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc").exists() else ():
        try:
            if entry.name.isdigit():
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) in sessions and state != "Z":
                    found.append(int(entry.name))
        except OSError:
            pass
    return found


def shared_memory() -> set[str]:
    """Names of shared memory files."""
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def kill(folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Twenty kills, without and with workers."""
    texts = [f"{'word ' * (i * 7 % 13)}{i}" for i in range(2000)]
    found = []
    for workers in (0, 2):
        place = folder / str(workers)
        shards = write_shards(place / "shards", texts, shards=7)
        found.append(train_and_kill(place, shards, kills=arguments.kills, workers=workers, seed=workers))
    left = ("status", "processes_left", "shared_memory_left")
    clean = all(run["exact"] and not any(run[name] for name in left) for run in found)
    return {"runs": found}, clean


def write_corpus(path: Path, records: int) -> str:
    """Write a jsonl of records of 3 to 12 random words."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, records, 10_000):
            counts = rng.integers(3, 13, 10_000)
            words = iter(rng.integers(0, 1 << 60, counts.sum()).tolist())
            for i, count in enumerate(counts.tolist()):
                text = " ".join(f"{next(words):x}" for _ in range(count))
                file.write(f'{{"text": "{text}", "id": {first + i}}}\n')
    return str(path)


def own_memory(pid: int) -> int:
    """Bytes that a process shares with no other (its unique set size)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def memory(folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Two million records through two workers: each process's own memory after a quarter and after all."""
    shard = write_corpus(folder / "corpus.jsonl", arguments.records)
    seen, quarter = 0, None
    with closing(bertstream.stream(shard, FakeEncoder(), batch_size=64, shuffle=True, num_workers=2)) as loader:
        started = time.perf_counter()
        for batch in loader:
            seen += len(batch["text"])
            if quarter is None and seen >= arguments.records // 4:
                quarter = family_memory()
            if seen >= arguments.records * 0.99:
                whole = family_memory()  # before the epoch ends, because its workers end with it
                break
    assert quarter is not None
    growth = [round(after / before, 3) for before, after in zip(quarter, whole, strict=True)]
    found = {
        "records": arguments.records,
        "records_per_s": round(seen / (time.perf_counter() - started)),
        "own_mib_after_a_quarter": [round(size / 2**20) for size in quarter],
        "own_mib_at_the_end": [round(size / 2**20) for size in whole],
        "growth": growth,
    }
    return found, max(growth) <= 1.05


def family_memory() -> list[int]:
    """Own memory of this process and of each of its children."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [own_memory(pid) for pid in (os.getpid(), *sorted(map(int, children)))]


def worker(folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """10,000 batches of 8 short texts through the encode thread: mean memory of each quarter.

    Freed memory is returned every two seconds, so memory goes up and down; least and most are printed as well.
    """
    encoder = bertstream.Encoder.from_pretrained(arguments.model, layers=2, device="cpu")
    resident = []
    with closing(bertstream.wrap(ShortTexts(arguments.batches), encoder, prefetch=2)) as loader:
        started = time.perf_counter()
        for number, _ in enumerate(loader, 1):
            if number % max(1, arguments.batches // 2000) == 0:
                resident.append(own_memory(os.getpid()))
        seconds = time.perf_counter() - started
        tokens = int(loader.stats()["tokens"])
    quarters = [resident[i * len(resident) // 4 : (i + 1) * len(resident) // 4] for i in range(4)]
    means = [statistics.mean(quarter) for quarter in quarters]
    growth = max(means[1:]) / means[0]
    closings = [close_somewhere(encoder, seed) for seed in range(arguments.closings)]
    beyond = max(close_s - forward_s for close_s, forward_s in closings)
    found = {
        "batches": arguments.batches,
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds),
        "own_mib_by_quarter": [round(mean / 2**20) for mean in means],
        "growth": round(growth, 3),
        "least_mib_by_quarter": [round(min(quarter) / 2**20) for quarter in quarters],
        "most_mib_by_quarter": [round(max(quarter) / 2**20) for quarter in quarters],
        "closings": len(closings),
        "slowest_close_s": round(max(close_s for close_s, _ in closings), 3),
        "beyond_the_forward_in_progress_s": round(max(0.0, beyond), 3),
    }
    return found, growth <= 1.05 and beyond <= 1.0


class ShortTexts:
    """Batches of 8 texts of 1 to 12 words, with few repeated texts."""

    def __init__(self, batches: int, seed: int = 0) -> None:
        self.batches = batches
        self.seed = seed

    def __iter__(self) -> Iterator[list[str]]:
        rng = random.Random(self.seed)
        words = "the bank of a river lends money when it rains and every boat that leaves has paid".split()  # noqa: SIM905
        for _ in range(self.batches):
            yield [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(8)]


def close_somewhere(encoder: bertstream.Encoder, seed: int) -> tuple[float, float]:
    """Seconds of a `close()` at a random moment, and of the encoder's last call, which it waited for."""
    rng = random.Random(seed)
    calls = [0.0]

    class Timed:
        """The encoder, with the seconds of each call noted."""

        tokenizer, device, max_forward_tokens = encoder.tokenizer, encoder.device, encoder.max_forward_tokens

        def encode(self, batch: bertstream.TokenBatch) -> bertstream.Embeddings:
            started = time.perf_counter()
            found = encoder.encode(batch)
            calls.append(time.perf_counter() - started)
            return found

    loader = bertstream.wrap(ShortTexts(2000, seed), Timed(), prefetch=2)
    batches = iter(loader)
    for _ in range(rng.randint(0, 300)):
        next(batches)
    time.sleep(rng.uniform(0, 0.2))
    started = time.perf_counter()
    loader.close()
    return time.perf_counter() - started, calls[-1]


def bytes_read() -> int:
    """Bytes this process has read so far, including reads from the page cache."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def restore(folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Time to the first batch of a fresh epoch, and of one restored in the middle of a million records."""
    shard = write_corpus(folder / "corpus.jsonl", arguments.records)
    size = os.path.getsize(shard)

    def make() -> bertstream.EmbeddingLoader:
        return bertstream.stream(shard, FakeEncoder(), batch_size=64, shuffle=True)

    def first_batch(state: dict[str, Any] | None) -> tuple[float, int]:
        with closing(make()) as loader:
            if state is not None:
                loader.load_state_dict(state)
            started, read, batches = time.perf_counter(), bytes_read(), iter(loader)
            next(batches)
            seconds = time.perf_counter() - started
            for _ in range(lanes - 1):  # by then each lane has read its bucket
                next(batches)
            return seconds, bytes_read() - read

    with closing(make()) as loader:
        lanes, open_pieces = loader.dataset.num_lanes, loader.dataset.open_shards
        batches = iter(loader)
        for _ in range(arguments.records // 64 // 2):
            next(batches)
        state = json.loads(json.dumps(loader.state_dict()))
    fresh, again = zip(*((first_batch(None), first_batch(state)) for _ in range(3)), strict=True)
    fresh_s, again_s = (statistics.median(seconds for seconds, _ in runs) for runs in (fresh, again))
    bucket_bytes = bertstream.StreamConfig().bucket_size * size / arguments.records
    found = {
        "records": arguments.records,
        "lanes": lanes,
        "state_bytes": len(json.dumps(state)),
        "fresh_s": round(fresh_s, 3),
        "restored_s": round(again_s, 3),
        "restored_bytes": again[0][1],
        "a_bucket_a_lane_bytes": round(lanes * bucket_bytes),
        "corpus_bytes": size,
    }
    # Each open piece of a lane has a read buffer of 64 KiB.
    return found, again_s <= 3 * fresh_s + 1 and again[0][1] <= lanes * (bucket_bytes + open_pieces * 2**16)


def main() -> int:
    """Run one check and print its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="soak", required=True)
    commands.add_parser("kill", help=kill.__doc__).add_argument("--kills", type=int, default=20)
    commands.add_parser("memory", help=memory.__doc__).add_argument("--records", type=int, default=2_000_000)
    command = commands.add_parser("worker", help=worker.__doc__)
    command.add_argument("--batches", type=int, default=10_000)
    command.add_argument("--closings", type=int, default=40)
    command.add_argument("--model", default="all-MiniLM-L6-v2")
    commands.add_parser("restore", help=restore.__doc__).add_argument("--records", type=int, default=1_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {"kill": kill, "memory": memory, "worker": worker, "restore": restore}
        found, held = runs[arguments.soak](Path(folder), arguments)
    print(json.dumps({"soak": arguments.soak, "held": held} | found))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
