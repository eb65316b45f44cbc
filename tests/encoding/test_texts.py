"""A list of texts is anything with strings in an order; whatever is read by name or has no order is refused."""

from __future__ import annotations

from collections import UserDict, deque
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from bertstream import BertEmbedding, ConfigError, Encoder
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
        (7, "texts is a int: pass a list of texts"),
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


@pytest.mark.parametrize(
    "texts",
    [
        ("a bank", "river"),
        deque(["a bank", "river"]),
        np.array(["a bank", "river"]),
        pandas.Series(["a bank", "river"], index=[7, 0]),
        datasets.Dataset.from_dict({"text": ["a bank", "river"]})["text"],
    ],
    ids=lambda value: type(value).__name__,
)
def test_strings_in_any_order_of_their_own_are_texts(minilm: Encoder, texts: Any) -> None:
    right = [text.input_ids.tolist() for text in minilm.tokenizer(["a bank", "river"])]
    assert [text.input_ids.tolist() for text in minilm.tokenizer(texts)] == right
