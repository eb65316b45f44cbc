"""Tables of pandas, polars and Arrow are rows, as a list of dicts of the same values is."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from test_rows import ROWS, columns

import bertstream
from bertstream import ConfigError, ShardError, StreamConfig
from bertstream.reading.tables import TableRows, is_table
from bertstream.testing import FakeEncoder, assert_resumes_exactly

pandas = pytest.importorskip("pandas")
pyarrow = pytest.importorskip("pyarrow")


def table(kind: str) -> Any:
    if kind == "polars":
        return pytest.importorskip("polars").DataFrame(ROWS)
    arrow = pyarrow.Table.from_pylist(ROWS)
    return {
        "pandas": lambda: pandas.DataFrame(ROWS),
        "pandas, another index": lambda: pandas.DataFrame(ROWS, index=[f"r{i % 9}" for i in range(len(ROWS))]),
        "pandas over Arrow": lambda: pandas.DataFrame(ROWS).convert_dtypes(dtype_backend="pyarrow"),
        "pandas with arrays as words": lambda: arrow.to_pandas(),
        "a Table": lambda: arrow,
        "a RecordBatch": lambda: arrow.to_batches()[0],
    }[kind]()


KINDS = [
    "pandas", "pandas, another index", "pandas over Arrow", "pandas with arrays as words", "polars", "a Table",
    "a RecordBatch",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_gives_the_batches_of_its_rows_as_dicts(kind: str) -> None:
    rows = table(kind)
    assert is_table(rows)
    assert columns(rows, shuffle=True) == columns(ROWS, shuffle=True)
    assert columns(rows, text="words", fields=["id"]) == columns(ROWS, text="words", fields=["id"])


@pytest.mark.parametrize("kind", ["polars", "a Table"])
def test_a_stream_over_a_table_resumes_exactly(kind: str) -> None:
    rows, reading = table(kind), StreamConfig(lanes=3, bucket_size=20, open_shards=2)
    assert_resumes_exactly(
        lambda: bertstream.stream(rows, FakeEncoder(), batch_size=16, shuffle=True, reading=reading), cuts=[4]
    )


@pytest.mark.parametrize("kind", ["pandas", "pandas with arrays as words", "a Table"])
def test_ids_in_a_table_are_texts(kind: str) -> None:
    [batch] = bertstream.stream(table(kind)[:5], FakeEncoder(), text="tags", fields=["id"])
    assert batch["tags"].tokens.input_ids.tolist() == [0, 2, 1, 2, 2, 2, 3, 2, 4, 2]


def test_a_table_is_read_a_run_at_a_time_and_pickles() -> None:
    rows = TableRows(pandas.DataFrame({"id": range(1000)}))
    assert [i for run in rows.runs(range(3, 999)) for i in run["id"]] == [*range(3, 999)]
    assert rows[7] == {"id": 7} and len(rows) == 1000 and rows.name == "DataFrame"
    assert pickle.loads(pickle.dumps(rows))[999] == {"id": 999}


@pytest.mark.parametrize("missing", [None, float("nan"), pandas.NA, pandas.NaT], ids=repr)
def test_a_missing_text_is_a_broken_record_with_its_index(missing: Any) -> None:
    rows = pandas.DataFrame({"text": pandas.Series(["a", "b", missing, "c"], [5, 6, 7, 8], dtype=object)})
    with pytest.raises(ShardError, match=r"DataFrame, record 2, field 'text': a text is a string or .*, not") as caught:
        list(bertstream.stream(rows, FakeEncoder()))
    assert caught.value.index == 2
    loader = bertstream.stream(rows, FakeEncoder(), reading=StreamConfig(max_bad_records=1))
    assert [len(batch["text"]) for batch in loader] == [3] and loader.stats()["bad_records"] == 1


@pytest.mark.parametrize("missing", [None, float("nan"), pandas.NA, pandas.NaT], ids=repr)
def test_a_missing_value_of_pandas_is_none_for_functions_and_in_batches(missing: Any) -> None:
    rows = pandas.DataFrame({"text": pandas.Series(["a", missing, "c"], dtype=object), "number": [0, 1, 2]})
    rows["object"] = rows["text"]
    rows["string"] = pandas.Series(["a", missing, "c"], dtype="string")
    rows["category"] = rows["object"].astype("category")
    rows["nullable"] = pandas.Series([1, pandas.NA, 3], dtype="Int64")
    rows["day"] = pandas.to_datetime(pandas.Series(["2020-01-01", None, "2020-01-03"]))
    rows["arrays"] = pandas.Series([np.array([1, 2]), missing, np.array([3])], dtype=object)
    assert [name for name, value in TableRows(rows)[1].items() if value is not None] == ["number"]
    [batch] = bertstream.stream(rows, FakeEncoder(), keep=lambda row: row["text"] is not None)
    assert batch["number"].tolist() == [0, 2]
    [batch] = bertstream.stream(rows, FakeEncoder(), map=lambda row: {**row, "text": row["text"] or "none"})
    assert [batch["nullable"][i] for i in batch["number"].argsort()] == [1, None, 3]


def test_nan_among_plain_numbers_of_pandas_stays_a_number() -> None:
    rows = pandas.DataFrame({"text": ["a", "b"], "score": [0.5, None]})
    [batch] = bertstream.stream(rows, FakeEncoder(), fields=["score"])
    assert batch["score"].dtype == torch.float64 and batch["score"].isnan().sum() == 1


def test_a_table_of_many_chunks_gives_each_row_once() -> None:
    whole = pyarrow.table({"text": [f"text {i}" for i in range(300)], "id": range(300)})
    parts = [whole.slice(0, size) for size in (3, 0, 300, 1)]
    loader = bertstream.stream(pyarrow.concat_tables(parts), FakeEncoder())
    assert sorted(i for batch in loader for i in batch["id"].tolist()) == sorted([*range(3), *range(300), 0])


def test_columns_without_a_name_are_named_by_their_number() -> None:
    rows = pandas.DataFrame([["a bank", 3]])
    [batch] = bertstream.stream(rows, FakeEncoder(), text="0")
    assert batch["1"].tolist() == [3]


def test_a_table_without_rows_or_with_a_name_twice_is_refused() -> None:
    rows = pandas.DataFrame({"text": ["a bank"], "id": [3]})
    with pytest.raises(ConfigError, match=r"shards is a DataFrame of 0 rows with the columns \['text', 'id'\]"):
        bertstream.stream(rows[:0], FakeEncoder())
    with pytest.raises(ConfigError, match="shards is a DataFrame with several columns named 'text'"):
        bertstream.stream(pandas.concat([rows, rows], axis=1), FakeEncoder())
    polars = pytest.importorskip("polars")
    with pytest.raises(ConfigError, match=r"shards is a LazyFrame, .*what its collect\(\) returns"):
        bertstream.stream(polars.from_dicts(ROWS).lazy(), FakeEncoder())


@pytest.mark.parametrize(
    "value", [None, [], {}, pandas.Series(["a"]), pyarrow.array(["a"])], ids=lambda v: type(v).__name__
)
def test_other_things_are_no_tables(value: Any) -> None:
    assert not is_table(value)
