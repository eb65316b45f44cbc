"""Labels that are names become numbers: in `fields=` of a stream, and in `Embeddings.align`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ConfigError, shortened


class UnknownLabelError(ValueError):
    """A value is none of the labels; whoever knows where it comes from raises an error with the place."""


def as_listed(field: str) -> str:
    """What to write where a field holds names of labels and a number is wanted, for messages."""
    return f'if these are labels, list them or give a label2id, as in fields={{{json.dumps(field)}: ["ham", "spam"]}}'


def is_class_label(value: object) -> bool:
    """Whether this is the `ClassLabel` of Hugging Face's datasets, which is not imported for it; it can be called."""
    return type(value).__name__ == "ClassLabel" and hasattr(value, "names")


def as_labels(value: Any) -> Any:
    """The list of labels that an array, a Series, an Index or a `ClassLabel` holds; anything else as it is."""
    if is_class_label(value):
        return value.names
    return value.tolist() if hasattr(value, "tolist") else value


class NumberOf:
    """The number of a label, counted from 0 in a list; of a list of labels, the list of theirs. Pickles.

    Args:
        labels: strings, each another, in the order of their numbers (a list, or an array or column of them, or a
            `ClassLabel` of Hugging Face); or label -> number, as `label2id` of a model.
        option: the argument that names them, for messages.
        instead: what to write where these are no labels, for the message.
    Raises:
        ConfigError: they are neither.
    """

    def __init__(self, labels: Any, option: str, *, instead: str = "") -> None:
        if isinstance(labels, (set, frozenset)):
            raise ConfigError(f"{option}={shortened(labels)}: a set has no order: write sorted(...) of it")
        labels = as_labels(labels)
        listed = isinstance(labels, (Sequence, Mapping)) and not isinstance(labels, str)
        if not listed or not labels or not all(isinstance(label, str) for label in labels):
            way_out = f"list the labels, strings, in the order of their numbers{instead}"
            raise ConfigError(f"{option}={shortened(labels)}: {way_out}")
        if isinstance(labels, Mapping):
            if not all(type(number) is int for number in labels.values()):
                raise ConfigError(f"{option}={shortened(labels)}: the number of a label is an int")
            self._numbers = dict(labels)
            return
        self._numbers = {label: number for number, label in enumerate(labels)}
        if len(self._numbers) < len(labels):
            twice = next(label for label in labels if list(labels).count(label) > 1)
            raise ConfigError(f"{option}={shortened(labels)}: the label {twice!r} comes twice: which number is its?")

    def __call__(self, value: Any) -> Any:
        """The number, or list of numbers.

        Raises:
            UnknownLabelError: with the value and the labels.
        """
        label = value
        if isinstance(value, bytes):  # a member of a tar, with its newline; bytes that are not UTF-8 are no label
            label = value.decode("utf-8-sig", "surrogateescape")
            label = label if label in self._numbers else label.strip()
        if isinstance(label, str) and label in self._numbers:
            return self._numbers[label]
        if isinstance(value, (list, tuple)):
            return [self(part) for part in value]
        raise UnknownLabelError(f"{shortened(value)} is none of the labels {shortened([*self._numbers])}")

    def __repr__(self) -> str:
        counted = list(self._numbers.values()) == list(range(len(self._numbers)))
        return repr([*self._numbers] if counted else self._numbers)
