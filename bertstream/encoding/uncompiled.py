"""Encoding inside a model that `torch.compile` compiled: it stays out of the graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(method: Callable[P, T]) -> Callable[P, T]:
    """A method that runs as it is in a compiled model, whose graphs end before it and begin again after it.

    Tokenizing and packing are Python and numpy over texts of any number and length, on which torch's compiler fails.
    """

    @functools.wraps(method)
    def run(*arguments: P.args, **named: P.kwargs) -> T:
        if torch.compiler.is_compiling():  # not always: `disable` imports the compiler, which takes seconds
            found: T = torch.compiler.disable(method)(*arguments, **named)
            return found
        return method(*arguments, **named)

    return run
