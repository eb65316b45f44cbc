"""The word cache gives the tokenizer's ids, holds no more than its limit, and says so if it is ever wrong."""

from __future__ import annotations

import re
import tracemalloc
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sweeps.words import KINDS, PARTS, bert, eurobert, gemma, paragraphs
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bertstream.encoding import word_cache
from bertstream.encoding.tokenizer import TextTokenizer
from bertstream.encoding.word_cache import WholeTexts, WordCache
from bertstream.encoding.word_cuts import Cut, find_cut
from bertstream.errors import ConfigError, EncoderError
from bertstream.tokens import Text, TokenBatch

STRINGS = st.lists(st.sampled_from(PARTS[:-1]), max_size=12).map("".join)
LISTS = st.lists(st.sampled_from(PARTS[:-1]), max_size=8)
TEXTS: st.SearchStrategy[Text] = STRINGS | LISTS | st.tuples(STRINGS, STRINGS) | st.tuples(LISTS, LISTS)

tokenizer_of = cache(lambda name: KINDS[name]())


def both(name: str, **options: Any) -> tuple[TextTokenizer, TextTokenizer]:
    """With the cache, and without."""
    auto = SimpleNamespace(backend_tokenizer=tokenizer_of(name))
    return TextTokenizer(auto, **options), TextTokenizer(auto, word_cache=False, **options)


def arrays(batch: TokenBatch) -> dict[str, Any]:
    return {name: None if value is None else np.asarray(value).tolist() for name, value in vars(batch).items()}


kept = cache(both)
"""So that their words are known already."""


def outcome(tokenizer: TextTokenizer, texts: list[Text]) -> dict[str, Any] | str:
    try:
        batch = tokenizer.batch(texts)
    except EncoderError as error:  # no room beside the first text of a pair
        return str(error)
    assert arrays(TokenBatch.from_texts(tokenizer(texts))) == arrays(batch)
    return arrays(batch)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=10)
@given(texts=st.lists(TEXTS, max_size=6), overflow=st.sampled_from(["truncate", "windows"]))
@example(
    texts=["the bank", ["the", "bank"], ("the bank", "a river"), (["the"], ["bank", ""]), "", []], overflow="error"
)
@example(texts=["word " * 40, ("a", "word " * 40), ["unbelievable"] * 20, "the bank"], overflow="truncate")
@example(texts=["word " * 40, ("a", "word " * 40), ["unbelievable"] * 20, "the bank"], overflow="windows")
def test_all_that_a_batch_holds_is_the_same_with_and_without_the_cache(
    name: str, overflow: Any, texts: list[Text]
) -> None:
    with_cache, without = kept(name, max_length=40, overflow=overflow)
    assert outcome(with_cache, texts) == outcome(without, texts)


@pytest.mark.parametrize("name", KINDS)
def test_real_paragraphs_have_the_librarys_ids(name: str) -> None:
    texts = paragraphs()[::9]
    found = both(name, max_length=100_000)[0].batch(texts)
    # From JSON too, because that changes the last bits of a Unigram's scores.
    library = Tokenizer.from_str(tokenizer_of(name).to_str())
    right = [encoding.ids for encoding in library.encode_batch(texts)]
    assert found.input_ids.tolist() == [number for ids in right for number in ids]
    assert found.lengths.tolist() == list(map(len, right))


def test_a_prompt_and_its_mask_are_the_same() -> None:
    options: dict[str, Any] = {"max_length": 16, "overflow": "windows", "prompt": "query: ", "prompt_counts": False}
    with_cache, without = both("bert", **options)
    texts: list[Text] = ["the bank of the river", "", ("a", "b"), ["the", "bank"], "word " * 30]
    assert arrays(with_cache.batch(texts)) == arrays(without.batch(texts))


def test_texts_that_a_template_repeats_are_the_librarys() -> None:
    tokenizer = bert()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP] $A", "$B [SEP] $A", [("[CLS]", 2), ("[SEP]", 3)]
    )
    found = TextTokenizer(SimpleNamespace(backend_tokenizer=tokenizer), max_length=99)(["the bank", ("a", "the bank")])
    right = [tokenizer.encode("the bank"), tokenizer.encode("a", "the bank")]
    assert [text.input_ids.tolist() for text in found] == [encoding.ids for encoding in right]


def test_words_are_asked_for_once() -> None:
    tokenizer = TextTokenizer(SimpleNamespace(backend_tokenizer=bert()), max_length=99)
    tokenizer(["the bank of the river"])
    assert tokenizer.word_count == (5, 1)  # a chunk asks for "the" once
    tokenizer(["the river", ["the", "river"], "the [SEP] river"])
    assert tokenizer.word_count == (12, 5)  # a text that is not cut counts as its words


