"""Places in nested values: "data.text" is the key "text" of the value under "data", "0.text" that of the first one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def part_of(holder: Any, name: str) -> Any:
    """The value at a key of a mapping, or at a number of a list or tuple.

    Raises:
        KeyError: there is none.
    """
    if isinstance(holder, Mapping):
        return holder[name]
    if isinstance(holder, (list, tuple)) and name.isdecimal() and int(name) < len(holder):
        return holder[int(name)]
    raise KeyError(name)


def find(holder: Any, path: str, part_of: Callable[[Any, str], Any] = part_of) -> Any:
    """The value at a path; at each level, a key that has a dot itself wins, the longest first.

    Args:
        holder: a record, batch or part of one.
        path: keys and positions with dots between them, or one of them.
        part_of: one level down; raises KeyError where there is nothing.
    Raises:
        KeyError: there is no such place.
    """
    return trail(holder, path, part_of)[-1][1]


def trail(holder: Any, path: str, part_of: Callable[[Any, str], Any] = part_of) -> list[tuple[str, Any]]:
    """The keys and positions that `find` follows, one a level, each with the value there.

    Raises:
        KeyError: there is no such place.
    """
    for head, rest in splits(path):
        try:
            part = part_of(holder, head)
            return [(head, part), *(trail(part, rest, part_of) if rest else ())]
        except KeyError:
            pass
    raise KeyError(path)


def splits(path: str) -> Iterator[tuple[str, str]]:
    """The keys that may begin a path, the longest first, each with the rest of the path; "" after the whole."""
    yield path, ""
    dot = path.rfind(".")
    while dot > 0:
        if dot < len(path) - 1:
            yield path[:dot], path[dot + 1 :]
        dot = path.rfind(".", 0, dot)
