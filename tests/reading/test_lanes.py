"""A lane reads its records in turn; what it may not skip ends in an error that says how to."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from shard_files import write

import bertstream
from bertstream import ShardError, StreamConfig
from bertstream.testing import FakeEncoder

WAY_OUT = "; reading=StreamConfig(max_bad_records=) skips and counts such records"
GZIP = gzip.compress("".join(f'{{"text": "{i * 7919 % 1009}"}}\n' for i in range(4000)).encode())


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": '),
        ("a.jsonl", '{"text": "a"}\n{"text": null}'),
        ("a.csv", "text,n\na,1\nb,2,3\n"),
        ("a.jsonl.gz", GZIP[: len(GZIP) // 2]),
    ],
)
def test_an_error_of_what_may_be_skipped_ends_with_the_way_out(tmp_path: Path, name: str, data: Any) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(ShardError) as caught:
        list(bertstream.stream(path, FakeEncoder()))
    assert str(caught.value).endswith(WAY_OUT) and str(caught.value).count(WAY_OUT) == 1
    with bertstream.stream(path, FakeEncoder(), reading=StreamConfig(max_bad_records=5)) as loader:
        assert sum(len(batch["text"]) for batch in loader) >= 1
        stats = loader.stats()
        assert stats["bad_records"] + stats["bad_shards"] >= 1


def test_an_error_of_a_whole_shard_names_what_is_wrong_alone(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"sentence": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ShardError, match="sentence") as caught:
        list(bertstream.stream(tmp_path / "a.parquet", FakeEncoder()))
    assert "max_bad_records" not in str(caught.value)
