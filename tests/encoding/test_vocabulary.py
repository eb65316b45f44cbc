"""A tokenizer that is not the model's is refused, and one that is smaller than a padded table is not."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from sentence_folders import SPECIAL, WORDS, make_model, make_tokenizer
from tokenizers import AddedToken, Tokenizer, models

from bertstream import Encoder, EncoderError, TokenBatch
from bertstream.jobs.doctor import examine

FAMILIES = [
    "Bert",
    "Roberta",
    "XLMRoberta",
    "DistilBert",
    "Albert",
    "DebertaV2",
    "Electra",
    "Camembert",
    "MPNet",
    "ModernBert",
]
SIZES = {"vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
OWN = {"DistilBert": {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}, "Albert": {"embedding_size": 8}}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_its_tokenizer_is_refused(family: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{family}Config")(**SIZES | OWN.get(family, {"pad_token_id": 0}))
    getattr(transformers, f"{family}Model")(config).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="without its tokenizer|holds no model that transformers can load"):
        Encoder.from_pretrained(tmp_path)


def test_the_doctor_says_that_the_tokenizer_is_missing(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)  # type: ignore[operator]
    [found] = examine([str(tmp_path)], device="cpu", dtype="float32")["models"].values()
    assert "comes without its tokenizer" in found["error"] and "save_pretrained()" in found["error"]


def test_a_settings_file_without_a_vocabulary_is_no_tokenizer(tmp_path: Path, minilm_folder: str) -> None:
    make_model(vocab_size=30522).save_pretrained(tmp_path)  # type: ignore[operator]
    settings = Path(minilm_folder, "tokenizer_config.json").read_text("utf-8")
    (tmp_path / "tokenizer_config.json").write_text(settings, "utf-8")
    with pytest.raises(EncoderError, match="without its tokenizer"):
        Encoder.from_pretrained(tmp_path)


def test_a_vocabulary_that_is_larger_than_the_embedding_table_is_refused(tmp_path: Path) -> None:
    model = make_model(vocab_size=len(SPECIAL + WORDS) - 1)
    with pytest.raises(EncoderError, match=r"19 entries, the model's embedding table 18 rows: it is another model's"):
        Encoder(model, make_tokenizer())
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="another model's"):
        Encoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("rows", [19, 20, 32, 38])
def test_an_embedding_table_that_is_padded_is_fine(rows: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert Encoder(make_model(vocab_size=rows), make_tokenizer())(["the bank"]).lengths.tolist() == [4]
    assert not caplog.records


def test_a_vocabulary_below_half_of_the_table_is_refused_in_a_folder_and_named_elsewhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = make_model(vocab_size=39), make_tokenizer()
    assert Encoder(model, tokenizer)(["the bank"]).lengths.tolist() == [4]
    assert "knows 19 tokens, the model 39" in caplog.text
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="knows 19 tokens, the model 39, .* pass both to Encoder"):
        Encoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_without_a_row_are_refused_until_the_table_is_resized(special: bool) -> None:
    model: Any = make_model(vocab_size=19)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<e1>", special=special), "<e2>"])
    with pytest.raises(EncoderError, match=r"<e1>.* ids up to 20, .* 19 rows: .*resize_token_embeddings\(len\(token"):
        Encoder(model, tokenizer)
    model.resize_token_embeddings(len(tokenizer))
    assert Encoder(model, tokenizer).tokenizer(["the <e2>"])[0].input_ids.tolist() == [2, 5, 20, 3]


def test_a_padding_token_that_was_only_added_for_padding_is_fine() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    encoder = Encoder(make_model(vocab_size=19), tokenizer)
    assert len(encoder(["the bank"])) == 1
    with pytest.raises(EncoderError, match=r"text 1 has the token id 19, the model knows 0 to 18: .*resize_token"):
        encoder(["the bank", "the <pad>"])


def test_special_tokens_that_the_vocabulary_lacks_are_refused() -> None:
    backend = Tokenizer(models.WordLevel({"the": 0, "bank": 1, "?": 2}, unk_token="?"))
    named = SimpleNamespace(backend_tokenizer=backend, all_special_tokens=["[CLS]", "[SEP]"])
    with pytest.raises(EncoderError, match=r"knows none of its special tokens \['\[CLS\]', '\[SEP\]'\]"):
        Encoder(make_model(), named)


@pytest.mark.parametrize("kind", [models.WordLevel, models.WordPiece])
def test_an_unknown_token_that_the_vocabulary_lacks_is_refused(kind: Any) -> None:
    named = SimpleNamespace(backend_tokenizer=Tokenizer(kind({"the": 0, "bank": 1}, unk_token="[UNK]")))
    with pytest.raises(EncoderError, match=r"lacks its unknown token '\[UNK\]'"):
        Encoder(make_model(), named)


def test_ids_of_another_vocabulary_say_what_may_be_the_cause() -> None:
    encoder = Encoder(make_model(vocab_size=19), make_tokenizer())
    ids = torch.tensor([[2, 19, 3]])
    with pytest.raises(EncoderError, match="token id 19.*another model, or tokens were added without"):
        encoder(TokenBatch.from_padded(ids, torch.ones_like(ids)))
