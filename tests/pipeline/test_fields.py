"""Texts are found in batches and records of any structure; putting vectors in changes nothing else."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchEncoding

from bertstream import Embeddings, TokenBatch
from bertstream.errors import ConfigError, EncoderError, ShardError
from bertstream.pipeline.fields import Field, as_fields, as_tensors, get_field, put_fields, texts_of, with_vectors
from bertstream.testing import FakeEncoder, FakeTokenizer
from bertstream.tokens import Text


class Pair(NamedTuple):
    said: Any
    label: Any


@dataclass
class Sample:
    said: Any
    label: Any = 0


@dataclass(frozen=True)
class FrozenSample:
    said: Any
    label: Any


@dataclass(frozen=True, slots=True)
class SlottedSample:
    said: Any
    label: Any


class Plain:
    """Neither a sequence nor a mapping nor a dataclass."""

    said = "a"


def encoded(*texts: Text) -> Embeddings:
    encoder = FakeEncoder()
    return encoder.encode(TokenBatch.from_texts(encoder.tokenizer(texts)))


# --- fields -----------------------------------------------------------------------------------------------------------


def test_fields_become_a_tuple() -> None:
    assert as_fields("said") == ("said",) and as_fields(-1) == (-1,) and as_fields(["q", 0]) == ("q", 0)
    assert as_fields(None) is None


@pytest.mark.parametrize("text", [True, (), [], 0.5, b"said", ("said", None), ("said", "said"), [["said"]]], ids=repr)
def test_a_value_that_names_no_field_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        as_fields(text)
    assert f"text={text!r}: name a key" in str(caught.value)


@pytest.mark.parametrize(
    ("holder", "text", "message"),
    [
        (
            {"sentence": "a", "label": 1},
            "said",
            r"text='said' names nothing in a dict with the keys \['sentence', 'label'\]",
        ),
        (Pair("a", 1), "text", r"text='text' names nothing in a Pair with the fields \['said', 'label'\]"),
        (FrozenSample("a", 1), "text", r"in a FrozenSample with the fields \['said', 'label'\]"),
        (FrozenSample("a", 1), 0, r"text=0 names nothing in a FrozenSample with the fields"),
        (("a", 1), 2, "text=2 names nothing in a tuple of length 2"),
        (["a", 1], -3, "text=-3 names nothing in a list of length 2"),
        (
            ("a", 1),
            "said",
            "text='said' names nothing in a tuple of length 2: its fields are positions, text=0 is the first",
        ),
        (("a", 1), "count", "text='count' names nothing in a tuple of length 2"),
        ("a bare string", 0, "text=0 names nothing in a str"),
        ("a bare string", "said", "text='said' names nothing in a str"),
        (Plain(), "text", "text='text' names nothing in a Plain"),
    ],
)
def test_a_missing_field_is_refused_with_the_fields_there_are(holder: Any, text: Field, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_field(holder, text)


HOLDERS: list[tuple[Any, Field, Field]] = [
    ({"said": 1, "label": 2}, "said", "label"),
    (OrderedDict(said=1, label=2), "said", "label"),
    (UserDict({"said": 1, "label": 2}), "said", "label"),
    (BatchEncoding({"said": 1, "label": 2}), "said", "label"),
    ({0: 1, 1: 2}, 0, 1),
    ([1, 2], 0, 1),
    ([1, 2], -2, -1),
    ((1, 2), -2, 1),
    ((1, 2), 0, -1),
    (Pair(1, 2), "said", "label"),
    (Pair(1, 2), -2, 1),
    (Sample(1, 2), "said", "label"),
    (FrozenSample(1, 2), "said", "label"),
    (SlottedSample(1, 2), "said", "label"),
]


@pytest.mark.parametrize(("holder", "field", "rest"), HOLDERS, ids=repr)
def test_put_fields_makes_a_copy_of_the_same_type(holder: Any, field: Field, rest: Field) -> None:
    before = copy.deepcopy(holder)
    out = put_fields(holder, {field: "new"})
    assert type(out) is type(holder) and out is not holder
    assert get_field(out, field) == "new" and get_field(holder, field) == 1
    assert get_field(out, rest) == 2
    assert holder == before
    both = put_fields(holder, {field: "new", rest: "too"})
    assert get_field(both, field) == "new" and get_field(both, rest) == "too"


def test_put_fields_adds_new_keys_to_a_dict() -> None:
    assert put_fields({"said": 1}, {"vectors": 2}) == {"said": 1, "vectors": 2}


def test_arrays_become_tensors_over_the_same_memory_unless_they_are_read_only() -> None:
    numbers, row = np.arange(3), np.arange(2)
    read_only = np.frombuffer(b"\1\2", np.uint8)
    as_tensors(numbers)[0] = 7
    tensors = as_tensors([row, read_only, None, "a"])
    tensors[0][0] = 8
    tensors[1][0] = 9
    assert numbers[0] == 7 and row[0] == 8 and read_only[0] == 1
    assert tensors[2:] == [None, "a"]


# --- texts out --------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
    st.sampled_from([dict, BatchEncoding]),
)
def test_padded_ids_are_read_with_the_mask_of_the_same_dict(
    lengths: list[int], left: bool, pairs: bool, kind: Any
) -> None:
    longest = max(lengths)
    ids = [list(range(10 * i + 1, 10 * i + 1 + length)) for i, length in enumerate(lengths)]
    padded, mask, segments = (torch.zeros(len(lengths), longest, dtype=torch.int64) for _ in range(3))
    for i, length in enumerate(lengths):
        real = slice(longest - length, longest) if left else slice(0, length)
        padded[i, real], mask[i, real] = torch.tensor(ids[i], dtype=torch.int64), 1
        segments[i, real] = torch.arange(length) % 2
    batch = kind({"input_ids": padded, "attention_mask": mask} | ({"token_type_ids": segments} if pairs else {}))
    found = texts_of(batch, ("input_ids",), FakeTokenizer())["input_ids"]
    assert np.split(found.input_ids, found.cu_seqlens[1:-1])[0].tolist() == ids[0]
    assert found.input_ids.tolist() == [i for row in ids for i in row] and found.lengths.tolist() == lengths
    if pairs:
        assert found.token_type_ids is not None
        assert found.token_type_ids.tolist() == [k % 2 for length in lengths for k in range(length)]
    else:
        assert found.token_type_ids is None


def test_texts_are_keyed_by_field_and_tokens_stay_as_they_are() -> None:
    tokens = TokenBatch.from_texts(FakeTokenizer()(["x"]))
    found = texts_of((["a b"], tokens, 7), (0, -2), FakeTokenizer())
    assert list(found) == [0, -2] and found[0].num_tokens == 2 and found[-2] is tokens
    assert list(texts_of(["a", ["b", "c"]], None, FakeTokenizer())) == [None]
    assert texts_of(tokens, ("text",), FakeTokenizer()) == {None: tokens}
    assert len(texts_of({"text": []}, ("text",), FakeTokenizer())["text"]) == 0


@pytest.mark.parametrize("texts", ["a text", {"a text"}, 5, None, np.array(["a"])], ids=repr)
def test_a_value_that_is_no_list_of_texts_is_refused_with_its_type(texts: Any) -> None:
    with pytest.raises(ConfigError, match=f"text='said' is a {type(texts).__name__}: a batch of texts is a list"):
        texts_of({"said": texts}, ("said",), FakeTokenizer())


def test_an_error_of_the_tokenizer_is_raised_unchanged() -> None:
    error = EncoderError("too long", records=(1,))

    def fail(texts: Any) -> Any:
        raise error

    with pytest.raises(EncoderError) as caught:
        texts_of(["a"], None, fail)
    assert caught.value is error


@pytest.mark.parametrize(
    "batch_of", [lambda error: error, lambda error: {"said": error}, lambda error: {"said": ["a"], "heard": error}]
)
def test_an_error_that_a_worker_process_sent_instead_of_texts_is_raised(batch_of: Any) -> None:
    error = ShardError("broken", path="a.jsonl", index=3)
    with pytest.raises(ShardError) as caught:
        texts_of(batch_of(error), ("said", "heard"), FakeTokenizer())
    assert caught.value is error


# --- vectors in -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("holder", "field", "rest"), HOLDERS, ids=repr)
def test_vectors_replace_the_texts_and_other_fields_are_the_users_own(holder: Any, field: Field, rest: Field) -> None:
    label, found = object(), encoded("a b", "c")
    batch = put_fields(holder, {field: ["a b", "c"], rest: label})
    out = with_vectors(batch, {field: found}, text=(field,), into=None, layout=None)
    assert type(out) is type(batch) and get_field(out, field) is found and get_field(out, rest) is label
    out = with_vectors(batch, {field: found}, text=(field,), into=None, layout="padded")
    assert get_field(out, rest) is label and get_field(batch, field) == ["a b", "c"]
    values, mask = found.padded()
    if isinstance(batch, (dict, UserDict)):
        assert torch.equal(out[field], values) and torch.equal(out[f"{field}_mask"], mask)
    else:
        assert all(map(torch.equal, get_field(out, field), (values, mask)))


def test_no_other_field_of_the_user_is_overwritten() -> None:
    found: dict[Field | None, Embeddings] = {"text": encoded("a b")}
    batch = {"text": ["a b"], "text_mask": "mine", "label": "mine"}
    with pytest.raises(ConfigError, match="layout='padded' would overwrite the batch's own 'text_mask'"):
        with_vectors(batch, found, text=("text",), into=None, layout="padded")
    with pytest.raises(ConfigError, match=r"into=\('label',\) would overwrite the batch's own 'label'"):
        with_vectors(batch, found, text=("text",), into=("label",), layout=None)
    assert with_vectors(batch, found, text=("text",), into=("text",), layout=None) == batch | found
    assert with_vectors(batch, found, text=("text",), into=("v",), layout="padded").keys() == {*batch, "v", "v_mask"}


def test_bare_texts_become_bare_vectors() -> None:
    found = encoded("a b")
    assert with_vectors(["a b"], {None: found}, text=None, into=None, layout=None) is found
    values, cu_seqlens = with_vectors(["a b"], {None: found}, text=None, into=None, layout="flat")
    assert torch.equal(values, found.values) and cu_seqlens.tolist() == [0, 2]


def test_a_streams_tokens_become_a_dict_of_their_fields() -> None:
    found = encoded("a b", "c")
    assert with_vectors(found.tokens, {None: found}, text=("text",), into=None, layout=None) is found
    found.tokens.fields = {"label": np.array([3, 4]), "id": ["x", "y"]}
    out = with_vectors(found.tokens, {None: found}, text=("said",), into=None, layout=None)
    assert list(out) == ["label", "id", "said"] and out["said"] is found and out["id"] == ["x", "y"]
    assert torch.equal(out["label"], torch.tensor([3, 4]))
    padded = with_vectors(found.tokens, {None: found}, text=("said",), into=("v",), layout="padded")
    assert list(padded) == ["label", "id", "v", "v_mask"]


def test_into_gives_each_text_a_key_and_needs_dicts() -> None:
    embeddings: dict[Field | None, Embeddings] = {"q": encoded("a"), "a": encoded("b")}
    out = with_vectors({"q": ["a"], "a": ["b"]}, embeddings, text=("q", "a"), into=("x", "y"), layout=None)
    assert out == {"q": ["a"], "a": ["b"], "x": embeddings["q"], "y": embeddings["a"]}
    with pytest.raises(ConfigError, match=r"into=\('x',\) needs batches that are dicts; this is a list"):
        with_vectors([["a"]], {0: encoded("a")}, text=(0,), into=("x",), layout=None)


class FrozenMapping(Mapping[str, Any]):
    """A mapping without `__setitem__`, made of a dict, as frozen dicts are."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


