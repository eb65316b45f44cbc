"""Names of shards: patterns are expanded, and the ending names the format and compression."""

from __future__ import annotations

import glob
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from braceexpand import braceexpand

from ..errors import ConfigError, ShardError, shortened
from .access import DEFAULT_ACCESS, Access, check_installed, check_pipe, file_name, is_local, is_pipe, is_url
from .endings import ENDINGS, parse_format, split_compression, split_ending
from .faults import Version
from .remote import list_url

READ_ERRORS = (OSError, EOFError, zlib.error, tarfile.TarError)
"""What reading a local shard may raise if the shard is missing or broken."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of records of one shard.

    Attributes:
        path: the shard's path, URL or `pipe:` command.
        start: index of the first record.
        stop: index after the last record; None reads to the end of the shard.
        offset: byte at which record `start` begins. With 0 the shard is read from its beginning and the records before
            `start` are skipped; Parquet always has 0, and is read from the row group that holds `start`.
        share, shares: of these records, only every `shares`-th is this piece's: those whose index in the shard leaves
            the rest `share`.
        source: the number of its source in a mixture.
        lane: the only lane that may read it; None for any, or of a share, for any of its rank.
        version: of the local file when the data was laid out; reading another one at its places would lose or join
            records. None takes any.
    """

    path: str
    start: int = 0
    stop: int | None = None
    offset: int = 0
    share: int = 0
    shares: int = 1
    source: int = 0
    lane: int | None = None
    version: Version | None = field(default=None, compare=False, repr=False)

    def own(self, start: int, stop: int) -> range:
        """Those of the shard's records from `start` to `stop` that are the piece's."""
        start = max(start, self.start)
        start += (self.share - start) % self.shares
        return range(start, stop if self.stop is None else min(stop, self.stop), self.shares)


def expand_shards(
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], access: Access = DEFAULT_ACCESS
) -> list[str]:
    """List the shards of a pattern, or of a sequence of patterns.

    Braces expand as in a shell, in paths, URLs and `pipe:` commands; a `~` at the start of a path is the home folder.
    `*`, `**`, `?` and `[...]` in a local path and `*` in a URL match files, in sorted order; in a chain of fsspec, such
    as zip://*.jsonl::s3://bucket/*.zip, in each of its links. A pattern that is itself the name of a local file means
    that file. A shard named twice is read twice.

    Args:
        shards: such as "train-{000..146}.tar", "data/*.jsonl", "s3://bucket/a.csv.gz", or a sequence of them.
        access: how they are opened.
    Returns:
        Paths, URLs and `pipe:` commands, in the order of the patterns.
    Raises:
        ConfigError: there are no shards or no matches, braces are unbalanced, an ending is unknown, a folder is named,
            a `pipe:` shard is not allowed, or a format needs a package that is not installed.
        ShardError: a local shard does not exist, or a URL cannot be listed.
    """
    several = isinstance(shards, Iterable) and not isinstance(shards, (str, os.PathLike))
    names: Any = shards if several else [shards]
    patterns = list(map(_checked_name, names))
    if not patterns:
        raise ConfigError(f"there are no shards: got {shortened(shards)}")
    paths: list[str] = []
    for pattern in patterns:
        try:
            found = list(_expand(os.fspath(pattern), access))
            kinds = [shard_kind(path, access) for path in found]
        except ConfigError:
            if text := next(filter(_looks_like_text, patterns), None):
                raise ConfigError(
                    f"there is no shard {shortened(text)}; these look like texts: pass rows, [{{'text': ...}}], or "
                    "wrap them in a DataLoader, for bertstream.wrap"
                ) from None
            raise
        for path, kind in zip(found, kinds, strict=True):
            check_packages(path, kind)
        paths.extend(found)
    for path in paths:
        if is_pipe(path):
            check_pipe(path, access)
        elif is_local(path) and not os.path.exists(path):
            raise ShardError(f"{path}: there is no such shard", path=path)
    return paths


def _checked_name(name: Any) -> str | os.PathLike[str]:
    if isinstance(name, Mapping):  # of an iterator: it is refused at its first row, before the others are read
        raise ConfigError(
            f"shards holds rows, such as {shortened(name)}, but has no positions to share out: pass a list of them, "
            "list(...)"
        )
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise ConfigError(f"the name of a shard is a str or a path; got {shortened(name)}")
    return name


# --- endings ----------------------------------------------------------------------------------------------------------


