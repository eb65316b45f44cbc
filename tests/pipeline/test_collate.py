"""Records become batches of the same structure, with tokens in place of the text, in the worker that reads them."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, UserDict
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from transformers import AutoTokenizer

from bertstream.encoding.tokenizer import TextTokenizer
from bertstream.errors import ConfigError, EncoderError
from bertstream.pipeline.collate import TokenCollate, tensor_column
from bertstream.pipeline.fields import Field, get_field
from bertstream.tokens import TokenBatch, tokenize_batch

TEXTS = ["the bank", "of the river"]
OTHERS = ["a spring", "in the desert"]


class Pair(NamedTuple):
    said: str
    label: int


@dataclass
class Sample:
    said: Any
    label: Any = 0


@dataclass(frozen=True)
class FrozenSample:
    said: str
    label: int


@dataclass(frozen=True, slots=True)
class SlottedSample:
    said: str
    label: int


@pytest.fixture(scope="module")
def encoder(minilm_folder: str) -> Any:
    """The part of an encoder that collating needs."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    return SimpleNamespace(tokenizer=TextTokenizer(tokenizer, max_length=16))


def holds(encoder: Any, batch: Any, texts: Sequence[Any]) -> bool:
    right = encoder.tokenizer.batch(texts)
    assert isinstance(batch, TokenBatch)
    return batch.input_ids.tolist() == right.input_ids.tolist() and batch.lengths.tolist() == right.lengths.tolist()


# --- structures -------------------------------------------------------------------------------------------------------


def test_dicts_become_a_dict(encoder: Any) -> None:
    records = [{"label": 1, "said": TEXTS[0], "id": "a"}, {"label": 2, "said": TEXTS[1], "id": "b"}]
    batch = TokenCollate(encoder, text="said")(records)
    assert list(batch) == ["label", "said", "id"]
    assert holds(encoder, batch["said"], TEXTS)
    assert batch["label"].tolist() == [1, 2] and batch["id"] == ["a", "b"]


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict, MappingProxyType], ids=lambda kind: kind.__name__)
def test_any_mapping_becomes_a_dict(encoder: Any, kind: Any) -> None:
    batch = TokenCollate(encoder, text="said")([kind({"said": text, "label": 0.5}) for text in TEXTS])
    assert type(batch) is dict and holds(encoder, batch["said"], TEXTS) and batch["label"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("field", [0, -2])
def test_tuples_and_lists_become_a_batch_of_their_type(encoder: Any, kind: Any, field: int) -> None:
    batch = TokenCollate(encoder, text=field)([kind([text, 7]) for text in TEXTS])
    assert type(batch) is kind and len(batch) == 2
    assert holds(encoder, batch[0], TEXTS) and batch[1].tolist() == [7, 7]


@pytest.mark.parametrize("field", ["said", 0, -2])
def test_namedtuples_become_a_batch_of_their_type(encoder: Any, field: Field) -> None:
    batch = TokenCollate(encoder, text=field)([Pair(text, 7) for text in TEXTS])
    assert type(batch) is Pair
    assert holds(encoder, batch.said, TEXTS) and torch.equal(batch.label, torch.tensor([7, 7]))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Sample, FrozenSample, SlottedSample])
def test_dataclasses_become_a_batch_of_their_type(encoder: Any, kind: Any) -> None:
    batch = TokenCollate(encoder, text="said")([kind(text, 7) for text in TEXTS])
    assert type(batch) is kind
    assert holds(encoder, batch.said, TEXTS) and batch.label.tolist() == [7, 7]
    if kind is not Sample:
        with pytest.raises(FrozenInstanceError):
            batch.label = 8


def test_bare_texts_become_bare_tokens(encoder: Any) -> None:
    texts = ["the bank", ["of", "the"], ("a", "pair"), ""]
    assert holds(encoder, TokenCollate(encoder)(texts), texts)


