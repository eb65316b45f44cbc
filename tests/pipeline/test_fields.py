"""Texts are found in batches and records of any structure; putting vectors in changes nothing else."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset, default_collate
from transformers import AutoTokenizer, BatchEncoding

import bertstream
from bertstream import Embeddings, Encoder, TokenBatch, TokenCollate
from bertstream.errors import ConfigError, EncoderError, ShardError
from bertstream.pipeline.fields import (
    Field,
    as_fields,
    as_tensors,
    get_field,
    position,
    put_fields,
    texts_of,
    with_vectors,
)
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
        ({"in": {"said": "a"}}, "inn.said", r"text='inn.said' names nothing in a dict with the keys \['in'\]"),
        ({"in": {"said": "a"}}, "in.text", r"text='in.text' names nothing: 'in' is a dict with the keys \['said'\]"),
        ({"in": [Pair("a", 1)]}, "in.0.text", r"text='in.0.text' names nothing: 'in.0' is a Pair with the fields"),
        ({"in": ["a", "b"]}, "in.2", "text='in.2' names nothing: 'in' is a list of length 2"),
        ({"in": ("a", "b")}, "in.said.x", r"'in' is a tuple of length 2: its fields are positions, text='in.0' is the"),
        ({"in": "a"}, "in.said", "text='in.said' names nothing: 'in' is a str"),
        (FrozenSample({"a": 1}, 1), "said.b.c", r"names nothing: 'said' is a dict with the keys \['a'\]"),
        ([Plain()], "0.text", "text='0.text' names nothing: '0' is a Plain"),
        (Pair("a", 1), "count", r"text='count' names nothing in a Pair with the fields"),
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


def nested(outer: tuple[Any, Field, Field], inner: tuple[Any, Field, Field]) -> tuple[Any, str, str, str]:
    """A holder in another, and the paths to the inner field, to its neighbour, and to the outer one's neighbour."""
    (around, field, rest), (holder, own, neighbour) = outer, inner
    field, rest = (position(around, part) for part in (field, rest))
    own, neighbour = (position(holder, part) for part in (own, neighbour))
    return put_fields(around, {field: holder}), f"{field}.{own}", f"{field}.{neighbour}", str(rest)


NESTABLE = [holder for holder in HOLDERS if holder[0] != {0: 1, 1: 2}]  # a path has no numbers as keys


@pytest.mark.parametrize("inner", NESTABLE, ids=repr)
@pytest.mark.parametrize("outer", NESTABLE, ids=repr)
def test_a_path_names_a_field_in_holders_of_any_kinds(outer: Any, inner: Any) -> None:
    batch, path, neighbour, rest = nested(outer, inner)
    before, found = copy.deepcopy(batch), encoded("a b", "c")
    assert (get_field(batch, path), get_field(batch, neighbour), get_field(batch, rest)) == (1, 2, 2)
    out = with_vectors(batch, {path: found}, text=(path,), into=None, layout=None)
    assert type(out) is type(batch) and get_field(out, path) is found
    assert (get_field(out, neighbour), get_field(out, rest)) == (2, 2)
    assert batch == before, "the user's own, and what is in it, is unchanged"


def test_a_key_that_has_a_dot_wins_over_a_path_and_a_look_adds_none() -> None:
    assert get_field({"in.said": 1, "in": {"said": 2}}, "in.said") == 1
    assert get_field({"a": {"b.c": 1, "b": {"c": 2}}}, "a.b.c") == 1
    assert get_field({"a.b": {}, "a": {"b": {"c": 2}}}, "a.b.c") == 2
    batch: Any = defaultdict(list, {"in": {"said": 1}})
    assert get_field(batch, "in.said") == 1 and list(batch) == ["in"]


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


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float32, torch.uint8])
def test_padded_ids_of_a_tuple_are_read_with_the_mask_that_is_named(kind: torch.dtype) -> None:
    ids, segments = torch.tensor([[0, 5, 6], [7, 8, 0]]), torch.tensor([[9, 0, 1], [1, 0, 9]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]]).to(kind)
    for batch in ((ids, mask, segments, 3), [ids, mask, segments, 3], (ids.numpy(), mask.numpy(), segments.numpy(), 3)):
        found = texts_of(batch, (0,), FakeTokenizer(), mask=(1,), token_type_ids=(2,))[0]
        assert found.token_type_ids is not None and found.token_type_ids.tolist() == [0, 1, 1, 0]
        assert found.input_ids.tolist() == [5, 6, 7, 8] and found.lengths.tolist() == [2, 2]


def test_padded_ids_of_several_fields_and_paths_have_a_mask_each() -> None:
    q, a, mask = torch.tensor([[1, 2]]), torch.tensor([[3, 4]]), torch.tensor([[1, 0]])
    batch = {"q": {"ids": q, "real": mask}, "a": Sample((a, 1 - mask)), "attention_mask": 7}
    found = texts_of(batch, ("q.ids", "a.said.0"), FakeTokenizer(), mask=("q.real", "a.said.1"))
    assert [tokens.input_ids.tolist() for tokens in found.values()] == [[1], [4]]
    usual = {"in": {"input_ids": q, "attention_mask": mask}}
    assert texts_of(usual, ("in.input_ids",), FakeTokenizer())["in.input_ids"].input_ids.tolist() == [1]


