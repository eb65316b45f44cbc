"""The check for machines with a GPU, run on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from benchmarks.common import read_corpus
from benchmarks.models import make_tokenizer, write_bert
from fork_server import ENCODERS, ROOT
from gpu import prepare, sentence_transformers, tests
from gpu.part import Settings
from gpu_check import Part, Target

from bertstream import Encoder


def settings(**other: Any) -> Settings:
    given = {"folder": "", "device": "cpu", "tiny": True, "data": None, "model": None, "workers": 1}
    return Settings(**given | other)


# `gpu.part` as a program that is forked; its settings come as an argument instead of on stdin. The part `tests` starts
# pytest, which would warn that modules are imported already whose assertions it wants to rewrite.
FORKED = f"""
import io, os, sys
os.environ["PYTEST_ADDOPTS"] = "--assert=plain"
sys.path.insert(0, "{ROOT}/tools")
sys.stdin = io.StringIO(sys.argv.pop())
from gpu import part
part.main()
"""


@pytest.fixture
def forked_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are forks of a process that has imported transformers: each would take seconds for that."""

    class Forked:
        def __init__(self, name: str, log: Path) -> None:
            self.name = name

        def run(self, settings: dict[str, Any], limit_s: float, show: gpu_check.Show) -> dict[str, Any]:
            out, errors, status = ENCODERS.start(FORKED, self.name, json.dumps(settings)).finish()
            rows = {row.pop("row"): row for row in map(json.loads, out.splitlines())}
            return {"ended": errors if status else "done", "took_s": 0.0, "rows": rows}

        def kill(self) -> None:
            pass

    monkeypatch.setattr(gpu_check, "Part", Forked)


