"""Token ids are transformers' own, whatever the process, the mix of texts, and the checkpoint's settings."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import AddedToken, AutoTokenizer

from bertstream.encoding.tokenizer import TextTokenizer
from bertstream.errors import ConfigError, EncoderError
from bertstream.tokens import Text, TokenizedText

# Words that split, words without any token (a replacement character, private use, blanks), and names of special tokens.
WORDS = st.sampled_from(
    ["bank", "unbelievable", "U.S.", "don't", "", " ", "\ufffd", "\ue000", "\u02dc", "[SEP]", "[PAD]", "東京", "naïve"]
)
STRINGS = st.lists(WORDS, max_size=12).map(" ".join) | st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), max_size=30
)
TEXTS: st.SearchStrategy[Text] = STRINGS | st.lists(WORDS, max_size=12) | st.tuples(STRINGS, STRINGS)

CUTS = st.sampled_from([3, 4, 5, 6, 7, 8, 10, 24])
"""Lengths to cut texts to: few, because each has a tokenizer of its own."""

SOME: list[Text] = [
    "the bank of the river",
    "",
    ["the", "unbelievable", "", "\ufffd", "bank"],
    ("a question", "its answer"),
    [],
    ("", ""),
    "naïve 東京",
]


@pytest.fixture(scope="module")
def auto(minilm_folder: str) -> Any:
    return AutoTokenizer.from_pretrained(minilm_folder)


@pytest.fixture(scope="module")
def cutting(auto: Any) -> Callable[[int], TextTokenizer]:
    """A truncating tokenizer for a length."""
    return cache(lambda max_length: TextTokenizer(auto, max_length=max_length, overflow="truncate"))


@pytest.fixture(scope="module")
def to_the_left(minilm_folder: str) -> Any:
    return AutoTokenizer.from_pretrained(minilm_folder, truncation_side="left")


def transformers_own(auto: Any, text: Text, **options: Any) -> Any:
    """Its encoding of one text, called with a batch: called with a pair it takes an empty second text for none."""
    return auto([text], is_split_into_words=isinstance(text, list), **options).encodings[0]


def assert_equal(found: TokenizedText, text: Text, right: Any) -> None:
    assert found.input_ids.dtype == np.int32 and found.input_ids.tolist() == right.ids
    if isinstance(text, tuple):
        assert found.token_type_ids is not None and found.token_type_ids.tolist() == right.type_ids
    else:
        assert found.token_type_ids is None and not any(right.type_ids)
    if isinstance(text, list):
        assert found.word_ids is not None
        assert found.word_ids.tolist() == [-1 if word is None else word for word in right.word_ids]
        assert found.num_words == len(text)
    else:
        assert found.word_ids is None and found.num_words == 0


# As transformers does it.


@settings(max_examples=50)
@given(texts=st.lists(TEXTS, max_size=6))
@example(texts=SOME)
def test_ids_segments_and_words_equal_transformers_for_any_mix_of_texts(
    auto: Any, cutting: Callable[[int], TextTokenizer], texts: list[Text]
) -> None:
    found = cutting(512)(texts)
    assert len(found) == len(texts)
    for one, text in zip(found, texts, strict=True):
        assert_equal(one, text, transformers_own(auto, text))
        assert one.cut_tokens == 0


@settings(max_examples=100)
@given(text=TEXTS, max_length=CUTS)
@example(text=("bank " * 9, "river " * 9), max_length=8)
@example(text=("bank", "river " * 9), max_length=8)
@example(text=("bank " * 9, "river"), max_length=7)
@example(text=("bank", "river"), max_length=3)
@example(text=["unbelievable"] * 9, max_length=6)
@example(text="[SEP] " * 30, max_length=10)
def test_truncation_equals_transformers_and_counts_the_dropped_tokens(
    auto: Any, cutting: Callable[[int], TextTokenizer], text: Text, max_length: int
) -> None:
    [whole], [cut] = cutting(512)([text]), cutting(max_length)([text])
    assert whole.cut_tokens == 0
    assert_equal(cut, text, transformers_own(auto, text, truncation="longest_first", max_length=max_length))
    assert len(cut.input_ids) == min(len(whole.input_ids), max_length)
    assert cut.cut_tokens == len(whole.input_ids) - len(cut.input_ids)
    assert cut.num_words == whole.num_words


@cache
def cutting_to(tokenizer: Any, max_length: int) -> TextTokenizer:
    return TextTokenizer(tokenizer, max_length=max_length, overflow="truncate")


@settings(max_examples=50)
@given(text=TEXTS, max_length=CUTS)
@example(text="one two three four", max_length=4)
@example(text=("bank " * 9, "river " * 9), max_length=8)
@example(text=("bank", "river " * 9), max_length=7)
@example(text=["unbelievable"] * 9, max_length=6)
@example(text=(["bank"] * 3, ["unbelievable", "river"]), max_length=6)
def test_truncation_on_the_left_keeps_what_transformers_keeps(to_the_left: Any, text: Text, max_length: int) -> None:
    [whole], [cut] = cutting_to(to_the_left, 512)([text]), cutting_to(to_the_left, max_length)([text])
    in_words = isinstance(text, list) or (isinstance(text[0:1], tuple) and isinstance(text[0], list))
    right = to_the_left(
        [text], is_split_into_words=in_words, truncation="longest_first", max_length=max_length
    ).encodings[0]
    assert cut.input_ids.tolist() == right.ids and cut.cut_tokens == len(whole.input_ids) - len(right.ids)
    assert cut.num_words == whole.num_words
    if cut.cut_tokens and whole.word_ids is not None and cut.word_ids is not None and cut.words_cut is not None:
        lost = set(whole.word_ids.tolist()) - set(cut.word_ids.tolist())
        assert np.flatnonzero(cut.words_cut).tolist() == sorted(lost)


def test_truncation_on_the_left_keeps_the_last_words_and_their_numbers(to_the_left: Any) -> None:
    tokenizer = TextTokenizer(to_the_left, max_length=5, overflow="truncate")
    [text, words, pair] = tokenizer(
        ["one two three four five", ["one", "two", "three", "four", "five"], ("one two", "three")]
    )
    said = [to_the_left.convert_ids_to_tokens(found.input_ids.tolist()) for found in (text, words, pair)]
    assert said[:2] == [["[CLS]", "three", "four", "five", "[SEP]"]] * 2
    assert said[2] == ["[CLS]", "two", "[SEP]", "three", "[SEP]"]
    assert words.word_ids is not None and words.word_ids.tolist() == [-1, 2, 3, 4, -1]
    assert words.words_cut is not None and words.words_cut.tolist() == [True, True, False, False, False]
    assert pair.token_type_ids is not None and pair.token_type_ids.tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(EncoderError, match="text 0 has 7 tokens"):
        TextTokenizer(to_the_left, max_length=5)(["one two three four five"])


def test_the_side_of_truncation_is_part_of_a_tokenizers_identity_only_where_it_cuts(
    auto: Any, to_the_left: Any
) -> None:
    def identity(tokenizer: Any, overflow: Any) -> Any:
        return TextTokenizer(tokenizer, max_length=5, overflow=overflow).identity[1:]

    assert identity(auto, "truncate") != identity(to_the_left, "truncate")
    for overflow in ("error", "windows"):
        assert identity(auto, overflow) == identity(to_the_left, overflow)
    assert len(identity(auto, "truncate")) == 5, "what states of earlier versions have"


@pytest.mark.parametrize("text", ["say [SEP] now", "[CLS]", ["a", "[MASK]ed", "[PAD]"], ("a [SEP] b", "[UNK]")])
@pytest.mark.parametrize("splits", [False, True])
def test_the_names_of_special_tokens_in_a_text_are_split_if_the_tokenizer_says_so(
    minilm_folder: str, text: Text, splits: bool
) -> None:
    auto = AutoTokenizer.from_pretrained(minilm_folder, split_special_tokens=splits)
    tokenizer = TextTokenizer(auto, max_length=64)
    right = transformers_own(auto, text).ids
    assert tokenizer([text])[0].input_ids.tolist() == right
    assert pickle.loads(pickle.dumps(tokenizer))([text])[0].input_ids.tolist() == right


def test_splitting_special_tokens_is_part_of_a_tokenizers_identity(minilm_folder: str, auto: Any) -> None:
    splitting = AutoTokenizer.from_pretrained(minilm_folder, split_special_tokens=True)
    assert TextTokenizer(splitting, max_length=9).identity != TextTokenizer(auto, max_length=9).identity


@pytest.mark.parametrize(
    "options", [{}, {"single_word": True}, {"lstrip": True}, {"rstrip": True}, {"normalized": True}, {"special": True}]
)
def test_added_tokens_are_found_as_transformers_finds_them(minilm_folder: str, options: dict[str, bool]) -> None:
    auto = AutoTokenizer.from_pretrained(minilm_folder)
    auto.add_tokens([AddedToken("Banken", **{"normalized": False} | options)])
    tokenizer = TextTokenizer(auto, max_length=64)
    texts: list[Text] = ["a Banken b", "aBankens", "banken", "a  Banken  .", ("Banken a", "the BANKEN")]
    for text, found in zip(texts, tokenizer(texts), strict=True):
        assert found.input_ids.tolist() == transformers_own(auto, text).ids


def test_an_empty_text_is_its_special_tokens(auto: Any) -> None:
    for text in ("", [], [""], " "):
        [found] = TextTokenizer(auto, max_length=16)([text])
        assert found.input_ids.tolist() == [auto.cls_token_id, auto.sep_token_id]


def test_no_texts_give_an_empty_batch(auto: Any) -> None:
    assert TextTokenizer(auto, max_length=16)([]) == []
    assert len(TextTokenizer(auto, max_length=16).batch([])) == 0


def test_words_that_were_cut_or_have_no_token_are_still_counted(auto: Any) -> None:
    """Traps 13 and 15."""
    words = ["bank", "\ufffd", "", "unbelievable", "river", "bank"]
    [found] = TextTokenizer(auto, max_length=4, overflow="truncate")([words])
    assert found.word_ids is not None and found.word_ids.tolist() == [-1, 0, 3, -1]
    assert found.num_words == 6


def test_a_batch_is_the_texts_in_their_order(auto: Any) -> None:
    batch = TextTokenizer(auto, max_length=512).batch(SOME)
    assert len(batch) == len(SOME)
    assert batch.num_words.tolist() == [0, 0, 5, 0, 0, 0, 0]
    starts = batch.cu_seqlens[:-1]
    assert (batch.input_ids[starts] == auto.cls_token_id).all()
    assert batch.token_type_ids is not None and batch.token_type_ids[starts[3] : starts[4]].max() == 1
    assert batch.word_ids is not None and (batch.word_ids[: starts[2]] == -1).all()


def test_a_very_long_text_is_cut_like_any_other(auto: Any) -> None:
    [found] = TextTokenizer(auto, max_length=512, overflow="truncate")(["bank " * 200_000])
    assert len(found.input_ids) == 512
    assert found.cut_tokens == 200_000 - 510


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """A small RoBERTa-like tokenizer: a word's first token carries the blank before it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], show_progress=False, initial_alphabet=alphabet
    )
    backend.train_from_iterator(["the bank of the river bank"] * 9, trainer)
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", 1), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return backend


