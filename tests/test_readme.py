"""The README's blocks run, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from bertstream import cli


@pytest.mark.slow
def test_every_block_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Python blocks are one program; it and the commands of the shell blocks run in one folder, in order."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in blocks} == {"python", "sh"}
    names: dict[str, Any] = {"__name__": "readme"}
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, "README.md", "exec"), names)
        else:
            for line in block.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "bertstream" and cli.main(arguments) == 0
    assert names["x"] is not None and names["y"] is not None
    assert names["cache"].stats()["misses"] == 0  # of the last cache, which the command line filled
    assert names["cache"].stats()["disk_hits"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "examples", "training.pt", "vectors"]


def test_every_file_that_the_readme_links_to_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [target for target in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)\"#]+)", text) if "://" not in target]
    assert links
    assert [target for target in links if not (ROOT / target).exists()] == []
