"""Each row says which characters of the user's text it is of: the library's own offsets, or an error."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from python_tokenizers import japanese
from sweeps.words import KINDS, PARTS, bert, paragraphs, roberta
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import bertstream
from bertstream import BertEmbedding, ConfigError, EmbeddingCache, Embeddings, Encoder, EncoderError, TokenCollate
from bertstream.encoding.spans import SpanFinder
from bertstream.encoding.tokenizer import TextTokenizer
from bertstream.tokens import Text, TokenBatch

SCRIPTS = [
    "They moored at the unbelievable bank.",
    "nai\u0308ve cafe\u0301 \u0439 e\u0301\u0302\u0323",  # combining marks
    "\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd ok \U0001f1eb\U0001f1f7\u2764\ufe0f",  # several characters each
    "\u6771\u4eac\u3067 \u4e2d\u6587 \ud55c\uad6d\uc5b4",
    "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd \u0627\u0644\u0633\u0651\u0644\u0627\u0645 123 \u05d1",  # right to left
    "\ufb01ne \u0130stanbul \u00dfo  \t\n two  blanks ",
    "[CLS] and [MASK] written out",
    "",
    " ",
]
STRINGS = st.sampled_from(SCRIPTS) | st.lists(st.sampled_from(PARTS[:-1]), max_size=8).map("".join)
LISTS = st.lists(st.sampled_from([*PARTS[:-1], ""]) | STRINGS, max_size=5)
TEXTS: st.SearchStrategy[Text] = STRINGS | LISTS | st.tuples(STRINGS, STRINGS) | st.tuples(LISTS, LISTS)

kind_of = cache(lambda name: Tokenizer.from_str(KINDS[name]().to_str()))
"""From JSON, which changes the last bits of a Unigram's scores."""


@cache
def tokenizer_of(name: str, **options: Any) -> TextTokenizer:
    return TextTokenizer(SimpleNamespace(backend_tokenizer=kind_of(name)), **{"max_length": 100_000} | options)


def rows_of(tokenizer: TextTokenizer, texts: Sequence[Text], *, special: bool = True) -> Embeddings:
    """Token output of these texts, as an encoder gives it."""
    tokens = tokenizer.batch(texts)
    tokens.texts = list(texts)
    kept = np.ones(tokens.num_tokens, np.bool_) if tokens.owned is None else tokens.owned
    if not special and tokens.special is not None:
        kept = kept & ~tokens.special
    lengths = np.add.reduceat(np.append(kept, 0), tokens.cu_seqlens[:-1]) * (tokens.lengths > 0) if texts else kept
    word_ids = None if tokens.word_ids is None else tokens.word_ids[kept]
    cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths.tolist()]).astype(np.int32))
    lengths = torch.from_numpy(lengths.astype(np.int64))
    values = torch.zeros(int(kept.sum()), 1)
    return Embeddings(values, cu_seqlens, lengths, tokens, "tokens", word_ids, finder=SpanFinder(tokenizer))


def spans_of(encoding: Any, text: int = 0) -> list[list[int]]:
    """As the tokenizers library has them."""
    found = zip(encoding.sequence_ids, encoding.offsets, strict=True)
    return [[text, -1, -1, -1] if part is None else [text, part, *offsets] for part, offsets in found]


def characters(text: Text, part: int, word: int) -> str:
    """What the columns of a row count in; words are counted through both texts of a pair."""
    if isinstance(text, tuple):
        word -= len(text[0]) if part and isinstance(text[0], list) else 0
        text = text[part]
    return text[word] if isinstance(text, list) else text


# The library's offsets.


@pytest.mark.parametrize("name", KINDS)
def test_real_paragraphs_and_every_script_have_the_librarys_offsets(name: str) -> None:
    texts = [*SCRIPTS, *paragraphs()[::20]]
    found = rows_of(tokenizer_of(name), texts)
    encodings = kind_of(name).encode_batch(texts)
    assert found.spans().tolist() == [row for i, one in enumerate(encodings) for row in spans_of(one, i)]


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=15)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), special=st.booleans())
@example(texts=[*SCRIPTS, SCRIPTS, ("a b", "c"), (["a b", ""], ["c"]), []], special=True)
def test_spans_lie_in_their_text_in_order_and_strings_are_what_they_cut_out(
    name: str, texts: list[Text], special: bool
) -> None:
    rows = rows_of(tokenizer_of(name), texts, special=special)
    spans, strings = rows.spans(), rows.strings()
    assert spans.dtype == torch.int64 and spans.shape == (len(rows.values), 4) and len(strings) == len(spans)
    assert spans[:, 0].tolist() == [i for i, length in enumerate(rows.lengths.tolist()) for _ in range(length)]
    words = [-1] * len(spans) if rows.word_ids is None else rows.word_ids.tolist()
    before: tuple[int, ...] = ()
    for (text, part, start, end), word, string in zip(spans.tolist(), words, strings, strict=True):
        if part < 0:
            assert special and start == end == -1 and string in ("[CLS]", "[SEP]", "<s>", "</s>")
            continue
        whole = characters(texts[text], part, word)
        assert 0 <= start <= end <= len(whole) and string == whole[start:end]
        assert before <= (text, part, word, start)
        before = (text, part, word, start)


