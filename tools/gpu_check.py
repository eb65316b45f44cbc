"""Check this version on a machine with a GPU in five minutes: the CUDA tests, then speed; prints rows as they come.

    python tools/gpu_check.py                            writes tools/results/<device>.json
    python tools/gpu_check.py --model minilm             with a folder's MiniLM and tokenizer, not random weights
    python tools/gpu_check.py --data texts.csv           with those texts instead of Python's manual
    python tools/gpu_check.py --parts launch forward     only these
    python tools/gpu_check.py --device cpu --tiny        the same on a CPU with tiny models, to try the tool

Each part is a file of tools/gpu and runs in a process of its own. One that crashes or takes longer than its limit ends
alone, and what it found until then is kept. The exit status is 1 if a part failed or was cut off. The results also hold
this device's targets, and which were met.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

TOOLS = Path(__file__).resolve().parent

LIMITS_S = {
    "prepare": 30,
    "tests": 70,
    "launch": 15,
    "forward": 30,
    "stream": 45,
    "epoch": 60,
    "sentence_transformers": 50,
}
"""Seconds of each part at most, in the order in which they run; together five minutes."""

Row = dict[str, Any]
Show = Callable[[str, str, Row], None]


class Target(NamedTuple):
    """A figure that a part's row should reach.

    Attributes:
        part: the part.
        row: its row.
        figure: the row's figure.
        least: the value that it should at least have, or None.
        most: the value that it should at most have, or None.
        devices: parts of the names of the devices it is meant for; "" is in all.
    """

    part: str
    row: str
    figure: str
    least: float | None = None
    most: float | None = None
    devices: tuple[str, ...] = ("",)

    def __str__(self) -> str:
        bound = f"at least {self.least:,}" if self.least is not None else f"at most {self.most:,}"
        return f"{self.part}, {self.row}: {self.figure} {bound}"

    def met(self, value: float | None) -> bool:
        """Whether a value reaches it; None is a figure that was not measured."""
        if value is None:
            return False
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


HOPPER = ("H100", "H200")

TARGETS = [
    Target("launch", "4k tokens", "cpu_ms", most=2.5),
    Target("forward", "bert_base 4k", "tokens_per_s", least=1_800_000, devices=HOPPER),
    Target("forward", "bert_base 32k", "tokens_per_s", least=2_400_000, devices=HOPPER),
    Target("forward", "minilm 32k", "tokens_per_s", least=12_000_000, devices=HOPPER),
    Target("stream", "bert_base", "over_lesser", least=0.85),
    Target("epoch", "launch_bound", "over_max", most=1.05),
]


class Part:
    """A part's process. It is started early, because importing takes seconds, and waits for `run`.

    Args:
        name: of a file of tools/gpu.
        log: file for what it and its libraries write.
        command: what to run instead.
    """

    def __init__(self, name: str, log: Path, command: Sequence[str] | None = None) -> None:
        self.name = name
        self._log = log
        self._ended = False
        paths = [str(TOOLS), str(TOOLS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command or [sys.executable, "-m", "gpu.part", name],
                cwd=TOOLS.parent,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,  # so that its own processes are killed with it
            )

    def run(self, settings: dict[str, Any], limit_s: float, show: Show) -> dict[str, Any]:
        """Run the part to its end or its limit.

        Args:
            settings: of `gpu.part.Settings`.
            limit_s: seconds.
            show: called with the part's name, a row's name and the row's figures, as each row comes.
        Returns:
            "ended" ("done", or why not), "took_s", and "rows" by name.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        rows: dict[str, Row] = {}
        cut_off = threading.Event()

        def cut() -> None:
            cut_off.set()
            self._kill_group()

        started = time.monotonic()
        timer = threading.Timer(limit_s, cut)
        timer.start()
        try:
            with suppress(BrokenPipeError):  # it failed on import, and its log says why
                self._process.stdin.write(json.dumps(settings) + "\n")
                self._process.stdin.close()
            for line in self._process.stdout:
                if not line.endswith("\n"):
                    break  # killed while it wrote
                row = json.loads(line)
                name = row.pop("row")
                rows[name] = row
                show(self.name, name, row)
            status = self._process.wait()
        finally:
            timer.cancel()
            timer.join()
            self.kill()
        if cut_off.is_set():
            ended = f"cut off after {limit_s:.0f} s"
        elif status:
            log = self._log.read_text(encoding="utf-8", errors="replace").strip()
            ended = f"failed with exit status {status}: {log[-3000:]}"
        else:
            ended = "done"
        return {"ended": ended, "took_s": round(time.monotonic() - started, 1), "rows": rows}

    def kill(self) -> None:
        """End the process and all that it started."""
        if self._ended:
            return
        self._kill_group()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()
        self._ended = True

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def judge(parts: dict[str, Any], device: str) -> dict[str, dict[str, Any]]:
    """Compare the figures with this device's targets; a figure that is missing misses its target."""
    verdicts = {}
    for target in TARGETS:
        if target.part in parts and any(name in device for name in target.devices):
            value = parts[target.part]["rows"].get(target.row, {}).get(target.figure)
            verdicts[str(target)] = {"value": value, "met": target.met(value)}
    return verdicts