IDS, MASK = torch.tensor([[1, 2]]), torch.tensor([[1, 0]])


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ((IDS, MASK), {}, "text=0 is a tensor: padded ids need .* or its field named, as in .*mask=1"),
        ((IDS, MASK), {"mask": (2,)}, "^mask=2 names nothing in a tuple of length 2"),
        ((IDS, MASK), {"mask": (1,), "token_type_ids": (2,)}, "^token_type_ids=2 names nothing in a tuple of length 2"),
        ((IDS, MASK[:, :1]), {"mask": (1,)}, r"one \[B, T\]; these are \[\[1, 2\], \[1, 1\]\]"),
        ((IDS, MASK[0]), {"mask": (1,)}, r"one \[B, T\]; these are \[\[1, 2\], \[2\]\]"),
        ((IDS, [1, 0]), {"mask": (1,)}, "input_ids and attention_mask are Tensor and list"),
        ((IDS, (1 - MASK) * -1e4), {"mask": (1,)}, "text=0: attention_mask has -10000, as a mask to be added"),
        ((IDS / 2, MASK), {"mask": (1,)}, "text=0: input_ids are torch.float32, no ids"),
        ((["a b"], MASK), {"mask": (1,)}, "text=0 is a list: the field 1 is for padded ids"),
        ((encoded("a").tokens, MASK), {"mask": (1,)}, "text=0 is a TokenBatch: the field 1 is for padded ids"),
    ],
)
def test_padded_ids_and_masks_that_do_not_fit_are_refused(batch: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        texts_of(batch, (0,), FakeTokenizer(), **options)


STRINGS = ["a b", "c", ""]


def columns_of(values: list[Any]) -> Iterator[Any]:
    """The values in all that a column of a table may be."""
    yield tuple(values) if isinstance(values[0], str) else values
    yield (
        np.array(values, object)
        if isinstance(values[0], str)
        else np.array([*map(np.array, values), None], object)[:-1]
    )
    pyarrow = pytest.importorskip("pyarrow")
    yield pyarrow.array(values)
    yield pyarrow.chunked_array([values[:1], values[1:]])
    pandas = pytest.importorskip("pandas")
    yield pandas.Series(values, index=[7, 0, 7])
    yield pandas.Series(values, dtype=pandas.ArrowDtype(pyarrow.array(values).type))
    if importlib.util.find_spec("polars") is not None:
        yield importlib.import_module("polars").Series(values)


def test_lists_of_ids_that_default_collate_transposed_are_told_apart() -> None:
    batch = default_collate([{"input_ids": [101, 102]}, {"input_ids": [101, 102]}])
    with pytest.raises(
        ConfigError, match=r"text='input_ids' holds tensors: torch's default collate transposes .*TokenC"
    ):
        texts_of(batch, ("input_ids",), FakeTokenizer())


def test_arrays_and_columns_of_strings_are_texts() -> None:
    columns = [*columns_of(STRINGS), np.array(STRINGS)]
    words = [text.split() for text in STRINGS]
    for right, found in [(STRINGS, columns), (words, columns_of(words))]:
        [expected] = texts_of(right, None, FakeTokenizer()).values()
        for column in found:
            batch = {"said": column, "heard": column}
            for tokens in (
                texts_of(batch, ("said",), FakeTokenizer())["said"],
                texts_of(column, None, FakeTokenizer())[None],
            ):
                assert tokens.input_ids.tolist() == expected.input_ids.tolist(), type(column)
                assert tokens.num_words.tolist() == expected.num_words.tolist(), type(column)
            assert len(texts_of(batch, ("said",), FakeTokenizer(), "heard")["said"]) == 3


def test_a_batch_that_is_a_table_is_refused() -> None:
    pandas = pytest.importorskip("pandas")
    for text in (None, ("said",)):
        with pytest.raises(
            ConfigError, match=r"a batch is a DataFrame with the columns \['said'\].*df.to_dict\('list'\)"
        ):
            texts_of(pandas.DataFrame({"said": ["a"]}), text, FakeTokenizer())


def test_texts_are_keyed_by_field_and_tokens_stay_as_they_are() -> None:
    tokens = TokenBatch.from_texts(FakeTokenizer()(["x"]))
    found = texts_of((["a b"], tokens, 7), (0, -2), FakeTokenizer())
    assert list(found) == [0, -2] and found[0].num_tokens == 2 and found[-2] is tokens
    assert list(texts_of(["a", ["b", "c"]], None, FakeTokenizer())) == [None]
    assert texts_of(tokens, ("text",), FakeTokenizer()) == {None: tokens}
    assert len(texts_of({"text": []}, ("text",), FakeTokenizer())["text"]) == 0


@pytest.mark.parametrize(
    "texts", ["a text", {"a text"}, 5, None, np.array("a"), np.array([["a"]]), {"a": 1}, iter("ab")]
)
def test_a_value_that_is_no_list_of_texts_is_refused_with_its_type(texts: Any) -> None:
    with pytest.raises(ConfigError, match=rf"text='said' is an? {type(texts).__name__}: a batch of texts is a list"):
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


def test_a_tensor_dataset_gives_the_vectors_of_its_texts(minilm: Encoder, minilm_folder: str) -> None:
    pairs = [("a bank", "of the river"), ("it", "rains"), ("the", "bank of the bank")]
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    padded = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    data = TensorDataset(
        padded["input_ids"], padded["attention_mask"].bool(), torch.arange(3), padded["token_type_ids"]
    )
    right = minilm(pairs)
    with bertstream.wrap(DataLoader(data, 3), minilm, text=0, mask=1, token_type_ids=3) as loader:
        [(found, mask, label, _)] = loader
    assert torch.equal(found.values, right.values) and label.tolist() == [0, 1, 2]
    assert torch.equal(mask, padded["attention_mask"].bool())
    named = [{"ids": padded["input_ids"], "real": padded["attention_mask"], "token_type_ids": padded["token_type_ids"]}]
    [batch] = bertstream.wrap(named, minilm, text="ids", mask="real")
    assert torch.equal(batch["ids"].values, right.values)


def test_a_path_leads_to_the_texts_of_torchs_own_collate_in_worker_processes(minilm: Encoder) -> None:
    data = [{"in": {"said": text, "n": i}, "label": (i, text)} for i, text in enumerate(("a bank", "the river", "it"))]
    right = minilm([record["in"]["said"] for record in data]).values  # type: ignore[index]
    for collate in (None, TokenCollate(minilm, text="in.said")):
        loader = DataLoader(data, 3, num_workers=1, collate_fn=collate)  # type: ignore[arg-type]
        for options in ({}, {"into": "x"}):
            [batch] = bertstream.wrap(loader, minilm, text="in.said", **options)  # type: ignore[arg-type]
            assert torch.equal(batch["in"]["x" if options else "said"].values, right)
            assert batch["in"]["n"].tolist() == [0, 1, 2]
    [batch] = bertstream.wrap(DataLoader(data, 3), minilm, text="label.1")  # type: ignore[arg-type]
    assert torch.equal(batch["label"][1].values, right) and batch["label"][0].tolist() == [0, 1, 2]


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
    with pytest.raises(ConfigError, match="into='label' would overwrite the batch's own 'label'"):
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
    assert with_vectors(found.tokens, {None: found}, text=None, into=None, layout=None) is found
    assert with_vectors(found.tokens, {None: found}, text=("text",), into=None, layout=None) == {"text": found}
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
    with pytest.raises(ConfigError, match=r"into='x' needs batches that are dicts; this is a list"):
        with_vectors([["a"]], {0: encoded("a")}, text=(0,), into=("x",), layout=None)


@pytest.mark.parametrize("layout", [None, "padded"])
def test_into_is_a_key_beside_the_text_in_the_innermost_dict(layout: Any) -> None:
    batch = Sample(({"q": ["a"], "a": ["b"], "n": 1}, {"q": ["c"]}), 2)
    before = copy.deepcopy(batch)
    embeddings: dict[Field | None, Embeddings] = {
        f"said.{path}": encoded(text) for path, text in (("0.q", "a"), ("0.a", "b"), ("1.q", "c"))
    }
    out = with_vectors(batch, embeddings, text=(*embeddings,), into=("x", "y", "z"), layout=layout)  # type: ignore[arg-type]
    masks = ["x_mask", "y_mask", "z_mask"] if layout else []
    assert [list(part) for part in out.said] == [["q", "a", "n", "x", "y", *masks[:2]], ["q", "z", *masks[2:]]]
    assert out.said[0]["q"] == ["a"] and out.label == 2 and batch == before
    if layout is None:
        assert out.said[1]["z"] is embeddings["said.1.q"]


@pytest.mark.parametrize(
    ("batch", "into", "message"),
    [
        ({"in": {"q": ["a"], "label": 1}}, "label", r"into='label' would overwrite the batch's own 'label'"),
        ({"in": {"q": ["a"]}}, "in.x", "into='in.x': the vectors go beside the text, into 'in': write into='x'"),
        ({"in": Sample(["a"])}, "x", r"into='x' needs batches that are dicts; 'in' is a Sample with the fields"),
    ],
)
def test_a_key_that_cannot_be_put_beside_the_text_is_refused(batch: Any, into: str, message: str) -> None:
    path = "in.said" if isinstance(batch["in"], Sample) else "in.q"
    with pytest.raises(ConfigError, match=message):
        with_vectors(batch, {path: encoded("a")}, text=(path,), into=(into,), layout=None)


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


def test_a_list_of_records_is_told_of_the_collate_fn_that_makes_a_batch_of_them() -> None:
    with pytest.raises(ConfigError, match=r"list of length 2, which are records: .*collate_fn=bertstream.TokenCollate"):
        list(bertstream.wrap([[{"words": ["a"]}, {"words": ["b", "c"]}]], FakeEncoder(), text="words"))
