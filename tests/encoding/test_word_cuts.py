"""A cut is admitted where a tokenizer's parts prove it exact, and refused with the part that does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sweeps.character_map import character_map
from sweeps.words import KINDS, PARTS, bert, deberta, gemma, modernbert, paragraphs, roberta, xlm_roberta
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from bertstream.encoding import word_cuts
from bertstream.encoding.word_cuts import Cut, NoCutError, find_cut

TEXTS = st.lists(st.sampled_from(PARTS[:-1]), max_size=30).map("".join) | st.text(max_size=30)


@cache
def kind(name: str) -> tuple[Tokenizer, Cut]:
    tokenizer = KINDS[name]()
    return tokenizer, find_cut(tokenizer)


def ids(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    return [number for piece in pieces for number in tokenizer.encode(piece, add_special_tokens=False).ids]


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60)
@given(text=TEXTS)
@example(text="y" * 10_000 + " a")
@example(text="a\x1cb \x1f c")
@example(text="the  bank\n\n  of\tthe \n river  ")
@example(text="new york New York")
@example(text="a [SEP] b")
@example(text="a <mask>b  <mask>")
def test_the_pieces_of_a_text_have_its_tokens(name: str, text: str) -> None:
    tokenizer, cut = kind(name)
    pieces = cut.pieces(text)
    if pieces is not None:
        assert ids(tokenizer, *pieces) == ids(tokenizer, text)


@pytest.mark.parametrize("name", KINDS)
def test_most_paragraphs_are_cut_into_words(name: str) -> None:
    _, cut = kind(name)
    pieces = [cut.pieces(" ".join(text.split())) for text in paragraphs()[::10]]
    assert sum(found is not None for found in pieces) > 0.95 * len(pieces)
    assert sum(len(found) for found in pieces if found) > 0.95 * sum(len(text.split()) for text in paragraphs()[::10])


def with_parts(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def with_tokens(tokenizer: Tokenizer, *tokens: str | AddedToken) -> Tokenizer:
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def with_one_crossing_merge() -> Tokenizer:
    """Of words, but for one token."""
    tokenizer = Tokenizer(models.BPE({"▁": 0, "a": 1, "▁a": 2, "a▁a": 3}, [("▁", "a"), ("a", "▁a")]))
    return with_parts(tokenizer, normalizer=normalizers.Replace(" ", "▁"))


def of_marks(**options: Any) -> Tokenizer:
    vocabulary = {"▁": 0, "a": 1, "▁a": 2, "▁▁": 3, "[UNK]": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], **{"unk_token": "[UNK]", **options}))
    return with_parts(tokenizer, normalizer=normalizers.Replace(" ", "▁"))


def of_words(pre_tokenizer: Any, *steps: Any) -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "a", "b", "▁", "▁a", "▁b"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    return with_parts(tokenizer, normalizer=normalizers.Sequence(list(steps)), pre_tokenizer=pre_tokenizer)


def mapped(pre_tokenizer: Any, **rules: str) -> Tokenizer:
    return of_words(pre_tokenizer, normalizers.Precompiled(character_map(rules)))


TO_ONE_BLANK = normalizers.Replace(Regex(" {2,}"), " ")

REFUSED: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "trained across blanks": (lambda: gemma(across=True), "crosses a blank"),
    "one merge across a blank": (with_one_crossing_merge, "'a▁a' crosses a blank"),
    "no mark in the vocabulary": (
        lambda: with_parts(Tokenizer(models.BPE({"a": 0}, [])), normalizer=normalizers.Replace(" ", "▁")),
        "lacks '▁'",
    ),
    "a character that is dropped between blanks": (
        lambda: with_parts(
            Tokenizer(models.BPE({"▁": 0, "a": 1, "▁▁": 2}, [("▁", "▁")])), normalizer=normalizers.Replace(" ", "▁")
        ),
        "drops '!'",
    ),
    "a blank for unknown characters": (lambda: of_marks(unk_token="▁"), "unknown characters become '▁'"),
    "whole texts in the vocabulary": (lambda: of_marks(ignore_merges=True), "ignore_merges=True"),
    "dropout": (lambda: with_parts(roberta(), model=models.BPE({"a": 0}, [], dropout=0.1)), "BPE has dropout=0.1"),
    "a Metaspace that does not split": (
        lambda: with_parts(deberta(), pre_tokenizer=pre_tokenizers.Metaspace(split=False)),
        "the pre-tokenizer is Metaspace",
    ),
    "a mark for the first word only": (
        lambda: with_parts(
            xlm_roberta(),
            pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="first")]
            ),
        ),
        "WhitespaceSplit \\+ Metaspace",
    ),
    "bytes without an expression": (
        lambda: with_parts(roberta(), pre_tokenizer=pre_tokenizers.ByteLevel(use_regex=False)),
        "the pre-tokenizer is ByteLevel",
    ),
    "an unknown expression": (
        lambda: with_parts(roberta(), pre_tokenizer=pre_tokenizers.Split(Regex(r"\S+ ?"), "isolated")),
        "the pre-tokenizer is Split",
    ),
    "no pre-tokenizer": (lambda: with_parts(bert(), pre_tokenizer=None), "the pre-tokenizer is none"),
    "a normalizer that joins words": (
        lambda: with_parts(bert(), normalizer=normalizers.Replace(Regex(" (?=a)"), "")),
        "the normalizer is Replace",
    ),
    "one that finds nothing everywhere": (
        lambda: of_words(pre_tokenizers.WhitespaceSplit(), normalizers.Replace("", "a")),
        "the normalizer is Replace",
    ),
    "one that brings two blanks together": (
        lambda: of_words(pre_tokenizers.Metaspace(), normalizers.Replace("~~", ""), TO_ONE_BLANK),
        "the normalizer is Replace",
    ),
    "one whose accent another one drops": (
        lambda: of_words(
            pre_tokenizers.Metaspace(), normalizers.Replace("~~", "\u0301"), normalizers.StripAccents(), TO_ONE_BLANK
        ),
        "the normalizer is Replace",
    ),
    "a map that drops a blank": (
        lambda: mapped(pre_tokenizers.WhitespaceSplit(), **{"\u2028": ""}),
        "the normalizer is Precompiled",
    ),
    "a map that makes a letter of a line end": (
        lambda: mapped(pre_tokenizers.WhitespaceSplit(), **{"\r\n": "a"}),
        "the normalizer is Precompiled",
    ),
    "a map that makes a blank of a dash": (
        lambda: mapped(pre_tokenizers.Metaspace(), **{"-": " "}),
        "the normalizer is Precompiled",
    ),
    "a map after one that drops characters": (
        lambda: of_words(
            pre_tokenizers.WhitespaceSplit(),
            normalizers.BertNormalizer(),
            normalizers.Precompiled(character_map({"A": "a"})),
        ),
        "BertNormalizer drops",
    ),
    "one that makes blanks for a byte-level tokenizer": (
        lambda: with_parts(roberta(), normalizer=normalizers.NFKC()),
        "the normalizer is NFKC",
    ),
    "an added token with a blank, in lower-cased text": (
        lambda: with_tokens(bert(), "New York"),
        "'New York' has a blank",
    ),
    "a lower-cased one that Strip may bring to the start": (
        lambda: with_tokens(of_words(pre_tokenizers.Metaspace(), normalizers.Lowercase(), normalizers.Strip()), "Tag"),
        "'Tag' .* which Strip changes",
    ),
    "a lower-cased one that takes the blanks beside it": (
        lambda: with_tokens(
            with_parts(roberta(), normalizer=normalizers.Lowercase()), AddedToken("<Tag>", lstrip=True, normalized=True)
        ),
        "'<Tag>' takes the blanks",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_cut_that_nothing_proves_is_refused(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(NoCutError, match=reason):
        find_cut(make())


@pytest.mark.parametrize("make", [roberta, modernbert], ids=["raw", "NFC"])
def test_a_text_that_shows_an_added_token_with_a_blank_is_not_cut(make: Callable[[], Tokenizer]) -> None:
    cut = find_cut(with_tokens(make(), AddedToken("new yor", normalized=make is modernbert)))
    assert cut.pieces("in new york") is None and cut.pieces("in new jersey") == ["in", " new", " jersey"]


@pytest.mark.parametrize(
    ("normalizer", "token", "text"),
    [(normalizers.Lowercase(), "Tag", "a   TAG b"), (normalizers.NFC(), "K", "a   \u212a b")],
    ids=["lower-cased", "composed"],
)
def test_blanks_before_an_added_token_that_the_text_does_not_show_stay_one_piece(
    normalizer: Any, token: str, text: str
) -> None:
    vocabulary = {"a": 0, "b": 1, "Ġ": 2, "ĠĠ": 3, "ĠĠĠ": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "Ġ"), ("ĠĠ", "Ġ")]))
    with_parts(tokenizer, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizer)
    pieces = find_cut(with_tokens(tokenizer, token)).pieces(text)
    assert pieces is not None and len(pieces) == 2
    assert ids(tokenizer, *pieces) == ids(tokenizer, text) == [0, 4, 5, 2, 1]


def test_runs_of_marks_may_be_tokens() -> None:
    cut = find_cut(of_marks())
    assert cut.pieces("a a  a") == ["a", " a  a"]


def test_a_parts_proof_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cuts, "_places", lambda *_: word_cuts._SINGLE)
    with pytest.raises(NoCutError, match="have other tokens"):
        find_cut(gemma(across=True))


@pytest.mark.parametrize(
    ("pre_tokenizer", "rules", "text"),
    [
        (pre_tokenizers.WhitespaceSplit(), {" ": " "}, "a \u0301b"),
        (pre_tokenizers.WhitespaceSplit(), {"\U000113d1": ""}, "b\U000113d1 b"),
        (pre_tokenizers.Metaspace(), {"\u0600": " "}, "a \u0600! b"),
        (pre_tokenizers.Metaspace(), {"b\u0301": ""}, "a b\u0301 a"),
    ],
)
def test_texts_with_a_grapheme_over_a_cut_are_not_cut_where_a_map_replaces_graphemes(
    pre_tokenizer: Any, rules: dict[str, str], text: str
) -> None:
    tokenizer = of_words(pre_tokenizer, normalizers.Precompiled(character_map(rules)), TO_ONE_BLANK)
    cut = find_cut(tokenizer)
    assert cut.pieces(text) is None and cut.pieces("a b") is not None


def test_blanks_that_form_a_grapheme_are_not_cut_where_graphemes_are_replaced() -> None:
    joined = word_cuts.re.compile(word_cuts._JOINED % (r"\s", r"\s"))
    for text in ("a \u0301b", "a\u3000\u0301", "\u0600 1", "a \u0e33", "a \uff9e", "a \u200d", "a \U0001f3fd"):
        assert joined.search(text) is not None
    for text in (
        "the bank, (of) \u00e9t\u00e9 \u6771\u4eac \U0001f600 \u2019s \u20ac 5 \u2026",
        "a  b \n c ",
        "e\u0301 a",
    ):
        assert joined.search(text) is None
