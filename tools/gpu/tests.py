"""The tests that are marked `cuda`, in a few processes if pytest-xdist is installed."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from .part import Emit, Settings

PROCESSES = 4
"""Each imports torch and makes a CUDA context, so more would not be faster."""


def run(settings: Settings, emit: Emit) -> None:
    """A row of counts, again as they grow, and one for each test that fails."""
    os.environ["BERTSTREAM_TEST_MODEL"] = settings.model_folder("minilm")
    rows = Rows(emit)
    files = ["tests/test_cuda.py"] if settings.tiny else files_with_cuda_tests()
    code = pytest.main([*options(settings), "-m", "cuda", *files], [rows])
    rows.emit_counts()
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(f"pytest ended with {code!r}")


def files_with_cuda_tests() -> list[str]:
    """The others may import what this machine lacks."""
    return [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "cuda" in path.read_text("utf-8")]


def options(settings: Settings) -> list[str]:
    """What pytest is told apart from the selection; plugins that the tests can do without may be missing."""
    found = ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]  # pytest-benchmark warns beside xdist
    if importlib.util.find_spec("pytest_timeout") is None:  # then setup.cfg's `timeout` is an unknown option
        found += ["-o", "addopts=", "-W", "ignore::pytest.PytestConfigWarning"]
    if importlib.util.find_spec("xdist") is not None and not settings.tiny:
        found += ["-n", str(min(PROCESSES, settings.workers))]
    return found


class Rows:
    """A pytest plugin that emits the outcomes of tests."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._counts = Counter(passed=0, failed=0, skipped=0)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called for each phase of a test, also with xdist."""
        if report.when != "call" and report.passed:
            return
        self._counts[report.outcome] += 1
        if report.failed:
            why = report.longreprtext.strip().splitlines()
            self._emit(report.nodeid, outcome=report.outcome, why=why[-1] if why else "", text=report.longreprtext)
        if self._counts.total() % 10 == 0:
            self.emit_counts()

    def emit_counts(self) -> None:
        """The counts so far."""
        self._emit("counts", **self._counts)
