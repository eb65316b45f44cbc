"""One row a word, whatever the words are: three kinds of tokenizer, arbitrary unicode, cut words, pairs, strings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import tokenizer_with_marks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from bertstream import ConfigError, Encoder, EncoderError
from bertstream.encoding.tokenizer import TextTokenizer
from bertstream.encoding.words import _SAMPLES, AddedTokens, Blanks, find_blanks
from bertstream.tokens import Text

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
SPECIAL_TOKENS = list(SPECIAL.values())
TEMPLATE = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)])

CORPUS = [
    "The unbelievable banks of the river sprang up, and electroencephalography didn't help: e-mail me at 10:45!",
    "Ein Überraschungsei für Élodie; l'été à la plage, naïve déjà-vu, ça va?",
    "Привет, мир! Это проверка. 東京は夜の七時。 안녕하세요 세계 مرحبا بالعالم שלום עולם नमस्ते दुनिया",
]

ODD_WORDS = [
    *["", " ", "  ", "\t", "\n", "\x00", "\x7f", "\u200b", "\u3000", "\ufffd", "\u02dc", "\ue000", "\U0010ffff"],
    *["\u0301", "e\u0301", "\u0915\u094d\u0937", "\U0001f44d\U0001f3fd", "\U0001f469\u200d\U0001f467", "\U0001f1eb"],
    *["[SEP]", "[CLS]", "[UNK]", "[PAD]", "[sep]", " [SEP]", "##s", "\u2581", "\u0120", "don't", "e-mail", "\u6771"],
    *["New York", " river", "river ", "a  b", "the\nbank", "river" * 25, "x" * 101],
]


def wordpiece() -> Tokenizer:
    """As BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_bpe(add_prefix_space: bool) -> Tokenizer:
    """As RoBERTa has it; the vocabulary is the same with and without the space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return tokenizer


def unigram() -> Tokenizer:
    """As XLM-RoBERTa has it: SentencePiece's model, normalisation and word mark."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=250, special_tokens=SPECIAL_TOKENS, unk_token="[UNK]", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "WordPiece": wordpiece,
    "byte-level BPE": lambda: byte_bpe(add_prefix_space=False),
    "byte-level BPE, add_prefix_space": lambda: byte_bpe(add_prefix_space=True),
    "Unigram": unigram,
}


class Kind:
    """A trained tokenizer, what transformers says with it, and a tiny BERT over its vocabulary."""

    def __init__(self, name: str) -> None:
        self.tokenizer = self._wrapped(TOKENIZERS[name]())
        # Without a space before each, transformers glues a list's words together. The expected ids have the space.
        self.blank_is_added = name == "byte-level BPE"
        self.right = self._wrapped(byte_bpe(add_prefix_space=True)) if self.blank_is_added else self.tokenizer
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            max_position_embeddings=4096,
        )
        self.model: nn.Module = BertModel(config).eval()
        self._made: dict[str, Encoder] = {}
        self.tokens, self.words = self.encoder(), self.encoder(output="words")

    @staticmethod
    def _wrapped(tokenizer: Tokenizer) -> Any:
        tokenizer.post_processor = TEMPLATE
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=4096, **SPECIAL)

    def encoder(self, **options: Any) -> Encoder:
        if str(options) not in self._made:
            self._made[str(options)] = Encoder(self.model, self.tokenizer, max_forward_tokens=8192, **options)
        return self._made[str(options)]

    def right_encoding(self, text: Text, **options: Any) -> Any:
        """What transformers makes of one list of words, or of a pair."""
        # In a batch of one: of a single pair it would take an empty second text for none.
        batch = [[part] for part in (text if isinstance(text, tuple) else (text,))]
        return self.right(*batch, is_split_into_words=True, **options).encodings[0]


