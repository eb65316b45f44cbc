"""Datasets of rows are read like shards: each row once, in any format, resumed exactly, or refused with the way out."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import bertstream
from bertstream import ConfigError, EmbeddingLoader, ShardError, StateError, StreamConfig, TextStream
from bertstream.reading.options import ReadOptions
from bertstream.reading.record_columns import RecordColumns
from bertstream.reading.records import read_columns
from bertstream.reading.shards import Piece
from bertstream.testing import FakeEncoder, assert_resumes_exactly
from bertstream.tokens import TokenBatch

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.dataset")
pandas = pytest.importorskip("pandas")

COUNT = 103
LANES = StreamConfig(lanes=3, bucket_size=20, open_shards=2)


def row(i: int) -> dict[str, Any]:
    words = ["bank"] * (i % 7)
    return {"text": f"number {i} {' '.join(words)}", "id": i, "words": [f"w{i}", *words], "tags": [i, 2], "half": i / 2}


ROWS = [row(i) for i in range(COUNT)]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    return datasets.Dataset.from_list(ROWS)


def plain(value: Any) -> Any:
    """A batch, or a column of it, with the types that its consumer meets."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return type(value), value.dtype, value.tolist()
    return [plain(part) for part in value] if isinstance(value, list) else value


def columns(rows: Any, **options: Any) -> list[dict[str, Any]]:
    """The batches of a stream over rows, without their places."""
    loader = bertstream.stream(rows, FakeEncoder(), batch_size=16, reading=LANES, **options)
    return [
        {
            name: value.tokens.input_ids.tolist() if isinstance(value, bertstream.Embeddings) else plain(value)
            for name, value in batch.items()
            if name not in ("__key__", "__shard__")
        }
        for batch in loader
    ]


def ids(rows: Any) -> list[int]:
    return [i for batch in TextStream(rows, FakeEncoder(), reading=LANES) for i in batch.fields["id"].tolist()]


# --- Hugging Face's ---------------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda rows: rows,
    "filtered": lambda rows: rows.filter(lambda row: int(row["id"]) % 3 == 0),
    "mapped": lambda rows: rows.map(lambda row: {"next": int(row["id"]) + 1}),
    "fewer columns": lambda rows: rows.select_columns(["text", "id"]),
    "shuffled, taken, skipped": lambda rows: rows.shuffle(seed=3).take(60).skip(10),
    "concatenated": lambda rows: datasets.concatenate_datasets([rows, rows]),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_format_changes_nothing(hugging_face: Any, change: str, streamed: bool) -> None:
    rows = hugging_face.to_iterable_dataset(num_shards=4) if streamed else hugging_face
    right = columns(CHANGES[change](rows))
    formats = ["torch", "numpy", "arrow", "pandas"]
    for form in formats if change in ("as it is", "filtered") else formats[:1]:
        assert columns(CHANGES[change](rows).with_format(form)) == right, form
        if form in ("torch", "numpy"):  # functions of the dataset then see tensors or arrays of single numbers
            assert columns(CHANGES[change](rows.with_format(form))) == right, form


@pytest.mark.parametrize("form", [None, "torch", "numpy", "arrow"])
def test_lists_of_words_are_texts_in_any_format(hugging_face: Any, form: str | None) -> None:
    def words(rows: Any) -> list[dict[str, Any]]:
        return columns(rows.with_format(form), text="words", fields=["id"])

    right = columns(ROWS, text="words", fields=["id"])
    assert words(hugging_face) == right
    assert sorted(i for batch in words(hugging_face.to_iterable_dataset(4)) for i in batch["id"][2]) == [*range(COUNT)]