@pytest.mark.parametrize("kind", [MappingProxyType, FrozenMapping])
@pytest.mark.parametrize("layout", [None, "padded"])
def test_vectors_go_into_a_copy_of_a_mapping_that_cannot_be_written(kind: Any, layout: Any) -> None:
    batch, found = kind({"said": ["a b"], "label": 1}), encoded("a b")
    out = with_vectors(batch, {"said": found}, text=("said",), into=("v",), layout=layout)
    assert type(out) is kind and out["said"] == ["a b"] and out["label"] == 1 and "v" not in batch
    assert (out["v"] is found) if layout is None else torch.equal(out["v_mask"], found.padded()[1])
    assert with_vectors(batch, {"said": found}, text=("said",), into=None, layout=None)["said"] is found


class ReadOnly:
    """Its text is a property that cannot be set."""

    said = property(lambda self: ["a b"])


class Keyed(FrozenMapping):
    """A mapping that is not made of a dict."""

    def __init__(self) -> None:
        super().__init__({"said": ["a b"]})


class Uncopyable:
    """Holds a lock, which cannot be copied."""

    def __init__(self) -> None:
        self.said = ["a b"]

    def __copy__(self) -> Uncopyable:
        raise TypeError("cannot pickle '_thread.lock' object")


@pytest.mark.parametrize("batch", [ReadOnly(), Keyed(), Uncopyable()], ids=lambda batch: type(batch).__name__)
def test_a_batch_that_takes_no_vectors_is_refused_with_the_way_out(batch: Any) -> None:
    with pytest.raises(ConfigError, match=f"'said' cannot be set in a copy of a {type(batch).__name__}.*such as dicts"):
        with_vectors(batch, {"said": encoded("a b")}, text=("said",), into=None, layout=None)
    assert get_field(batch, "said") == ["a b"]
