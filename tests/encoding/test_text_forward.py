"""An encoder's calls: which texts they take, in whose modes they run, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_bert
from torch import nn

import bertstream
from bertstream import ConfigError, Encoder, EncoderError, TokenBatch
from bertstream.embeddings import SupportsCache, SupportsTraining
from bertstream.testing import FakeEncoder
from bertstream.tokens import Text


def test_an_empty_batch_and_texts_without_any_token_have_defined_rows(minilm: Encoder, tokenizer: Any) -> None:
    assert minilm([]).values.shape == (0, 384)
    assert minilm([]).padded()[0].shape == (0, 0, 384)
    bare = Encoder(minilm.model, tokenizer, output="sentence", pooling=("mean", "cls"))
    batch = minilm.tokenizer.batch(["one text", "another"])
    batch.input_ids, batch.cu_seqlens = batch.input_ids[:4], np.array([0, 0, 4, 4], np.int32)
    batch.special = None
    vectors = bare.encode(batch).vectors
    assert vectors.shape == (3, 768)
    assert not vectors[[0, 2]].any() and vectors[1].all()


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad]
)
def test_the_callers_modes_do_not_change_the_vectors(minilm: Encoder, mode: Callable[[], Any]) -> None:
    right = minilm(["the callers own modes"]).values
    with mode():
        found = minilm(["the callers own modes"]).values
    assert torch.equal(found, right)
    layer = nn.Linear(384, 2)
    layer(found).sum().backward()  # a tensor of inference mode would raise here
    assert layer.weight.grad is not None and not found.requires_grad


def test_text_that_is_too_long_raises_or_is_counted(small_folder: str, small: Encoder) -> None:
    long = "word " * 1000
    with pytest.raises(EncoderError, match="1002 tokens, the model takes 512") as caught:
        small(["short", long])
    assert caught.value.records == (1,)
    cut = Encoder.from_pretrained(small_folder, dtype="float32", overflow="truncate", max_length=16)(["short", long])
    assert cut.lengths.tolist() == [3, 16] and cut.tokens.cut_tokens.tolist() == [0, 1000 - 14]


def test_a_call_that_truncates_says_so_once(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(tiny_bert(), tokenizer, output="words", overflow="truncate", max_length=4)
    encoder(["short"])
    assert not caplog.records
    for _ in range(2):
        encoder([["one", "two", "three"], "short"])
    (record,) = caplog.records
    assert "truncation cut 1 of 2 texts in this call" in record.message and "by 1 words and 1 tokens" in record.message


def test_a_call_of_ready_tokens_leaves_it_to_the_loader_to_say_so(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Encoder(tiny_bert(), tokenizer, overflow="truncate", max_length=4)
    encoder(encoder.tokenizer.batch(["one two three four"]))
    assert not caplog.records


def test_a_batch_that_is_too_long_never_reaches_the_model(tokenizer: Any, minilm: Encoder) -> None:
    short = Encoder(tiny_bert(max_position_embeddings=16), tokenizer)
    with pytest.raises(EncoderError, match="the model takes 16") as caught:
        short.encode(minilm.tokenizer.batch(["a", "b " * 20]))
    assert caught.value.records == (1,)


def test_an_encoder_offers_training_and_a_cache_and_a_fake_one_neither(minilm: Encoder) -> None:
    assert isinstance(minilm, SupportsTraining) and isinstance(minilm, SupportsCache)
    assert not isinstance(FakeEncoder(), SupportsTraining) and not isinstance(FakeEncoder(), SupportsCache)


def test_padded_token_ids_give_the_vectors_of_their_texts(minilm: Encoder, tokenizer: Any) -> None:
    texts = ["a bank", "the spring of the river", ""]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        padded = tokenizer(texts, padding=True, return_tensors="pt")
        batch = TokenBatch.from_padded(padded["input_ids"], padded["attention_mask"], padded["token_type_ids"])
        torch.testing.assert_close(minilm.encode(batch).values, minilm(texts).values)
    with pytest.raises(ConfigError, match="one .B, T.; these are"):
        TokenBatch.from_padded(padded["input_ids"], padded["attention_mask"][:1])
    (out,) = bertstream.wrap([dict(padded)], minilm, text="input_ids", into="vectors")
    torch.testing.assert_close(out["vectors"].values, minilm(texts).values)
    bare = Encoder(minilm.model, tokenizer, special_tokens=False)
    with pytest.raises(EncoderError, match="special tokens cannot be told apart"):
        bare.encode(batch)


def test_float16_that_overflows_is_refused_at_the_first_batch(tokenizer: Any) -> None:
    own = tiny_bert()
    with torch.no_grad():
        own.encoder.layer[-1].output.dense.weight.mul_(1e7)
        own.encoder.layer[-1].output.LayerNorm.weight.mul_(1e7)
    with pytest.raises(EncoderError, match="not finite.*bfloat16"):
        Encoder(own, tokenizer, dtype="float16")(["some text"])


def test_encode_takes_texts_as_a_call_does(minilm: Encoder) -> None:
    texts: list[Text] = ["a bank", ["two", "words"], ("a", "pair")]
    right = minilm(texts).values
    for given in (texts, tuple(texts), minilm.tokenizer.batch(texts)):
        assert torch.equal(minilm.encode(given).values, right)
        torch.testing.assert_close(minilm.embed(given).values, right, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a bank", r"one string: pass a list of texts, \[text\]"),
        (
            {"text": ["a bank"]},
            r"texts is a dict with the keys \['text'\]: pass the list of texts under one of its keys",
        ),
        ({"a bank"}, "texts is a set: pass a list of texts"),
        (torch.ones(1, 2), "texts is a Tensor: pass a list of texts"),
        (iter(["a bank"]), "texts is a list_iterator: pass a list of texts"),
        (None, "texts is a NoneType: pass a list of texts"),
    ],
)
def test_anything_but_a_list_of_texts_is_refused_with_the_way_out(minilm: Encoder, texts: Any, message: str) -> None:
    for call in (minilm, minilm.encode, minilm.embed, minilm.tokenizer.batch):
        with pytest.raises(ConfigError, match=message):
            call(texts)


def test_the_output_of_a_transformers_tokenizer_is_refused_with_the_way_out(minilm: Encoder, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"texts is a BatchEncoding .*TokenBatch.from_padded\(input_ids"):
        minilm.encode(tokenizer(["a bank"]))


def test_token_ids_of_another_vocabulary_are_refused_and_the_text_named(minilm: Encoder) -> None:
    ids = torch.tensor([[101, 102], [101, 99_999]])
    with pytest.raises(EncoderError, match="text 1 has the token id 99999, the model knows 0 to 30521") as caught:
        minilm(TokenBatch.from_padded(ids, torch.ones_like(ids)))
    assert caught.value.records == (1,)


def test_an_encoder_that_was_pickled_by_an_earlier_version_still_encodes(tokenizer: Any) -> None:
    def earlier(part: Any) -> Any:
        state = part.__getstate__()
        for name in {"_check_finite", "_attention"} & state.keys():
            del state[name]
        found = type(part).__new__(type(part))
        found.__setstate__(state)
        return found

    encoder = Encoder(tiny_bert(), tokenizer)
    right = encoder(["a text"]).values
    lower, upper = encoder.split(1)
    torch.testing.assert_close(earlier(upper)(earlier(lower)(["a text"])).values, right)
    encoder.unfreeze()  # packed, by the model's own modules
    torch.testing.assert_close(earlier(encoder)(["a text"]).values, right)
