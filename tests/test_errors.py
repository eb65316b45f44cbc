"""The error tree as its docstring draws it, and errors on their way between processes."""

from __future__ import annotations

import copy
import pickle
from typing import Any, Literal

import numpy as np
import pytest

from bertstream import errors
from bertstream.errors import (
    BertstreamError,
    CacheError,
    ConfigError,
    EncoderError,
    LoaderClosedError,
    ShardError,
    StateError,
    check_at_least,
    check_choice,
    check_flag,
    described,
    kind_of,
    shortened,
)

ONE_OF_EACH = [
    BertstreamError("it broke"),
    ShardError("it broke", path="train-003.tar", index=7, field="txt"),
    ShardError("it broke"),
    EncoderError("it broke", records=[2, 5]),
    CacheError("it broke", path="cache"),
    StateError("it broke", key="seed"),
    ConfigError("it broke"),
    LoaderClosedError("it broke"),
]


def test_the_tree_is_as_drawn() -> None:
    bases = {name: cls.__bases__ for name, cls in vars(errors).items() if name.endswith("Error")}
    assert bases == {
        "BertstreamError": (Exception,),
        "ShardError": (BertstreamError,),
        "EncoderError": (BertstreamError,),
        "CacheError": (BertstreamError,),
        "StateError": (BertstreamError,),
        "ConfigError": (BertstreamError, ValueError),
        "LoaderClosedError": (BertstreamError, RuntimeError),
    }


def test_errors_keep_the_fields_they_were_given() -> None:
    assert vars(ShardError("x", path="a.tar", index=7, field="txt")) == {"path": "a.tar", "index": 7, "field": "txt"}
    assert vars(EncoderError("x", records=[2, 5])) == {"records": (2, 5)}
    assert vars(CacheError("x", path="cache")) == {"path": "cache"}
    assert vars(StateError("x", key="seed")) == {"key": "seed"}


def test_fields_that_are_not_known_are_none_or_empty() -> None:
    assert vars(ShardError("x")) == {"path": None, "index": None, "field": None}
    assert (EncoderError("x").records, CacheError("x").path, StateError("x").key) == ((), None, None)


def test_every_field_is_drawn_in_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = {line.split("(")[0].split()[0]: line for line in errors.__doc__.splitlines() if "Error" in line}
    for error in ONE_OF_EACH:
        assert all(f" .{field}" in drawn[type(error).__name__] for field in vars(error))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("error", ONE_OF_EACH, ids=lambda error: type(error).__name__)
def test_errors_pickle_with_their_fields(error: BertstreamError, protocol: int) -> None:
    back = pickle.loads(pickle.dumps(error, protocol))
    assert type(back) is type(error)
    assert (back.args, vars(back)) == (error.args, vars(error))
    assert str(back) == "it broke"


@pytest.mark.parametrize("error", ONE_OF_EACH, ids=lambda error: type(error).__name__)
def test_errors_can_be_copied(error: BertstreamError) -> None:
    back = copy.deepcopy(error)
    assert (type(back), back.args, vars(back)) == (type(error), error.args, vars(error))


def test_whole_numbers_that_are_large_enough_pass() -> None:
    for value in (1, 2, 10**20, np.int64(1)):
        check_at_least("lanes", value, 1)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, 2.5, "3", None, np.int32(0)], ids=repr)
def test_other_values_are_refused_and_shown(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        check_at_least("lanes", value, 1)
    assert str(caught.value) == f"lanes={value!r}: write a whole number of at least 1"


def test_a_value_outside_a_literal_is_refused_with_the_choices() -> None:
    check_choice("uneven", "pad", Literal["stop", "pad"])
    with pytest.raises(ConfigError, match="^uneven='drop': write one of 'stop', 'pad'$"):
        check_choice("uneven", "drop", Literal["stop", "pad"])


def test_messages_name_the_type_of_an_error_and_shorten_long_values() -> None:
    assert described(KeyError("a")) == "KeyError: 'a'"
    assert shortened("x" * 100) == "'" + "x" * 56 + "..."
    assert shortened([1]) == "[1]"


@pytest.mark.parametrize("value", [True, False, np.True_, 0, 1, None])
def test_truth_values_pass(value: Any) -> None:
    check_flag("shuffle", value)


@pytest.mark.parametrize("value", ["yes", "", 1000, -1, 1.0, [], np.ones(2)], ids=repr)
def test_other_values_of_a_flag_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^shuffle=.*: write True or False$"):
        check_flag("shuffle", value)


def test_a_type_has_its_article() -> None:
    assert (kind_of([]), kind_of(BertstreamError()), kind_of(ConfigError())) == (
        "a list", "a BertstreamError", "a ConfigError",
    )  # fmt: skip
    assert kind_of(EncoderError("it broke")) == "an EncoderError"