@pytest.mark.parametrize(
    ("text", "records", "found"),
    [
        (("q", "a"), [{"q": q, "a": a} for q, a in zip(TEXTS, OTHERS, strict=True)], ("q", "a")),
        ((0, -1), [(q, 1, a) for q, a in zip(TEXTS, OTHERS, strict=True)], (0, 2)),
        ([0, "label"], [Pair(q, a) for q, a in zip(TEXTS, OTHERS, strict=True)], (0, 1)),  # type: ignore[arg-type]
        (["said", "label"], [Sample(q, a) for q, a in zip(TEXTS, OTHERS, strict=True)], ("said", "label")),
    ],
)
def test_a_record_may_hold_several_texts(
    encoder: Any, text: Any, records: list[Any], found: tuple[Field, Field]
) -> None:
    batch = TokenCollate(encoder, text=text)(records)
    assert holds(encoder, get_field(batch, found[0]), TEXTS)
    assert holds(encoder, get_field(batch, found[1]), OTHERS)


@pytest.mark.parametrize(
    ("record", "path", "rest"),
    [
        (lambda text: {"in": {"said": text, "n": 3}, "label": 1}, "in.said", ("in.n", "label")),
        (lambda text: ({"said": text, "n": 3}, 1), "0.said", ("0.n", 1)),
        (lambda text: [Pair(text, 3), 1], "0.said", ("0.label", 1)),
        (lambda text: Pair((text, 3), 1), "said.0", ("said.1", "label")),  # type: ignore[arg-type]
        (lambda text: FrozenSample([3, {"in": text}], 1), "said.1.in", ("said.0", "label")),  # type: ignore[arg-type]
        (lambda text: {"in": Sample(text, 3), "label": 1}, "in.said", ("in.label", "label")),
    ],
)
def test_a_path_leads_to_texts_within_a_record_and_its_parts_become_batches(
    encoder: Any, record: Any, path: str, rest: tuple[Field, Field]
) -> None:
    records = [record(text) for text in TEXTS]
    before = copy.deepcopy(records)
    batch = TokenCollate(encoder, text=path)(records)
    assert type(batch) is type(records[0]) and type(get_field(batch, path.split(".")[0])) is type(
        get_field(records[0], path.split(".")[0])
    )
    assert holds(encoder, get_field(batch, path), TEXTS)
    assert [get_field(batch, field).tolist() for field in rest] == [[3, 3], [1, 1]]
    assert records == before


def test_words_may_be_an_array_and_texts_numpys_strings(encoder: Any) -> None:
    records = [{"said": np.array(["the", "bank"], object)}, {"said": np.array(["river"])}]
    assert holds(encoder, TokenCollate(encoder, text="said")(records)["said"], [["the", "bank"], ["river"]])
    assert holds(encoder, TokenCollate(encoder)([*np.array(TEXTS)]), TEXTS)
    pairs = [{"q": np.array(["the", "bank"], object), "a": np.array([word])} for word in ("rose", "fell")]
    batch = TokenCollate(encoder, text="q", pair="a")(pairs)
    assert holds(encoder, batch["q"], [(["the", "bank"], ["rose"]), (["the", "bank"], ["fell"])])


def test_paths_may_lead_to_several_texts_and_to_a_pair(encoder: Any) -> None:
    records = [{"in": {"q": q, "a": a}, "id": "x"} for q, a in zip(TEXTS, OTHERS, strict=True)]
    batch = TokenCollate(encoder, text=("in.q", "in.a"))(records)
    assert holds(encoder, batch["in"]["q"], TEXTS) and holds(encoder, batch["in"]["a"], OTHERS)
    batch = TokenCollate(encoder, text="in.q", pair="in.a")(records)
    assert holds(encoder, batch["in"]["q"], [*zip(TEXTS, OTHERS, strict=True)]) and batch["in"]["a"] == OTHERS
    with pytest.raises(ConfigError, match=r"^pair='in.b' names nothing: 'in' is a dict with the keys \['q', 'a'\]"):
        TokenCollate(encoder, text="in.q", pair="in.b")(records)


def test_parts_of_several_structures_are_refused_by_their_path(encoder: Any) -> None:
    collate = TokenCollate(encoder, text="in.0")
    with pytest.raises(ConfigError, match="^'in' of record 1 of the batch is a list of length 1, the first a list"):
        collate([{"in": ["a", "b"]}, {"in": ["a"]}])
    with pytest.raises(ConfigError, match="^record 1 of the batch is a Sample with .*, the first a dict with"):
        TokenCollate(encoder, text="said")([{"said": "a"}, Sample("b")])


def test_a_key_that_a_record_lacks_is_none(encoder: Any) -> None:
    batch = TokenCollate(encoder, text="said")([{"said": "a"}, {"said": "b", "label": 3}])
    assert batch["label"] == [None, 3]


