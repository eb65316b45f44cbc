"""A list of texts is anything with strings in an order; whatever is read by name or has no order is refused."""

from __future__ import annotations

from collections import UserDict, deque
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from bertstream import BertEmbedding, ConfigError, Encoder, EncoderError
from bertstream.encoding.texts import check_texts

pandas = pytest.importorskip("pandas")
pyarrow = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")

COLUMNS = {"text": ["a bank"], "label": [1]}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        *[
            (kind(COLUMNS), rf"{name} with the keys \['text', 'label'\]: pass the list of texts under one of its keys")
            for kind, name in ((dict, "dict"), (UserDict, "UserDict"), (MappingProxyType, "mappingproxy"))
        ],
        *[
            (table, rf"{name} with the columns \['text', 'label'\]: pass the list of texts in one of its columns")
            for table, name in (
                (pandas.DataFrame(COLUMNS), "DataFrame"),
                (pyarrow.table(COLUMNS), "Table"),
                (datasets.Dataset.from_dict(COLUMNS), "Dataset"),
            )
        ],
        (
            BatchEncoding({"input_ids": [[1]], "attention_mask": [[1]]}),
            r"padding=True.*from_padded\(input_ids, attention_mask\)$",
        ),
        (
            BatchEncoding({"input_ids": [[1]], "token_type_ids": [[0]], "attention_mask": [[1]]}),
            r"padding=True, return_tensors='pt'.*from_padded\(input_ids, attention_mask, token_type_ids\)$",
        ),
        (frozenset(["a bank"]), "texts is a frozenset: pass a list of texts"),
        (COLUMNS.keys(), "texts is a dict_keys: pass a list of texts"),
        (COLUMNS.values(), "texts is a dict_values: pass a list of texts"),
        ((text for text in ["a bank"]), "texts is a generator: pass a list of texts"),
        (map(str, [1]), "texts is a map: pass a list of texts"),
        (np.array("a bank"), "texts is a ndarray: pass a list of texts"),
        (np.array([["a", "bank"]]), "texts is a ndarray: pass a list of texts"),
        (torch.ones(2), "texts is a Tensor: pass a list of texts"),
        (b"a bank", "one string: pass a list of texts"),
        (7, "texts is an int: pass a list of texts"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_list_of_texts_is_refused_with_what_to_pass(texts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_texts(texts)


def test_encoder_tokenizer_and_embedding_refuse_alike(minilm: Encoder) -> None:
    for call in (minilm, minilm.tokenizer, minilm.tokenizer.batch, BertEmbedding(minilm)):
        for texts in (COLUMNS, pandas.DataFrame(COLUMNS), {"a bank"}, map(str, [1])):
            with pytest.raises(ConfigError, match=f"texts is a {type(texts).__name__}"):
                call(texts)


TEXTS = ["a bank", "river"]


@pytest.mark.parametrize(
    "texts",
    [
        tuple(TEXTS),
        deque(TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, object),
        pandas.Series(TEXTS, index=[7, 0]),
        pandas.Series(TEXTS).array,
        pandas.Index(TEXTS),
        pandas.Series(TEXTS, dtype="category"),
        pyarrow.array(TEXTS),
        pyarrow.chunked_array([TEXTS[:1], TEXTS[1:]]),
        *(datasets.Dataset.from_dict({"text": TEXTS}).with_format(form)["text"] for form in (None, "torch", "numpy")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_strings_in_any_order_of_their_own_are_texts(minilm: Encoder, texts: Any) -> None:
    right = minilm(TEXTS).values
    for call in (minilm, minilm.encode, BertEmbedding(minilm)):
        assert torch.equal(call(texts).values, right)
    assert len(minilm.tokenizer(texts)) == 2


def test_a_column_of_polars_is_texts(minilm: Encoder) -> None:
    polars = pytest.importorskip("polars")
    assert torch.equal(minilm(polars.DataFrame({"text": TEXTS})["text"]).values, minilm(TEXTS).values)


def test_lists_of_words_in_an_array_are_texts(minilm: Encoder) -> None:
    words = [["a", "bank"], ["river"]]
    right = minilm(words)
    for texts in (pyarrow.array(words), pandas.Series(map(np.array, words)), pandas.Series(words, index=[3, 3])):
        found = minilm(texts)
        assert torch.equal(found.values, right.values) and np.array_equal(found.word_ids, right.word_ids)
        assert found.tokens.texts == words


def test_the_words_of_a_pair_may_be_arrays(minilm: Encoder) -> None:
    pairs = [(["a", "bank"], ["river"]), (["two"], [])]
    found, right = minilm([tuple(map(np.array, pair)) for pair in pairs]), minilm(pairs)
    assert torch.equal(found.values, right.values) and np.array_equal(found.word_ids, right.word_ids)
    assert found.tokens.texts == pairs


@pytest.mark.parametrize("missing", [None, float("nan"), pandas.NA, pandas.NaT], ids=repr)
def test_a_missing_text_is_named_by_its_index(minilm: Encoder, missing: Any) -> None:
    for texts in (pandas.Series(["a", missing], index=[8, 9], dtype=object), np.array(["a", missing], object)):
        with pytest.raises(EncoderError, match=r"text 1 is (None|nan|<NA>|NaT) ") as caught:
            minilm(texts)
        assert caught.value.records == (1,)
    for texts in (pandas.Series(["a", None], dtype="str"), pyarrow.array(["a", None])):
        with pytest.raises(EncoderError, match=r"text 1 is (None|nan) "):
            minilm(texts)
