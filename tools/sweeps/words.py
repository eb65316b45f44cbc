"""Tokenizers that are trained on the spot, and random texts with traps for whoever cuts them at blanks."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pydoc_data.topics import topics
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from .tokenizers import CORPUS

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PARTS = [
    *(
        "a",
        "B",
        "the",
        "Bank",
        "word",
        "unbelievable",
        "12",
        "7",
        "'s",
        "don't",
        "##ing",
        "-",
        "'",
        "``",
        ".",
        ",",
        "?!",
    ),
    *(" ", " ", " ", " ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u1680", "\u2003", "\u2028", "\u202f"),
    *("\u205f", "\u3000", "\x85", "\x0b", "\x0c", "\x1c", "\x1f", "\x00", "\x07", "\x7f", "\u180e", "\u200b", "\u200d"),
    *("\u2060", "\ufeff", "\u00ad", "\ufffd", "\ue000", "\u0301", "\u0338", "\u3099", "\uff9e", "\u0e33", "\u0600"),
    *("\u00e9", "e\u0301", "\u00df", "\u0130", "\u01c6", "\ufb01", "\u212a", "\u00b4", "\u00a8", "\u037a", "\u1fef"),
    *("\u0434\u043e\u043c", "\u03a3\u03c2", "\u4e2d", "\u65e5\u672c", "\ud55c\uad6d", "\u1112\u1161", "\u0627\u0644"),
    *(
        "\u05e9\u05dc",
        "\u0915\u094d\u0937",
        "\u0e01\u0e33",
        "\U0001f600",
        "\U0001f469\u200d\U0001f467",
        "\U0001f44d\U0001f3fd",
    ),
    *("\U0001f1eb\U0001f1f7", "\u2581", "\u2581a", "\u0120", "\u2019", "\u2026", "=", "<", "[", "]"),
    *("[SEP]", "[sep]", "[MASK]", "[CLS] ", "[UN", "K]", "<s>", "new york", "New York", "\\", "x" * 70, "y" * 10_000),
]
"""What random texts are made of; the last one is a word as long as a file."""


def random_text(draw: random.Random) -> str:
    """Up to 40 parts, seldom with the longest."""
    return "".join(draw.choice(PARTS[: -1 if draw.random() < 0.99 else None]) for _ in range(draw.randrange(40)))


@cache
def paragraphs() -> list[str]:
    """Those of Python's manual."""
    return [part for name in sorted(topics) for part in topics[name].split("\n\n")]


def bert(*, lowercase: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _trained(tokenizer, trainers.WordPieceTrainer)


def roberta(*, add_prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer = _trained(tokenizer, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


def modernbert() -> Tokenizer:
    """With NFC, and runs of blanks among the added tokens."""
    tokenizer = roberta()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in (5, 4, 3, 2)])
    return tokenizer


def eurobert() -> Tokenizer:
    """With the expression of Llama 3."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return _trained(tokenizer, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def xlm_roberta() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    return _trained(tokenizer, trainers.UnigramTrainer, unk_token="[UNK]")


def deberta() -> Tokenizer:
    """Nothing but Metaspace cuts it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex("\\s{2,}|[\n\r\t]"), " "),
            normalizers.NFC(),
            normalizers.Strip(left=False, right=True),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return _trained(tokenizer, trainers.UnigramTrainer, unk_token="[UNK]")


def gemma(*, across: bool = False) -> Tokenizer:
    """A BPE over whole texts, trained on words; or `across` blanks."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", fuse_unk=True))
    marks = normalizers.Replace(" ", "\u2581")
    if across:
        tokenizer.normalizer = marks
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = _trained(tokenizer, trainers.BpeTrainer)
    tokenizer.normalizer = marks
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bert": bert,
    "bert_cased": lambda: bert(lowercase=False),
    "roberta": roberta,
    "roberta_prefix": lambda: roberta(add_prefix_space=True),
    "modernbert": modernbert,
    "eurobert": eurobert,
    "xlm_roberta": xlm_roberta,
    "deberta": deberta,
    "gemma": gemma,
}


def _trained(tokenizer: Tokenizer, trainer: Any, **options: Any) -> Tokenizer:
    texts = [*CORPUS * 3, *paragraphs()[:150]]
    tokenizer.train_from_iterator(
        texts, trainer(vocab_size=900, special_tokens=SPECIALS, show_progress=False, **options)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer
