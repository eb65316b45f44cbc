"""A bucket of tokenized records is cut into batches of about equal lengths; pure: equal buckets give equal batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..tokens import Indices


def cut_bucket(
    lengths: npt.NDArray[Any],
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    shuffle: np.random.Generator | None = None,
) -> list[Indices]:
    """Sort a bucket by length and cut it into batches.

    Args:
        lengths: [R] tokens of each record of the bucket, special tokens included.
        batch_size: records in a batch; the bucket's last batch may have fewer.
        max_tokens: real tokens in a batch at most, counted without padding; a longer record is a batch of its own.
            Exactly one of `batch_size` and `max_tokens` is given.
        shuffle: mixes records of equal length and the order of the batches; None keeps shorter batches first.
    Returns:
        For each batch the indices of its records in the bucket, ascending; every record is in exactly one batch.
    """
    order = np.arange(len(lengths)) if shuffle is None else shuffle.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    if batch_size is not None:
        starts = list(range(0, len(order), batch_size))
    else:
        assert max_tokens is not None
        starts, held = [0], 0
        for i, length in enumerate(lengths[order].tolist()):
            if i > starts[-1] and held + length > max_tokens:
                starts.append(i)
                held = 0
            held += length
    batches = [np.sort(batch) for batch in np.split(order, starts[1:]) if len(batch)]
    if shuffle is not None:
        batches = [batches[i] for i in shuffle.permutation(len(batches))]
    return batches
