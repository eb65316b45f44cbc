"""Random settings and texts, each case a pure function of its number and the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bertstream.tokens import Text

from .tokenizers import CORPUS, UNKNOWN

MODELS = ("bert", "roberta", "distilbert", "albert", "electra", "modernbert", "xlm-roberta", "mpnet", "deberta-v2")
NOT_PACKED = ("mpnet", "deberta-v2")
WAYS = ("call", "call", "wrap", "stream", "cache")
WORD_POOLINGS = ("mean", "first", "last", "max", "first_last")
SENTENCE_POOLINGS = ("mean", "cls", "last", "max", "weighted_mean", "mean_sqrt_len")
PROMPTS = ("bank of ", "query:", "the")
LAYERS = 3
MOST = 76
"""Tokens that each of the models takes, at least."""

PLAIN_WORDS = " ".join(CORPUS).split()
ODD_WORDS = [
    "e\u0301",
    "don't",
    "x" * 30,
    UNKNOWN,
    "🙂👍🏽",
    "\u200b",
    "ﬁ",
    "İ",
    "１２",
    "a\u00adb",
    "\u0915\u094d\u0937",
    ".",
]
BLANK_WORDS = ["", " ", "\t", " river", "New York"]


@dataclass
class Case:
    """One case of the sweep.

    Attributes:
        number: of the case; with the seed it gives the same case again.
        model: a family of `MODELS`.
        tokenizer: a kind of `tokenizers.TOKENIZERS`.
        way: "call", "wrap", "stream" or "cache" (a wrapped loader's second epoch, from a cache).
        options: arguments of `Encoder`.
        texts: what is encoded; all are pairs, or none is.
        batch_size: of "wrap", "stream" and "cache".
        prefetch: of these.
        shuffle: of "stream".
        truncation_side: of the tokenizer.
        must_refuse: why the settings alone have no right answer; "" if they have one.
    """

    number: int
    model: str
    tokenizer: str
    way: str
    options: dict[str, Any]
    texts: list[Text]
    batch_size: int = 4
    prefetch: int | None = None
    shuffle: bool = False
    truncation_side: str = "right"
    must_refuse: str = ""
    layers: tuple[int, ...] = field(default=(-1,))

    def __str__(self) -> str:
        shown = {name: value for name, value in asdict(self).items() if name not in ("number", "layers")}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def draw(number: int, seed: int, models: Sequence[str] = MODELS, tokenizers: Sequence[str] = ()) -> Case:
    """The case of this number."""
    chance = random.Random(f"{seed}/{number}")
    model, tokenizer = chance.choice(models), chance.choice(tokenizers)
    output = chance.choice(("tokens", "words", "sentence"))
    layers: Any = tuple(chance.sample(range(LAYERS + 1), chance.choice((1, 1, 2, 3))))
    layers = tuple(layer if chance.random() < 0.5 else layer - LAYERS - 1 for layer in layers)
    options: dict[str, Any] = {"output": output, "layers": layers[0] if len(layers) == 1 else layers}
    options["combine"] = chance.choice(("concat", "mean", "sum", "stack"))
    must_refuse = ""
    if output == "words":
        options["pooling"] = chance.choice((None, *WORD_POOLINGS))
    if output == "sentence":
        several = tuple(chance.sample(SENTENCE_POOLINGS, chance.randint(1, 3)))
        options["pooling"] = chance.choice((None, several[0], several))
        options["normalize"] = chance.random() < 0.4
        if chance.random() < 0.15:
            options["pooling"] = chance.choice(("pooler", ("pooler", *several)))
            if chance.random() < 0.8:
                options |= {"layers": -1, "combine": "concat"}
                layers = (-1,)
    if output != "words":
        options["special_tokens"] = chance.random() < 0.6
    options["dtype"] = "bfloat16" if chance.random() < 0.15 else "float32"
    options["overflow"] = chance.choice(("error", "truncate", "windows"))
    if options["overflow"] != "error" or chance.random() < 0.2:
        options["max_length"] = chance.choice((None, *range(6, 30)))
    if options["overflow"] == "windows":
        options["stride"] = chance.randint(0, (options["max_length"] or 30) - 5)
    options["packed"] = chance.choice((None, None, False, True))
    if (
        options["packed"] and model in NOT_PACKED and any(layer % (LAYERS + 1) for layer in layers)
    ):  # the embedding layer, 0, needs no packing
        must_refuse = "packed=True for a model that cannot be packed"
    if output == "sentence" and chance.random() < 0.4:
        options["prompt"] = chance.choice(PROMPTS)
    way = chance.choice(WAYS)
    options["max_forward_tokens"] = chance.choice((1, 16, 64, 2048, *([None] if way == "call" else [])))
    if chance.random() < 0.03:
        change, must_refuse = chance.choice(bad_options(output))
        options |= change
    in_pairs = chance.random() < 0.25
    texts = [draw_text(chance, tokenizer, in_pairs) for _ in range(chance.randint(1, 7))]
    if chance.random() < 0.3:
        texts.append(chance.choice(texts))  # the same text twice
    return Case(
        number,
        model,
        tokenizer,
        way,
        options,
        texts,
        batch_size=chance.randint(1, 4),
        prefetch=chance.choice((None, 0, 1)),
        shuffle=chance.random() < 0.5,
        truncation_side=chance.choice(("right", "left")),
        must_refuse=must_refuse,
        layers=layers,
    )


def bad_options(output: str) -> list[tuple[dict[str, Any], str]]:
    """Settings that have no right answer, and why."""
    out: list[tuple[dict[str, Any], str]] = [
        ({"layers": LAYERS + 1}, "no such layer"),
        ({"layers": (1, 1)}, "a layer twice"),
        ({"overflow": "truncate", "stride": 3}, "a stride without windows"),
        ({"overflow": "windows", "max_length": 8, "stride": 8}, "a stride as large as a window"),
        ({"max_length": 1000}, "longer than the model takes"),
    ]
    if output == "words":
        out.append(({"special_tokens": False}, "words without special tokens"))
    if output != "sentence":
        out += [({"normalize": True}, "normalized tokens"), ({"prompt": PROMPTS[0]}, "a prompt before tokens")]
    return out


def draw_text(chance: random.Random, tokenizer: str, in_pairs: bool) -> Text:
    """A string, a list of words, or a pair of either; short ones, long ones, and odd ones."""
    as_words = chance.random() < 0.4
    parts = [draw_words(chance, tokenizer, as_words) for _ in range(1 + in_pairs)]
    if as_words:
        return (parts[0], parts[1]) if in_pairs else parts[0]
    strings = [chance.choice((" ", " ", "  ")).join(part) for part in parts]
    return (strings[0], strings[1]) if in_pairs else strings[0]


def draw_words(chance: random.Random, tokenizer: str, as_words: bool) -> list[str]:
    count = chance.choice((0, 1, 1, 2, 3, 5, 8, 13, 21))
    specials = (
        ["[MASK]", "[PAD]", "[SEP]", "[UNK]"] if tokenizer == "wordpiece" else ["<mask>", "<pad>", "</s>", "<unk>"]
    )
    rare = [*ODD_WORDS, *specials, *(BLANK_WORDS if as_words and tokenizer != "gemma" else [])]
    if tokenizer == "gemma":  # whose words are read off the running text
        rare = [word for word in rare if word not in specials]
    return [chance.choice(rare) if chance.random() < 0.15 else chance.choice(PLAIN_WORDS) for _ in range(count)]
