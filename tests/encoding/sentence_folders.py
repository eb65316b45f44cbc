"""Tiny sentence-transformers folders with random weights, written by hand, and their vectors computed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "The", "bank", "Bank", "of", "river", "query", ":", "find", "a", "moored", "at", "rates", "Rates"]
TEXTS = ["The bank of the river", "a Bank", "moored at the bank : The Rates of a bank", "", "query : river"]


def make_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One id a word, from 5; case counts."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=40, **names, **options)


def make_model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "max_position_embeddings": 40, "hidden_size": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(**sizes | options)
    model = BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def make_folder(
    folder: Path,
    pooling: Mapping[str, Any] | None = None,
    *,
    after: Sequence[tuple[str, Mapping[str, Any] | None]] = (),
    settings: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    transformer: str = "",
    weights: Mapping[str, Tensor] | None = None,
) -> str:
    """A folder as version 2 wrote it.

    Args:
        pooling: of 1_Pooling/config.json.
        after: kind and config of the modules after it.
        settings: of sentence_bert_config.json.
        about: of config_sentence_transformers.json.
        transformer: the subfolder of the transformer.
        weights: of each Dense.
    """
    own = folder / transformer
    own.mkdir(parents=True, exist_ok=True)
    make_model().save_pretrained(own)  # type: ignore[operator]
    make_tokenizer().save_pretrained(own)
    pooled = {"word_embedding_dimension": 8} | dict(pooling or {"pooling_mode_mean_tokens": True})
    kinds = [("Transformer", None), ("Pooling", pooled), *after]
    listed = []
    for number, (kind, config) in enumerate(kinds):
        path = f"{number}_{kind}" if number else transformer
        listed.append({"idx": number, "name": str(number), "path": path, "type": _full_name(kind)})
        (folder / path).mkdir(exist_ok=True)
        if config is not None:
            (folder / path / "config.json").write_text(json.dumps(config))
        if kind == "Dense" and weights is not None:
            torch.save(dict(weights), folder / path / "pytorch_model.bin")
    (folder / "modules.json").write_text(json.dumps(listed))
    if settings is not None:
        (own / "sentence_bert_config.json").write_text(json.dumps(settings))
    if about is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(about))
    return str(folder)


def _full_name(kind: str) -> str:
    return kind if "." in kind else f"sentence_transformers.models.{kind}"


@cache
def _plain(folder: str) -> tuple[Any, Any]:
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def hidden_states(folder: str, text: str, **options: Any) -> Tensor:
    """[L, H] of one text, by plain transformers."""
    model, tokenizer = _plain(folder)
    found: Tensor = model(**tokenizer(text, return_tensors="pt", **options)).last_hidden_state[0]
    return found
