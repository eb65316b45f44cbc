"""What torch's default collate fails on, in words: it names neither the field nor what to write instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from ..errors import ConfigError, shortened

_FILE = "torch/utils/data/_utils/collate.py"
_UNEQUAL = ("each element in list of batch should be of equal size", "stack expects each tensor to be equal size")
_NO_COLUMN = "default_collate: batch must contain"


def explained(error: Exception) -> ConfigError | None:
    """The error to raise in the place of one of torch's default collate.

    Args:
        error: whatever reading raised; of a worker process torch sends the text alone, so that no field is known.
    Returns:
        None where it is another one.
    """
    text = str(error)
    batches = list(_batches_in(error))
    if not batches and _FILE not in text:
        return None
    values = batches[-1] if batches else ()
    if any(said in text for said in _UNEQUAL):
        sizes = [list(value.shape) if isinstance(value, Tensor) else len(value) for value in values]
        what = "tensors of the shapes" if any(isinstance(value, Tensor) for value in values) else "lists of the lengths"
        problem = f"{what} {shortened(sizes)[1:-1]}" if sizes else "lists, or tensors, of unequal length"
    elif _NO_COLUMN in text:
        problem = f"values such as {shortened(values[0])}" if values else "values of this type, such as None or objects"
    elif isinstance(error, KeyError):
        problem = f"records of which some have no {error.args[0]!r}" if batches else "records with other keys"
    else:
        return None
    path = ".".join(_path(batches))
    return ConfigError(
        f"{f'field {path!r}: ' * bool(path)}torch's default collate cannot join {problem}: give the DataLoader "
        "collate_fn=bertstream.TokenCollate(encoder, text=...), which makes a list of such a field, with one entry "
        "a record"
    )


def _batches_in(error: BaseException) -> Iterator[Sequence[Any]]:
    """The lists that default collate was joining when it failed, from the records to the values of a field."""
    trace = error.__traceback__
    last: Any = None
    while trace is not None:
        batch = trace.tb_frame.f_locals.get("batch") if trace.tb_frame.f_code.co_filename.endswith(_FILE) else None
        if isinstance(batch, (list, tuple)) and batch and batch is not last:
            last = batch
            yield batch
        trace = trace.tb_next


def _path(batches: Sequence[Sequence[Any]]) -> Iterator[str]:
    """The names and positions that lead from each list to the next."""
    for outer, inner in pairwise(batches):
        first = outer[0]
        try:
            names = first if isinstance(first, Mapping) else range(len(first))
            yield next(str(n) for n in names if all(a[n] is b for a, b in zip(outer, inner, strict=True)))
        except (LookupError, StopIteration, TypeError, ValueError):  # torch made the inner list of other values
            return
