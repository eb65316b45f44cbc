"""The check for machines with a GPU, run on a CPU."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch
from benchmarks import common

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore:Dynamo does not know")  # the views that attention on a CPU uses
def test_the_whole_check_runs_on_a_cpu_with_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "run_tests", lambda select: {"passed": 0, "failed": [], "skipped": 9})
    monkeypatch.setattr(common, "matmul_rate", lambda dtype, device="cpu": 1.0)
    # Trace only: a C++ compiler is slow and may be missing.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert gpu_check.main(["--device", "cpu", "--tiny", "--texts", "16", "--results", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert found["ran"] and found["benchmarks"].keys() == gpu_check.BENCHMARKS.keys()
    assert found["failed_benchmarks"] == {} and found["machine"]["device"] == "cpu"
    verdicts = gpu_check.judge(found["benchmarks"], "NVIDIA H100 80GB HBM3")  # finds every figure
    assert len(verdicts) == len(gpu_check.TARGETS) and None not in [verdict["value"] for verdict in verdicts.values()]


def test_a_test_that_fails_fails_the_check_and_is_named(tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text("import pytest\ndef test_a(): assert 0\ndef test_b(): pass\ndef test_c(): pytest.skip('no')\n")
    found = gpu_check.run_tests([str(test), "-c", "/dev/null"])
    assert (found["passed"], found["skipped"]) == (1, 1) and found["failed"][0].endswith("test_a")
    assert "pytest itself" in gpu_check.run_tests(["--no-such-option", "-c", "/dev/null"])["failed"][0]


def test_a_benchmark_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(arguments: list[str]) -> dict[str, Any]:
        if arguments[0] == "wrap":
            raise MemoryError("the device is full")
        return {"benchmark": arguments[0], "machine": {}}

    monkeypatch.setattr(gpu_check.bench, "measure", measure)
    monkeypatch.setattr(common, "matmul_rate", lambda dtype, device="cpu": 1.0)
    monkeypatch.setattr(gpu_check, "run_tests", lambda select: {"passed": 9, "failed": [], "skipped": 0})
    assert gpu_check.main(["--device", "cpu", "--tiny", "--results", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert not found["ran"] and "the device is full" in found["failed_benchmarks"]["wrap"]
    assert found["benchmarks"].keys() == gpu_check.BENCHMARKS.keys() - {"wrap"}


def test_targets_are_judged_by_device() -> None:
    found = {
        "encode": {
            "tokens_per_s": {"bertstream_bfloat16": 1.1e6},
            "times": {"bertstream_bfloat16": {"sentence_transformers_bfloat16": 2.5}},
        }
    }
    held = [verdict["held"] for verdict in gpu_check.judge(found, "NVIDIA H100 80GB HBM3").values()]
    assert held == [False, True, False]  # the epoch benchmark failed
    assert len(gpu_check.judge(found, "NVIDIA L4")) == 2


def test_a_missing_device_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "sees no CUDA device" in capsys.readouterr().err


def test_the_corpus_has_the_asked_number_of_distinct_texts(tmp_path: Path) -> None:
    gpu_check.write_corpus(tmp_path / "c.jsonl", 20_000)
    texts = [json.loads(line)["text"] for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert len(texts) == len(set(texts)) == 20_000
