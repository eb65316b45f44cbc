"""Models with random weights, for machines without trained ones; they are as fast."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from bertstream import Encoder

TOKENIZER = "all-MiniLM-L6-v2"
"""The model whose tokenizer is used: it is bert-base-uncased's, and comes with the demo extra."""


def write_bert(folder: Path, *, tiny: bool = False, tokenizer: str | None = None) -> str:
    """Write a BERT-base with random weights (seed 0) and a tokenizer.

    Args:
        folder: created.
        tiny: whether to write a model small enough for a test instead.
        tokenizer: the folder of another tokenizer than `TOKENIZER`'s.
    Returns:
        The folder's path.
    """
    source = tokenizer or Encoder.from_pretrained(TOKENIZER, dtype="float32", device="cpu").model.config._name_or_path
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes if tiny else {})).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)