@pytest.fixture(scope="module", params=TOKENIZERS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(request.param)


def word_count(text: Text) -> int:
    return sum(map(len, text)) if isinstance(text, tuple) else len(text)


def word_of_token(text: Text, encoding: Any) -> list[int]:
    """The word of each token, those of a pair counted through both, -1 for special tokens."""
    ahead = [0, len(text[0]) if isinstance(text, tuple) else 0]
    pairs = zip(encoding.word_ids, encoding.sequence_ids, strict=True)
    return [-1 if word is None else word + ahead[part] for word, part in pairs]


def padded_by_hand(rows: Sequence[Sequence[float]], pad: float) -> list[list[float]]:
    longest = max(map(len, rows))
    return [[*row, *[pad] * (longest - len(row))] for row in rows]


LISTS = 20
"""Texts of one Hypothesis example: an encoder's call costs about the same for one and for many."""

words = st.one_of(st.text(max_size=6), st.sampled_from(ODD_WORDS), st.sampled_from(" ".join(CORPUS).split()))
word_lists = st.lists(words, max_size=6)
batches = st.lists(word_lists | st.tuples(word_lists, word_lists), min_size=LISTS, max_size=LISTS)
law = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example])


@settings(law, max_examples=25)
@given(texts=batches)
def test_each_word_has_one_row_in_order(kind: Kind, texts: list[Text]) -> None:
    found, tokens = kind.words(texts), kind.tokens(texts)
    assert found.lengths.tolist() == [word_count(text) for text in texts]
    assert found.word_ids is not None and found.present is not None and found.values.isfinite().all()
    assert found.word_ids.tolist() == [number for text in texts for number in range(word_count(text))]
    ids = np.split(found.tokens.input_ids, found.tokens.cu_seqlens[1:-1])
    rows, present = [torch.zeros(0, 8)], []
    for i, text in enumerate(texts):
        encoding = kind.right_encoding(text)
        assert ids[i].tolist() == encoding.ids
        word_ids = np.array(word_of_token(text, encoding))
        for number in range(word_count(text)):
            mine = tokens[i][word_ids == number]
            rows.append(mine.mean(0, keepdim=True) if len(mine) else torch.zeros(1, 8))
            present.append(len(mine) > 0)
    assert found.present.tolist() == present
    torch.testing.assert_close(found.values, torch.cat(rows), atol=1e-6, rtol=1e-5)


@settings(law, max_examples=12)
@given(texts=batches, max_length=st.integers(4, 12))
def test_words_that_were_cut_are_marked(kind: Kind, texts: list[Text], max_length: int) -> None:
    encoder = kind.encoder(output="words", overflow="truncate", max_length=max_length)
    tags = [[100 * i + number for number in range(word_count(text))] for i, text in enumerate(texts)]
    found = encoder(texts)
    assert found.word_ids is not None and found.present is not None
    assert found.lengths.tolist() == [word_count(text) for text in texts]
    assert not found.values[~found.present].any()
    word_ids, present, aligned = [], [], []
    for text, numbers in zip(texts, tags, strict=True):
        whole = {*word_of_token(text, kind.right_encoding(text))}
        left = {*word_of_token(text, kind.right_encoding(text, truncation=True, max_length=max_length))}
        cut = whole - left
        word_ids += [-1 if i in cut else i for i in range(len(numbers))]
        present += [i in left for i in range(len(numbers))]
        aligned.append([-100 if i in cut else number for i, number in enumerate(numbers)])
    assert found.word_ids.tolist() == word_ids
    assert found.present.tolist() == present
    assert found.tokens.cut_words.tolist() == [row.count(-100) for row in aligned]
    assert found.align(tags).tolist() == padded_by_hand(aligned, -100)


@settings(law, max_examples=12)
@given(texts=batches, overflow=st.sampled_from(["truncate", "windows"]))
def test_in_token_output_a_words_number_goes_to_its_first_token(kind: Kind, texts: list[Text], overflow: Any) -> None:
    # Beside a first text of this test at most, some room is left for windows over the second.
    encoder = kind.encoder(overflow=overflow, max_length=700, stride=1 if overflow == "windows" else 0)
    tags = [[0.5 + number for number in range(word_count(text))] for text in texts]
    aligned = []
    for text, numbers in zip(texts, tags, strict=True):
        encoding = kind.right_encoding(text, truncation=overflow == "truncate", max_length=700)
        word_ids = word_of_token(text, encoding)
        first = [word >= 0 and word not in word_ids[:i] for i, word in enumerate(word_ids)]
        aligned.append([numbers[word] if here else 0.0 for word, here in zip(word_ids, first, strict=True)])
    assert encoder(texts).align(tags, pad=0.0).tolist() == padded_by_hand(aligned, 0.0)


