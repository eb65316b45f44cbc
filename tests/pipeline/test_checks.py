"""What `wrap` cannot take is refused before anything is read, with what to write."""

from __future__ import annotations

from typing import Any

import pytest

import bertstream
from bertstream import ConfigError, TextStream
from bertstream.testing import FakeEncoder, write_shards

BATCHES = [{"text": ["a bank"]}]


def loader_of(kind: str) -> Any:
    if kind == "an encoder":
        return FakeEncoder()
    if kind == "a dict":
        return {"train": BATCHES}
    if kind == "a number":
        return 7
    package = pytest.importorskip("pyarrow" if kind == "Table" else kind)
    return package.table(BATCHES[0]) if kind == "Table" else package.DataFrame(BATCHES[0])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pandas", r"loader is a DataFrame, which holds rows, not batches: write bertstream.stream\(...\) for it"),
        ("polars", "loader is a DataFrame, which holds rows"),
        ("Table", "loader is a Table, which holds rows"),
        ("a dict", r"loader is a dict with the keys \['train'\]: pass a DataLoader over one"),
        ("an encoder", "the first argument is an encoder"),
        ("a number", "loader is an int: pass an iterable of batches"),
    ],
)
def test_what_yields_no_batches_is_refused(kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bertstream.wrap(loader_of(kind), FakeEncoder(), text="text")


@pytest.mark.parametrize("name", ["mask", "token_type_ids"])
def test_the_field_of_a_mask_needs_one_of_padded_ids(name: str, tmp_path: Any) -> None:
    for options in ({}, {"text": (0, 1)}, {"text": 0, "pair": 1}):
        with pytest.raises(ConfigError, match=rf"{name}=\(2,\) for text=.*: name one field for each field of padded"):
            bertstream.wrap(BATCHES, FakeEncoder(), **{name: 2}, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{name}=True: name a key"):
        bertstream.wrap(BATCHES, FakeEncoder(), text=0, **{name: True})  # type: ignore[arg-type]
    stream = TextStream(write_shards(tmp_path, ["a bank"]), FakeEncoder())
    with pytest.raises(ConfigError, match=rf"{name}=\(2,\) has no effect on a TextStream, which tokenizes"):
        bertstream.wrap(stream, FakeEncoder(), **{name: 2})  # type: ignore[arg-type]