def test_values_of_every_kind_are_those_of_the_rows() -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["ham", "spam"]),
            "score": datasets.Value("float32"),
            "day": datasets.Value("timestamp[ms]"),
            "raw": datasets.Value("binary"),
            "big": datasets.Value("uint64"),
            "nested": {"a": datasets.Value("int8"), "b": datasets.List(datasets.Value("string"))},
            "pairs": datasets.List({"x": datasets.Value("bool")}),
            "grid": datasets.Array2D((1, 2), "int32"),
        }
    )
    rows = [
        {
            "text": f"text {i}",
            "label": i % 2,
            "score": i / 3 if i % 3 else None,
            "day": datetime.datetime(2026, 1, 1 + i),
            "raw": bytes([i]),
            "big": 2**63 - 1 - i,
            "nested": {"a": i, "b": ["x"] * i},
            "pairs": [{"x": True}] * i,
            "grid": [[i, i]],
        }
        for i in range(20)
    ]
    dataset = datasets.Dataset.from_list(rows, features=features)
    for some in (dataset, dataset.remove_columns("grid"), dataset.shuffle(seed=1)):  # as it is, and as Arrow holds it
        assert columns(some) == columns(list(some))


def test_columns_that_nobody_wants_are_not_decoded() -> None:
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1], "picture": [b"no picture"] * 2})
    dataset = dataset.cast_column("picture", datasets.Image())
    [batch] = bertstream.stream(dataset, FakeEncoder(), fields=["label"])
    assert batch["label"].tolist() == [0, 1]
    with pytest.raises(ShardError, match="record 0"):
        list(bertstream.stream(dataset, FakeEncoder()))


def test_ids_of_a_dataset_stay_columns(hugging_face: Any) -> None:
    dataset = hugging_face.map(lambda row: {"input_ids": [row["id"], 2], "attention_mask": [1, 0]})
    items = list(read_columns(Piece("Dataset", 0, COUNT), ReadOptions(text="input_ids", rows=dataset)))
    [found] = items
    assert isinstance(found, RecordColumns) and isinstance(found.texts, TokenBatch)
    assert found.texts.input_ids.tolist() == list(range(COUNT)) and "attention_mask" not in found.fields


def test_a_format_of_some_columns_leaves_out_the_others(hugging_face: Any) -> None:
    found = columns(hugging_face.with_format("torch", columns=["text", "half"]))
    assert found[0].keys() == {"text", "half", "__index__"}


def test_a_transform_of_the_users_is_applied(hugging_face: Any) -> None:
    rows = hugging_face.with_transform(
        lambda batch: {"text": batch["text"], "id": [np.int64(i + 1) for i in batch["id"]]}
    )
    assert sorted(ids(rows)) == [i + 1 for i in range(COUNT)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows.take(1), [0]),
        (lambda rows: rows.skip(100), [25, 51, 77]),  # divided among the shards by Hugging Face, like take()
        (lambda rows: rows.filter(lambda row: row["id"] in (3, 7)), [3, 7]),
    ],
)
def test_shards_of_a_dataset_that_a_filter_leaves_empty_are_no_error(
    hugging_face: Any, change: Callable[[Any], Any], expected: list[int]
) -> None:
    assert sorted(ids(change(hugging_face.to_iterable_dataset(num_shards=4)))) == expected


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_a_filter_that_leaves_nothing_is_an_error(hugging_face: Any, workers: int | None) -> None:
    rows = hugging_face.to_iterable_dataset(num_shards=4).filter(lambda row: row["id"] < 0)
    stream = TextStream(rows, FakeEncoder())
    loader = stream if workers is None else bertstream.stream(rows, FakeEncoder(), num_workers=workers)
    with pytest.raises(ShardError, match=r"^IterableDataset shard 0 of 4: no record in the whole epoch: did a filter"):
        list(loader)
    with pytest.raises(
        ConfigError, match=r"shards is a Dataset of 0 rows with the columns \['text', .*nothing to read"
    ):
        TextStream(hugging_face.filter(lambda row: row["id"] < 0), FakeEncoder())


def test_a_worker_or_the_rest_of_an_epoch_may_have_no_record(hugging_face: Any) -> None:
    rows = hugging_face.to_iterable_dataset(num_shards=4).filter(lambda row: row["id"] == 3)
    assert len(list(DataLoader(TextStream(rows, FakeEncoder()), batch_size=None, num_workers=2))) == 1
    assert_resumes_exactly(lambda: bertstream.stream(rows, FakeEncoder()))


