"""The pages' blocks run and print what the pages say, and their links lead somewhere."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from bertstream import cli

PAGES = ["README.md", "examples/README.md", "tools/README.md", "bertstream/README.md"]
# In an output, "..." is any text, and a run of blanks or line ends is like any other.
LOOSELY = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


# What this environment cannot have, because it needs another transformers: test_migration.py runs its blocks elsewhere.
ELSEWHERE = "flair"


def blocks_of(page: str) -> list[tuple[str, str, str]]:
    """(language, content, place) of each block that names a language; a place is "page:line" of its first line."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(block[1], block[2], f"{page}:{text.count(chr(10), 0, block.start(2)) + 1}") for block in found]


def run(language: str, block: str, place: str, names: dict[str, Any]) -> str:
    """Run a block of Python, or of commands of bertstream, and return what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if language == "python":
            page, line = place.split(":")
            exec(compile("\n" * (int(line) - 1) + block, page, "exec"), names)  # tracebacks show the page's line
        else:
            for command in block.splitlines():
                program, *arguments = shlex.split(command)
                assert program == "bertstream" and cli.main(arguments) == 0, f"{place}: {command}"
    return printed.getvalue()


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.slow
@pytest.mark.timeout(300)  # the cookbook is one long program
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_each_page_is_a_program_that_prints_what_it_says(
    page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, minilm_folder: str
) -> None:
    """Blocks run in one folder, those of Python in one namespace; a text block is what the block above prints."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    hub = tmp_path / "sentence-transformers"  # to be found by its name on the hub, without the hub
    hub.mkdir()
    (hub / "all-MiniLM-L6-v2").symlink_to(minilm_folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    printed = ""
    for language, block, place in blocks_of(page):
        if f"from {ELSEWHERE}" in block:
            continue
        if language == "text":
            same = doctest.OutputChecker().check_output(block, printed, LOOSELY)
            assert same, f"{place} says\n{block}but the block above printed\n{printed}"
        else:
            assert language in ("python", "sh"), place
            printed = run(language, block, place, names)


def test_the_front_page_fits_in_8_kib() -> None:
    assert (ROOT / "README.md").stat().st_size <= 8192


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)\"\s]+)", text) if "://" not in link]
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page} links to {link}"