def check(arguments: argparse.Namespace, show: Show) -> tuple[Path | None, dict[str, Any]]:
    """Run the parts; return the path of the results, which are written after each part, and the results."""
    results: dict[str, Any] = {"ran": False, "tiny": arguments.tiny, "machine": {}, "targets": {}, "parts": {}}
    path = None
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "folder": folder,
            "device": arguments.device,
            "tiny": arguments.tiny,
            "data": None if arguments.data is None else str(arguments.data.resolve()),
            "model": None if arguments.model is None else str(arguments.model.resolve()),
            "workers": max(1, len(os.sched_getaffinity(0)) - 2),
        }
        names = ["prepare", *(name for name in LIMITS_S if name in arguments.parts and name != "prepare")]
        until = time.monotonic() + arguments.limit_s
        waiting = [Part(name, Path(folder) / f"{name}.log") for name in names]
        try:
            for part in waiting:
                limit_s = max(0.0, until - time.monotonic())
                if not arguments.tiny:  # which is for any machine, however slow
                    limit_s = min(limit_s, LIMITS_S[part.name])
                found = part.run(settings, limit_s, show)
                results["parts"][part.name] = found
                show(part.name, found["ended"], {"took_s": found["took_s"]})
                results["machine"] |= found["rows"].get("machine", {})
                if part.name == "prepare" and found["ended"] != "done":
                    break
                device = str(results["machine"]["device"])
                results["targets"] = {} if arguments.tiny else judge(results["parts"], device)
                results["ran"] = [found["ended"] for found in results["parts"].values()] == ["done"] * len(names)
                path = arguments.results / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        finally:
            for part in waiting:
                part.kill()
    return path, results


class Table:
    """Prints rows: seconds since the start, the part, the row, its figures; and their names where they change."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._head = ""

    def show(self, part: str, name: str, row: Row) -> None:
        """Print a row; a long text is in the results only."""
        figures = {figure: shown(value) for figure, value in row.items() if figure != "text"}
        widths = [max(len(figure), len(value)) for figure, value in figures.items()]
        head = "  ".join(figure.rjust(width) for figure, width in zip(figures, widths, strict=True))
        values = "  ".join(value.rjust(width) for value, width in zip(figures.values(), widths, strict=True))
        if head != self._head:
            print(" " * 47 + head)
            self._head = head
        print(f"{time.monotonic() - self._started:6.1f}  {part:21}  {name:14}  {values}", flush=True)


def shown(value: Any) -> str:
    """A figure with three digits, or all that are left of the point."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main(given: list[str] | None = None) -> int:
    """Run the check and print its rows, verdicts and the path of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder with MiniLM (weights of any dtype) and its tokenizer")
    parser.add_argument("--data", type=Path, help="texts: jsonl, csv or txt, or a folder with the benchmarks' data")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS_S), default=list(LIMITS_S))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few texts")
    parser.add_argument("--limit-s", type=float, default=300, help="seconds of all parts together")
    parser.add_argument("--results", type=Path, default=TOOLS / "results")
    arguments = parser.parse_args(given)
    path, results = check(arguments, Table().show)
    for target, verdict in results["targets"].items():
        value = "not measured" if verdict["value"] is None else shown(verdict["value"])
        print(f"{'met' if verdict['met'] else 'MISSED'}: {target}: {value}")
    print("no results" if path is None else path)
    return 0 if results["ran"] else 1


if __name__ == "__main__":
    sys.exit(main())
