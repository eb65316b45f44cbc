"""The user's functions of a record: `keep=` and `map=`."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from ..errors import ConfigError, described, shortened
from .raw import RecordError

Keep: TypeAlias = Callable[[dict[str, Any]], Any]
Map: TypeAlias = Callable[[dict[str, Any]], Mapping[str, Any] | None]


def check_functions(keep: Keep | None, map: Map | None) -> None:
    """Refuse what cannot be called.

    Raises:
        ConfigError: with the value seen.
    """
    if keep is not None and not callable(keep):
        raise ConfigError(f"keep={shortened(keep)}: pass a function of a record, a dict, that says whether to keep it")
    if map is not None and not callable(map):
        raise ConfigError(f"map={shortened(map)}: pass a function from a record, a dict, to a dict, or None to drop it")


def kept_and_mapped(values: dict[str, Any], keep: Keep | None, map: Map | None) -> dict[str, Any] | None:
    """The record that the user's functions make of one; None if they drop it.

    Args:
        values: all fields of the record.
        keep: is asked first, so that nothing is computed for records that are dropped; and it sees the data's fields.
        map: makes the record; what it returns stays unchanged.
    Raises:
        RecordError: a function raised, or `map` returned something that is neither a mapping nor None.
    """
    try:
        if keep is not None and not keep(values):
            return None
    except Exception as error:  # a user's function may raise anything; it stays attached as the cause
        raise RecordError(f"keep={name_of(keep)} raised {described(error)} on {shortened(values)}") from error
    if map is None:
        return values
    try:
        mapped = map(values)
    except Exception as error:
        raise RecordError(f"map={name_of(map)} raised {described(error)} on {shortened(values)}") from error
    if mapped is None:
        return None
    if not isinstance(mapped, Mapping):
        way_out = "return the record as a dict, or None to drop it"
        raise RecordError(f"map={name_of(map)} returned {shortened(mapped)} for {shortened(values)}: {way_out}")
    return dict(mapped)


def name_of(function: Any) -> str:
    """The function's name, for messages and states, or that of its type; without the function it is defined in."""
    return str(getattr(function, "__qualname__", type(function).__qualname__)).rpartition("<locals>.")[2]


def check_can_be_sent(parts: Mapping[str, Any], *, failed: bool) -> None:
    """Refuse what cannot be sent to worker processes that are not forked.

    Args:
        parts: what is sent, by its name in the message.
        failed: whether sending was tried, and failed: only then is it tried for each part.
    Raises:
        ConfigError: with the name of one that does not pickle, or that workers would not find, and the way out.
    """
    interactive = not hasattr(sys.modules["__main__"], "__file__")
    for name, part in parts.items():
        if interactive and getattr(part, "__module__", None) == "__main__":
            raise ConfigError(
                f"{name} is of a notebook or an interactive program, where worker processes, which here are not "
                "forked, cannot import it: write it to a module and import it from there, or write num_workers=0"
            )
        if not failed:
            continue
        try:
            pickle.dumps(part)
        except Exception as error:  # pickle raises anything, for its own reasons and for the object's
            raise ConfigError(
                f"{name} cannot be sent to worker processes, which here are not forked and receive it by pickle "
                f"({described(error)}): a function has to be importable, as one that def makes at the top level of a "
                "module; a lambda or a function within another one is not. Or write num_workers=0"
            ) from error
