"""The benchmarks' corpus: each text once, the same file every time."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import corpus
import pytest


def small_data(folder: Path) -> Path:
    """A folder like that of the data, with a handful of texts."""
    (folder / "banking77").mkdir()
    (folder / "ud_english_ewt").mkdir()
    for name in ("train", "test"):
        rows = "text,category\nWhere is my card?,card\nWhere is my card?,card\nA " + name + " query,other\n"
        (folder / "banking77" / f"{name}.csv").write_text(rows, encoding="utf-8")
    for name in ("dev", "test"):
        (folder / "ud_english_ewt" / f"{name}.conllu").write_text("# text = A sentence.\n1\tA\n", encoding="utf-8")
    return folder


def test_it_holds_every_text_once_and_is_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data(tmp_path)
    lines = []
    for name in ("one.jsonl", "two.jsonl"):
        monkeypatch.setattr(sys, "argv", ["corpus.py", "--data", str(data), "--out", str(tmp_path / name)])
        assert corpus.main() == 0
        lines.append(json.loads(capsys.readouterr().out))
    content = (tmp_path / "one.jsonl").read_bytes()
    texts = [json.loads(line)["text"] for line in content.decode().splitlines()]
    assert lines[0] == lines[1] and lines[0]["sha256"] == hashlib.sha256(content).hexdigest()
    assert len(texts) == len(set(texts)) == lines[0]["texts"] and all(texts)
    assert {"Where is my card?", "A train query", "A test query", "A sentence."} < set(texts)
    assert len(texts) > 1900, "the paragraphs of Python's manual"
    assert lines[0]["words"] == sum(len(text.split()) for text in texts)
