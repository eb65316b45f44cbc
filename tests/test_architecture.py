"""The shape of the house: what may import what, what is public, and what every file has."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bertstream

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bertstream"

# Each module imports from rows above its own only.
LAYERS = (
    ("errors",),
    ("cuda", "distributed", "parquet", "parts", "runtime", "tar", "watchdog"),
    ("types", "files"),
    ("shards", "tokenizer", "bucket", "pooling", "layers", "attention", "prefetch", "fingerprint", "codec"),
    ("stages", "coalesce", "places", "plots", "loading", "lanes", "memory", "disk", "groups", "forward"),
    ("split",),
    ("dataset", "collate", "encoder", "cache"),
    ("iteration",),
    ("encode_stage", "ranks"),
    ("loader", "precompute", "module"),
    ("export", "inspection", "doctor"),
    ("cli", "integrations", "testing"),
    ("__init__", "__main__"),
)
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}

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
    "warm",
    "wrap",
]

FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])


def room(file: Path) -> str:
    """The name a file goes by in the table: a subpackage is one room."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a file imports, at whatever depth; names of a `from` included."""
    inside = ("bertstream", *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else ()
            base = (*base, *(node.module or "").split(".")) if node.module else base
            yield from ((node.lineno, ".".join((*base, alias.name))) for alias in node.names)


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Public functions and classes, and the public methods of those classes; a protocol's methods are no code."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef) and "Protocol" not in map(ast.unparse, node.bases):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        yield f"{node.name}.{method.name}", method


def test_the_table_lists_the_files_that_are_there() -> None:
    assert {room(file) for file in FILES} == LAYER_OF.keys()


@every_file
def test_imports_go_to_lower_layers_only(file: Path) -> None:
    own = room(file)
    for line, name in imports(file):
        top, _, rest = name.partition(".")
        if top != "bertstream":
            continue
        target = rest.split(".")[0]
        if target == own:
            continue  # inside one subpackage
        assert target in LAYER_OF and not target.startswith("__"), f"{file.name}:{line} imports the package root"
        assert LAYER_OF[target] < LAYER_OF[own], f"{file.name}:{line}: {own} must not import {target}"


def test_what_is_imported_is_declared() -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg", "utf-8")
    declared = setup["options"]["install_requires"] + "".join(setup["options.extras_require"].values())
    names = {re.split(r"[^\w-]", line, maxsplit=1)[0].replace("-", "_") for line in declared.split()}
    imported = {name.partition(".")[0] for file in FILES for _, name in imports(file)}
    assert imported - sys.stdlib_module_names - {"bertstream"} <= names


def test_importing_bertstream_is_light() -> None:
    heavy = {"transformers", "webdataset", "pyarrow", "aiohttp"}
    code = f"import sys, bertstream; print(*sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_the_public_names_are_these() -> None:
    assert list(bertstream.__all__) == PUBLIC_NAMES
    assert [name for name in PUBLIC_NAMES if not hasattr(bertstream, name)] == []
    assert [name for name in dir(bertstream) if not name.startswith("__")] == sorted(PUBLIC_NAMES)


@every_file
def test_nothing_prints_but_the_command_line(file: Path) -> None:
    tree = ast.parse(file.read_text("utf-8"))
    lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "print"]
    assert room(file) == "cli" or lines == []


@every_file
def test_public_things_have_docstrings(file: Path) -> None:
    tree = ast.parse(file.read_text("utf-8"))
    assert ast.get_docstring(tree), "the module has none"
    assert [name for name, node in public_definitions(tree) if not ast.get_docstring(node)] == []


@every_file
def test_only_prefetch_and_the_watchdog_start_threads(file: Path) -> None:
    """And runtime, which ends its own before it returns."""
    tree = ast.parse(file.read_text("utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert room(file) in ("prefetch", "watchdog", "runtime") or not names & {
        "Thread",
        "Timer",
        "ThreadPoolExecutor",
        "start_new_thread",
    }


@every_file
def test_only_distributed_reads_the_ranks_environment(file: Path) -> None:
    tree = ast.parse(file.read_text("utf-8"))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert room(file) == "distributed" or not strings & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