def test_a_streaming_dataset_that_shuffles_itself_has_another_order_in_each_epoch(hugging_face: Any) -> None:
    stream = TextStream(hugging_face.to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=500), FakeEncoder())

    def order(epoch: int) -> list[int]:
        stream.set_epoch(epoch)
        return [i for batch in stream for i in batch.fields["id"].tolist()]

    orders = [order(epoch) for epoch in (0, 1, 7, 1)]
    assert orders[1] == orders[3] and len({tuple(found) for found in orders}) == 3
    assert all(sorted(found) == list(range(COUNT)) for found in orders)


# --- any rows ---------------------------------------------------------------------------------------------------------

SOURCES: dict[str, Callable[[Any], Any]] = {
    "a list": list,
    "map-style": lambda rows: rows.with_format("numpy"),
    "filtered": lambda rows: rows.filter(lambda row: row["id"] != 7),
    "streaming": lambda rows: rows.to_iterable_dataset(num_shards=6).with_format("torch"),
    "streaming, shuffled, filtered": lambda rows: (
        rows.to_iterable_dataset(num_shards=6).shuffle(seed=1, buffer_size=50).filter(lambda row: row["id"] != 7)
    ),
    "a DataFrame": lambda rows: rows.to_pandas(),
}


@pytest.mark.parametrize(
    ("source", "num_workers"),
    [*((source, 0) for source in SOURCES), ("map-style", 2), ("streaming, shuffled, filtered", 2), ("a DataFrame", 2)],
)
def test_rows_of_a_dataset_come_once_and_resume_exactly(hugging_face: Any, source: str, num_workers: int) -> None:
    rows = SOURCES[source](hugging_face)

    def make(workers: int = num_workers) -> EmbeddingLoader:
        return bertstream.stream(rows, FakeEncoder(), batch_size=16, shuffle=True, num_workers=workers, reading=LANES)

    found = [i for batch in make() for i in batch["id"].tolist()]
    assert sorted(found) == [i for i in range(COUNT) if i != 7 or "filtered" not in source] != found
    assert_resumes_exactly(make, cuts=[4], resume_with=lambda: make(0))


ROWS_THAT_STAY: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "list": list,
    "tuple": tuple,
    "Hugging Face": lambda rows: datasets.Dataset.from_list(rows),
    "Hugging Face, as tensors": lambda rows: datasets.Dataset.from_list(rows).with_format("torch"),
    "pandas": lambda rows: pandas.DataFrame(rows),
    "polars": lambda rows: pytest.importorskip("polars").DataFrame(rows),
    "Arrow": lambda rows: pytest.importorskip("pyarrow").Table.from_pylist(rows),
    "in a mixture": lambda rows: bertstream.Mixture([(rows, 1), (datasets.Dataset.from_list(ROWS), 1)]),
}


@pytest.mark.parametrize("kind", ROWS_THAT_STAY)
@pytest.mark.parametrize("text", ["text", "words", "tags"])
def test_a_state_of_the_rows_in_another_order_is_refused(kind: str, text: str) -> None:
    def stream(rows: list[dict[str, Any]], **options: Any) -> EmbeddingLoader:
        return bertstream.stream(ROWS_THAT_STAY[kind](rows), FakeEncoder(), text=text, reading=LANES, **options)

    state = json.loads(json.dumps(stream(ROWS).state_dict()))
    stream([dict(row) for row in ROWS]).load_state_dict(state)
    moved, other = ROWS[1:] + ROWS[:1], [row(i) for i in range(500, 500 + COUNT)]
    for rows in (moved, other):
        with pytest.raises(StateError, match=r"over other rows, or .* another order, .*shuffle\(seed=\)") as caught:
            stream(rows).load_state_dict(state)
        assert caught.value.key == "rows"
    with pytest.raises(StateError, match="saved with seed=0, this stream has seed=1; over other rows"):
        stream(moved, seed=1).load_state_dict(state)
    del state["settings"]["rows"]  # as before states had it
    stream(moved).load_state_dict(state)


def test_a_hugging_face_dataset_that_was_shuffled_otherwise_is_other_rows(hugging_face: Any) -> None:
    state = bertstream.stream(hugging_face.shuffle(seed=1), FakeEncoder()).state_dict()
    bertstream.stream(hugging_face.shuffle(seed=1), FakeEncoder()).load_state_dict(state)
    with pytest.raises(StateError, match="over other rows"):
        bertstream.stream(hugging_face.shuffle(seed=2), FakeEncoder()).load_state_dict(state)