@pytest.mark.parametrize("nested", [False, True])
def test_words_of_a_byte_level_tokenizer_are_not_glued_together(byte_level: Tokenizer, nested: bool) -> None:
    """Trap 14: what transformers gives if the tokenizer was made with add_prefix_space=True."""
    words = ["the", "bank", "", " of", "\triver", "\u3000bank"]
    spaced, plain = (Tokenizer.from_str(byte_level.to_str()) for _ in range(2))
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    if nested:
        split = pre_tokenizers.Split("#", "isolated")
        plain.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    right = spaced.encode(words, is_pretokenized=True)
    assert right.ids != plain.encode(words, is_pretokenized=True).ids, "they would be glued"
    for backend in (plain, spaced):
        found, text = TextTokenizer(SimpleNamespace(backend_tokenizer=backend), max_length=64)([words, "the bank"])
        assert found.input_ids.tolist() == right.ids
        assert found.word_ids is not None
        assert found.word_ids.tolist() == [-1 if word is None else word for word in right.word_ids]
        assert text.input_ids.tolist() == backend.encode("the bank").ids, "strings stay as the tokenizer takes them"


# What a checkpoint's files or a user's settings say of batches is not ours.


def test_padding_and_truncation_of_the_checkpoint_do_not_leak_in(minilm_folder: str, tmp_path: Path) -> None:
    folder = shutil.copytree(
        minilm_folder, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("*.safetensors", ".git*")
    )
    settings_file = folder / "tokenizer.json"
    content = json.loads(settings_file.read_text("utf-8"))
    content["truncation"] = {"max_length": 5, "strategy": "LongestFirst", "stride": 2, "direction": "Right"}
    content["padding"] = content["padding"] | {"strategy": {"Fixed": 9}}
    settings_file.write_text(json.dumps(content), "utf-8")
    auto = AutoTokenizer.from_pretrained(folder)
    assert len(auto.backend_tokenizer.encode("one two three four five six")) == 9, "the settings are in force"
    words = ["one", "two", "three", "four", "five", "six"]
    for overflow, max_length, length in (("error", 16, 8), ("truncate", 6, 6)):
        tokenizer = TextTokenizer(auto, max_length=max_length, overflow=overflow)  # type: ignore[arg-type]
        for found in tokenizer([" ".join(words), words, ("one two three", "four five")])[:2]:
            assert found.input_ids.tolist()[: length - 1] == auto.convert_tokens_to_ids(["[CLS]", *words])[: length - 1]
            assert len(found.input_ids) == length and found.cut_tokens == 8 - length


