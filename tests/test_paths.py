"""Where a path such as "data.text" leads."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertstream.paths import find, splits

KEYS = st.text("ab.", min_size=1, max_size=4)
NESTED = st.recursive(
    st.integers(), lambda inner: st.dictionaries(KEYS, inner, max_size=3) | st.lists(inner, max_size=2)
)


@pytest.mark.parametrize(
    ("holder", "path", "value"),
    [
        ({"text": 1}, "text", 1),
        ({"data": {"text": 1}}, "data.text", 1),
        ({"data": {"text": 1}, "data.text": 2}, "data.text", 2),
        ({"a.b": {"c": 1}, "a": {"b.c": 2}}, "a.b.c", 1),
        ({"a.b": {"d": 1}, "a": {"b": {"c": 2}}}, "a.b.c", 2),
        ({"turns": [{"text": 1}, {"text": 2}]}, "turns.1.text", 2),
        (({"text": 1}, 5), "0.text", 1),
        ({"a.": 1, ".b": 2}, "a.", 1),
        ({"data": {"0": 1}}, "data.0", 1),
    ],
)
def test_a_path_leads_to_a_key_with_dots_before_it_leads_further_down(holder: Any, path: str, value: int) -> None:
    assert find(holder, path) == value


@pytest.mark.parametrize("path", ["text", "data.label", "data.text.x", "turns.2", "turns.-1", "turns.x", "turns.", "."])
def test_a_path_to_nowhere_is_a_key_error_that_names_it(path: str) -> None:
    with pytest.raises(KeyError) as caught:
        find({"data": {"text": "text"}, "turns": ["a", "b"]}, path)
    assert caught.value.args == (path,)


def places(holder: Any) -> list[tuple[tuple[str, ...], Any]]:
    parts = holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()
    return [((str(name), *rest), value) for name, part in parts for rest, value in [((), part), *places(part)]]


@given(st.dictionaries(KEYS, NESTED, max_size=3))
def test_every_place_has_a_path_that_leads_to_some_value_of_that_path(holder: dict[str, Any]) -> None:
    by_path: dict[str, list[Any]] = {}
    for keys, value in places(holder):
        by_path.setdefault(".".join(keys), []).append(value)
    for path, values in by_path.items():
        assert find(holder, path) in values


@given(st.text("ab.", min_size=1))
def test_the_parts_of_a_path_join_to_the_path(path: str) -> None:
    found = list(splits(path))
    assert found[0] == (path, "")
    assert all(f"{head}.{rest}" == path for head, rest in found[1:])
    assert sorted((len(head) for head, _ in found), reverse=True) == [len(head) for head, _ in found]
