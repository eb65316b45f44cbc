"""The shape of the house: what may import what, what is public, and what every file has."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bertstream

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bertstream"

ROOMS = (
    ("errors", "paths"),
    ("system", "cursors", "columns", "labels"),
    ("tokens",),
    ("word_tags",),
    ("embeddings", "repeats"),
    ("reading",),
    ("encoding",),
    ("caching",),
    ("pipeline",),
    ("loader", "module"),
    ("jobs",),
    ("arguments",),
    ("cli", "integrations", "testing"),
    ("__init__", "__main__"),
)
"""Each file imports from its own room and from rows above it."""
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
MOST_LINES = 450

PUBLIC_NAMES = [
    "BertEmbedding",
    "BertstreamError",
    "CacheError",
    "ConfigError",
    "EmbeddingCache",
    "EmbeddingLoader",
    "Embeddings",
    "Encoder",
    "EncoderError",
    "LoaderClosedError",
    "Mixture",
    "ScalarMix",
    "ShardError",
    "StateError",
    "StreamConfig",
    "TextStream",
    "TokenBatch",
    "TokenCollate",
    "UnfreezeSchedule",
    "embed",
    "stream",
    "tokenize",
    "warm",
    "wrap",
]

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text("utf-8")) for file in FILES}


def named(file: Path) -> str:
    """The file's dotted name below the package."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def room(file: Path) -> str:
    """A folder, or a file at the top."""
    return named(file).split(".")[0]


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a file imports, at whatever depth; names of a `from` included."""
    inside = ("bertstream", *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else ()
            base = (*base, *(node.module or "").split(".")) if node.module else base
            yield from ((node.lineno, ".".join((*base, alias.name))) for alias in node.names)


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Public functions and classes, and the public methods of those classes.

    Not a protocol's methods and not the signatures of an overloaded function, which are no code.
    """
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if "overload" in map(ast.unparse, node.decorator_list):
                continue
            yield node.name, node
            if isinstance(node, ast.ClassDef) and "Protocol" not in map(ast.unparse, node.bases):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        yield f"{node.name}.{method.name}", method


def own_imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name below the package) of each file of the package that a file imports."""
    files = {named(other) for other in FILES}
    for line, name in imports(file):
        top, _, rest = name.partition(".")
        if top == "bertstream":
            # `from .a import b`: b may be a file or a name in one.
            known = [rest, rest.rpartition(".")[0], f"{rest}.__init__", f"{rest.rpartition('.')[0]}.__init__"]
            yield line, next((target for target in known if target in files), "__init__")


def mentions(file: Path) -> set[str]:
    """All names and attributes in a file."""
    names = {node.id for node in ast.walk(TREES[file]) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(TREES[file]) if isinstance(node, ast.Attribute)}


def test_the_table_lists_all_rooms() -> None:
    assert {room(file) for file in FILES} == FLOOR.keys()


def test_imports_go_to_lower_floors_only() -> None:
    wrong = [
        f"{named(file)}:{line} imports {target}"
        for file in FILES
        for line, target in own_imports(file)
        if room(file) != target.split(".")[0] and FLOOR[target.split(".")[0]] >= FLOOR[room(file)]
    ]
    assert wrong == []


def test_no_file_imports_itself_through_others() -> None:
    graph = {named(file): {target for _, target in own_imports(file)} for file in FILES}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert graph.keys() == set()


def test_no_file_is_too_long_to_be_one() -> None:
    lines = {named(file): len(file.read_text("utf-8").splitlines()) for file in FILES}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_what_is_imported_is_declared() -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg", "utf-8")
    declared = setup["options"]["install_requires"] + "".join(setup["options.extras_require"].values())
    names = {re.split(r"[^\w-]", line, maxsplit=1)[0].replace("-", "_") for line in declared.split()}
    imported = {name.partition(".")[0] for file in FILES for _, name in imports(file)}
    assert imported - sys.stdlib_module_names - {"bertstream"} <= names


def test_importing_bertstream_is_light() -> None:
    heavy = {"transformers", "webdataset", "pyarrow", "aiohttp", "triton"}
    code = f"import sys, bertstream; print(*sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_the_public_names_are_these() -> None:
    assert list(bertstream.__all__) == PUBLIC_NAMES
    assert [name for name in PUBLIC_NAMES if not hasattr(bertstream, name)] == []
    assert [name for name in dir(bertstream) if not name.startswith("__")] == sorted(PUBLIC_NAMES)


def test_only_the_command_line_prints() -> None:
    assert [named(file) for file in FILES if "print" in mentions(file)] == ["cli"]


def test_public_things_have_docstrings() -> None:
    without = [named(file) for file in FILES if not ast.get_docstring(TREES[file])]
    without += [
        f"{named(file)}.{name}"
        for file in FILES
        for name, node in public_definitions(TREES[file])
        if not ast.get_docstring(node)
    ]
    assert without == []


def test_threads_are_started_in_few_places() -> None:
    """The process's own end before they return, or only watch."""
    starters = {"Thread", "Timer", "ThreadPoolExecutor", "start_new_thread"}
    found = [named(file) for file in FILES if mentions(file) & starters]
    assert found == ["reading.stall_watch", "system.process", "system.threads"]


def test_only_distributed_reads_the_ranks_environment() -> None:
    variables = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    strings = {
        named(file): {node.value for node in ast.walk(TREES[file]) if isinstance(node, ast.Constant)} for file in FILES
    }
    assert [name for name, values in strings.items() if values & variables] == ["system.distributed"]


WORST_WORDS = r"\bbehind\b|\banew\b|\bstands?\b|\bhanded out\b|\bpassed over\b|\bis through\b|\bwhereof\b|\bthereof\b"


def test_code_and_pages_are_written_in_plain_words() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("examples/*.py"), *ROOT.glob("tools/**/*.py")]
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in [*FILES, *pages]
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        if re.search(WORST_WORDS, line, re.IGNORECASE)
    ]
    assert found == []
