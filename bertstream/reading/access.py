"""How shards may be opened, and what kind of name a shard has: a path, a URL or a command."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError

BUFFER_BYTES = 1 << 16
"""A stream holds many shards open at once, one a lane; larger buffers were no faster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """How shards are opened.

    Attributes:
        allow_pipe: whether `pipe:` shards may run their shell commands.
        storage_options: for fsspec, such as credentials; used for URLs only.
        shard_cache: a folder into which a remote shard is downloaded whole when it is first read; None reads remotely.
            It is not bounded, and a copy is never compared with its origin again: delete it to have it renewed. Its
            name is made from the URL alone. Workers and ranks may share the folder.
        stall_warning_s: seconds after which a read of a URL or pipe that is still waiting is named in a warning; None
            is never.
    Raises:
        ConfigError: an argument of a wrong type or out of range.
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
    """Whether a shard is what a command writes."""
    return path.startswith("pipe:")


def is_url(path: str) -> bool:
    """Whether a shard is opened through fsspec."""
    return "://" in path and not is_pipe(path)


def is_local(path: str) -> bool:
    """Whether a shard is named by a path."""
    return not is_url(path) and not is_pipe(path)


def check_pipe(path: str, access: Access) -> None:
    """Refuse to run a command that nobody allowed.

    Raises:
        ConfigError: with the command, and how to allow it.
    """
    if not access.allow_pipe:
        raise ConfigError(f"{path!r} would run a shell command: pass allow_pipe=True if you trust it")


def check_installed(path: str, package: str, extra: str) -> None:
    """Refuse a shard whose format needs a package that is missing.

    Raises:
        ConfigError: with the shard, and how to install the package.
    """
    try:
        __import__(package)
    except ImportError as error:
        message = f"{path!r} needs the package {package}: pip install 'bertstream[{extra}]'"
        raise ConfigError(message) from error
