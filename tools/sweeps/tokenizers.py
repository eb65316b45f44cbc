"""Tokenizers of the kinds that encoders use, over small vocabularies, without a hub.

The vocabularies are made here: the trainers of `tokenizers` break ties in another way in every run.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the bank of the river raised its interest rates again this spring",
    "The unbelievable banks of the river sprang up, and electroencephalography didn't help: e-mail me at 10:45!",
    "A bat and a bass swim upstream; one of them is a fish, the other is not (says the book).",
    "Ein Überraschungsei für Élodie; l'été à la plage, naïve déjà-vu, ça va?",
    "Привет, мир! Это проверка. 東京は夜の七時。 안녕하세요 세계 مرحبا بالعالم שלום עולם नमस्ते दुनिया",
]
WORDS = CORPUS[0].split()
"""Words that are one token each in `wordpiece`."""
UNKNOWN = "☃"
"""No vocabulary holds it; byte-level ones cut it into bytes."""
NAMES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
SENTENCEPIECE = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def wordpiece(pad_id: int = 0, *, segments: bool = True) -> Any:
    """As BERT has it, with the padding token at this id, 0 to 4."""
    specials = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    specials.insert(pad_id, "[PAD]")
    normalizer, pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = [word for line in CORPUS for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(line))]
    pieces = [*words[: len(WORDS)]]
    for word in words:
        pieces += [word[:3], f"##{word[-3:]}", *word, *(f"##{letter}" for letter in word)]
    tokenizer = Tokenizer(models.WordPiece(numbered([*specials, *pieces]), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    frame(tokenizer, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    return wrapped(tokenizer, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), segments=segments)


def byte_bpe(*, add_prefix_space: bool = False) -> Any:
    """As RoBERTa has it; the vocabulary is the same with and without the space."""
    spaced = pre_tokenizers.ByteLevel(add_prefix_space=True)
    merges = merges_of(tuple(word for line in CORPUS for word, _ in spaced.pre_tokenize_str(line)), 150)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = numbered([*SENTENCEPIECE, *letters, *("".join(merge) for merge in merges)])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    frame(tokenizer, "<s> $A </s>", "<s> $A </s> </s> $B </s>")
    return wrapped(tokenizer, ("<pad>", "<unk>", "<s>", "</s>", "<mask>"))


def unigram() -> Any:
    """As XLM-RoBERTa has it: SentencePiece's model, normalisation and word mark."""
    tokenizer = sentencepiece(SENTENCEPIECE)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    frame(tokenizer, "<s> $A </s>", "<s> $A </s> </s> $B </s>")
    return wrapped(tokenizer, ("<pad>", "<unk>", "<s>", "</s>", "<mask>"))


def closed_only() -> Any:
    """As T5 has it: no token before a text, one after it, and the padding token's id is 0."""
    tokenizer = sentencepiece(("<pad>", "</s>", "<unk>", "<s>", "<mask>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    frame(tokenizer, "$A </s>", "$A </s> $B </s>")
    return wrapped(tokenizer, ("<pad>", "<unk>", "<s>", "</s>", "<mask>"))


def gemma() -> Any:
    """As Gemma has it: a normalizer turns blanks into the word mark, and nothing puts one before the first word."""
    words = [f"▁{word}" if i else word for line in CORPUS for i, word in enumerate(line.split())]
    merges = merges_of(tuple(words), 200)
    letters = sorted({"▁", *"".join(words)})
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary = numbered([*specials, *letters, *("".join(merge) for merge in merges)])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    frame(tokenizer, "<bos> $A <eos>", "<bos> $A <eos> <bos> $B <eos>")
    return wrapped(tokenizer, ("<pad>", "<unk>", "<bos>", "<eos>", "<mask>"))


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "wordpiece": wordpiece,
    "byte_bpe": byte_bpe,
    "byte_bpe_prefix": lambda: byte_bpe(add_prefix_space=True),
    "unigram": unigram,
    "closed_only": closed_only,
    "gemma": gemma,
}


def sentencepiece(specials: Sequence[str]) -> Tokenizer:
    """A unigram model over words, their beginnings and ends, and letters; the more frequent, the more likely."""
    words = [f"▁{word}" for line in CORPUS for word in line.split()]
    counts = Counter(part for word in words for part in (word, word[:3], word[-3:], word[1:4]))
    letters = sorted({*"▁", *"".join(words)} - {*counts})
    total = sum(counts.values())
    scored = [(part, math.log(count / total)) for part, count in sorted(counts.items()) if len(part) < 12]
    vocabulary = [*((name, 0.0) for name in specials), *scored, *((letter, -12.0) for letter in letters)]
    return Tokenizer(models.Unigram(vocabulary, unk_id=list(specials).index("<unk>")))


@functools.cache
def merges_of(words: tuple[str, ...], count: int) -> list[tuple[str, str]]:
    """Byte-pair merges: again and again the most frequent pair, the first in the alphabet of equals."""
    split = [list(word) for word in words]
    out: list[tuple[str, str]] = []
    while len(out) < count:
        pairs = Counter(pair for word in split for pair in pairwise(word))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        out.append(best)
        for word in split:
            for i in range(len(word) - 2, -1, -1):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = ["".join(best)]
    return out


def numbered(pieces: Sequence[str]) -> dict[str, int]:
    """Ids in this order; a piece that comes twice has its first."""
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def frame(tokenizer: Any, single: str, pair: str) -> None:
    """Special tokens around a text, and around the two of a pair."""
    parts = {part.partition(":")[0] for part in pair.split()} - {"$A", "$B"}
    known = [(part, tokenizer.token_to_id(part)) for part in sorted(parts)]
    tokenizer.post_processor = processors.TemplateProcessing(single, pair, known)


def wrapped(tokenizer: Any, specials: Sequence[str], *, segments: bool = False) -> Any:
    """Of transformers, which finds these special tokens inside texts too."""
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if segments else [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=names, **dict(zip(NAMES, specials, strict=True))
    )
