"""How well a shuffled stream mixes data sorted by class."""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

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
        classes[f"stream_open_shards_{open_shards}"] = classes_through(shard, open_shards=open_shards)
    with tempfile.TemporaryDirectory() as folder:
        table = pyarrow.Table.from_pylist(rows)
        for group in (len(rows), 1000, 500, 100):
            path = Path(folder) / f"{group}.parquet"
            pyarrow.parquet.write_table(table, path, row_group_size=group)
            classes[f"stream_row_groups_of_{group}"] = classes_through(path)
    return {"records": len(rows), "classes_in_a_batch": {name: round(count, 1) for name, count in classes.items()}}


def classes_through(shard: Path, **options: Any) -> float:
    """Mean number of distinct classes in the batches of 32 of a shuffled stream."""
    reading = bertstream.StreamConfig(**options)
    dataset = bertstream.TextStream(shard, FakeEncoder(), batch_size=32, shuffle=True, reading=reading)
    return statistics.mean(len(set(batch.fields["category"])) for batch in dataset if len(batch) == 32)


def classes_in_batches(labels: npt.NDArray[np.int64]) -> float:
    """Mean number of distinct labels in batches of 32, in this order."""
    return statistics.mean(len(set(labels[i : i + 32].tolist())) for i in range(0, len(labels) - 31, 32))
