"""Ids that were written down give the batches of their texts, or are refused by name."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from bertstream.encoding.tokenizer import TextTokenizer
from bertstream.errors import EncoderError
from bertstream.tokens import Text, TokenBatch, TokenizedText

WORDS = st.sampled_from(["bank", "unbelievable", "don't", "", "\ufffd", "[SEP]", "東京"])
STRINGS = st.lists(WORDS, max_size=12).map(" ".join)
KINDS: list[st.SearchStrategy[Text]] = [STRINGS, st.lists(WORDS, max_size=12), st.tuples(STRINGS, STRINGS)]
WAYS: list[dict[str, Any]] = [
    {},
    {"overflow": "truncate", "max_length": 8},
    {"overflow": "windows", "max_length": 12, "stride": 2},
    {"prompt": "query: ", "prompt_counts": False},
    {"segments": False},
    {"prompt": "find: ", "word_splitter": str.split},
]


@pytest.fixture(scope="module")
def auto(minilm_folder: str) -> Any:
    return AutoTokenizer.from_pretrained(minilm_folder)


def of(auto: Any, **options: Any) -> TextTokenizer:
    return TextTokenizer(auto, **{"max_length": 512, "vocab_size": 30522, **options})


def ids(*ids: int, **others: Any) -> TokenizedText:
    return TokenizedText(np.array(ids, np.int32), **others)


def contents(batch: TokenBatch) -> dict[str, Any]:
    arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: array if array is None else np.asarray(array).tolist() for name, array in arrays.items()}


def outcome(tokenize: Any, texts: Sequence[Any]) -> Any:
    try:
        return contents(tokenize(texts))
    except EncoderError as error:  # a pair whose first text leaves a window no room
        return error.records


@pytest.fixture(scope="module", params=WAYS, ids=str)
def tokenizer(request: pytest.FixtureRequest, auto: Any) -> TextTokenizer:
    return of(auto, **request.param)


@settings(max_examples=40)
@given(texts=st.one_of(*[st.lists(kind, min_size=1, max_size=4) for kind in (*KINDS, st.one_of(*KINDS))]))
def test_whole_ids_of_texts_are_cut_as_their_texts_are(tokenizer: TextTokenizer, texts: list[Text]) -> None:
    assert outcome(tokenizer.ids, tokenizer.whole()(texts)) == outcome(tokenizer.batch, texts)


@settings(max_examples=10)
@given(st.lists(STRINGS.filter(lambda text: "[SEP]" not in text), min_size=1, max_size=4))
def test_special_tokens_are_found_by_their_ids(auto: Any, texts: list[str]) -> None:
    tokenizer = of(auto)
    unmarked = [TokenizedText(text.input_ids) for text in tokenizer(texts)]
    assert contents(tokenizer.ids(unmarked)) == contents(tokenizer.batch(texts))
    [marked] = tokenizer(["one [SEP] two"])
    mixed = tokenizer.ids([*unmarked, marked])
    assert contents(mixed) == contents(tokenizer.batch([*texts, "one [SEP] two"]))


@pytest.mark.parametrize(
    ("wrong", "options", "message"),
    [
        (ids(101, 30522, 102), {}, "the token id 30522: the model knows 0 to 30521"),
        (ids(101, -1, 102), {}, "the token id -1: the model knows 0 to 30521"),
        (ids(101, -1, 102), {"vocab_size": None}, "the token id -1: ids begin at 0"),
        (ids(), {}, "the list of ids is empty"),
        (ids(*[7] * 9), {"max_length": 8}, r"text 1 has 9 tokens, the model takes 8: \[7, .* make the encoder"),
        (ids(101, 7, 102), {"word_splitter": str.split}, "the token id 7 is of no word: word vectors need word_ids"),
        (
            ids(101, 7, 102, 0, 0),
            {},
            r"the ids end with 2 of the padding token \[PAD\] \(0\): put attention_mask beside",
        ),
        (ids(0, 0, 0, 101, 0, 102), {}, "the ids begin with 3 of the padding token"),
        (ids(0, 0, 0, 0), {}, "the ids are 4 of the padding token"),
        (
            ids(101, 2424, 1024, 7, 102),
            {"prompt": "find: ", "word_splitter": str.split},
            "the token id 7 is of no word: word vectors need word_ids",
        ),
        (
            ids(*[101] * 9),
            {"max_length": 8, "overflow": "truncate"},
            "text 1 has 9 special tokens, the model takes 8 in all",
        ),
    ],
    ids=str,
)
def test_wrong_ids_name_their_text_and_value(
    auto: Any, wrong: TokenizedText, options: dict[str, Any], message: str
) -> None:
    right = ids(101, 102, word_ids=np.array([-1, -1], np.int32))
    with pytest.raises(EncoderError, match=message) as caught:
        of(auto, **options).ids([right, wrong, right])
    assert caught.value.records == (1,)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 2), STRINGS | st.just("a [PAD] b [PAD]"), st.integers(0, 2)), min_size=1))
def test_padded_ids_are_refused_without_their_mask_and_all_others_taken(
    auto: Any, texts: list[tuple[int, str, int]]
) -> None:
    tokenizer = of(auto)
    said = tokenizer([text for _, text, _ in texts])
    padded = [
        TokenizedText(np.pad(text.input_ids, (left, right))) for (left, _, right), text in zip(texts, said, strict=True)
    ]
    wrong = [number for number, (left, _, right) in enumerate(texts) if left or right]
    for given_ids in (padded, TokenBatch.from_texts(padded)):
        if wrong:
            with pytest.raises(EncoderError) as caught:
                tokenizer.ids(given_ids)
            assert list(caught.value.records) == wrong
        else:
            assert (
                tokenizer.ids(given_ids).input_ids.tolist()
                == tokenizer.batch([text for _, text, _ in texts]).input_ids.tolist()
            )


def test_padding_that_texts_may_end_with_is_taken(auto: Any, minilm_folder: str) -> None:
    padded = ids(101, 7, 102, 102)
    assert TextTokenizer(None, max_length=9).ids([ids(101, 7, 102, 0)]).lengths.tolist() == [4]
    as_frame = AutoTokenizer.from_pretrained(minilm_folder, pad_token="[SEP]")
    assert of(as_frame).ids([padded]).lengths.tolist() == [4]
    unpadded = AutoTokenizer.from_pretrained(minilm_folder)
    unpadded.pad_token = None
    assert of(unpadded).ids([ids(101, 7, 102, 0)]).lengths.tolist() == [4]
    unframed = AutoTokenizer.from_pretrained(minilm_folder)
    unframed.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    assert of(unframed).ids([ids(7, 0), ids()]).lengths.tolist() == [2, 0]


def test_a_mask_says_that_the_padding_token_at_an_end_is_of_the_text(auto: Any) -> None:
    ending = AutoTokenizer.from_pretrained(auto.name_or_path)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 101)])
    [said] = of(ending)(["a [PAD]"])
    assert of(ending).ids([said]).input_ids.tolist() == said.input_ids.tolist() == [101, 1037, 0]
    assert said.special is not None and said.special.tolist() == [True, False, False]
    with pytest.raises(EncoderError, match="end with 1 of"):
        of(ending).ids([TokenizedText(said.input_ids)])


def test_a_tokenizer_that_was_pickled_before_takes_padding_as_it_did(auto: Any) -> None:
    before = of(auto)
    del before.__dict__["_padding"]
    assert before.identity == of(auto).identity
    assert pickle.loads(pickle.dumps(before)).ids([ids(101, 7, 102, 0)]).lengths.tolist() == [4]


def test_ids_alone_may_be_cut_too_and_keep_their_last_special_token(auto: Any) -> None:
    [cut] = [of(auto, max_length=5, overflow="truncate").ids([ids(101, 1, 2, 3, 4, 5, 102)])]
    assert cut.input_ids.tolist() == [101, 1, 2, 3, 102] and cut.cut_tokens.tolist() == [2]
    windows = of(auto, max_length=5, overflow="windows").ids([ids(101, 1, 2, 3, 4, 5, 102)])
    assert windows.input_ids.tolist() == [101, 1, 2, 3, 102, 101, 3, 4, 5, 102]


def test_the_identity_of_ids_depends_on_what_changes_them_alone(auto: Any, minilm_folder: str) -> None:
    plain = of(auto).ids_identity
    assert of(auto, max_length=9, overflow="truncate", word_splitter=str.split).ids_identity == plain
    assert of(auto, prompt="query: ").ids_identity == plain | {"prompt": "query: "}
    other = AutoTokenizer.from_pretrained(minilm_folder, split_special_tokens=True)
    other.add_tokens(["newword"])
    assert of(other).ids_identity["vocabulary"] != plain["vocabulary"]
