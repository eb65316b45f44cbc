"""All errors, as one tree, and the checks of arguments that raise them.

    BertstreamError(Exception)                something outside the program failed
      ShardError     .path .index .field      a shard or record is missing, unreadable or broken
      EncoderError   .records                 the model could not be loaded, or failed on these texts
      CacheError     .path                    damaged, full, or made by another encoder
      StateError     .key                     a checkpoint of another version, seed or shard list
    ConfigError(BertstreamError, ValueError)  a bad argument: raised before any file or thread is opened
    LoaderClosedError(BertstreamError, RuntimeError)

Each error takes a message and, by keyword, the fields above. Errors pickle with their fields, so they survive the way
out of a worker process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import get_args

import numpy as np


class BertstreamError(Exception):
    """The base of all errors that bertstream raises on purpose."""


class ShardError(BertstreamError):
    """A shard or one of its records is missing, unreadable or broken.

    Attributes:
        path: the shard's path, URL or command, or None.
        index: the record's index in the shard, counted from 0 and with broken records, or None.
        field: the field at fault, or None.
        records: how many records are lost: one, those of a row group, or those of the rest of a piece; None if unknown.
        gives_up_shard: whether the rest of the shard is skipped too.
        skippable: whether `max_bad_records` may skip it. A fault of the machine or network, and a shard that changes
            while it is read, always raise.
    """

    records: int | None = 1
    gives_up_shard = False
    skippable = True

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
        records: indices in the batch of the texts at fault; empty if no text is.
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
    """A saved state does not fit this loader.

    Attributes:
        key: the entry of the state that does not fit, or None.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class ConfigError(BertstreamError, ValueError):
    """An argument is wrong; the message shows the value seen and what to write instead."""


class LoaderClosedError(BertstreamError, RuntimeError):
    """The loader is closed and can no longer be iterated."""


def check_choice(name: str, value: object, choices: object) -> None:
    """Refuse a value that a `Literal` does not list.

    Args:
        name: the argument, as the user writes it.
        value: what the user wrote.
        choices: the `Literal` type.
    Raises:
        ConfigError: with the value seen and the choices.
    """
    if value not in get_args(choices):
        raise ConfigError(f"{name}={shortened(value)}: write one of {', '.join(map(repr, get_args(choices)))}")


def check_at_least(name: str, value: object, least: int) -> None:
    """Refuse anything but a whole number of at least `least`.

    NumPy's integers pass. A bool is refused, and so is a float, even a whole one: the values checked here are counts.

    Args:
        name: the argument, as the user writes it.
        value: what the user wrote; check for None first where None is allowed.
        least: the smallest value allowed.
    Raises:
        ConfigError: with the value seen and the smallest value allowed.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={shortened(value)}: write a whole number of at least {least}")


def check_flag(name: str, value: object) -> None:
    """Refuse anything but a truth value, such as the "no" of a config file; 0, 1 and None pass as they always did.

    Args:
        name: the argument, as the user writes it.
        value: what the user wrote.
    Raises:
        ConfigError: with the value seen.
    """
    if value is not None and not isinstance(value, np.bool_) and not (isinstance(value, int) and value in (0, 1)):
        raise ConfigError(f"{name}={shortened(value)}: write True or False")


def shortened(value: object) -> str:
    """The start of a value's repr for a message, 60 characters; long values are cut before their repr is made."""
    shown = repr(value[:60] if isinstance(value, (str, bytes, list)) else value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def kind_of(value: object) -> str:
    """The name of a value's type with its article, such as "a list" and "an IterableDataset"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def counted(count: int, what: str) -> str:
    """A number and what it counts, such as "1 lane" and "2 lanes"."""
    return f"{count} {what}{'s' * (count != 1)}"


def described(error: BaseException) -> str:
    """The error's type and text for a message, on one line."""
    return f"{type(error).__name__}: {' '.join(filter(None, map(str.strip, str(error).splitlines())))}"


def table_columns(value: object) -> list[str] | None:
    """The names of the columns of a table (of pandas, polars, Arrow or datasets); None for anything else."""
    names = getattr(value, "column_names", None)
    if names is None:
        names = getattr(value, "columns", None)
    return list(map(str, names)) if isinstance(names, Iterable) else None