@pytest.mark.parametrize(
    ("text", "records"),
    [
        ("said", [{"said": ["a", "b"], "label": [1, 2], "vector": np.zeros(2)} for _ in range(2)]),
        (0, [[["a", "b"], torch.zeros(2)] for _ in range(2)]),
        ("said", [Sample(["a", "b"], [1, 2]) for _ in range(2)]),
    ],
)
def test_records_are_unchanged(encoder: Any, text: Field, records: list[Any]) -> None:
    before = copy.deepcopy(records)
    batch = TokenCollate(encoder, text=text)(records)
    for value in batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list) else [batch.label]:
        for part in [value] if isinstance(value, Tensor) else value if isinstance(value, list) else []:
            part.fill_(9)
    assert repr(records) == repr(before)


def test_it_holds_only_the_tokenizer(encoder: Any) -> None:
    class Heavy:
        tokenizer = encoder.tokenizer
        weights = torch.zeros(10_000_000)

    assert len(pickle.dumps(TokenCollate(Heavy(), text="said"))) < 1_000_000  # type: ignore[arg-type]


# --- the other fields -------------------------------------------------------------------------------------------------


def test_a_list_of_tags_is_one_tensor_per_text_although_default_collate_transposes_it(encoder: Any) -> None:
    """Trap 40: torch silently transposes lists of equal length, and raises for ragged ones."""
    even = [{"said": ["a", "b", "c"], "tags": [1, 2, 3]}, {"said": ["d", "e", "f"], "tags": [4, 5, 6]}]
    assert [row.tolist() for row in default_collate(even)["tags"]] == [[1, 4], [2, 5], [3, 6]]
    assert default_collate(even)["said"] == [("a", "d"), ("b", "e"), ("c", "f")]
    collate = TokenCollate(encoder, text="said")
    assert [row.tolist() for row in collate(even)["tags"]] == [[1, 2, 3], [4, 5, 6]]

    ragged = [{"said": ["a", "b"], "tags": [1, 2]}, {"said": [], "tags": []}, {"said": ["d"], "tags": [4]}]
    with pytest.raises(RuntimeError, match="equal size"):
        default_collate(ragged)
    batch = collate(ragged)
    assert [row.tolist() for row in batch["tags"]] == [[1, 2], [], [4]]
    assert {row.dtype for row in batch["tags"]} == {torch.int64}
    assert batch["said"].num_words.tolist() == [2, 0, 1]


def test_tags_that_are_names_stay_one_list_per_text(encoder: Any) -> None:
    records = [{"said": ["a", "b"], "tags": ["B", "O"]}, {"said": ["c", "d"], "tags": ["O", "B"]}]
    assert TokenCollate(encoder, text="said")(records)["tags"] == [["B", "O"], ["O", "B"]]


def array(*shape: int) -> np.ndarray[Any, Any]:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(
    "values",
    [
        [1, 2],
        [0.5, 1.5],
        [True, False],
        [np.float32(1), np.float32(2)],
        [np.array(1), np.array(2)],
        [array(2, 3), array(2, 3)],
        [torch.zeros(2, 3), torch.ones(2, 3)],
        [torch.tensor(1), torch.tensor(2)],
        ["a", "b"],
    ],
    ids=repr,
)
def test_numbers_strings_and_tensors_of_one_shape_equal_default_collates_result(values: list[Any]) -> None:
    column, right = tensor_column(values), default_collate(values)
    if isinstance(right, Tensor):
        assert column.dtype == right.dtype and torch.equal(column, right)
    else:
        assert column == right


@pytest.mark.parametrize(
    "values",
    [
        [torch.zeros(2), torch.ones(3)],
        [torch.zeros(2, 4), torch.ones(0, 4)],
        [array(2), array(3)],
        [torch.zeros(2), torch.zeros(2, dtype=torch.int64)],
        [torch.zeros(2), torch.tensor(1.0)],
        [torch.zeros(2).to_sparse(), torch.ones(3).to_sparse()],
        [torch.zeros(2), None],
        [array(2), torch.zeros(3)],
    ],
    ids=lambda values: " ".join(f"{getattr(v, 'dtype', v)}{getattr(v, 'shape', '')}" for v in values),
)
def test_arrays_of_several_shapes_or_dtypes_stay_one_tensor_per_record(values: list[Any]) -> None:
    column = tensor_column(values)
    assert isinstance(column, list) and len(column) == len(values)
    for found, value in zip(column, values, strict=True):
        if value is None:
            assert found is None
        else:
            right = torch.as_tensor(value)
            assert found.dtype == right.dtype and torch.equal(found.to_dense(), right.to_dense())


