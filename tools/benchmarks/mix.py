"""How well a shuffled stream mixes data sorted by class."""

from __future__ import annotations

import argparse
import csv
import statistics

import numpy as np
import numpy.typing as npt

import bertstream
from bertstream.testing import FakeEncoder


def mix(arguments: argparse.Namespace) -> dict[str, object]:
    """Count the classes in a batch of 32 of banking77, whose file is sorted by its 77 classes."""
    with (arguments.data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["category"] for row in rows})
    labels = np.array([names.index(row["category"]) for row in rows])
    mixed = np.random.default_rng(0).permutation(labels)
    classes = {"file_order": classes_in_batches(labels), "all_mixed": classes_in_batches(mixed)}
    shard = arguments.data / "banking77" / "train.csv"
    for open_shards in (1, 4, 16, 64):
        reading = bertstream.StreamConfig(open_shards=open_shards)
        dataset = bertstream.TextStream(shard, FakeEncoder(), batch_size=32, shuffle=True, reading=reading)
        counts = [len(set(batch.fields["category"])) for batch in dataset if len(batch) == 32]
        classes[f"stream_open_shards_{open_shards}"] = statistics.mean(counts)
    return {"records": len(rows), "classes_in_a_batch": {name: round(count, 1) for name, count in classes.items()}}


def classes_in_batches(labels: npt.NDArray[np.int64]) -> float:
    """Mean number of distinct labels in batches of 32, in this order."""
    return statistics.mean(len(set(labels[i : i + 32].tolist())) for i in range(0, len(labels) - 31, 32))
