"""Encoding several batches together gives each what encoding it alone gives, in memory of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from drawn_texts import tokenized
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig, BertModel

from bertstream import Embeddings, Encoder, EncoderError, TokenBatch
from bertstream.embeddings import Output
from bertstream.pipeline.coalesce import encode_together
from bertstream.repeats import text_bytes
from bertstream.testing import FakeEncoder
from bertstream.tokens import Text


class RevealingEncoder(FakeEncoder):
    """Rows hold everything that a model may look at, so texts that differ in any of it get different rows."""

    def __init__(self) -> None:
        super().__init__(hidden_size=9)
        self.calls: list[TokenBatch] = []

    def encode(self, batch: TokenBatch) -> Embeddings:
        """FakeEncoder's columns, then segment, word, special, owned, start of a window, words of the text."""
        self.calls.append(batch)
        found = super().encode(batch)
        starts = np.zeros(batch.num_tokens, np.int32)
        lengths = batch.lengths if batch.window_lengths is None else batch.window_lengths
        starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = 1
        columns = (
            (batch.token_type_ids, 0),
            (batch.word_ids, -1),
            (batch.special, False),
            (batch.owned, True),
            (starts, 0),
            (np.repeat(batch.num_words, batch.lengths), 0),
        )
        for column, (tokens, absent) in enumerate(columns, start=3):
            found.values[:, column] = absent if tokens is None else torch.from_numpy(tokens)
        return found


def assert_same(found: Embeddings, right: Embeddings, atol: float = 0.0) -> None:
    """All parts of two batches are equal, values within a tolerance."""
    torch.testing.assert_close(found.values, right.values, atol=atol, rtol=0.0)
    assert found.output == right.output and found.tokens is right.tokens
    for name in ("cu_seqlens", "lengths", "present", "word_ids"):
        a, b = getattr(found, name), getattr(right, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and a.tolist() == b.tolist()), name


def assert_apart(parts: Sequence[Embeddings]) -> None:
    """No two batches share memory, so a loop may write into one or keep a part of it."""
    for name in ("values", "cu_seqlens", "lengths", "present"):
        tensors = [getattr(part, name) for part in parts]
        held = [tensor.untyped_storage() for tensor in tensors if tensor is not None and tensor.numel()]
        assert len({storage.data_ptr() for storage in held}) == len(held), name
        assert all(t is None or t.untyped_storage().nbytes() == t.nbytes for t in tensors), f"{name} keeps more alive"


# Special tokens are known for all texts or for none; see the last test.
TOKEN_BATCHES = st.booleans().flatmap(
    lambda special: st.lists(
        st.lists(tokenized(special), max_size=4).map(TokenBatch.from_texts), min_size=1, max_size=4
    )
)


@given(TOKEN_BATCHES, st.booleans())
def test_encoding_together_equals_encoding_alone(batches: list[TokenBatch], once: bool) -> None:
    encoder = RevealingEncoder()
    parts, repeats = encode_together(encoder.encode, batches, once=once)
    (call,) = encoder.calls
    texts = sum(map(len, batches))
    assert len(call) == texts - repeats and (once or not repeats)
    if once and call.words_cut is None:
        assert len(set(text_bytes(call))) == len(call), "a text was encoded twice"
    for part, batch in zip(parts, batches, strict=True):
        assert_same(part, encoder.encode(batch))
    assert_apart(parts)


@given(TOKEN_BATCHES)
def test_pick_undoes_concat(batches: list[TokenBatch]) -> None:
    whole = TokenBatch.concat(batches)
    bounds = np.cumsum([0, *map(len, batches)]).tolist()
    for batch, (start, end) in zip(batches, pairwise(bounds), strict=True):
        found = whole.pick(np.arange(start, end))
        assert found.cu_seqlens.tolist() == batch.cu_seqlens.tolist()
        absent = {"special": False, "token_type_ids": 0, "word_ids": -1, "owned": True, "words_cut": False}
        for name in ("input_ids", "num_words", "cut_tokens", *absent):
            a, b = getattr(found, name), getattr(batch, name)
            if a is None:
                assert b is None or name == "special", f"{name} is lost"
            else:
                assert a.dtype in (np.int32, np.bool_)
                assert a.tolist() == ([absent[name]] * len(a) if b is None else b.tolist()), name
        windows = batch.lengths if batch.window_lengths is None else batch.window_lengths
        assert found.window_lengths is None or found.window_lengths.tolist() == windows.tolist()
        assert not found.fields and found.cursor is None


# --- real tokenizers --------------------------------------------------------------------------------------------------

WORDS = ["the", "bank", "unbelievable", "", "\ufffd", "."]
strings = st.lists(st.sampled_from(WORDS), max_size=7).map(" ".join)
word_lists = st.lists(st.sampled_from(WORDS), max_size=7)
# The first text of a pair is repeated in every window, so it must be short.
question = st.sampled_from(["", "the", "the bank"])
pairs_in_words = st.tuples(question.map(str.split), word_lists)
texts: st.SearchStrategy[Text] = strings | word_lists | st.tuples(question, strings) | pairs_in_words
texts_in_words: st.SearchStrategy[Text] = word_lists | pairs_in_words


