"""Tokenizers of transformers that are written in Python, with vocabularies of a few words, and models for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
JAPANESE = ["東京", "京", "は", "夜", "の", "七", "時", "です", "##です", "##く", "行", "。", "a", "b", "##b"]
ENGLISH = ["the", "bank", "##s", "of", "river", "un", "##believ", "##able", "a", "b", "##b", ".", ",", "don", "'", "t"]
SYLLABLES = ["tôi", "là", "sinh_viên", "th@@", "th", "e", "the", "a", "b", "ba@@", "n@@", "k", "@USER", "HTTPURL", "."]
MERGES = ["t h", "th e</w>", "l à</w>", "t ô", "tô i</w>", "b a"]


def japanese(folder: Path, **options: Any) -> Any:
    """As cl-tohoku's, without MeCab unless an option says so."""
    return transformers.BertJapaneseTokenizer(_lines(folder / "vocab.txt", SPECIAL + JAPANESE), **options)


def phobert(folder: Path, merges: list[str] = MERGES, words: list[str] = SYLLABLES) -> Any:
    return transformers.PhobertTokenizer(*_subwords(folder, merges, words))


def bertweet(folder: Path) -> Any:
    return transformers.BertweetTokenizer(*_subwords(folder, MERGES, SYLLABLES), normalization=True)


def esm(folder: Path) -> Any:
    names = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWC", "<mask>"]
    return transformers.EsmTokenizer(_lines(folder / "vocab.txt", names))


def canine(folder: Path) -> Any:
    return transformers.CanineTokenizer()


def byt5(folder: Path) -> Any:
    return transformers.ByT5Tokenizer()


KINDS = {make.__name__: make for make in (japanese, phobert, bertweet, esm, canine, byt5)}
MODELS = {"japanese": "Bert", "phobert": "Roberta", "bertweet": "Roberta", "esm": "Esm", "canine": "Canine"}


def make_model(kind: str, tokenizer: Any) -> nn.Module:
    """The family's model, with random weights, for this tokenizer's ids."""
    torch.manual_seed(0)
    family = MODELS[kind]
    sizes = {} if kind == "canine" else {"vocab_size": len(tokenizer)}
    sizes |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": tokenizer.pad_token_id}
    more = {"esm": {"mask_token_id": tokenizer.mask_token_id}, "canine": {"num_hash_buckets": 64}}.get(kind, {})
    config = getattr(transformers, f"{family}Config")(**sizes, **more)
    model: nn.Module = getattr(transformers, f"{family}Model")(config).eval()
    return model


def _lines(path: Path, lines: list[str]) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return str(path)


def _subwords(folder: Path, merges: list[str], words: list[str]) -> tuple[str, str]:
    counted = [f"{merge} {number}" for number, merge in enumerate(merges)]
    return _lines(folder / "vocab.txt", [f"{word} 1" for word in words]), _lines(folder / "bpe.codes", counted)
