"""Labels become their numbers, in a stream's fields and beside vectors of words."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_files import read, read_until_error, tar_bytes, write

import bertstream
from bertstream import ConfigError
from bertstream.labels import NumberOf
from bertstream.reading.options import ReadOptions
from bertstream.testing import FakeEncoder


def test_labels_become_their_numbers_in_every_format(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pydict({"text": ["a", "b"], "c": ["card", "refund"]}), tmp_path / "a.parquet"
    )
    for path in (
        write(tmp_path / "a.csv", "text,c\na,card\nb,refund\n"),
        write(tmp_path / "a.jsonl", '{"text": "a", "c": "card"}\n{"text": "b", "c": "refund"}'),
        str(tmp_path / "a.parquet"),
    ):
        batch = next(iter(bertstream.stream(path, FakeEncoder(), fields={"c": ["refund", "card"]})))
        assert sorted(batch["c"].tolist()) == [0, 1]
        assert [record.fields["c"] for record in read(path, ReadOptions(fields={"c": ("refund", "card")}))] == [1, 0]


def test_labels_of_words_become_lists_of_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": ["New", "York"], "tags": ["B", "I"]}\n{"text": [], "tags": []}')
    assert [record.fields["tags"] for record in read(path, ReadOptions(fields={"tags": ["O", "B", "I"]}))] == [
        [1, 2],
        [],
    ]


@pytest.mark.parametrize(
    "labels",
    [
        np.array(["refund", "card"]),
        pandas.Series(["refund", "card"]).unique(),
        pandas.Series(["refund", "card"]),
        pandas.Index(["refund", "card"]),
        pandas.Categorical(["refund", "card"]),
        pyarrow.array(["refund", "card"]),
        datasets.ClassLabel(names=["refund", "card"]),
    ],
    ids=lambda labels: type(labels).__name__,
)
def test_labels_may_come_as_an_array_or_a_class_label(labels: Any) -> None:
    rows = [{"text": ["a"], "c": "card"}, {"text": ["b"], "c": "refund"}]
    [batch] = bertstream.stream(rows, FakeEncoder(), fields={"c": labels, "__index__": None})
    assert batch["c"].tolist() == [1 - index for index in batch["__index__"]]
    assert batch["text"].align([["card"], ["refund"]], names=labels).tolist() == [[1], [0]]


@pytest.mark.parametrize("read", [lambda rows: rows, pyarrow.Table.from_pylist], ids=["records", "columns"])
def test_none_keeps_a_field_beside_labels_as_it_is(read: Callable[[Any], Any]) -> None:
    rows = read([{"text": "a", "c": "card", "n": 0.5, "unread": 1}, {"text": "b", "c": "card", "n": None, "unread": 2}])
    loader = bertstream.stream(rows, FakeEncoder(), fields={"n": None, "c": ["card"], "__none__": None})
    [batch] = loader
    assert sorted(batch) == ["c", "n", "text"] and sorted(batch["n"], key=str) == [0.5, None]
    pickle.dumps(loader._stream)


@pytest.mark.parametrize("value", ["refnd", None, 0, ["refund", "x"], {"a": 1}])
def test_an_unknown_label_is_a_broken_record_that_names_the_known_ones(tmp_path: Path, value: Any) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "c": "card"}\n' + json.dumps({"text": "b", "c": value}))
    _, error = read_until_error(path, ReadOptions(fields={"c": ["refund", "card"]}))
    shown = repr("x" if isinstance(value, list) else value)
    assert f"{path}, record 1, field 'c': {shown} is none of the labels ['refund', 'card']" in str(error)
    assert (error.index, error.field) == (1, "c")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b", "a"], "fields\\['c'\\]=.*: the label 'a' comes twice"),
        ([], r"fields\['c'\]=\[\]: list the labels"),
        (["a", 1], r"fields\['c'\]=\['a', 1\]: list the labels, strings, in the order"),
        ([1, 2], r"list the labels, strings, .* or write a function, as in \{\"c\": int\}"),
        ({}, r"fields\['c'\]=\{\}: list the labels"),
        ({1: 0}, r"list the labels, strings"),
        ({"a": "0"}, r"fields\['c'\]=\{'a': '0'\}: the number of a label is an int"),
        ({"a": True}, "the number of a label is an int"),
        (np.array([1, 2]), r"fields\['c'\]=\[1, 2\]: list the labels, strings"),
        ({"a", "b"}, r"fields\['c'\]=\{.*\}: a set has no order: write sorted\(...\) of it$"),
        (frozenset([*map(str, range(999))]), r"^fields\['c'\]=frozenset.{51}: a set has no order"),
        ("ab", "lists of labels; got 'c': 'ab'"),
        (7, "lists of labels; got 'c': 7"),
    ],
)
def test_bad_labels_are_refused_by_the_constructor(labels: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReadOptions(fields={"c": labels})


@given(st.lists(st.text("ab", max_size=3), min_size=1, unique=True))
def test_numbers_are_positions_and_survive_pickling(names: list[str]) -> None:
    number_of: Callable[[Any], Any] = pickle.loads(pickle.dumps(NumberOf(names, "c")))
    assert number_of(names) == list(range(len(names))) and repr(number_of) == repr(names)


def test_a_members_bytes_are_read_as_a_label(tmp_path: Path) -> None:
    members = [("0.txt", b"a"), ("0.label", b"spam"), ("1.txt", b"b"), ("1.label", b"\xef\xbb\xbfham")]
    path = write(tmp_path / "a.tar", tar_bytes([*members, ("2.txt", b"c"), ("2.label", b"\xff")]))
    options = ReadOptions(text="txt", fields={"label": ["ham", "spam"]})
    records, error = read_until_error(path, options)
    assert [record.fields["label"] for record in records] == [1, 0]
    assert r"record 2, field 'label': b'\xff' is none of the labels ['ham', 'spam']" in str(error)


@pytest.mark.parametrize("name", ["cls", "class.id", "score"])
def test_members_that_are_numbers_elsewhere_may_hold_labels(tmp_path: Path, name: str) -> None:
    members = [("0.txt", b"a"), (f"0.{name}", b"spam\n"), ("1.txt", b"b"), (f"1.{name}", b" ham")]
    path = write(tmp_path / "a.tar", tar_bytes([*members, ("2.txt", b"c"), (f"2.{name}", b"eggs")]))
    records, error = read_until_error(path, ReadOptions(text="txt", fields={name: ["ham", "spam"]}))
    assert [record.fields[name] for record in records] == [1, 0]
    assert f"record 2, field '{name}': b'eggs' is none of the labels ['ham', 'spam']" in str(error)
    for fields in (None, [name], {name: int}):
        error = read_until_error(path, ReadOptions(text="txt", fields=fields))[1]
        assert f"field '{name}': a member of this name is read as" in str(error)
        assert "but holds b'spam\\n': if these are labels, list them or give a label2id, as in fields=" in str(error)
    assert read(path, ReadOptions(text="txt", fields=[]))[0].fields == {}


def test_int_of_a_label_says_how_labels_become_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,c\na,spam\n")
    error = read_until_error(path, ReadOptions(fields={"c": int}))[1]
    way_out = 'if these are labels, list them or give a label2id, as in fields={"c": ["ham", "spam"]}'
    assert f"on 'spam': {way_out}" in str(error)
    path = write(tmp_path / "a.jsonl", '{"text": "a", "c": null}')
    assert "labels" not in str(read_until_error(path, ReadOptions(fields={"c": int}))[1])


@given(st.dictionaries(st.text("ab", max_size=3), st.integers(-100, 5), min_size=1))
def test_a_mapping_gives_its_own_numbers(label2id: dict[str, int]) -> None:
    number_of = pickle.loads(pickle.dumps(NumberOf(label2id, "c")))
    assert number_of([*label2id]) == [*label2id.values()]
    assert number_of([label.encode() for label in label2id]) == [*label2id.values()]


def test_a_label_that_a_mapping_lacks_is_a_broken_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "c": "spam"}\n{"text": "b", "c": "spm"}')
    records, error = read_until_error(path, ReadOptions(fields={"c": {"ham": 0, "spam": 7}}))
    assert records[0].fields == {"c": 7}
    assert "record 1, field 'c': 'spm' is none of the labels ['ham', 'spam']" in str(error)


# --- align ------------------------------------------------------------------------------------------------------------


def test_align_takes_labels_by_name() -> None:
    batch = next(iter(bertstream.stream([{"text": ["New", "York", "is"]}, {"text": []}], FakeEncoder())))
    tags: list[list[Any]] = [["B", "I", "O"], []] if batch["__index__"][0] == 0 else [[], ["B", "I", "O"]]
    numbers = [[{"O": 0, "B": 1, "I": 2}[tag] for tag in row] for row in tags]
    embeddings = batch["text"]
    assert embeddings.align(tags, names=["O", "B", "I"]).tolist() == embeddings.align(numbers).tolist()
    assert embeddings.align(tags, -1, names=("O", "B", "I")).min() == -1


@pytest.mark.parametrize(
    ("tag", "names", "message"),
    [
        (
            "X",
            ["O", "B"],
            r"the tags of text 0 of the batch \(record 0 of list\): 'X' is none of the labels \['O', 'B'\]",
        ),
        (0, ["O", "B"], "0 is none of the labels"),
        ("O", ["O", "O"], r"names=\['O', 'O'\]: the label 'O' comes twice"),
        ("O", "OB", "names='OB': list the labels"),
        ("O", None, r"tags of text 0 are \['O'\]: give a list of numbers, one a word, or labels with names="),
    ],
)
def test_align_names_the_record_of_a_label_that_is_not_known(tag: Any, names: Any, message: str) -> None:
    batch = next(iter(bertstream.stream([{"text": ["word"]}], FakeEncoder())))
    with pytest.raises(ConfigError, match=message):
        batch["text"].align([[tag]], names=names)