@pytest.mark.parametrize("name", ["bert", "roberta"])
@settings(max_examples=30)
@given(words=st.lists(STRINGS, max_size=6))
@example(words=["unbelievable", "", "\U0001f469\u200d\U0001f467", "[MASK]x", " a", "nai\u0308ve"])
def test_the_pieces_of_a_word_are_found_in_the_word_with_and_without_a_blank_before_it(
    name: str, words: list[str]
) -> None:
    """RoBERTa's gets a blank before most words, and loses no character; BERT's own offsets are within words."""
    rows = rows_of(tokenizer_of(name), [words])
    assert rows.word_ids is not None
    if name == "bert":
        own = kind_of(name).encode(words, is_pretokenized=True)
        assert rows.spans().tolist() == spans_of(own)
        return
    for number, word in enumerate(words):
        pieces = rows.spans()[rows.word_ids == number]
        seen = {at for start, end in pieces[:, 2:].tolist() for at in range(start, end)}
        assert {at for at, character in enumerate(word) if character.strip()} <= seen


# What is cut.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "text", ["the unbelievable bank of the river", ("the bank of it", "an unbelievable river bank")]
)
def test_a_truncated_text_has_the_spans_that_transformers_keeps(minilm_folder: str, side: str, text: Text) -> None:
    auto = AutoTokenizer.from_pretrained(minilm_folder, truncation_side=side)
    tokenizer = TextTokenizer(auto, max_length=8, overflow="truncate")
    right = auto(*([text] if isinstance(text, str) else text), truncation="longest_first", max_length=8)
    assert rows_of(tokenizer, [text]).spans().tolist() == spans_of(right.encodings[0])


@settings(max_examples=30)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3), stride=st.integers(0, 2), special=st.booleans())
@example(texts=["word " * 30, ("a", "bank " * 20), ["unbelievable"] * 9], stride=1, special=True)
def test_windows_have_each_tokens_span_once(texts: list[Text], stride: int, special: bool) -> None:
    whole = rows_of(tokenizer_of("bert"), texts, special=special)
    try:
        found = rows_of(tokenizer_of("bert", max_length=16, overflow="windows", stride=stride), texts, special=special)
    except EncoderError:  # no room beside the first text of a pair
        return
    assert found.spans().tolist() == whole.spans().tolist() and found.strings() == whole.strings()


@pytest.mark.parametrize("name", ["bert", "roberta", "gemma"])
def test_a_prompt_is_of_no_text(name: str) -> None:
    texts: list[Text] = ["the bank of it", ("the bank", "a river"), ["the", "bank"], ""]
    prompted = rows_of(tokenizer_of(name, prompt="find the river: "), texts)
    plain = rows_of(tokenizer_of(name), texts)
    spans = prompted.spans()
    of_text = spans[spans[:, 1] >= 0]
    assert of_text[:, :2].tolist() == [row[:2] for row in plain.spans().tolist() if row[1] >= 0]
    strings = [string for string, part in zip(prompted.strings(), spans[:, 1], strict=True) if part >= 0]
    right = [string for string, row in zip(plain.strings(), plain.spans(), strict=True) if row[1] >= 0]
    assert [string.strip() for string in strings] == [string.strip() for string in right]
    assert (spans[:, 1] < 0).sum() > (plain.spans()[:, 1] < 0).sum() + 8


# Words.


@pytest.fixture(scope="module")
def words(minilm_folder: str) -> Encoder:
    return Encoder.from_pretrained(minilm_folder, dtype="float32", device="cpu", output="words", layers=1)