@pytest.mark.parametrize(
    "values",
    [
        [],
        [None, None],
        [np.str_("a"), np.str_("b")],
        [np.array(["a"]), np.array(["b"])],
        [np.array(["a"]), np.array(["b", "c"])],
        [np.datetime64("2020-01-01"), np.datetime64("2020-01-02")],
        [{"a": 1}, {"a": 2}],
        [(1, 2), (3, 4)],
        [2**63, 1],
    ],
    ids=repr,
)
def test_values_that_are_no_numbers_stay_a_list(values: list[Any]) -> None:
    assert tensor_column(values) == values
    assert all(found is value for found, value in zip(tensor_column(values), values, strict=True))


# --- in worker processes ----------------------------------------------------------------------------------------------


def batches(encoder: Any, records: list[Any], text: Any, batch_size: int = 2) -> list[Any]:
    collate = TokenCollate(encoder, text=text)
    return list(DataLoader(records, batch_size=batch_size, num_workers=1, collate_fn=collate))  # type: ignore[arg-type]


@pytest.mark.parametrize("tags", [lambda count: [count] * count, torch.ones], ids=["lists", "tensors"])
def test_a_ragged_column_leaves_a_worker_in_one_storage(encoder: Any, tags: Any) -> None:
    """A file handle per text would use up a process's 1,024 within a few batches."""
    [batch] = batches(encoder, [{"said": "a", "tags": tags(i % 5)} for i in range(40)], "said", 40)
    assert [len(row) for row in batch["tags"]] == [i % 5 for i in range(40)]
    assert len({row.untyped_storage().data_ptr() for row in batch["tags"]}) == 1


@pytest.mark.parametrize(
    ("text", "bad", "message"),
    [
        ("said", None, "field 'said': text 1 is None (NoneType)"),
        ("said", "bank " * 30, "field 'said': text 1 has 32 tokens, the model takes 16: 'bank bank "),
    ],
)
def test_an_error_from_a_worker_keeps_its_fields(encoder: Any, text: Any, bad: Any, message: str) -> None:
    """Trap 42: torch would rebuild a raised error without its fields, so the error is returned as an item."""
    records = [{"said": "fine"}, {"said": bad}]
    with pytest.raises(EncoderError) as caught:
        TokenCollate(encoder, text=text)(records)
    [found] = batches(encoder, records, text)
    for error in (caught.value, found):
        assert type(error) is EncoderError and error.records == (1,)
        assert str(error).startswith(message)


def test_a_missing_key_in_a_worker_is_a_config_error(encoder: Any) -> None:
    [found] = batches(encoder, [{"sentence": "a"}, {"sentence": "b"}], "said")
    assert type(found) is ConfigError and "'said'" in str(found)


def raising(records: list[Any]) -> Any:
    raise EncoderError("it broke", records=[5])


def test_torch_strips_the_fields_of_an_error_that_a_worker_raises() -> None:
    """The reason that errors are returned as items; unnecessary once torch fixes this."""
    iterator: Any = iter(DataLoader(["a"], num_workers=1, collate_fn=raising))
    try:
        with pytest.raises(Exception, match="it broke") as caught:
            next(iterator)
    finally:
        iterator._shutdown_workers()  # immediately; garbage collection would take seconds
    assert (type(caught.value), getattr(caught.value, "records", None)) != (EncoderError, (5,))


# --- errors -----------------------------------------------------------------------------------------------------------


class Plain:
    """Neither a sequence nor a mapping nor a dataclass."""

    said = "a"


