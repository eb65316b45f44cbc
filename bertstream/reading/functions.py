"""The user's functions of a record, and names that become numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ..errors import ConfigError, described, shortened
from .raw import RecordError, excerpt

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
        raise RecordError(f"keep={name_of(keep)} raised {described(error)} on {excerpt(values)}") from error
    if map is None:
        return values
    try:
        mapped = map(values)
    except Exception as error:
        raise RecordError(f"map={name_of(map)} raised {described(error)} on {excerpt(values)}") from error
    if mapped is None:
        return None
    if not isinstance(mapped, Mapping):
        way_out = "return the record as a dict, or None to drop it"
        raise RecordError(f"map={name_of(map)} returned {excerpt(mapped)} for {excerpt(values)}: {way_out}")
    return dict(mapped)


def name_of(function: Any) -> str:
    """The function's name, for messages and states, or that of its type; without the function it is defined in."""
    return str(getattr(function, "__qualname__", type(function).__qualname__)).rpartition("<locals>.")[2]


class NumberOf:
    """Turns names into their numbers, counted from 0; of a list of names, each.

    Args:
        names: all different.
        field: whose values they are, for messages.
    Raises:
        ConfigError: they are no strings, none at all, or one comes twice.
    """

    def __init__(self, names: Sequence[str], field: str) -> None:
        if not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"fields maps names to functions, or to lists of labels; got {field!r}: {list(names)!r}")
        self._numbers = {name: number for number, name in enumerate(names)}
        if len(self._numbers) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"fields lists the label {twice!r} of {field!r} twice: its number would be unclear")

    def __call__(self, value: Any) -> Any:
        """The number of a name, or a list of numbers.

        Raises:
            RecordError: a name is not known.
        """
        if isinstance(value, (list, tuple)):
            return [self(part) for part in value]
        number = self._numbers.get(value) if isinstance(value, str) else None
        if number is None:
            raise RecordError(f"{excerpt(value)} is none of its labels: {excerpt([*self._numbers])}")
        return number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NumberOf) and self._numbers == other._numbers

    def __hash__(self) -> int:
        return hash(tuple(self._numbers))

    def __repr__(self) -> str:
        return repr([*self._numbers])