def test_a_special_token_inside_a_word_is_part_of_it(kind: Kind) -> None:
    text = ["river[SEP]bank", "[SEP][SEP]", "the[CLS]"]
    found = kind.words([text])
    assert found.present is not None and found.present.all()
    special = kind.tokens.tokenizer([text])[0].special
    assert special is not None and np.flatnonzero(special).tolist() == [0, len(special) - 1]


@pytest.mark.parametrize("prepend_scheme", ["never", "first"])
def test_words_are_not_glued_together_by_a_tokenizer_that_needs_blanks(prepend_scheme: Any) -> None:
    words = ["the", "river", "[SEP]", "", "banks"]
    tokenizer = unigram()
    found = []
    for scheme in (prepend_scheme, "always"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
        found.append(TextTokenizer(wrapped, max_length=100)([words])[0].input_ids.tolist())
    assert found[0] == found[1]


def test_strings_are_split_at_blanks_or_by_the_users_function(kind: Kind) -> None:
    strings: list[Text] = ["  The river\tbanks, \n", "", " \u3000", ("the banks", "of a river")]
    lists: list[Text] = [["The", "river", "banks,"], [], [], (["the", "banks"], ["of", "a", "river"])]
    torch.testing.assert_close(kind.words(strings).values, kind.words(lists).values)
    assert kind.words(strings).lengths.tolist() == [3, 0, 0, 5]
    by_comma = kind.encoder(output="words", word_splitter=lambda text: text.split(","))
    found = by_comma(["the river,,banks", ["kept, as it is"]])
    torch.testing.assert_close(found.values, kind.words([["the river", "", "banks"], ["kept, as it is"]]).values)


@pytest.mark.parametrize(("splitter", "seen"), [(str.strip, "'a b'"), (lambda text: [text, 1], "1")])
def test_a_word_splitter_that_returns_no_list_of_words_is_refused(splitter: Any, seen: str) -> None:
    encoder = Kind("WordPiece").encoder(output="words", word_splitter=splitter)
    with pytest.raises(ConfigError, match=f"word_splitter returned .*{seen}.* for text 1"):
        encoder([["a", "b"], "a b"])


@pytest.mark.parametrize("overflow", ["truncate", "windows"])
def test_a_word_that_is_longer_than_the_model_takes_has_one_row(kind: Kind, overflow: Any) -> None:
    encoder = kind.encoder(output="words", overflow=overflow, max_length=32, stride=8 if overflow == "windows" else 0)
    word = "\u0915\U0010ffff\u6771" * 100
    found = encoder([["the", word, "banks", word * 10], [word], ["river"]])
    assert found.lengths.tolist() == [4, 1, 1] and found.values.isfinite().all()
    assert found.present is not None and found.word_ids is not None
    if overflow == "windows":
        assert found.present.all() and found.word_ids.tolist() == [0, 1, 2, 3, 0, 0]


def test_half_a_surrogate_pair_in_a_word_is_refused(kind: Kind) -> None:
    with pytest.raises(EncoderError, match=r"text 1 holds half of a surrogate pair.*\\ud83d") as caught:
        kind.words([["fine"], ["the", "ba\ud83dnk"]])
    assert caught.value.records == (1,)


def test_texts_without_words_have_no_rows(kind: Kind) -> None:
    empty: list[list[Text]] = [[], [[]], [[], ([], [])]]
    for texts in empty:
        found = kind.words(texts)
        assert found.values.shape == (0, 8) and found.lengths.tolist() == [0] * len(texts)
        assert found.padded()[0].shape == (len(texts), 0, 8)


def test_the_mask_of_words_moves_with_their_vectors(kind: Kind) -> None:
    moved = kind.words([["the", "", "river"]]).to("meta")
    assert moved.present is not None and moved.present.device == moved.values.device == torch.device("meta")


def test_the_mask_of_words_has_a_padded_form(kind: Kind) -> None:
    found = kind.words([["the", "", "river"], ["bank"]])
    assert found.padded_present().tolist() == [[True, False, True], [True, False, False]]


def test_word_output_refuses_tokens_of_unsplit_strings(kind: Kind) -> None:
    tokenizer = kind.tokens.tokenizer
    assert kind.words.encode(tokenizer.batch([["a", "list"], ""])).lengths.tolist() == [2, 0]
    for texts in (["a string", "another"], [["a", "list"], "a string"], [["a", "list"], "a string", ("of", "two")]):
        with pytest.raises(EncoderError, match="belong to no word") as caught:
            kind.words.encode(tokenizer.batch(texts))
        assert caught.value.records == tuple(i for i, text in enumerate(texts) if not isinstance(text, list))


# Blanks before words, whatever the tokenizer.


def with_marks() -> Tokenizer:
    return tokenizer_with_marks(CORPUS, SPECIAL_TOKENS)


def with_a_first_mark() -> Tokenizer:
    """As Llama 2 has it: the normalizer also puts a mark before the text."""
    tokenizer = with_marks()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return tokenizer


def with_a_first_mark_and_metaspace() -> Tokenizer:
    """The name of the pre-tokenizer asks for blanks, but the normalizer puts a mark before each word already."""
    tokenizer = with_a_first_mark()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return tokenizer


def with_blanks_in_the_vocabulary() -> Tokenizer:
    """Nothing marks a blank: it is the first character of a word's first token."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def of_characters() -> Tokenizer:
    """A blank is a token like any other character."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    trainer = trainers.BpeTrainer(vocab_size=1, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def without_blanks() -> Tokenizer:
    """As CLIP has it: byte-level, but blanks are dropped."""
    tokenizer = byte_bpe(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), tokenizer.pre_tokenizer])
    return tokenizer


