"""Tiny models of every family with random weights, and a tokenizer for all of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from bertstream.encoding.attention import BatchingSupport
from bertstream.encoding.self_test import probe_batching
from bertstream.tokens import Int32Array, Text

VOCABULARY = 8000
"""The first ids of MiniLM's: they spell every word, and an encoder copies its tokenizer and weights in a quarter of the
time."""
MASK = 103
"""The id of the mask."""
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
OWN: dict[str, dict[str, Any]] = {
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
    "BigBird": {"block_size": 4, "num_random_blocks": 1},
    "Data2VecText": {"pad_token_id": 1},
    "Esm": {"mask_token_id": MASK, "token_dropout": False},
    "EsmWithMaskRatio": {"mask_token_id": MASK, "token_dropout": True, "position_embedding_type": "rotary"},
    "IBert": {"pad_token_id": 1},
    "Longformer": {"attention_window": [16] * 3},
    "Nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 8},
    "SqueezeBert": {"embedding_size": 32},
    "XLM": {"emb_dim": 32, "n_layers": 3, "n_heads": 4, "pad_index": 0},
}
WORDS = ["The", "unbelievable", "banks", "of", "the", "river", "sprang", "electroencephalography"]
PAIRS: list[Text] = [("a question", "its answer, which is longer"), ("", "b"), ("the bank of the river", "no")]


def make(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    # Heads that share keys and values; a share of masks that the model was trained with.
    kind = name.removeprefix("Grouped").removesuffix("WithMaskRatio")
    config = getattr(transformers, f"{kind}Config")(**SIZES | OWN.get(name, {}) | options)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():  # spread like trained weights: with the initial ones attention is nearly uniform
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def tiny(model: type[nn.Module], config: type[Any], **options: Any) -> nn.Module:
    """A model of `TINY` sizes."""
    torch.manual_seed(0)
    return model(config(**TINY | options)).eval()


def tiny_bert(**options: Any) -> nn.Module:
    """One for all ids of MiniLM's tokenizer, with BERT's own number of positions."""
    return tiny(BertModel, BertConfig, **{"vocab_size": 30522, "max_position_embeddings": 512} | options)


def probed(model: nn.Module) -> BatchingSupport:
    """How the last layer of a tiny model runs."""
    return probe_batching(model, (3,), 3)[1]


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


def random_texts(lengths: Sequence[int], special: Sequence[int] = (), seed: int = 0) -> list[Int32Array]:
    """Texts with these ids inside, each at another place, and not in every text."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(1000, VOCABULARY, length, np.int32) for length in lengths]
    for number, text in enumerate(texts):
        for i in special[number % (len(special) + 1) :]:
            text[rng.integers(1, max(2, len(text) - 1))] = i
    return texts


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
