"""Random tokenizers of the tokenizers library: any parts together, for rules that have to hold for all of them."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from bertstream.encoding.word_cache import WordCache
from bertstream.encoding.word_cuts import NoCutError, find_cut
from bertstream.errors import EncoderError

from .character_map import character_map
from .words import LLAMA

CHARACTERS = [
    *("a", "b", "A", "k", "K", "x", "y", "1", "!", "-", "`", ";", "'", "[", "]", "<", ">", "_", "``", "''", "'s"),
    *(" ", " ", " ", " ", "  ", "\n", "\t", "\u00a0", "\u2000", "\u2028", "\u3000", "\u200b", "\u200d", "\u2581"),
    *("\u0301", "\u0338", "\u00e9", "\u00b4", "\u00df", "\u0130", "\u03a3", "\u212a", "\uff21", "\uff4b", "\uff9e"),
    *("\u4e2d", "\u0600", "\U000113d1", "\U0001f600", "tag", "TAG", "Tag", "[K]", "[k]"),
]
_MAPPED = [
    *("a", "k", "-", " ", "!", "e\u0301", "\u0600", "\uff21", "\u3000", "\u00a0", "\r\n", "\u200b", "\t", "\n"),
    *(" \u0301", "\U000113d1", "\u00e9"),
]
_ADDED = ["tag", "Tag", "K", "[K]", "a", "x-", "\u00e9", "A", "\u4e2d", "a b", "!", "  ", "_a", "\uff21"]
_TEXTS = 150


def random_text(draw: random.Random, most: int = 16) -> str:
    """Fewer than `most` characters, blanks among them."""
    return "".join(draw.choice(CHARACTERS) for _ in range(draw.randrange(most)))


def random_tokenizer(draw: random.Random) -> Tokenizer:
    """A trained tokenizer of random parts; many are of no use.

    Raises:
        Exception: the library does not put these parts together.
    """
    tokenizer = _gemma_like(draw) if draw.random() < 0.2 else _of_any_parts(draw)
    for _ in range(draw.choice([0, 0, 1, 2])):
        content = draw.choice(_ADDED)
        around = {name: draw.random() < 0.25 for name in ("lstrip", "rstrip", "single_word", "special")}
        tokenizer.add_tokens([AddedToken(content, normalized=draw.random() < 0.7, **around)])
    return Tokenizer.from_str(tokenizer.to_str())


def wrong_text(seed: int) -> tuple[str | None, bool]:
    """A text of which a random tokenizer has other ids by its word cache, and whether it had one."""
    draw = random.Random(seed)
    try:
        tokenizer = random_tokenizer(draw)
        cache = WordCache(tokenizer, find_cut(tokenizer))
    except NoCutError:
        return None, False
    except BaseException as error:
        # What the library raises for parts that do not go together; some of them make its trainers panic.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        return None, False
    for _ in range(_TEXTS):
        text = random_text(draw)
        try:
            right = tokenizer.encode(text, add_special_tokens=False).ids
        except Exception:  # a model without an unknown token; the cache asks the same library
            continue
        try:
            found = cache.texts([text])[0]
        except EncoderError:  # it was compared
            return text, True
        if found != array("i", right).tobytes():
            return text, True
    return None, True


def _gemma_like(draw: random.Random) -> Tokenizer:
    """A BPE over whole texts that was trained on words."""
    tokenizer = _bpe(draw)
    _train(draw, tokenizer, pre_tokenizers.Metaspace(prepend_scheme="first"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = draw.choice([None, pre_tokenizers.Split(" ", "merged_with_previous")])
    return tokenizer


def _of_any_parts(draw: random.Random) -> Tokenizer:
    kind = draw.choice(["BPE", "BPE", "WordPiece", "Unigram", "WordLevel"])
    tokenizer = {
        "BPE": _bpe,
        "WordPiece": lambda draw: Tokenizer(
            models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=draw.choice([3, 100]))
        ),
        "Unigram": lambda draw: Tokenizer(models.Unigram()),
        "WordLevel": lambda draw: Tokenizer(models.WordLevel(unk_token="[UNK]")),
    }[kind](draw)
    splits = _pre_tokenizer(draw)
    steps = [_normalizer(draw) for _ in range(draw.choice([0, 1, 1, 2, 3]))]
    if "ByteLevel" in repr(splits) and draw.random() < 0.8:  # else hardly any has a cut
        steps = [step for step in steps if type(step).__name__ in ("NFC", "NFD", "Lowercase")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps) if len(steps) > 1 else steps[0]
    _train(draw, tokenizer, splits)
    return tokenizer


def _bpe(draw: random.Random) -> Tokenizer:
    rare: dict[str, Any] = {"end_of_word_suffix": "</w>"} if draw.random() < 0.15 else {}
    rare |= {"continuing_subword_prefix": "##"} if draw.random() < 0.1 else {}
    flags = {name: draw.random() < share for name, share in [("fuse_unk", 0.5), ("byte_fallback", 0.3)]}
    unknown = draw.choice([None, "[UNK]"])
    return Tokenizer(models.BPE(unk_token=unknown, ignore_merges=draw.random() < 0.2, **flags, **rare))


def _train(draw: random.Random, tokenizer: Tokenizer, splits: Any) -> None:
    model = tokenizer.model
    kind = type(model).__name__
    options: dict[str, Any] = {"vocab_size": draw.choice([60, 120, 200]), "special_tokens": ["[UNK]"]}
    if kind == "BPE":
        options["limit_alphabet"] = draw.choice([12, 30, 1000])
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet() if "ByteLevel" in repr(splits) else []
        for name in ("end_of_word_suffix", "continuing_subword_prefix"):
            options |= {name: value} if (value := getattr(model, name)) else {}
    if kind == "Unigram":
        options["unk_token"] = "[UNK]"
    trainer = f"{kind.title() if kind == 'BPE' else kind}Trainer"
    if splits is not None:
        tokenizer.pre_tokenizer = splits
    corpus = [*(random_text(draw, 20) for _ in range(60)), *["  ", "   ", "a  b"] * 2]
    tokenizer.train_from_iterator(corpus, getattr(trainers, trainer)(show_progress=False, **options))


def _normalizer(draw: random.Random) -> Any:
    def either() -> bool:
        return draw.random() < 0.5

    plain = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt")
    kind = draw.choice([*plain, "Strip", "BertNormalizer", "Replace", "Replace", "blanks", "marks", "Precompiled"])
    if kind in plain:
        return getattr(normalizers, kind)()
    if kind == "Strip":
        return normalizers.Strip(left=either(), right=either())
    if kind == "BertNormalizer":
        return normalizers.BertNormalizer(
            clean_text=either(), handle_chinese_chars=either(), strip_accents=draw.choice([None, True, False])
        )
    if kind == "Replace":
        found = draw.choice(["!", "-", "``", "''", "_", "", "x", "'", "a"])
        return normalizers.Replace(found, draw.choice(["", "x", " ", "\u0301", "-", "\u2581", "\u00b4", "!", '"']))
    if kind == "blanks":
        found = Regex(draw.choice(["\\s{2,}|[\n\r\t]", r"\s+", " {2,}"]))
        return normalizers.Replace(found, draw.choice([" ", "\u2581"]))
    if kind == "marks":
        return normalizers.Replace(" ", "\u2581")
    values = ["", " ", "a", "-", "b", " a", "\u0301", "\u2581"]
    return normalizers.Precompiled(
        character_map({draw.choice(_MAPPED): draw.choice(values) for _ in range(draw.randrange(1, 4))})
    )


def _pre_tokenizer(draw: random.Random) -> Any:
    return draw.choice(list(_pre_tokenizers(draw)))


def _pre_tokenizers(draw: random.Random) -> Iterator[Any]:
    def metaspace() -> Any:
        scheme = draw.choice(["always", "first", "never"])
        return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=draw.random() < 0.9)

    in_order = pre_tokenizers.Sequence
    behavior = draw.choice(["isolated", "removed", "contiguous", "merged_with_next", "merged_with_previous"])
    bert, blanks = pre_tokenizers.BertPreTokenizer(), pre_tokenizers.WhitespaceSplit()
    whitespace = pre_tokenizers.Whitespace()
    yield None
    yield from (bert, blanks, whitespace, pre_tokenizers.Split(" ", "merged_with_previous"))
    yield from (metaspace(), metaspace(), metaspace(), in_order([blanks, metaspace()]))
    yield in_order([in_order([whitespace]), in_order([metaspace()])])
    yield in_order([pre_tokenizers.Punctuation(), metaspace()])
    yield in_order([blanks, pre_tokenizers.Punctuation(behavior)])
    yield in_order([bert, pre_tokenizers.Digits(draw.random() < 0.5), pre_tokenizers.Punctuation(behavior)])
    for _ in range(2):
        yield pre_tokenizers.ByteLevel(add_prefix_space=draw.random() < 0.4, use_regex=draw.random() < 0.9)
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    yield in_order([pre_tokenizers.Split(Regex(LLAMA), "isolated"), bytes_alone])