@pytest.mark.slow
@pytest.mark.timeout(300)  # seven programs one after the other
@pytest.mark.usefixtures("forked_parts")
def test_the_whole_check_runs_on_a_cpu_with_tiny_models_and_finds_every_figure(tmp_path: Path) -> None:
    assert gpu_check.main(["--device", "cpu", "--tiny", "--results", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert found["ran"] and found["machine"]["device"] == "cpu"
    assert found["parts"].keys() == gpu_check.LIMITS_S.keys()
    assert {part["ended"] for part in found["parts"].values()} == {"done"}
    verdicts = gpu_check.judge(found["parts"], "NVIDIA H100 80GB HBM3")
    assert len(verdicts) == len(gpu_check.TARGETS) and None not in [verdict["value"] for verdict in verdicts.values()]
    assert found["parts"]["forward"]["rows"]["minilm error"]["error"] < 0.03


@pytest.mark.slow
def test_a_part_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert gpu_check.main(["--device", "cpu", "--tiny", "--parts", "prepare", "--results", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "cpu.json").read_text())["parts"]["prepare"]
    assert found["ended"] == "done" and {"machine", "texts", "bert_base", "minilm"} <= found["rows"].keys()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_parts")
def test_a_device_that_is_missing_ends_the_check_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--parts", "launch", "--results", str(tmp_path)]) == 1  # the tests hide the devices
    assert "--device cuda: torch" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def run(code: str, tmp_path: Path, limit_s: float = 30) -> tuple[dict[str, Any], list[tuple[str, str, Any]]]:
    """What a part of this code reports, and the rows that were shown."""
    shown: list[tuple[str, str, Any]] = []
    part = Part("it", tmp_path / "log", [sys.executable, "-c", code])
    return part.run({"tiny": True}, limit_s, lambda *row: shown.append(row)), shown


SAY = "import json, sys, time; print(json.dumps({'row': 'a', 'given': json.loads(sys.stdin.readline())}), flush=True); "


def test_a_part_reports_its_rows_as_they_come(tmp_path: Path) -> None:
    found, shown = run(SAY + "print(json.dumps({'row': 'b', 'ms': 1.5}))", tmp_path)
    assert found["ended"] == "done" and found["rows"] == {"a": {"given": {"tiny": True}}, "b": {"ms": 1.5}}
    assert shown == [("it", "a", {"given": {"tiny": True}}), ("it", "b", {"ms": 1.5})]


def test_a_part_that_hangs_is_cut_off_with_its_children_and_keeps_its_rows(tmp_path: Path) -> None:
    sleeper = (
        "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    )
    found, _ = run(SAY + sleeper, tmp_path, limit_s=1.5)
    assert found["ended"] == "cut off after 2 s" and found["rows"].keys() == {"a"} and found["took_s"] < 20


@pytest.mark.parametrize(
    ("end", "why"), [("sys.exit('no such device')", "no such device"), ("import os; os.abort()", "exit status -6")]
)
def test_a_part_that_fails_says_why_and_keeps_its_rows(tmp_path: Path, end: str, why: str) -> None:
    found, _ = run(SAY + end, tmp_path)
    assert found["ended"].startswith("failed") and why in found["ended"] and found["rows"].keys() == {"a"}


def test_a_part_that_ends_before_it_is_told_anything_failed(tmp_path: Path) -> None:
    found, _ = run("raise SystemExit('import failed')", tmp_path)
    assert "import failed" in found["ended"] and found["rows"] == {}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Code by part, to run instead of it."""
    codes = {"prepare": SAY + "print(json.dumps({'row': 'machine', 'device': 'Some GPU'}))"}
    codes |= dict.fromkeys(gpu_check.LIMITS_S.keys() - {"prepare"}, SAY)

    class Replaced(Part):
        def __init__(self, name: str, log: Path) -> None:
            super().__init__(name, log, [sys.executable, "-c", codes[name]])

    monkeypatch.setattr(gpu_check, "Part", Replaced)
    return codes


def test_a_part_that_fails_does_not_stop_the_others(
    parts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts["forward"] = SAY + "raise MemoryError('the device is full')"
    parts["epoch"] = SAY + "print(json.dumps({'row': 'launch_bound', 'over_max': 1.04}))"
    assert gpu_check.main(["--results", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "some-gpu.json").read_text())
    assert not found["ran"] and "the device is full" in found["parts"]["forward"]["ended"]
    others = {name: part["ended"] for name, part in found["parts"].items() if name != "forward"}
    assert others == dict.fromkeys(gpu_check.LIMITS_S.keys() - {"forward"}, "done")
    printed = capsys.readouterr().out
    assert "met: epoch, launch_bound: over_max at most 1.05: 1.04" in printed
    assert "MISSED: stream, bert_base: over_lesser at least 0.85: not measured" in printed


def test_when_the_time_is_up_the_other_parts_are_cut_off(parts: dict[str, str], tmp_path: Path) -> None:
    parts["tests"] = SAY + "time.sleep(60)"
    assert gpu_check.main(["--results", str(tmp_path), "--limit-s", "2.5", "--parts", "tests", "launch"]) == 1
    found = json.loads((tmp_path / "some-gpu.json").read_text())["parts"]
    assert found["prepare"]["ended"] == "done"
    assert found["tests"]["ended"].startswith("cut off") and found["tests"]["rows"].keys() == {"a"}
    assert found["launch"]["ended"] == "cut off after 0 s"


def test_the_table_names_figures_where_they_change(capsys: pytest.CaptureFixture[str]) -> None:
    table = gpu_check.Table()
    table.show("forward", "a", {"tokens_per_s": 2_400_000, "gpu_ms": 1.23456, "way": "packed"})
    table.show("forward", "b", {"tokens_per_s": 1_234_567.8, "gpu_ms": 0.5, "way": "packed"})
    table.show("tests", "c", {"why": "assert 0", "text": "long"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[::3]] == [["tokens_per_s", "gpu_ms", "way"], ["why"]]
    assert lines[1].split()[1:] == ["forward", "a", "2,400,000", "1.23", "packed"]
    assert lines[2].split()[1:] == ["forward", "b", "1,234,568", "0.5", "packed"]
    assert lines[0].index("gpu_ms") + 6 == lines[1].index("1.23") + 4 and "long" not in lines[4]


def test_the_limits_are_five_minutes_together() -> None:
    assert sum(gpu_check.LIMITS_S.values()) <= 300


def test_targets_are_judged_by_device() -> None:
    rows = {"bert_base 4k": {"tokens_per_s": 1_700_000}, "minilm 32k": {"tokens_per_s": 12_500_000}}
    parts: dict[str, Any] = {"forward": {"rows": rows}, "launch": {"rows": {}}}
    met = {name: verdict["met"] for name, verdict in gpu_check.judge(parts, "NVIDIA H100 80GB HBM3").items()}
    assert list(met.values()) == [False, False, False, True]  # 32k of BERT-base is missing, and so is launch
    assert len(gpu_check.judge(parts, "NVIDIA L4")) == 1
    assert Target("a", "b", "c", most=2.5).met(2.5) and not Target("a", "b", "c", most=2.5).met(2.6)


def test_the_tests_that_fail_are_named_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = tmp_path / "test_it.py"
    test.write_text("import pytest\ndef test_a(): assert 0\ndef test_b(): pass\ndef test_c(): pytest.skip('no')\n")
    rows: dict[str, Any] = {}
    found = tests.Rows(lambda row, **figures: rows.update({row: figures}))
    assert pytest.main(["-q", "-p", "no:cacheprovider", "-c", "/dev/null", str(test)], [found]) == 1
    found.emit_counts()
    assert rows.pop("counts") == {"passed": 1, "failed": 1, "skipped": 1}
    ((name, row),) = rows.items()
    assert name.endswith("test_a") and "assert 0" in row["text"]


def test_the_tests_run_without_pytest_timeout_and_xdist(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "-n" in tests.options(settings(tiny=False, workers=9))
    monkeypatch.setattr(tests.importlib.util, "find_spec", lambda name: None)
    found = tests.options(settings(tiny=False))
    assert "-n" not in found and "addopts=" in found


def test_a_machine_without_sentence_transformers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", None)
    rows: list[Any] = []
    sentence_transformers.run(settings(), lambda row, **figures: rows.append((row, figures)))
    assert rows == [("skipped", {"why": "sentence-transformers is not installed"})]


def test_the_manual_gives_enough_distinct_texts() -> None:
    assert len(set(prepare.manual())) >= prepare.TEXTS


def test_shards_have_the_asked_size_and_no_text_twice() -> None:
    texts = ["a bank", "the river", "banks"]
    found = prepare.sharded(texts, 100)
    assert found[:3] == texts and len(found) == len(set(found)) and sum(map(len, found)) >= 100
    assert prepare.sharded(texts, 1) == texts


def test_a_corpus_is_jsonl_csv_or_lines(tmp_path: Path) -> None:
    files = {"a.jsonl": '{"text": "one, two"}\n', "b.csv": '3,"one, two",three\n', "c.txt": "one, two\nthree\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert [read_corpus(tmp_path / name) for name in files] == [["one, two"], ["one, two three"], ["one, two", "three"]]


def test_without_the_demo_extra_a_tokenizer_is_made_of_the_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.models.demo_folder", lambda: None)
    folder = write_bert(tmp_path / "bert", "tiny", texts=["The bank of the river.", "A river bank, and a bank."] * 3)
    encoder = Encoder.from_pretrained(folder, dtype="float32", device="cpu")
    words = encoder.tokenizer(["the river", ("a bank", "THE RIVER")])
    one = make_tokenizer(["the river bank"] * 3)("the river")["input_ids"]
    assert len(words[0].input_ids) == len(one) == 4 and encoder.tokenizer.max_length == 512
    assert len(encoder(["the river", "a bank"]).values) == 8