KINDS_OF_BLANKS: dict[str, tuple[Callable[[], Tokenizer], bool]] = {
    "marks": (with_marks, True),
    "a first mark": (with_a_first_mark, False),
    "a first mark, Metaspace": (with_a_first_mark_and_metaspace, True),
    "blanks in the vocabulary": (with_blanks_in_the_vocabulary, True),
    "characters": (of_characters, True),
    "without blanks": (without_blanks, False),
    "WordPiece": (wordpiece, False),
    "Unigram": (unigram, False),
    "byte-level, add_prefix_space": (lambda: byte_bpe(add_prefix_space=True), False),
}
"""The tokenizer, and whether version 0.1.0 had other tokens."""


def of_texts(tokenizer: Tokenizer, texts: list[Text]) -> list[list[int]]:
    found = TextTokenizer(SimpleNamespace(backend_tokenizer=tokenizer), max_length=200)(texts)
    return [text.input_ids.tolist() for text in found]


@pytest.mark.parametrize("name", KINDS_OF_BLANKS)
def test_a_list_of_words_has_the_tokens_of_the_running_text(name: str) -> None:
    tokenizer = KINDS_OF_BLANKS[name][0]()
    tokenizer.post_processor = TEMPLATE
    strings = ["the river banks sprang", "river", "Привет мир", "l'été à la plage, ça va?"]
    in_words = of_texts(tokenizer, [*[text.split() for text in strings], (["the", "banks"], ["of", "the", "river"])])
    assert in_words == of_texts(tokenizer, [*strings, ("the banks", "of the river")])


@pytest.mark.parametrize("name", KINDS_OF_BLANKS)
def test_only_tokenizers_whose_words_had_other_tokens_have_another_identity(name: str) -> None:
    make, changed = KINDS_OF_BLANKS[name]
    tokenizer = TextTokenizer(SimpleNamespace(backend_tokenizer=make()), max_length=200)
    assert tokenizer.identity[:6] == (tokenizer.backend.content, 200, "error", 0, True, "NoneType")
    assert tokenizer.identity[6:] == (("found by trying",) if changed else ())


def test_word_vectors_of_a_string_with_marks_are_those_of_its_tokens() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=with_marks(), model_max_length=100, **SPECIAL)
    tokenizer.backend_tokenizer.post_processor = TEMPLATE
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    model = BertModel(config).eval()
    text = "the unbelievable river banks"
    encoding = tokenizer(text)
    marks = [token.startswith("\u2581") for token in tokenizer.convert_ids_to_tokens(encoding.input_ids)]
    words = np.cumsum(marks)[1:-1]
    rows = Encoder(model, tokenizer)([text])[0][1:-1]
    right = torch.stack([rows[words == word].mean(0) for word in range(4)])
    torch.testing.assert_close(Encoder(model, tokenizer, output="words")([text])[0], right)