@pytest.mark.parametrize(
    ("record", "text", "message"),
    [
        ({"sentence": "a"}, "said", r"text='said' names nothing in a dict with the keys \['sentence'\]"),
        (Plain(), "said", "a record is a Plain: TokenCollate takes dicts, tuples, lists, namedtuples and dataclasses"),
    ],
)
def test_a_missing_field_is_refused_with_the_fields_there_are(
    encoder: Any, record: Any, text: Field, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenCollate(encoder, text=text)([record, record])


def test_a_missing_second_text_is_named_as_the_pair(encoder: Any) -> None:
    with pytest.raises(ConfigError, match="^pair='said' names nothing in a dict"):
        TokenCollate(encoder, text="sentence", pair="said")([{"sentence": "a"}])


@pytest.mark.parametrize(
    ("odd", "seen"),
    [
        (("a", 1, "more"), "a tuple of length 3"),
        (("a",), "a tuple of length 1"),
        (["a", 1], "a list of length 2"),
        ({0: "a", 1: 1}, r"a dict with the keys \[0, 1\]"),
    ],
)
def test_records_of_several_structures_are_refused(encoder: Any, odd: Any, seen: str) -> None:
    with pytest.raises(ConfigError, match=f"record 1 of the batch is {seen}, the first a tuple of length 2"):
        TokenCollate(encoder, text=0)([("a", 1), odd])


def test_an_encoder_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="encoder is a str without a tokenizer"):
        TokenCollate("bert-base-uncased")  # type: ignore[arg-type]


# --- ids --------------------------------------------------------------------------------------------------------------


@dataclass
class Ids:
    input_ids: Any
    attention_mask: Any


IN_KINDS = {
    "lists": lambda auto, text: dict(auto(text)),
    "padded tensors": lambda auto, text: {
        name: part[0]
        for name, part in auto(
            text, return_tensors="pt", padding="max_length", max_length=16, padding_side="left"
        ).items()
    },
    "arrays": lambda auto, text: {
        name: np.array(part) for name, part in auto(text, return_special_tokens_mask=True).items()
    },
    "deeper": lambda auto, text: {"one": {"tokens": dict(auto(text, padding="max_length", max_length=16))}},
}


@pytest.mark.parametrize("kind", IN_KINDS)
def test_ids_are_the_tokens_of_their_texts(encoder: Any, minilm_folder: str, kind: str) -> None:
    auto = AutoTokenizer.from_pretrained(minilm_folder)
    records = [IN_KINDS[kind](auto, text) for text in TEXTS]
    field = "one.tokens.input_ids" if kind == "deeper" else "input_ids"
    batch = TokenCollate(encoder, text=field, keep_text=True)(records)
    tokens = get_field(batch, field)
    right = tokenize_batch(encoder.tokenizer, TEXTS)
    assert holds(encoder, tokens, TEXTS) and tokens.hashes.tolist() == right.hashes.tolist()
    assert tokens.special.tolist() == right.special.tolist() and tokens.texts is None
    assert "attention_mask" in (batch if kind != "deeper" else batch["one"]["tokens"])


def test_ids_come_bare_or_in_a_dataclass_beside_texts(encoder: Any) -> None:
    ids = [text.input_ids.tolist() for text in encoder.tokenizer(TEXTS)]
    assert holds(encoder, TokenCollate(encoder)(ids), TEXTS)
    assert holds(encoder, TokenCollate(encoder)([ids[0], TEXTS[1]]), TEXTS)
    padded = [Ids([*one, 0], [1] * len(one) + [0]) for one in ids]
    assert holds(encoder, TokenCollate(encoder, text="input_ids")(padded).input_ids, TEXTS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": [101, 102, 0]}, r"^record 1, field 'x': the ids end with 1 of the padding token \[PAD\]"),
        ({"x": [101, -5]}, "^record 1, field 'x': the token id -5: ids begin at 0"),
        ({"x": [[101, 102]]}, r"^record 1, field 'x': \[\[101, 102\]\] has one dimension too many"),
        ({"x": torch.ones(1, 3)}, "^record 1, field 'x': .* has one dimension too many"),
        ({"x": [101], "attention_mask": [1, 1]}, "^record 1, field 'attention_mask': it has 2 entries, 'x' has 1"),
        ({"x": [101, *[7] * 30]}, "^record 1, field 'x': text 1 has 31 tokens"),
    ],
)
def test_wrong_ids_name_their_record_and_field(encoder: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(EncoderError, match=message) as caught:
        TokenCollate(encoder, text="x")([{"x": [101, 102], "attention_mask": [1, 1]}, wrong])
    assert caught.value.records == (1,)