def test_the_users_tokenizer_is_left_as_it_is(minilm_folder: str) -> None:
    auto = AutoTokenizer.from_pretrained(minilm_folder)
    auto.backend_tokenizer.enable_truncation(7)
    auto.backend_tokenizer.enable_padding(length=11)
    before = auto.backend_tokenizer.to_str()
    TextTokenizer(auto, max_length=5, overflow="truncate")(SOME)
    assert auto.backend_tokenizer.to_str() == before


# Other processes.


def ids(texts: list[TokenizedText]) -> list[list[int]]:
    return [text.input_ids.tolist() for text in texts]


@pytest.fixture
def used(auto: Any) -> TextTokenizer:
    """A tokenizer that this process has used already, with the threads that this starts."""
    tokenizer = TextTokenizer(auto, max_length=512)
    tokenizer(SOME)
    return tokenizer


def test_a_used_tokenizer_pickles_without_its_backend(used: TextTokenizer) -> None:
    sent = pickle.dumps(used)
    assert len(sent) < 1_000_000, "a vocabulary's JSON, no weights"
    assert used.backend.content.encode() in sent and len(sent) < len(used.backend.content.encode()) + 1000
    assert ids(pickle.loads(sent)(SOME)) == ids(used(SOME))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("parallelism", [None, "true"])
