"""Where torch's default collate fails, the error names the field, what is in it, and the way out."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, default_collate

import bertstream
from bertstream import ConfigError, TextStream, TokenCollate
from bertstream.pipeline.default_collate import explained
from bertstream.testing import FakeEncoder, write_shards

Named = namedtuple("Named", ["text", "tags"])


def wrapped(records: Any, **options: Any) -> bertstream.EmbeddingLoader:
    """As a new user writes it."""
    return bertstream.wrap(DataLoader(records, batch_size=2, **options), FakeEncoder(), text="text")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"tags": [1, 2]}, {"tags": [1]}, "field 'tags': .* cannot join lists of the lengths 2, 1: give"),
        ({"text": ["a", "b"]}, {"text": ["c"]}, "field 'text': .* lists of the lengths 2, 1: give"),
        ({"in": {"a": 0, "tags": [1]}}, {"in": {"a": 0, "tags": []}}, r"field 'in.tags': .* lists of the lengths 1, 0"),
        ({"x": torch.ones(2, 1)}, {"x": torch.ones(3, 1)}, r"field 'x': .* tensors of the shapes \[2, 1\], \[3, 1\]"),
        ({"x": None}, {"x": None}, "field 'x': .* values such as None"),
        ({"x": 1}, {}, "cannot join records of which some have no 'x'"),
    ],
)
def test_a_field_that_default_collate_cannot_join_is_named(first: Any, second: Any, message: str) -> None:
    records = [{"text": "a bank"} | first, {"text": "a river"} | second]
    with wrapped(records) as loader, pytest.raises(ConfigError, match=message) as caught:
        next(iter(loader))
    assert "collate_fn=bertstream.TokenCollate(encoder, text=...)" in str(caught.value)
    assert isinstance(caught.value.__cause__, (RuntimeError, TypeError, KeyError))
    with wrapped(records, collate_fn=TokenCollate(FakeEncoder(), "text")) as loader:
        assert len(next(iter(loader))["text"]) == 2, "the way out that the message names"


@pytest.mark.parametrize(
    ("records", "field"),
    [
        ([("a", [1]), ("b", [1, 2])], "field '1': "),
        ([Named("a", [1]), Named("b", [1, 2])], "field '1': "),
        ([["a"], ["b", "c"]], "^"),
    ],
)
def test_positions_are_named_and_bare_texts_have_no_name(records: list[Any], field: str) -> None:
    loader = DataLoader(records, batch_size=2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{field}torch's default collate cannot join lists of the lengths 1, 2"):
        next(iter(bertstream.wrap(loader, FakeEncoder())))


def test_from_a_worker_the_way_out_comes_without_the_field() -> None:
    records = [{"text": "a", "tags": [1]}, {"text": "b", "tags": [1, 2]}]
    with (
        wrapped(records, num_workers=1) as loader,
        pytest.raises(ConfigError, match="of unequal length: give the "),
    ):
        next(iter(loader))


def test_errors_of_others_stay_as_they_are() -> None:
    def failing(records: Any) -> Any:
        raise RuntimeError("stack expects each tensor to be equal size, says somebody else")

    with wrapped([{"text": "a"}] * 2, collate_fn=failing) as loader, pytest.raises(RuntimeError, match="somebody else"):
        next(iter(loader))


@given(st.lists(st.lists(st.integers(0, 1), max_size=3), min_size=2, max_size=4), st.booleans())
def test_every_ragged_column_is_named(column: list[list[int]], deep: bool) -> None:
    records: list[Any] = [{"same": [], "x": {"tags": tags} if deep else tags} for tags in column]
    try:
        default_collate(records)
    except RuntimeError as error:
        found = str(explained(error))
        assert f"field '{'x.tags' if deep else 'x'}': " in found and str([*map(len, column)])[1:-1] in found
    else:
        assert len({*map(len, column)}) == 1


def test_a_stream_whose_batches_a_dataloader_would_join_is_refused(tmp_path: Path) -> None:
    stream = TextStream(write_shards(tmp_path, ["a bank"] * 3), FakeEncoder(), batch_size=2)
    with pytest.raises(ConfigError, match=r"has batch_size=4, but its TextStream makes .*batch_size=None\)"):
        bertstream.wrap(DataLoader(stream, batch_size=4), FakeEncoder())
    with bertstream.wrap(DataLoader(stream, batch_size=None), FakeEncoder()) as loader:
        assert sum(len(batch["text"]) for batch in loader) == 3
