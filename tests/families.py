"""Tiny models of every family with random weights, and a tokenizer for all of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from bertstream.tokens import Text

VOCABULARY = 8000
"""The first ids of MiniLM's: they spell every word, and an encoder copies its tokenizer and weights in a quarter of the
time."""
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
}
TINY = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 300,
}
"""Sizes for a test that makes its own vocabulary of ids."""
OWN = {
    "DistilBert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64},
    "Electra": {"embedding_size": 16},
    "Albert": {"embedding_size": 16},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "conv_kernel_size": 3}
    | {"type_vocab_size": 2},
    "ModernBert": {"local_attention": 16, "global_attn_every_n_layers": 2},
    "EuroBert": {"num_key_value_heads": 4, "head_dim": 8},
    "GroupedEuroBert": {"num_key_value_heads": 2, "head_dim": 8},
    "MobileBert": {"embedding_size": 32, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "FNet": {"tpu_short_seq_length": 80},
    "MPNet": {"type_vocab_size": 0},
    "Roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "XLMRoberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "Camembert": {"pad_token_id": 1, "type_vocab_size": 1},
}
WORDS = ["The", "unbelievable", "banks", "of", "the", "river", "sprang", "electroencephalography"]
PAIRS: list[Text] = [("a question", "its answer, which is longer"), ("", "b"), ("the bank of the river", "no")]


def make(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    kind = name.removeprefix("Grouped")  # heads that share keys and values
    config = getattr(transformers, f"{kind}Config")(**SIZES | OWN.get(name, {}) | options)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():  # spread like trained weights: with the initial ones attention is nearly uniform
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


class Tokenizer:
    """MiniLM's tokenizer with the vocabulary of these models, presented as another family's."""

    def __init__(self, folder: str, model: nn.Module) -> None:
        self.backend_tokenizer = _backend(folder)
        self.model_max_length = 80
        two = getattr(model.config, "type_vocab_size", 0) > 1
        self.model_input_names = ["input_ids", "attention_mask", *(["token_type_ids"] if two else [])]


@functools.cache
def _backend(folder: str) -> tokenizers.Tokenizer:
    """Read once: encoders never change it."""
    return tokenizers.Tokenizer.from_str(first_pieces(folder))


def first_pieces(folder: str) -> str:
    """The tokenizer.json of MiniLM's folder with the ids below `VOCABULARY`."""
    parts = json.loads(Path(folder, "tokenizer.json").read_text("utf-8"))
    parts["model"]["vocab"] = {piece: i for piece, i in parts["model"]["vocab"].items() if i < VOCABULARY}
    return json.dumps(parts)


def loss_of(rows: list[Tensor]) -> Tensor:
    """A loss that depends on every element of every row, each with its own weight."""
    flat = torch.cat([row.reshape(-1) for row in rows])
    weights = torch.randn(len(flat), generator=torch.Generator().manual_seed(1))
    return (flat * weights).sum() + (flat**2).sum()


def tokenizer_with_marks(corpus: Sequence[str], special_tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """As Gemma has it: a normalizer makes blanks marks, and nothing puts one before the first word."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # only to learn pieces that do not cross blanks
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(special_tokens), show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer
