"""The text and the wanted fields of a record are chosen by name."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from shard_files import read, read_until_error, texts, write

from bertstream.errors import ConfigError
from bertstream.reading.access import Access
from bertstream.reading.options import ReadOptions
from bertstream.tokens import Record


def test_all_fields_are_kept_unchanged_by_default(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": [1, null], "text": "x", "b": {"c": 0.5}}')
    assert read(path) == [Record("x", {"a": [1, None], "b": {"c": 0.5}}, "a:0", path, 0)]
    path = write(tmp_path / "a.csv", 'text,label\n"a ""b"", c\nd",7\n')
    assert read(path) == [Record('a "b", c\nd', {"label": "7"}, "a:0", path, 0)]


def test_fields_are_chosen_by_name_and_passed_through_functions(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label,other\nx,7,8\n")
    assert read(path, ReadOptions(fields=["label"]))[0].fields == {"label": "7"}
    assert read(path, ReadOptions(fields={"label": int}))[0].fields == {"label": 7}
    assert read(path, ReadOptions(fields=[]))[0].fields == {}


def test_a_text_may_be_a_list_of_words(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": ["New", "York"]}\n{"text": []}')
    assert texts(read(path)) == [["New", "York"], []]


def test_options_pickle_and_hide_passwords() -> None:
    options = ReadOptions(text="a", fields={"b": int}, access=Access(storage_options={"password": "xyzzy"}))
    assert pickle.loads(pickle.dumps(options)) == options
    assert "xyzzy" not in repr(options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "text names the field"),
        ({"text": ["a"]}, r"text names the field.*For vectors of several fields, use a DataLoader"),
        ({"fields": "label"}, r"fields=\['label'\]"),
        ({"fields": [1]}, "names of fields"),
        ({"fields": {"label": "int"}}, "names to functions"),
        ({"text": "a", "fields": ["a"]}, "leave out 'a'"),
        ({"fields": ["__key__"]}, "'__key__' is a field that each batch has of its own"),
        ({"text": "__index__"}, "'__index__' is a field"),
        ({"pair": "__shard__"}, "'__shard__' is a field"),
    ],
)
def test_bad_options_are_refused_by_the_constructor(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReadOptions(**arguments)


def test_an_error_in_a_users_function_is_kept_as_the_cause(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "n": {}}')
    _, error = read_until_error(path, ReadOptions(fields={"n": lambda value: value["key"]}))
    assert isinstance(error.__cause__, KeyError)


@pytest.mark.parametrize("name", ["__key__", "__index__", "__shard__", "__repeated__"])
def test_a_field_that_would_be_replaced_by_the_batchs_own_is_refused_unless_it_is_left_out(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "a", "{name}": 17, "n": 1}}')
    _, error = read_until_error(path)
    assert error.field == name and "rename it, or name others with fields=" in str(error)
    assert read(path, ReadOptions(fields=["n"]))[0].fields == {"n": 1}
