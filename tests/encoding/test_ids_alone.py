"""An encoder without a tokenizer takes ids, in every way that they come, and refuses texts before anything is read."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_folders import make_model, make_tokenizer
from torch.utils.data import DataLoader

import bertstream
from bertstream import ConfigError, EmbeddingCache, Encoder, EncoderError, TokenBatch, TokenCollate

TEXTS = ["the bank of the river", "a Bank", "moored"]


@pytest.fixture(scope="module")
def padded() -> Any:
    return make_tokenizer()(TEXTS, padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(make_model(), None).freeze()


@pytest.fixture(scope="module")
def right() -> Encoder:
    """With its tokenizer."""
    return Encoder(make_model(), make_tokenizer()).freeze()


def test_padded_ids_give_the_vectors_of_their_texts(encoder: Encoder, right: Encoder, padded: Any) -> None:
    batch = TokenBatch.from_padded(padded["input_ids"], padded["attention_mask"])
    assert torch.equal(encoder(batch).values, right(TEXTS).values)
    assert encoder.fingerprint() == right.fingerprint()
    sent: Encoder = pickle.loads(pickle.dumps(encoder))
    assert torch.equal(sent(batch).values, right(TEXTS).values)


def test_wrap_takes_them_and_a_cache_finds_them_again(encoder: Encoder, right: Encoder, padded: Any) -> None:
    rows = [{name: padded[name][i] for name in ("input_ids", "attention_mask")} for i in range(3)]
    data = DataLoader(rows, batch_size=3)  # type: ignore[arg-type]
    with bertstream.wrap(data, encoder, text="input_ids", cache=EmbeddingCache()) as loader:
        found = [batch["input_ids"].values for _ in range(2) for batch in loader]
        stats = loader.stats()
    assert all(torch.equal(values, right(TEXTS).values) for values in found) and len(found) == 2
    assert (stats["cache_memory_hits"], stats["cache_misses"]) == (3, 3)


@pytest.mark.parametrize(
    "give",
    [
        lambda encoder: encoder(TEXTS),
        lambda encoder: encoder([["the", "bank"]]),
        lambda encoder: encoder([("the", "bank")]),
        lambda encoder: next(iter(bertstream.wrap(DataLoader(TEXTS), encoder))),
        lambda encoder: bertstream.BertEmbedding(encoder)(TEXTS),
    ],
)
def test_a_text_is_refused_in_words(give: Callable[[Encoder], Any], encoder: Encoder) -> None:
    with pytest.raises(
        ConfigError, match=r"without a tokenizer and takes ids alone: .*TokenBatch.*Encoder\(model, tokeni"
    ):
        give(encoder)


@pytest.mark.parametrize(
    "make",
    [
        lambda shard, encoder: bertstream.stream(shard, encoder, text="text"),
        lambda shard, encoder: bertstream.embed(shard, encoder, shard + ".out"),
        lambda shard, encoder: bertstream.TextStream(shard, encoder),
        lambda shard, encoder: TokenCollate(encoder, text="text"),
    ],
)
def test_shards_of_texts_are_refused_before_they_are_read(
    make: Callable[[str, Encoder], Any], encoder: Encoder, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the bank"}\n', "utf-8")
    with pytest.raises(ConfigError, match="the encoder has no tokenizer and takes ids alone"):
        make(str(tmp_path / "a.jsonl"), encoder)


def test_what_only_a_tokenizer_can_follow_is_refused() -> None:
    with pytest.raises(ConfigError, match="prompt='query: ' has no effect without a tokenizer"):
        Encoder(make_model(), None, output="sentence", prompt="query: ")
    with pytest.raises(ConfigError, match="word_splitter=.* has no effect without a tokenizer"):
        Encoder(make_model(), None, output="words", word_splitter=str.split)


def test_ids_are_checked_as_ever(encoder: Encoder) -> None:
    with pytest.raises(EncoderError, match="text 0 has the token id 24, the model knows 0 to 23"):
        encoder(TokenBatch.from_padded(torch.tensor([[24]]), torch.tensor([[1]])))
    with pytest.raises(EncoderError, match="text 0 has 41 tokens, the model takes 40"):
        encoder(TokenBatch.from_padded(torch.ones(1, 41, dtype=torch.int64), torch.ones(1, 41)))


@pytest.mark.parametrize(
    ("output", "message"), [("words", "word vectors need texts"), ("tokens", "special_tokens=False needs")]
)
def test_outputs_that_need_more_than_ids_say_so(output: Any, message: str, padded: Any) -> None:
    encoder = Encoder(make_model(), None, output=output, special_tokens=output == "words")
    with pytest.raises(EncoderError, match=message):
        encoder(TokenBatch.from_padded(padded["input_ids"], padded["attention_mask"]))


def test_it_is_split_and_saved_without_one(right: Encoder, padded: Any, tmp_path: Path) -> None:
    batch = TokenBatch.from_padded(padded["input_ids"], padded["attention_mask"])
    lower, upper = Encoder(make_model(), None).split(at=1)
    assert torch.allclose(upper(lower(batch)).values, right(TEXTS).values, atol=1e-6)
    Encoder(make_model(), None).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert torch.equal(Encoder.from_pretrained(tmp_path, dtype="float32")(TEXTS).values, right(TEXTS).values)
