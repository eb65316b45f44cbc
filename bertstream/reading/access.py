"""How shards are opened and read, and the three kinds of shard names: paths, URLs and `pipe:` commands."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ..errors import ConfigError, check_at_least, check_choice, check_flag
from .endings import parse_format

Quoting: TypeAlias = Literal["auto", "standard", "none"]

BUFFER_BYTES = 1 << 16
"""Size of each open shard's buffer. A stream keeps one shard open per lane, and larger buffers were no faster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """How shards are opened and read.

    Attributes:
        allow_pipe: whether `pipe:` shards may run their shell commands.
        storage_options: options for fsspec, such as credentials; used for URLs only.
        shard_cache: a folder that keeps whole copies of remote shards, downloaded at the first read; None reads
            remotely. Its size is not bounded. A copy is named by its URL and never compared with the original again:
            delete it to download it again. Workers and ranks may share the folder.
        stall_warning_s: seconds a read of a URL or pipe may wait before a warning names it; None never warns.
        format: of all shards, whatever their names: an ending such as "jsonl" or "txt.gz"; None is what each name says.
            Without a compression it is that of the name, or of the content.
        delimiter: between the fields of csv and tsv; None is "," for csv and a tab for tsv.
        quoting: whether quotes enclose fields of csv and tsv. "standard": as in RFC 4180. "none": a quote is a
            character like others. "auto": "standard" where the delimiter is no tab, else what the header and first
            rows show.
        header: whether the first row of csv and tsv names the columns; or their names, if the files have no such row.
            The columns of False are called "0", "1" and so on.
        encoding: of txt, csv and tsv. jsonl, and text in tars, is UTF-8.
        max_record_bytes: the longest line, row of csv, or record of a tar (the members that are read); a longer one is
            a broken record. Without a limit a quote that is never closed, or a file without newlines, would be read
            into memory whole. 64 MiB is a thousand times the text that the longest encoders take.
    Raises:
        ConfigError: an argument has the wrong type or is out of range.
    """

    allow_pipe: bool = False
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold passwords
    shard_cache: str | os.PathLike[str] | None = None
    stall_warning_s: float | None = 30.0
    format: str | None = None
    delimiter: str | None = None
    quoting: Quoting = "auto"
    header: bool | Sequence[str] = True
    encoding: str = "utf-8"
    max_record_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if self.shard_cache is not None and not (
            isinstance(self.shard_cache, (str, os.PathLike)) and os.fspath(self.shard_cache)
        ):
            raise ConfigError(f"shard_cache={self.shard_cache!r}: write the path of a folder, or None")
        if self.shard_cache is not None:
            object.__setattr__(self, "shard_cache", os.path.expanduser(self.shard_cache))
        seconds = self.stall_warning_s
        if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
            raise ConfigError(f"stall_warning_s={seconds!r}: write a number of seconds above 0, or None")
        if self.format is not None:
            parse_format(self.format)
        if self.delimiter is not None and not (
            isinstance(self.delimiter, str)
            and len(self.delimiter) == 1
            and self.delimiter.isascii()
            and self.delimiter not in '"\r\n'
        ):
            raise ConfigError(f"delimiter={self.delimiter!r}: write one ASCII character, such as ';', or None")
        check_flag("allow_pipe", self.allow_pipe)
        check_choice("quoting", self.quoting, Quoting)
        object.__setattr__(self, "header", _checked_header(self.header))
        object.__setattr__(self, "encoding", _checked_encoding(self.encoding))
        check_at_least("max_record_bytes", self.max_record_bytes, 1)


def _checked_header(header: bool | Sequence[str]) -> bool | tuple[str, ...]:
    if isinstance(header, bool):
        return header
    names = () if isinstance(header, str) or not isinstance(header, Sequence) else tuple(header)
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ConfigError(f"header={header!r}: write True, False, or the names of the columns, all different")
    return names


def _checked_encoding(encoding: str) -> str:
    """The codec's own name."""
    try:
        name = codecs.lookup(encoding).name
        plain = _ASCII.encode(name) == _ASCII.encode()
    except (LookupError, TypeError, UnicodeError) as error:
        raise ConfigError(f"encoding={encoding!r}: write the name of a text encoding, such as 'cp1252'") from error
    if name == "utf-8-sig":  # a byte order mark is removed in any case
        return "utf-8"
    if not plain:
        raise ConfigError(
            f"encoding={encoding!r} does not write ASCII as ASCII, so its lines are not found: convert the files "
            f"first, as in iconv -f {encoding} -t UTF-8"
        )
    return name


_ASCII = "".join(map(chr, range(128)))
DEFAULT_ACCESS = Access()


def is_pipe(path: str) -> bool:
    """Whether a shard is the output of a command."""
    return path.startswith("pipe:")


def is_url(path: str) -> bool:
    """Whether a shard is opened through fsspec."""
    return "://" in path and not is_pipe(path)


def is_local(path: str) -> bool:
    """Whether a shard is named by a local path."""
    return not is_url(path) and not is_pipe(path)


def file_name(path: str) -> str:
    """The last part of a path or URL, after a slash of either kind."""
    return re.split(r"[/\\]", path)[-1]


def check_pipe(path: str, access: Access) -> None:
    """Refuse to run a command unless commands are allowed.

    Raises:
        ConfigError: with the command, and how to allow it.
    """
    if not access.allow_pipe:
        raise ConfigError(f"{path!r} would run a shell command: pass allow_pipe=True if you trust it")


def check_installed(path: str, package: str, extra: str) -> None:
    """Refuse a shard that needs a package which is not installed.

    Args:
        path: the shard.
        package: the package's import name.
        extra: the extra of bertstream that installs it.
    Raises:
        ConfigError: with the shard, and how to install the package.
    """
    try:
        __import__(package)
    except ImportError as error:
        message = f"{path!r} needs the package {package}: pip install 'bertstream[{extra}]'"
        raise ConfigError(message) from error
