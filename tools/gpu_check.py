"""Check this version on a machine with a GPU: the CUDA tests, then the benchmarks with a BERT-base of random weights.

    python tools/gpu_check.py                            writes tools/results/<device>.json; about ten minutes
    python tools/gpu_check.py --data ../shared/data      with those texts instead of Python's manual
    python tools/gpu_check.py --device cpu --tiny        the same on a CPU with a tiny model, to try the tool

The exit status is 1 if a test or a benchmark failed. The results also hold this device's targets, and which were met.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from xml.etree import ElementTree

import bench
import torch
from benchmarks.common import machine
from benchmarks.models import write_bert

ROOT = Path(__file__).resolve().parent.parent

# The benchmarks that depend on the device, with their own options; they share one corpus.
BENCHMARKS: dict[str, list[str]] = {
    "encode": ["encode", "--dtypes", "float32", "bfloat16", "--without", "pipeline", "flair"],
    "encode_compiled": ["encode", "--dtypes", "bfloat16", "--without", "pipeline", "flair", "sentence", "--compiled"],
    "wrap": ["wrap", "--dtypes", "bfloat16"],
    "epoch": ["epoch", "--dtypes", "bfloat16"],
    "outputs": ["outputs", "--dtypes", "bfloat16"],
    "cache": ["cache", "--dtypes", "bfloat16"],
}

# Targets of BERT-base in bfloat16: name, figure in the results, test of it, and a part of the devices' names.
TARGETS: list[tuple[str, Callable[[dict[str, Any]], float], Callable[[float], bool], str]] = [
    (
        "tokens/s of the encoder, at least 1.2 M (aim: 2 M)",
        lambda found: found["encode"]["tokens_per_s"]["bertstream_bfloat16"],
        lambda value: value >= 1.2e6,
        "H100",
    ),
    (
        "times sentence-transformers in bfloat16, at least 2",
        lambda found: found["encode"]["times"]["bertstream_bfloat16"]["sentence_transformers_bfloat16"],
        lambda value: value >= 2,
        "",
    ),
    (
        "an epoch of a launch-bound model over max(T_encode, T_train), at most 1.10",
        lambda found: found["epoch"]["steps"]["launch_bound"]["over_max"],
        lambda value: value <= 1.10,
        "",
    ),
]


def run_tests(select: list[str]) -> dict[str, Any]:
    """Run pytest in a process of its own; return counts and the names of failed tests."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *select]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not report.exists():
            return {"passed": 0, "failed": ["pytest itself: " + (done.stdout + done.stderr)[-2000:]], "skipped": 0}
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
        "skipped": len(skipped),
    }


def run_benchmarks(texts: list[str], settings: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Run all benchmarks, even if some fail; return lines and tracebacks by name."""
    found, failed = {}, {}
    for name, own in BENCHMARKS.items():
        started = time.perf_counter()
        print(f"{name} ...", file=sys.stderr)
        try:
            found[name] = bench.measure([*own, *texts, *settings])
            found[name]["took_s"] = round(time.perf_counter() - started, 1)
            found[name].pop("machine")  # the results hold it once
        except (Exception, SystemExit):
            failed[name] = traceback.format_exc()
    return found, failed


def judge(found: dict[str, Any], device: str) -> dict[str, dict[str, Any]]:
    """Compare the figures with this device's targets; a benchmark that failed misses its targets."""
    verdicts = {}
    for name, figure, wanted, devices in TARGETS:
        if devices not in device:
            continue
        try:
            value = figure(found)
        except KeyError:
            verdicts[name] = {"value": None, "held": False}
        else:
            verdicts[name] = {"value": value, "held": wanted(value)}
    return verdicts


def write_corpus(path: Path, count: int) -> None:
    """Write sentences of Python's manual as jsonl, then runs of two, of three and so on, each text once."""
    paragraphs = [part.strip() for topic in sorted(topics) for part in topics[topic].split("\n\n")]
    sentences = [part for paragraph in paragraphs for part in re.split(r"(?<=\.)\s+", paragraph) if len(part) > 20]
    texts: dict[str, None] = {}
    for together in range(1, 12):
        runs = (" ".join(sentences[i : i + together]) for i in range(len(sentences) - together))
        texts |= dict.fromkeys(text for text in runs if len(text) < 1200)
    chosen = list(texts)
    random.Random(0).shuffle(chosen)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen[:count]), encoding="utf-8")


def check(arguments: argparse.Namespace) -> tuple[Path, bool]:
    """Run everything; return the path of the results, and whether everything ran."""
    tests = ["tests/test_cuda.py"] if arguments.tiny else ["tests"]
    print("tests ...", file=sys.stderr)
    tested = run_tests([*tests, "-m", "cuda"])
    with tempfile.TemporaryDirectory() as folder:
        model = write_bert(Path(folder) / "bert", tiny=arguments.tiny, tokenizer=arguments.tokenizer)
        corpus = Path(folder) / "corpus.jsonl"
        write_corpus(corpus, arguments.texts)
        texts = ["--data", str(arguments.data)] if arguments.data is not None else ["--corpus", str(corpus)]
        settings = ["--model", model, "--device", arguments.device, "--texts", str(arguments.texts)]
        settings += ["--rounds", str(arguments.rounds)]
        found, failed = run_benchmarks(texts, settings)
    on = machine(arguments.device)
    ran = not tested["failed"] and not failed and (on["device"] == "cpu" or tested["passed"] > 0)
    results = {
        "ran": ran,
        "model": "tiny, random weights" if arguments.tiny else "BERT-base, random weights",
        "machine": on | {"cuda": torch.version.cuda},
        "tests": tested,
        "targets": {} if arguments.tiny else judge(found, str(on["device"])),
        "benchmarks": found,
        "failed_benchmarks": failed,
    }
    name = re.sub(r"\W+", "-", str(on["device"])).strip("-").lower()
    path = arguments.results / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path, ran


def main(given: list[str] | None = None) -> int:
    """Run everything and print the path of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with banking77/ and ud_english_ewt/")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few texts")
    parser.add_argument("--tokenizer", help="a folder with one of at most 30,522 entries, if the demo extra is missing")
    parser.add_argument("--texts", type=int, help="20,000 by default")
    parser.add_argument("--rounds", type=int, help="5 by default")
    parser.add_argument("--results", type=Path, default=ROOT / "tools" / "results")
    arguments = parser.parse_args(given)
    arguments.texts = arguments.texts or (40 if arguments.tiny else 20_000)
    arguments.rounds = arguments.rounds or (1 if arguments.tiny else 5)
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: torch {torch.__version__} sees no CUDA device here")
    path, ran = check(arguments)
    print(path)
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
