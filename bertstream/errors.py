"""What can go wrong, as one tree.

    BertstreamError(Exception)                what the world did
      ShardError     .path .index .field      a shard or record is missing, unreadable or broken
      EncoderError   .records                 the model could not be loaded, or failed on these texts
      CacheError     .path                    damaged, full, or made by another encoder
      StateError     .key                     a checkpoint of another version, seed or shard list
    ConfigError(BertstreamError, ValueError)  a bad argument: raised before any file or thread is opened
    LoaderClosedError(BertstreamError, RuntimeError)

Every error takes one message and, by keyword, the fields above. They pickle whole, so an error raised in a worker
process arrives with its fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args


class BertstreamError(Exception):
    """Base of every error that bertstream raises on purpose."""


class ShardError(BertstreamError):
    """A shard or one of its records is missing, unreadable or broken.

    Attributes:
        path: the shard as it was named, or None.
        index: the record's position in the shard, counted from 0 with broken ones, or None.
        field: the field of the record that is wrong, or None.
        gives_up_shard: whether the rest of the shard was passed over with it.
    """

    gives_up_shard = False

    def __init__(
        self, message: str, *, path: str | None = None, index: int | None = None, field: str | None = None
    ) -> None:
        super().__init__(message)
        self.path = path
        self.index = index
        self.field = field


class EncoderError(BertstreamError):
    """The model could not be loaded, or failed on a batch.

    Attributes:
        records: positions in the batch of the texts at fault; empty where the fault is not theirs.
    """

    def __init__(self, message: str, *, records: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.records = tuple(records)


class CacheError(BertstreamError):
    """The embedding cache is damaged, full, or made by another encoder.

    Attributes:
        path: the cache's folder, or None.
    """

    def __init__(self, message: str, *, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


class StateError(BertstreamError):
    """A checkpoint does not fit this loader.

    Attributes:
        key: the entry of the state that does not fit, or None.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class ConfigError(BertstreamError, ValueError):
    """A bad argument; the message shows the value seen and what to write instead."""


class LoaderClosedError(BertstreamError, RuntimeError):
    """The loader was closed and cannot be iterated any more."""


def check_choice(name: str, value: object, choices: object) -> None:
    """Refuse a value that is none of a Literal's.

    Raises:
        ConfigError: with the value seen and the choices.
    """
    if value not in get_args(choices):
        raise ConfigError(f"{name}={shortened(value)}: write one of {', '.join(map(repr, get_args(choices)))}")


def shortened(value: object) -> str:
    """A value as messages show it, 80 characters at most."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def named(error: BaseException) -> str:
    """An error as messages show it."""
    return f"{type(error).__name__}: {error}"
