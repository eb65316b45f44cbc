"""Names of shards: patterns are expanded, and the ending says the format."""

from __future__ import annotations

import glob
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from braceexpand import braceexpand

from ..errors import ConfigError, ShardError
from .access import DEFAULT_ACCESS, Access, check_installed, check_pipe, is_local, is_pipe, is_url
from .files import size_of
from .remote import list_url

_ENDING = re.compile(
    r"\.(?:(?P<kind>tar|jsonl|ndjson|csv|tsv|txt)(?:\.(?P<packing>gz|zst))?|(?P<whole>tgz|parquet))$", re.IGNORECASE
)
_ENDINGS = ".tar, .jsonl, .ndjson, .csv, .tsv, .txt, each also with .gz or .zst, .tgz and .parquet"
READ_ERRORS = (OSError, EOFError, zlib.error, tarfile.TarError)


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of records of one shard.

    Attributes:
        path: the shard's path or URL.
        start: index of its first record.
        stop: index after its last record; None for all records to the end of the shard.
        offset: byte at which record `start` begins. With 0 the shard is read from its beginning, up to `start`; Parquet
            always has 0, and is read from the row group that holds `start`.
    """

    path: str
    start: int = 0
    stop: int | None = None
    offset: int = 0


def expand_shards(
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], access: Access = DEFAULT_ACCESS
) -> list[str]:
    """List the shards that a pattern, or a sequence of patterns, stands for.

    Braces are expanded as in a shell, in paths, URLs and `pipe:` commands. `*`, `**`, `?` and `[...]` in a local path
    and `*` in a URL match files, in sorted order. A local file whose name is the pattern itself is taken as it is. A
    shard that is named twice is read twice.

    Args:
        shards: such as "train-{000..146}.tar", "data/*.jsonl", "s3://bucket/a.csv.gz", or several of them.
        access: how they are opened.
    Returns:
        Paths, URLs and `pipe:` commands in the order that they were named in.
    Raises:
        ConfigError: nothing is named or matched, braces do not match, an ending is not known, a folder is named, a
            `pipe:` shard is not allowed, or a format needs a package that is not installed.
        ShardError: a local shard does not exist, or a URL cannot be listed.
    """
    patterns = [shards] if isinstance(shards, (str, os.PathLike)) or not isinstance(shards, Iterable) else list(shards)
    if not patterns:
        raise ConfigError(f"no shard is named: got {shards!r}")
    paths: list[str] = []
    for pattern in patterns:
        if not isinstance(pattern, (str, os.PathLike)) or not (name := os.fspath(pattern)):
            raise ConfigError(f"a shard is named by a str or a path; got {pattern!r}")
        paths.extend(_expand(name, access))
    for path in paths:
        check_packages(path, shard_kind(path))
        if is_pipe(path):
            check_pipe(path, access)
        elif is_local(path) and not os.path.exists(path):
            raise ShardError(f"{path}: there is no such shard", path=path)
    return paths


def shard_size(path: str, access: Access = DEFAULT_ACCESS) -> int:
    """Bytes of a shard as it is stored: compressed ones are counted compressed.

    Args:
        path: a path, URL or `pipe:` command.
        access: how it is opened.
    Returns:
        0 where it cannot be known: for a pipe, or a server that does not say.
    Raises:
        ShardError: the shard is missing or cannot be reached.
    """
    return size_of(path, access)


def is_rows(source: Any) -> bool:
    """Whether this is a dataset of rows (mappings) rather than names of shards.

    Such are Hugging Face's `Dataset` and `IterableDataset`, and lists and map-style datasets of dicts.
    """
    if isinstance(source, (str, os.PathLike)):
        return False
    if hasattr(source, "num_shards") and hasattr(source, "shard"):
        return True
    return hasattr(source, "__getitem__") and len(source) > 0 and isinstance(source[0], Mapping)


# --- paths ------------------------------------------------------------------------------------------------------------


class ShardKind(NamedTuple):
    """What a shard's name says: the format, how it is packed ("gz", "zst", ""), and the file's name without endings."""

    name: str
    packing: str
    stem: str


def shard_kind(path: str) -> ShardKind:
    """What a shard's name says about it; ConfigError where the ending is unknown."""
    name = path
    if is_pipe(path):
        name = path.split()[-1].strip("'\"()")
    elif is_url(path):  # a chain of fsspec, such as zip://a.txt::s3://b/c.zip, names the file in its first link
        name = re.split("[?#]", next(link for link in path.split("::") if "://" in link))[0]
    base = re.split(r"[/\\]", name)[-1]
    match = _ENDING.search(base)
    if match is None:
        raise ConfigError(f"the ending of {path!r} is not known; known are {_ENDINGS}")
    name, packing = (match["kind"] or match["whole"]).lower(), (match["packing"] or "").lower()
    return ShardKind(*(("tar", "gz") if name == "tgz" else (name, packing)), base[: match.start()])


def check_packages(path: str, kind: ShardKind) -> None:
    """ConfigError where the format needs a package that is not installed, or a file where a pipe is named."""
    if kind.packing == "zst":
        check_installed(path, "zstandard", "zstd")
    if kind.name == "parquet":
        check_installed(path, "pyarrow", "parquet")
        if is_pipe(path):
            raise ConfigError(f"{path!r}: Parquet is read from its end, which a pipe cannot do: write it to a file")


def read_errors(path: str, kind: ShardKind) -> tuple[type[Exception], ...]:
    """What reading a shard of this kind may raise that is the data's or the network's fault."""
    # What a file system behind fsspec raises is its own choice, and so is what pyarrow and datasets do.
    return (Exception,) if is_url(path) or kind.name in ("parquet", "rows") else READ_ERRORS


def _expand(pattern: str, access: Access) -> Iterator[str]:
    if is_local(pattern) and os.path.exists(pattern):
        if os.path.isdir(pattern):
            raise ConfigError(f"{pattern!r} is a folder: name its shards, such as {os.path.join(pattern, '*.tar')!r}")
        yield pattern
        return
    try:
        paths = list(braceexpand(pattern, escape=False)) if "{" in pattern else [pattern]
    except ValueError as error:
        raise ConfigError(f"the braces of {pattern!r} do not match") from error
    for path in paths:
        if is_url(path) and "*" in path:
            matches = list_url(path, access)
        elif is_local(path) and glob.has_magic(path) and not os.path.exists(path):
            matches = glob.glob(path, recursive=True)
        else:
            matches = [path]
        if not matches:
            raise ConfigError(f"no file matches {path!r}")
        yield from sorted(matches)
