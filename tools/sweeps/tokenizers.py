"""Tokenizers of the kinds that encoders use, trained on a few sentences in milliseconds, without a hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the bank of the river raised its interest rates again this spring",
    "The unbelievable banks of the river sprang up, and electroencephalography didn't help: e-mail me at 10:45!",
    "A bat and a bass swim upstream; one of them is a fish, the other is not (says the book).",
    "Ein Überraschungsei für Élodie; l'été à la plage, naïve déjà-vu, ça va?",
    "Привет, мир! Это проверка. 東京は夜の七時。 안녕하세요 세계 مرحبا بالعالم שלום עולם नमस्ते दुनिया",
] * 3
WORDS = CORPUS[0].split()
"""Words that are one token each in `wordpiece`."""
UNKNOWN = "☃"
"""No vocabulary holds it; byte-level ones cut it into bytes."""
NAMES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def wordpiece(pad_id: int = 0, *, segments: bool = True) -> Any:
    """As BERT has it, with the padding token at this id, 0 to 4."""
    specials = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    specials.insert(pad_id, "[PAD]")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    train(tokenizer, trainers.WordPieceTrainer, 400, specials)
    frame(tokenizer, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    return wrapped(tokenizer, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), segments=segments)


def byte_bpe(*, add_prefix_space: bool = False) -> Any:
    """As RoBERTa has it."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    train(tokenizer, trainers.BpeTrainer, 450, specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    frame(tokenizer, "<s> $A </s>", "<s> $A </s> </s> $B </s>")
    return wrapped(tokenizer, ("<pad>", "<unk>", "<s>", "</s>", "<mask>"))


def unigram() -> Any:
    """As XLM-RoBERTa has it: SentencePiece's model, normalisation and word mark."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    train(tokenizer, trainers.UnigramTrainer, 300, specials, unk_token="<unk>")
    frame(tokenizer, "<s> $A </s>", "<s> $A </s> </s> $B </s>")
    return wrapped(tokenizer, ("<pad>", "<unk>", "<s>", "</s>", "<mask>"))


def closed_only() -> Any:
    """As T5 has it: no token before a text, one after it, and the padding token's id is 0."""
    specials = ["<pad>", "</s>", "<unk>", "<s>", "<mask>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    train(tokenizer, trainers.UnigramTrainer, 300, specials, unk_token="<unk>")
    frame(tokenizer, "$A </s>", "$A </s> $B </s>")
    return wrapped(tokenizer, ("<pad>", "<unk>", "<s>", "</s>", "<mask>"))


def gemma() -> Any:
    """As Gemma has it: a normalizer turns blanks into the word mark, and nothing puts one before the first word."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # so that no piece crosses a blank
    train(learner, trainers.BpeTrainer, 450, specials)
    learnt = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(learnt["vocab"], merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    frame(tokenizer, "<bos> $A <eos>", "<bos> $A <eos> <bos> $B <eos>")
    tokenizer.add_special_tokens(specials)
    return wrapped(tokenizer, ("<pad>", "<unk>", "<bos>", "<eos>", "<mask>"))


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "wordpiece": wordpiece,
    "byte_bpe": byte_bpe,
    "byte_bpe_prefix": lambda: byte_bpe(add_prefix_space=True),
    "unigram": unigram,
    "closed_only": closed_only,
    "gemma": gemma,
}


def train(tokenizer: Any, trainer: Any, size: int, specials: Sequence[str], **options: Any) -> None:
    options |= {"vocab_size": size, "special_tokens": list(specials), "show_progress": False}
    tokenizer.train_from_iterator(CORPUS, trainer(**options))


def frame(tokenizer: Any, single: str, pair: str) -> None:
    """Special tokens around a text, and around the two of a pair."""
    parts = {part.partition(":")[0] for part in pair.split()} - {"$A", "$B"}
    known = [(part, tokenizer.token_to_id(part)) for part in sorted(parts)]
    tokenizer.post_processor = processors.TemplateProcessing(single, pair, known)


def wrapped(tokenizer: Any, specials: Sequence[str], *, segments: bool = False) -> Any:
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if segments else [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=names, **dict(zip(NAMES, specials, strict=True))
    )
