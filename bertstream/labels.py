"""Labels that are names become numbers: in `fields=` of a stream, and in `Embeddings.align`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import ConfigError, shortened


class UnknownLabelError(ValueError):
    """A value is none of the labels; whoever knows where it comes from raises an error with the place."""


class NumberOf:
    """The number of a label, counted from 0; of a list of labels, the list of theirs. Pickles.

    Args:
        labels: strings, each another, in the order of their numbers.
        option: the argument that names them, for messages.
    Raises:
        ConfigError: they are no such list.
    """

    def __init__(self, labels: Sequence[str], option: str) -> None:
        listed = isinstance(labels, Sequence) and not isinstance(labels, str)
        if not listed or not labels or not all(isinstance(label, str) for label in labels):
            raise ConfigError(f"{option}={shortened(labels)}: list the labels, strings, in the order of their numbers")
        self._numbers = {label: number for number, label in enumerate(labels)}
        if len(self._numbers) < len(labels):
            twice = next(label for label in labels if list(labels).count(label) > 1)
            raise ConfigError(f"{option}={shortened(labels)}: the label {twice!r} comes twice: which number is its?")

    def __call__(self, value: Any) -> Any:
        """The number, or list of numbers.

        Raises:
            UnknownLabelError: with the value and the labels.
        """
        if isinstance(value, str) and value in self._numbers:
            return self._numbers[value]
        if isinstance(value, (list, tuple)):
            return [self(part) for part in value]
        raise UnknownLabelError(f"{shortened(value)} is none of the labels {shortened([*self._numbers])}")

    def __repr__(self) -> str:
        return repr([*self._numbers])