def test_where_map_makes_the_text_all_of_a_row_is_compared() -> None:
    rows = [{"parts": {"title": f"title {i}", "body": b"x"}, "image": object()} for i in range(40)]

    def stream(rows: list[dict[str, Any]]) -> TextStream:
        return TextStream(rows, FakeEncoder(), map=lambda row: {"text": row["parts"]["title"]})

    state = stream(rows).state_dict()
    stream([row | {"image": object()} for row in rows]).load_state_dict(state)
    with pytest.raises(StateError, match="over other rows"):
        stream(rows[::-1]).load_state_dict(state)


@pytest.mark.parametrize("kind", ["with its own code", "with a transform", "streaming"])
def test_rows_that_may_be_others_each_time_are_not_compared(hugging_face: Any, kind: str) -> None:
    rows = {
        "with its own code": lambda: OwnRows(),
        "with a transform": lambda: hugging_face.with_transform(lambda rows: rows),
        "streaming": lambda: hugging_face.to_iterable_dataset(),
    }[kind]()
    assert "rows" not in TextStream(rows, FakeEncoder()).settings


class OwnRows(list[Any]):
    def __init__(self) -> None:
        super().__init__(ROWS)


def test_a_row_without_a_text_is_named(hugging_face: Any) -> None:
    with pytest.raises(ShardError, match="field 'body'") as caught:
        list(TextStream(hugging_face, FakeEncoder(), text="body"))
    assert caught.value.path == "Dataset" and caught.value.index == 0


class Uncounted(torch.utils.data.Dataset[Any]):
    """A map-style dataset that does not say how many records it has."""

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"text": "a bank"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rows: datasets.DatasetDict(train=rows), r"DatasetDict .*'train'\]: pass .*, as in data\['train'\]"),
        (
            lambda rows: datasets.IterableDatasetDict(dev=rows.to_iterable_dataset()),
            r"IterableDatasetDict with the keys \['dev'\]: pass one of its splits, as in data\['dev'\]",
        ),
        (lambda rows: {"a": rows, "b": rows}, r"dict with the keys \['a', 'b'\]: pass .*, as in data\['a'\]"),
        (
            lambda rows: {"text": ["a bank"]},
            r"dict with the keys \['text'\]: pass a list of dicts, one a record, as in",
        ),
        (lambda rows: {}, r"dict with the keys \[\]: pass a list of dicts, one a record$"),
        (lambda rows: {"a.jsonl", "b.jsonl"}, "set, which has no order: pass a list"),
        (lambda rows: DataLoader(ROWS), "DataLoader, which has no positions to share out: use bertstream.wrap"),  # type: ignore[arg-type]
        (lambda rows: pyarrow.table({"text": ["a"]}).to_reader(), r"RecordBatchReader, .*: pass its read_all\(\)$"),
        (
            lambda rows: pyarrow.dataset.dataset(pyarrow.table({"text": ["a"]})),
            r".*Dataset, .*: pass its to_table\(\)$",
        ),
        (lambda rows: Uncounted(), "Uncounted, which has no positions to share out: use bertstream.wrap"),
    ],
)
def test_a_source_that_is_neither_shards_nor_rows_is_refused_with_the_way_out(
    hugging_face: Any, make: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"shards is an? {message}"):
        bertstream.stream(make(hugging_face), FakeEncoder())


def test_the_rows_that_a_refused_dict_of_columns_is_told_to_pass_are_rows() -> None:
    data = {"text": ["a bank", "a river"], "id": [3, 4]}
    assert sorted(ids([dict(zip(data, row)) for row in zip(*data.values())])) == [3, 4]  # noqa: B905


def test_names_in_a_series_are_shards_whatever_its_index(tmp_path: Path) -> None:
    names = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    for name in names:
        Path(name).write_text('{"text": "a bank"}\n')
    assert TextStream(pandas.Series(names, index=[7, 3]), FakeEncoder()).shards == names