def test_identity_and_pickles_do_not_depend_on_the_cache() -> None:
    with_cache, without = both("gemma", max_length=24)
    assert with_cache.identity == without.identity


def cache_of(tokenizer: Tokenizer, limit: int = word_cache.LIMIT) -> WordCache:
    return WordCache(tokenizer, find_cut(tokenizer), limit)


def test_ever_new_words_stay_at_the_bound() -> None:
    cached = cache_of(bert(), 1 << 18)
    number = 0
    sizes = []
    tracemalloc.start()
    try:
        for _ in range(40):
            chunk = []
            for _ in range(16):
                chunk.append(" ".join(f"w{number + i}" for i in range(10)))
                number += 10
            cached.texts(chunk)
            sizes.append((cached.num_bytes, tracemalloc.get_traced_memory()[0]))
    finally:
        tracemalloc.stop()
    estimated, real = map(max, zip(*sizes, strict=True))
    assert estimated < 1.3 * (1 << 18) and real < 1.5 * (1 << 18)
    assert estimated > (1 << 17)  # it fills


def test_words_that_are_in_use_outlive_the_halves() -> None:
    cached = cache_of(bert(), 1 << 16)
    for first in range(0, 2000, 50):
        cached.texts(["bank " + " ".join(f"w{i}" for i in range(first, first + 50))])
    assert cached.count.found == 39  # "bank", in all chunks but the first


def test_long_pieces_are_not_kept() -> None:
    tokenizer = bert()
    cached = cache_of(tokenizer)
    cached.texts(["x" * 65, "x" * 64])
    before = cached.num_bytes
    cached.texts(["x" * 65, "x" * 64])
    assert cached.count == (4, 1) and cached.num_bytes == before
    assert cached.texts(["x" * 65]) == WholeTexts(tokenizer).texts(["x" * 65])


@pytest.mark.parametrize("texts", [["the bank", "a river"], [["the"], ["a", "river"]]], ids=["strings", "lists"])
def test_a_difference_is_an_error_that_names_the_text_and_the_way_out(texts: list[Any]) -> None:
    cached = cache_of(bert())
    look_up = cached.texts if isinstance(texts[0], str) else cached.lists
    look_up(texts[:1])
    cached._words.add("river", b"\0\0\0\0")
    for _ in range(word_cache._COMPARED - 1):
        look_up(texts[:1])
    with pytest.raises(EncoderError, match=r"a text has other tokens .*river.*word_cache=False") as raised:
        look_up(texts)
    assert raised.value.records == ()  # such a text is not one to skip


def test_pieces_that_the_tokenizer_refuses_do_not_spoil_the_chunks_after() -> None:
    tokenizer = Tokenizer(models.WordLevel({"the": 0, "bank": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    cached = WordCache(tokenizer, Cut(None, re.compile("\x00"), None))
    for look_up, texts in ((cached.texts, ["the river"]), (cached.lists, [["the", "river"]])):
        with pytest.raises(Exception, match="Missing"):
            look_up(texts)
    assert cached.texts(["the bank"]) == WholeTexts(tokenizer).texts(["the bank"])


def test_a_refused_tokenizer_gets_whole_texts_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = gemma(across=True)
    with caplog.at_level("INFO", "bertstream"):
        texts = TextTokenizer(SimpleNamespace(backend_tokenizer=tokenizer), max_length=999)
    assert any("no word cache" in message and "crosses a blank" in message for message in caplog.messages)
    assert texts(["the bank of the river"])[0].input_ids.tolist() == tokenizer.encode("the bank of the river").ids
    assert texts.word_count == (0, 0)


def test_truncation_and_padding_of_the_users_tokenizer_do_not_matter() -> None:
    tokenizer = eurobert()
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=9)
    texts = TextTokenizer(SimpleNamespace(backend_tokenizer=tokenizer), max_length=99)
    texts(["the bank of the river"])
    assert texts.word_count.asked == 5 and tokenizer.truncation["max_length"] == 1


@pytest.mark.parametrize("value", [-1, True, "64MiB", 1.5])
def test_other_values_than_bytes_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="word_cache"):
        TextTokenizer(SimpleNamespace(backend_tokenizer=tokenizer_of("bert")), max_length=9, word_cache=value)


@pytest.mark.parametrize("texts", [["a b a", "a c"], [["a", "b", "a"], ["a", "c"]]])
def test_a_word_is_new_once_however_often_its_chunk_has_it(texts: list[Any]) -> None:
    tokenizer = TextTokenizer(SimpleNamespace(backend_tokenizer=bert()), max_length=99)
    tokenizer(texts)
    assert tokenizer.word_count == (5, 2)
    tokenizer(texts)
    assert tokenizer.word_count == (10, 7)