def test_a_forked_child_builds_its_own_backend(
    used: TextTokenizer, parallelism: str | None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Trap 34: one that was used before a fork would hang in the child, or warn of its lost threads."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if parallelism is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallelism)

    def child(end: Connection) -> None:
        before = used.backend._built
        found = ids(used(SOME))
        end.send((found, used.backend._built is not before))

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with warnings.catch_warnings():
        # Newer Pythons warn of a fork beside threads, which is the point here.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = context.Process(target=child, args=(theirs,))
        process.start()
    if not ours.poll(30):
        process.kill()
        pytest.fail("the child hangs")
    assert ours.recv() == (ids(used(SOME)), True)
    process.join()
    assert "forked" not in capfd.readouterr().err


def test_a_spawned_child_gets_the_tokenizer_from_its_pickle(used: TextTokenizer) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert ids(pool.submit(used, SOME).result(60)) == ids(used(SOME))


class Parallelism:
    """A collate_fn that tokenizes and says what the environment is then."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[Text]) -> tuple[list[list[int]], str | None]:
        return ids(self.tokenizer(texts)), os.environ.get("TOKENIZERS_PARALLELISM")


def test_workers_tokenize_on_one_thread_and_the_main_process_on_several(
    used: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 34: the variable is set in the worker alone, and there even over a "true", which hangs after a fork."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    loader = DataLoader(SOME, batch_size=4, num_workers=1, collate_fn=Parallelism(used))  # type: ignore[arg-type]
    assert [found for found, _ in loader] == [ids(used(SOME[:4])), ids(used(SOME[4:]))]
    assert {variable for _, variable in loader} == {"false"}
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert {variable for _, variable in loader} == {"false"}
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


# Refusals.


@pytest.mark.parametrize(
    ("text", "tokens"), [("bank " * 400, 402), (["bank"] * 400, 402), (("bank " * 200, "bank " * 200), 403)]
)
def test_a_text_that_is_too_long_is_named_and_shown_shortened(auto: Any, text: Text, tokens: int) -> None:
    with pytest.raises(EncoderError) as caught:
        TextTokenizer(auto, max_length=256)(["short", ["short"], text])
    message = str(caught.value)
    assert message.startswith(f"text 2 has {tokens} tokens, the model takes 256: {repr(text)[:50]}")
    assert "overflow='truncate'" in message and len(message) < 280
    assert caught.value.records == (2,)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (None, "NoneType"),
        (42, "int"),
        (b"bytes", "bytes"),
        (("a", "b", "c"), "tuple"),
        (("a",), "tuple"),
        (("a", None), "tuple"),
        (["a", 1], "list"),
        ([["a", "b"], ["c"]], "list"),
        ({"text": "a"}, "dict"),
    ],
    ids=repr,
)
def test_a_value_that_is_no_text_is_refused_with_its_index_and_value(auto: Any, text: Any, kind: str) -> None:
    with pytest.raises(EncoderError) as caught:
        TextTokenizer(auto, max_length=16)(["fine", text])
    assert str(caught.value).startswith(f"text 1 is {text!r} ({kind}): a text is a string, a list of words, or")
    assert caught.value.records == (1,)


@pytest.mark.parametrize("text", ["broken \ud83d", ["broken", "\ud83d"], ("fine", "\ude00")])
def test_half_a_surrogate_pair_is_refused_with_its_index(auto: Any, text: Text) -> None:
    with pytest.raises(EncoderError, match=r"text 1 holds half of a surrogate pair.*\\ud") as caught:
        TextTokenizer(auto, max_length=16)(["fine \U0001f600", text])
    assert caught.value.records == (1,)


def test_one_string_instead_of_a_list_is_refused(auto: Any) -> None:
    with pytest.raises(ConfigError, match=r"texts='the bank', one string: pass a list of texts, \[text\]"):
        TextTokenizer(auto, max_length=16)("the bank")


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"max_length": 0}, "max_length=0"),
        ({"max_length": -5}, "max_length=-5"),
        ({"max_length": 2}, "max_length=2: a pair's special tokens alone take 3"),
        ({"max_length": 16, "overflow": "cut"}, "overflow='cut': write one of 'error', 'truncate', 'windows'"),
    ],
)
def test_a_bad_argument_is_refused_with_the_value_seen(auto: Any, options: dict[str, Any], seen: str) -> None:
    with pytest.raises(ConfigError, match=seen):
        TextTokenizer(auto, **options)


def test_a_list_of_texts_as_a_text_is_named_once(auto: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = TextTokenizer(auto, max_length=64)
    of_words: list[list[Text]] = [["the bank", "a b"], [["the", "bank", " ", "\ta\n"]], [("the bank", "a b")]]
    for texts in of_words:
        tokenizer(texts)
    TextTokenizer(auto, max_length=64, word_splitter=str.split)([["New York", "banks"]])  # word vectors
    assert not caplog.records
    for _ in range(2):
        tokenizer(["the", (["bank"], ["The bank raised its rates.", "No."])])
    (message,) = [record.getMessage() for record in caplog.records]
    assert "text 1 is a list of words" in message and "['The bank raised its rates.', 'No.']" in message
