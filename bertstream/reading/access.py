"""How shards may be opened, and the three kinds of shard names: paths, URLs and `pipe:` commands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError

BUFFER_BYTES = 1 << 16
"""Size of each open shard's buffer. A stream keeps one shard open per lane, and larger buffers were no faster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """How shards are opened.

    Attributes:
        allow_pipe: whether `pipe:` shards may run their shell commands.
        storage_options: options for fsspec, such as credentials; used for URLs only.
        shard_cache: a folder that keeps whole copies of remote shards, downloaded at the first read; None reads
            remotely. Its size is not bounded. A copy is named by its URL and never compared with the original again:
            delete it to download it again. Workers and ranks may share the folder.
        stall_warning_s: seconds a read of a URL or pipe may wait before a warning names it; None never warns.
    Raises:
        ConfigError: an argument has the wrong type or is out of range.
    """

    allow_pipe: bool = False
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold passwords
    shard_cache: str | os.PathLike[str] | None = None
    stall_warning_s: float | None = 30.0

    def __post_init__(self) -> None:
        if self.shard_cache is not None and not (
            isinstance(self.shard_cache, (str, os.PathLike)) and os.fspath(self.shard_cache)
        ):
            raise ConfigError(f"shard_cache={self.shard_cache!r}: write the path of a folder, or None")
        seconds = self.stall_warning_s
        if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
            raise ConfigError(f"stall_warning_s={seconds!r}: write a number of seconds above 0, or None")


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
