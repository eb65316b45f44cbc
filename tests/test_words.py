"""One row a word, whatever the words are: three kinds of tokenizer, arbitrary unicode, cut words, pairs, strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from bertstream import Encoder
from bertstream.types import Text

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
SPECIAL_TOKENS = list(SPECIAL.values())
TEMPLATE = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)])

CORPUS = [
    "The unbelievable banks of the river sprang up, and electroencephalography didn't help: e-mail me at 10:45!",
    "Ein Überraschungsei für Élodie; l'été à la plage, naïve déjà-vu, ça va?",
    "Привет, мир! Это проверка. 東京は夜の七時。 안녕하세요 세계 مرحبا بالعالم שלום עולם नमस्ते दुनिया",
]

ODD_WORDS = ["", " ", "  ", "\t", "\n", "\x00", "\x7f", "\u200b", "\u3000", "\ufffd", "\u02dc", "\ue000", "\U0010ffff"]
ODD_WORDS += [
    "\u0301",
    "e\u0301",
    "\u0915\u094d\u0937",
    "👍🏽",
    "👩‍👩‍👧",
    "🇫🇷",
    "[SEP]",
    "[CLS]",
    "[UNK]",
    "[PAD]",
    "[sep]",
    " [SEP]",
]
ODD_WORDS += [
    "New York",
    " river",
    "river ",
    "a  b",
    "the\nbank",
    "river" * 25,
    "x" * 101,
    "don't",
    "e-mail",
    "▁",
    "Ġ",
    "##s",
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
        # Without a space before them transformers glues a list's words together, so it says what is right with one.
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
        self.tokens, self.words = self.encoder(), self.encoder(output="words")

    @staticmethod
    def _wrapped(tokenizer: Tokenizer) -> Any:
        tokenizer.post_processor = TEMPLATE
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=4096, **SPECIAL)

    def encoder(self, **options: Any) -> Encoder:
        return Encoder(self.model, self.tokenizer, max_forward_tokens=8192, **options)

    def right_encoding(self, text: Text, **options: Any) -> Any:
        """What transformers makes of one list of words, or of a pair."""
        parts = text if isinstance(text, tuple) else (text,)
        return self.right(*parts, is_split_into_words=True, **options).encodings[0]


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


def align_by_hand(rows: Sequence[Sequence[float]], pad: int) -> list[list[float]]:
    longest = max(map(len, rows))
    return [[*row, *[pad] * (longest - len(row))] for row in rows]


LISTS = 20
"""Texts of one Hypothesis example: an encoder's call costs about the same for one and for many."""

words = st.one_of(st.text(max_size=6), st.sampled_from(ODD_WORDS), st.sampled_from(" ".join(CORPUS).split()))
word_lists = st.lists(words, max_size=6)
batches = st.lists(word_lists | st.tuples(word_lists, word_lists), min_size=LISTS, max_size=LISTS)
law = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example])


@settings(law, max_examples=10_000 // LISTS // len(TOKENIZERS))
@given(texts=batches)
def test_any_words_have_one_row_each_in_their_order(kind: Kind, texts: list[Text]) -> None:
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


@settings(law, max_examples=25)
@given(texts=batches, max_length=st.integers(4, 12))
def test_words_that_were_cut_are_told_apart(kind: Kind, texts: list[Text], max_length: int) -> None:
    encoder = kind.encoder(output="words", overflow="truncate", max_length=max_length)
    tags = [[100 * i + number for number in range(word_count(text))] for i, text in enumerate(texts)]
    found = encoder(texts)
    assert found.word_ids is not None and found.present is not None
    assert found.lengths.tolist() == [word_count(text) for text in texts]
    aligned = []
    for i, (text, word_ids, present) in enumerate(
        zip(
            texts,
            *(np.split(array, np.cumsum(found.lengths)[:-1]) for array in (found.word_ids, found.present.numpy())),
            strict=True,
        )
    ):
        whole = {*word_of_token(text, kind.right_encoding(text))}
        left = {*word_of_token(text, kind.right_encoding(text, truncation=True, max_length=max_length))}
        numbers = range(word_count(text))
        assert word_ids.tolist() == [-1 if number in whole - left else number for number in numbers]
        assert present.tolist() == [number in left for number in numbers]
        assert found.tokens.cut_words[i] == len(whole - left)
        aligned.append([-100 if number in whole - left else tags[i][number] for number in numbers])
        assert not found[i][~torch.from_numpy(present)].any()
    assert found.align(tags).tolist() == align_by_hand(aligned, -100)