def tiny(folder: str, **options: Any) -> Encoder:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertModel(BertConfig(vocab_size=30522, **sizes)).eval().requires_grad_(False)
    return Encoder(model, AutoTokenizer.from_pretrained(folder), **options)


WAYS: list[dict[str, Any]] = [
    {"overflow": "windows", "max_length": 12, "stride": 2},
    {"special_tokens": False, "overflow": "truncate", "max_length": 12},
    {"layers": (1, 2), "combine": "stack", "packed": False},
    {"output": "words", "overflow": "windows", "max_length": 12},
    {"output": "words", "pooling": "first_last", "overflow": "truncate", "max_length": 12},
    {"output": "sentence", "pooling": ("cls", "mean"), "overflow": "windows", "max_length": 12},
]


@pytest.fixture(scope="module", params=WAYS, ids=str)
def some_encoder(request: pytest.FixtureRequest, minilm_folder: str) -> Encoder:
    return tiny(minilm_folder, **request.param)


@settings(max_examples=25)
@given(st.data())
def test_encoding_together_equals_encoding_alone_for_every_output_and_overflow(
    some_encoder: Encoder, data: st.DataObject
) -> None:
    text = texts_in_words if some_encoder.output == "words" else texts
    drawn = data.draw(st.lists(st.lists(text, max_size=3), min_size=1, max_size=3))
    batches = [some_encoder.tokenizer.batch(texts) for texts in drawn]
    parts, _ = encode_together(some_encoder.encode, batches)
    for part, batch in zip(parts, batches, strict=True):
        assert_same(part, some_encoder.encode(batch), atol=1e-5)
    assert_apart(parts)


@pytest.fixture(scope="module", params=["tokens", "words", "sentence"])
def real_encoder(request: pytest.FixtureRequest, minilm_folder: str) -> Encoder:
    output: Output = request.param
    return Encoder.from_pretrained(minilm_folder, output=output, dtype="float32", device="cpu")


@settings(max_examples=8)
@given(st.data())
def test_all_minilm_together_and_alone_differ_by_at_most_1e_5(
    real_encoder: Encoder, sentences: list[str], data: st.DataObject
) -> None:
    sentence = st.sampled_from([text for text in sentences if len(text) < 100][:12])
    text: Any = sentence.map(str.split)
    if real_encoder.output != "words":
        text = text | sentence | st.tuples(sentence, sentence) | st.just("")
    drawn = data.draw(st.lists(st.lists(text, max_size=3), min_size=2, max_size=3))
    batches = [real_encoder.tokenizer.batch(texts) for texts in drawn]
    parts, _ = encode_together(real_encoder.encode, batches)
    for part, batch in zip(parts, batches, strict=True):
        assert_same(part, real_encoder.encode(batch), atol=1e-5)


def test_one_batch_without_repeats_goes_to_the_encoder_as_it_is() -> None:
    encoder = RevealingEncoder()
    batch = TokenBatch.from_texts(encoder.tokenizer(["a", "b"]))
    (found,), repeats = encode_together(encoder.encode, [batch])
    assert encoder.calls[0] is batch is found.tokens and not repeats


def test_each_distinct_text_is_encoded_once() -> None:
    encoder = RevealingEncoder()
    batches = [TokenBatch.from_texts(encoder.tokenizer(texts)) for texts in (["a b", "c"], ["c", "c", "d"], ["a b"])]
    parts, repeats = encode_together(encoder.encode, batches)
    assert repeats == 3 and [len(call) for call in encoder.calls] == [3]
    parts[0].values.zero_()
    assert parts[2].values.any(), "a repeated text's rows are a copy"


def test_a_cut_word_and_a_word_without_tokens_are_distinguished(minilm_folder: str) -> None:
    """Both texts have the same tokens and as many words; only one of them lost its last word."""
    encoder = tiny(minilm_folder, output="words", overflow="truncate", max_length=4)
    blank, cut = (encoder.tokenizer.batch([words]) for words in (["a", "bank", ""], ["a", "bank", "raised"]))
    assert blank.input_ids.tolist() == cut.input_ids.tolist()
    for batches in ([blank, cut], [cut, blank]):
        parts, _ = encode_together(encoder.encode, batches)
        for part, batch in zip(parts, batches, strict=True):
            assert_same(part, encoder.encode(batch), atol=1e-6)


def test_tokens_of_unknown_kind_are_not_taken_for_ordinary_ones(minilm_folder: str) -> None:
    """An encoder without rows for special tokens refuses them alone, so it must refuse them with others too."""
    encoder = tiny(minilm_folder, special_tokens=False)
    ids = torch.tensor([[101, 1996, 102]])
    padded, known = TokenBatch.from_padded(ids, torch.ones_like(ids)), encoder.tokenizer.batch(["the"])
    for batches in ([padded], [known, padded], [padded, known]):
        with pytest.raises(EncoderError, match="special tokens cannot be told apart"):
            encode_together(encoder.encode, batches)
    empty = encoder.tokenizer.batch([])
    parts, _ = encode_together(encoder.encode, [known, empty])
    assert [len(part.values) for part in parts] == [1, 0]
