"""Models of random weights, for machines that have no others: what they compute is as fast as with trained ones."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from bertstream import Encoder

TOKENIZER = "all-MiniLM-L6-v2"
"""Whose tokenizer is taken: bert-base-uncased's own, which the demo extra brings."""


def write_bert(folder: Path, *, tiny: bool = False, tokenizer: str | None = None) -> str:
    """Write a folder with a BERT-base of random weights (seed 0), or with one that is small enough for a test.

    Args:
        folder: is made.
        tiny: whether it is small.
        tokenizer: the folder of another than `TOKENIZER`'s.
    """
    source = tokenizer or Encoder.from_pretrained(TOKENIZER, dtype="float32", device="cpu").model.config._name_or_path
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes if tiny else {})).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)