def test_truncation_that_was_set_on_the_users_tokenizer_does_not_hide_the_blanks() -> None:
    tokenizer = with_marks()
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=9)
    assert find_blanks(tokenizer)[:2] == (False, True)
    assert find_blanks(tokenizer).unlike == "" and tokenizer.truncation["max_length"] == 1


def test_empty_words_and_words_that_begin_with_a_blank_get_none() -> None:
    words = ["the", "", " river", "of", "the", ""]
    assert Blanks(others=True).put(words) == ["the", "", " river", " of", " the", ""]
    assert Blanks(first=True, others=True).put(words) == [" the", "", " river", " of", " the", ""]
    assert Blanks().put(words) == words and Blanks(others=True).put([]) == []


def test_a_tokenizer_whose_tokens_cross_blanks_is_named_at_the_first_list(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator([" ".join(words) for words in _SAMPLES] * 3, trainer)
    texts = TextTokenizer(SimpleNamespace(backend_tokenizer=tokenizer), max_length=200)
    with caplog.at_level(logging.WARNING, "bertstream"):
        texts(["the river"])
        assert not caplog.messages
        for _ in range(2):
            texts([["the", "river"], ["a", "bank"]])
    (message,) = caplog.messages
    assert "does not have the tokens of the running text, as in 'the river did not rise'" in message


# Added tokens.


@pytest.mark.parametrize(
    ("token", "word"),
    [
        (AddedToken("ban", single_word=True), "banks"),
        (AddedToken("ban", single_word=True, lstrip=True), "ban1"),
        (AddedToken("[ban", single_word=True), "[ban_"),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [with_marks, lambda: byte_bpe(add_prefix_space=False)], ids=["marks", "bytes"])
def test_a_word_that_only_begins_like_an_added_token_keeps_its_blank(
    make: Callable[[], Tokenizer], token: AddedToken, word: str
) -> None:
    tokenizer = make()
    right = of_texts(tokenizer, [["the", word, "river"]])
    tokenizer.add_tokens([token])
    assert of_texts(tokenizer, [["the", word, "river"]]) == right
    assert TextTokenizer(SimpleNamespace(backend_tokenizer=tokenizer), max_length=9).identity[-1] == (
        "added tokens as they match"
    )


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (AddedToken("ban", single_word=True), ["ban", "ban-k", "ban."]),
        (AddedToken("ban"), ["ban", "banks"]),
        (AddedToken("ban", lstrip=True, rstrip=True), ["ban", "banks"]),
        (AddedToken("BAN", normalized=True), ["ban", "BAN", "Banks"]),
        (AddedToken("[BAN]", special=True), ["[BAN]", "[BAN]k"]),
    ],
    ids=str,
)
def test_an_added_token_in_a_list_has_no_token_of_a_blank_before_it(token: AddedToken, words: list[str]) -> None:
    tokenizer = byte_bpe(add_prefix_space=False)
    if token.normalized:
        tokenizer.normalizer = normalizers.Lowercase()
    add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
    add([token])
    number = tokenizer.token_to_id(token.content)
    before = of_texts(tokenizer, [["the"]])[0]
    for word in words:
        assert of_texts(tokenizer, [["the", word]])[0][: len(before) + 1] == [*before, number]


def test_a_special_token_that_is_split_like_other_text_is_no_added_token() -> None:
    tokenizer = byte_bpe(add_prefix_space=False)
    assert AddedTokens(tokenizer).begin("[SEP]x") and not AddedTokens(tokenizer).begin("x[SEP]")
    tokenizer.encode_special_tokens = True
    assert not AddedTokens(tokenizer).begin("[SEP]x")


def test_added_tokens_that_match_as_they_are_written_leave_the_identity() -> None:
    """As ModernBERT has it: a normalizer that leaves them, and runs of blanks."""
    tokenizer = byte_bpe(add_prefix_space=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("   ", normalized=True), AddedToken("|||EMAIL|||", normalized=True)])
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True)])
    assert find_blanks(tokenizer) == Blanks(first=True, others=True)