@settings(max_examples=30)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
@example(texts=["a a  aa a", ("the bank", " the"), ["two words", "", "x"], ""])
def test_word_rows_are_the_words_of_lists_and_strings(words: Encoder, texts: list[Text]) -> None:
    rows = words(texts)
    right = [
        word
        for text in texts
        for part in (text if isinstance(text, tuple) else (text,))
        for word in (part.split() if isinstance(part, str) else part)
    ]
    assert rows.strings() == right
    assert rows.word_ids is not None
    for (text, part, start, end), number, word in zip(rows.spans().tolist(), rows.word_ids, right, strict=True):
        assert characters(texts[text], part, number)[start:end] == word


def with_splitter(folder: str, splitter: Callable[[str], Sequence[str]]) -> Encoder:
    return Encoder.from_pretrained(
        folder, dtype="float32", device="cpu", output="words", layers=0, word_splitter=splitter
    )


def test_words_of_a_splitter_are_found_in_the_string_or_refused(minilm_folder: str) -> None:
    found = with_splitter(minilm_folder, lambda text: re.findall(r"\w+", text))(["Hello, (big) world!"])
    assert found.spans().tolist() == [[0, 0, 0, 5], [0, 0, 8, 11], [0, 0, 13, 18]]
    for splitter in (lambda text: text.lower().split(), lambda text: ["a"]):  # not in the text; three times
        with pytest.raises(
            ConfigError, match=r"text 1, 'A banana': where each word is in it is not clear; split texts"
        ):
            with_splitter(minilm_folder, splitter)(["a", "A banana"]).spans()


def test_words_that_truncation_cut_have_no_characters(minilm_folder: str) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, output="words", layers=0, overflow="truncate", max_length=5)
    rows = encoder(["the old bank of it", ["one", "two"]])
    assert rows.strings() == ["the", "old", "bank", "", "", "one", "two"]
    assert rows.spans()[3:5].tolist() == [[0, -1, -1, -1]] * 2 and rows.spans()[5].tolist() == [1, 0, 0, 3]


# Wherever the texts are kept.

REPEATED = ["The bank", "the BANK", "The bank", "A river"]
"""The first three are equal to a model without case."""
PIECES = ["[CLS]", "The", "bank", "[SEP]", "[CLS]", "the", "BANK", "[SEP]"]


@pytest.fixture
def nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("offsets were asked for")

    monkeypatch.setattr("bertstream.encoding.tokenizers_backend.TokenizersBackend.encoded", refuse)
    return monkeypatch.undo


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("workers", [None, 0, 1])
def test_a_wrapped_loader_gives_equal_texts_their_own_characters(
    minilm: Encoder, nothing_is_asked: Callable[[], None], workers: int | None, cached: bool
) -> None:
    collate = list if workers is None else TokenCollate(minilm, keep_text=True)
    source: Any = DataLoader(REPEATED, 2, collate_fn=collate, num_workers=workers or 0)  # type: ignore[arg-type]
    for _ in range(2 if cached else 1):
        with bertstream.wrap(source, minilm, cache=EmbeddingCache("8MiB") if cached else None, prefetch=4) as loader:
            batches = list(loader)
    nothing_is_asked()
    assert batches[0].strings() == PIECES
    assert [found.tokens.texts for found in batches] == [REPEATED[:2], REPEATED[2:]]


def test_what_keep_text_is_has_to_be_said_plainly(minilm: Encoder) -> None:
    with pytest.raises(ConfigError, match="keep_text='text': write True or False"):
        TokenCollate(minilm, keep_text="text")  # type: ignore[arg-type]


def test_pairs_of_two_fields_have_both_parts(minilm: Encoder) -> None:
    with bertstream.wrap([{"a": ["x y"], "b": ["z"]}], minilm, text="a", pair="b") as loader:
        [batch] = loader
    assert batch["a"].strings() == ["[CLS]", "x", "y", "[SEP]", "z", "[SEP]"]
    assert batch["a"].spans()[:, 1].tolist() == [-1, 0, 0, -1, 1, -1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_keeps_its_texts_knows_their_characters(minilm: Encoder, workers: int) -> None:
    rows = [{"text": text, "label": i} for i, text in enumerate(REPEATED)]
    with bertstream.stream(rows, minilm, batch_size=2, into="vectors", num_workers=workers) as loader:
        for batch in loader:
            found = batch["vectors"]
            assert found.tokens.texts == batch["text"]
            assert found.strings()[1] == batch["text"][0].split()[0]
            assert found[1:].tokens.fields["label"].tolist() == batch["label"][1:].tolist()
    with (
        bertstream.stream(rows, minilm, batch_size=2) as loader,
        pytest.raises(ConfigError, match=r"spans\(\) needs the texts, .* into= in stream"),
    ):
        next(iter(loader))["text"].spans()


def test_a_trained_encoder_and_both_halves_of_a_split_one_know_the_characters(minilm_folder: str) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, dtype="float32", device="cpu", special_tokens=False)
    lower, upper = encoder.split(2)
    given = lower(REPEATED[:2])
    assert given.strings() == PIECES
    assert upper(given).strings() == [piece for piece in PIECES if piece[0] != "["]
    encoder.unfreeze()
    with bertstream.wrap([REPEATED[:2]], encoder) as loader:
        [tokens] = loader
    assert isinstance(tokens, TokenBatch)
    assert BertEmbedding(encoder)(tokens).strings() == upper(given).strings()


