"""What the README shows, runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_every_block_of_the_readme_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Python blocks are one program, whose folder the commands of the shell blocks share, in the README's order."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
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
                assert program == "bertstream"
                subprocess.run([sys.executable, "-m", program, *arguments], check=True, stdin=subprocess.DEVNULL)
    assert names["x"] is not None and names["y"] is not None
    assert names["cache"].stats()["misses"] == 0  # the last one, which the command line had filled
    assert names["cache"].stats()["disk_hits"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "examples", "state.json", "vectors"]


def test_every_file_that_the_readme_links_to_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [target for target in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)\"#]+)", text) if "://" not in target]
    assert links
    assert [target for target in links if not (ROOT / target).exists()] == []