class ShardKind(NamedTuple):
    """What the name of a shard says.

    Attributes:
        format: "tar", "jsonl", "ndjson", "json", "csv", "tsv", "txt" or "parquet"; "rows" for a dataset, no shard.
        compression: "gz", "zst", "bz2", "xz", or "" for none.
        stem: the file's name without its endings.
    """

    format: str
    compression: str
    stem: str


def shard_kind(path: str, access: Access = DEFAULT_ACCESS) -> ShardKind:
    """Read format, compression and stem from the name of a shard; `access.format` takes precedence.

    Raises:
        ConfigError: the ending is unknown.
    """
    name = path
    if is_pipe(path):
        name = path.split()[-1].strip("'\"()")
    elif is_url(path):  # a chain of fsspec, such as zip://a.txt::s3://b/c.zip, names the file in its first link
        name = next(link for link in path.split("::") if "://" in link)
        if name.startswith(("http://", "https://")):  # elsewhere ? and # are part of a name
            name = re.split("[?#]", name)[0]
    base = file_name(name)
    found = split_ending(base)
    if access.format is None:
        if found is None:
            way_out = "StreamConfig(format=) names the format of files with another"
            if base.lower().endswith((".arrow", ".feather")):
                way_out += (
                    "; Arrow's files are read as rows: pass datasets.load_from_disk(folder) of the folder that "
                    f"save_to_disk wrote, or pyarrow.feather.read_table({path!r})"
                )
            raise ConfigError(f"the ending of {path!r} is unknown; known are {ENDINGS}; {way_out}")
        stem, shard_format, compression = found
        return ShardKind(shard_format, compression, stem)
    _, shard_format, compression = parse_format(access.format)
    stem, of_name = (found[0], found[2]) if found is not None else split_compression(base)
    return ShardKind(shard_format, "" if shard_format == "parquet" else compression or of_name, stem)


def check_packages(path: str, kind: ShardKind) -> None:
    """Refuse a shard that this installation, or a pipe, cannot read.

    Raises:
        ConfigError: a package for its format or compression is not installed, or it is Parquet from a pipe.
    """
    if kind.compression == "zst":
        check_installed(path, "zstandard", "zstd")
    if kind.format == "parquet":
        check_installed(path, "pyarrow", "parquet")
        if is_pipe(path):
            raise ConfigError(f"{path!r}: Parquet is read from its end, which a pipe cannot do: write it to a file")


def read_errors(path: str, kind: ShardKind) -> tuple[type[Exception], ...]:
    """The exceptions of reading a shard that are no mistake in the program: faults of the data or of the machine."""
    # fsspec's file systems, pyarrow and datasets may raise anything.
    return (Exception,) if is_url(path) or kind.format in ("parquet", "rows") else READ_ERRORS


def _looks_like_text(name: object) -> bool:
    """Whether this is no name of a shard, but holds blanks."""
    if not isinstance(name, str) or len(name.split()) < 2:
        return False
    return is_local(name) and split_ending(name) is None and not glob.glob(name)


def _commonest_ending(folder: str) -> str:
    """That of most of the shards in a folder, with its dot; .tar if there are none."""
    found = [(name, split_ending(name)) for name in glob.glob("*", root_dir=folder)]
    endings = Counter(name[len(kind[0]) :] for name, kind in found if kind is not None)
    return endings.most_common(1)[0][0] if endings else ".tar"


def _way_into(folder: str) -> str:
    """What to pass in place of a folder."""
    if os.path.exists(os.path.join(folder, "dataset_dict.json")):
        return f"save_to_disk wrote several splits there, pass one of those of datasets.load_from_disk({folder!r})"
    if all(os.path.exists(os.path.join(folder, name)) for name in ("state.json", "dataset_info.json")):
        return f"save_to_disk wrote it, pass datasets.load_from_disk({folder!r})"
    return f"name its shards, as in {os.path.join(folder, f'*{_commonest_ending(folder)}')!r}"


def _expand(pattern: str, access: Access) -> Iterator[str]:
    if is_local(pattern):
        pattern = os.path.expanduser(pattern)
    if is_local(pattern) and os.path.exists(pattern):
        if os.path.isdir(pattern):
            raise ConfigError(f"{pattern!r} is a folder: {_way_into(pattern)}")
        yield pattern
        return
    try:
        paths = list(braceexpand(pattern, escape=False)) if "{" in pattern else [pattern]
    except ValueError as error:
        raise ConfigError(f"the braces of {pattern!r} are unbalanced") from error
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