def test_parts_wholes_and_pickles_know_their_characters(minilm: Encoder) -> None:
    texts = ["The bank", ("a", "river"), ["two words"], ""]
    whole = minilm(texts)
    parts = whole.split([1, 2, 1])
    assert [part.tokens.texts for part in parts] == [texts[:1], texts[1:3], texts[3:]]
    strings = [string for part in parts for string in part.strings()]
    assert strings == whole.strings() == Embeddings.concat(parts).strings()
    assert whole[::-1].strings() == [string for i in (3, 2, 1, 0) for string in whole[i : i + 1].strings()]
    assert whole[[3, 0]].spans()[:, 0].tolist() == [0, 0, 1, 1, 1, 1]
    sent = pickle.loads(pickle.dumps(whole.to("cpu")))
    assert sent.strings() == strings and torch.equal(sent.spans(), whole.spans())
    mixed = Embeddings.concat([whole, minilm(minilm.tokenizer.batch(["without its text"]))])
    assert mixed.tokens.texts is None


def test_a_pickle_without_texts_holds_no_vocabulary(minilm: Encoder) -> None:
    found = minilm(minilm.tokenizer.batch(["the bank"]))
    assert found.finder is not None and len(pickle.dumps(found)) < 20_000
    assert pickle.loads(pickle.dumps(found)).finder is None


# Errors instead of wrong characters.


def test_a_tokenizer_that_is_written_in_python_knows_the_characters_of_words_only(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(japanese(tmp_path), max_length=99, word_splitter=str.split)
    rows = rows_of(tokenizer, ["the  bank", ["東京", "a b"]])
    with pytest.raises(ConfigError, match="written in Python does not say .* output='words'"):
        rows.spans()
    words = dataclasses.replace(rows, output="words", values=torch.zeros(4, 1))
    assert words.strings() == ["the", "bank", "東京", "a b"]
    assert words.spans().tolist() == [[0, 0, 0, 3], [0, 0, 5, 9], [1, 0, 0, 2], [1, 0, 0, 3]]


def test_a_text_that_was_changed_is_named() -> None:
    rows = rows_of(TextTokenizer(SimpleNamespace(backend_tokenizer=bert()), max_length=99), ["a", ["the", "bank"], "b"])
    assert rows.tokens.texts is not None
    for changed in (["the", "river"], ["the bank"], ["the", "bank", ""], "the bank"):
        rows.tokens.texts[1] = changed
        with pytest.raises(EncoderError, match="text 1 of the batch has other tokens now") as caught:
            rows.strings()
        assert caught.value.records == (1,)
    rows.tokens.texts.append("c")
    with pytest.raises(ConfigError, match="holds 4 texts, the batch 3"):
        rows.spans()


def test_another_tokenizer_is_noticed() -> None:
    texts = ["the unbelievable bank"]
    rows = rows_of(TextTokenizer(SimpleNamespace(backend_tokenizer=bert()), max_length=99), texts)
    rows.finder = SpanFinder(TextTokenizer(SimpleNamespace(backend_tokenizer=roberta()), max_length=99))
    with pytest.raises(EncoderError, match="text 0 of the batch has other tokens now"):
        rows.spans()
    rows.finder = SpanFinder(print)
    with pytest.raises(ConfigError, match="builtin_function_or_method does not say which characters"):
        rows.spans()


def test_what_is_missing_is_said(minilm: Encoder, minilm_folder: str) -> None:
    with pytest.raises(ConfigError, match=r"spans\(\) needs the texts, .* call the encoder with texts"):
        minilm(minilm.tokenizer.batch(["a"])).spans()
    found = minilm(["a"])
    found.finder = None
    with pytest.raises(ConfigError, match=r"strings\(\) needs a tokenizer .* take vectors of an Encoder"):
        found.strings()
    sentence = Encoder.from_pretrained(minilm_folder, output="sentence")(["a"])
    with pytest.raises(ConfigError, match="sentence output is one vector a text"):
        sentence.spans()
