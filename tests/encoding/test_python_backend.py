"""Tokenizers that are written in Python give the library's tokens and vectors in any process, and say they are slow."""

from __future__ import annotations

import json
import logging
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from python_tokenizers import ENGLISH, KINDS, MERGES, MODELS, SPECIAL, SYLLABLES, japanese, make_model, phobert
from torch.utils.data import DataLoader
from transformers import BertTokenizer, PreTrainedTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

import bertstream
from bertstream import ConfigError, Encoder, EncoderError, StreamConfig, TokenCollate
from bertstream.encoding import python_backend
from bertstream.encoding.tokenizer import TextTokenizer
from bertstream.testing import assert_resumes_exactly
from bertstream.tokens import Text, TokenizedText

WORDS = st.sampled_from(
    [
        *[
            "the",
            "banks",
            "unbelievable",
            "東京は夜の七時です。",
            "tôi",
            "LAGV",
            "@who",
            "http://a.b",
            "don't",
            "<mask>",
        ],
        *["</s>", "[SEP]", "a\nb", "\ufffd", "\u3000", "\U0001f44d\U0001f3fd", "e\u0301", ""],
    ]
)
STRINGS = st.lists(WORDS, max_size=8).map(" ".join) | st.text(st.characters(codec="utf-8"), max_size=20)
LISTS = st.lists(WORDS, max_size=8)
TEXTS: st.SearchStrategy[Text] = STRINGS | LISTS | st.tuples(STRINGS, STRINGS) | st.tuples(LISTS, LISTS)
ROWS = ["東京は夜の七時です。", "the bank", "tôi là sinh_viên", "LAGV", "a  b", "a b a b a b"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By kind."""
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in KINDS.items()}


@pytest.fixture(scope="module")
def ours(tokenizers: dict[str, Any]) -> dict[str, TextTokenizer]:
    return {kind: TextTokenizer(tokenizer, max_length=10_000) for kind, tokenizer in tokenizers.items()}


def called(tokenizer: Any, *text: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ByT5's, of an end that is in the text
        return tokenizer(*text, return_token_type_ids=True, return_special_tokens_mask=True, **options)


@pytest.mark.filterwarnings("ignore:This sequence already has")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@example(text=("",))
@example(text=("", ""))
@example(text=("</s>", "a</s>"))
@given(text=st.tuples(STRINGS) | st.tuples(STRINGS, STRINGS))
def test_strings_and_pairs_have_the_librarys_tokens(
    kind: str, text: Any, tokenizers: dict[str, Any], ours: dict[str, TextTokenizer]
) -> None:
    right = called(tokenizers[kind], *text)
    _, found, _ = ours[kind]([("a", "b"), text if len(text) == 2 else text[0], ("a", "b")])
    assert found.input_ids.tolist() == right["input_ids"]
    assert found.special is not None and len(found.special) == len(found.input_ids)
    if kind != "byt5":  # whose mask counts an end that the text had as one more
        assert found.special.tolist() == [bool(entry) for entry in right["special_tokens_mask"]]
    if len(text) == 2 and len(right["token_type_ids"]) == len(right["input_ids"]):  # ByT5's is wrong beside an end
        assert found.token_type_ids is not None and found.token_type_ids.tolist() == right["token_type_ids"]


@pytest.mark.parametrize("kind", ["japanese", "phobert", "bertweet", "esm"])
@settings(max_examples=30)
@given(first=LISTS, second=st.none() | LISTS)
def test_each_token_of_a_list_knows_its_word(
    kind: str, first: list[str], second: list[str] | None, tokenizers: dict[str, Any], ours: dict[str, TextTokenizer]
) -> None:
    tokenizer = tokenizers[kind]
    [found] = ours[kind]([first if second is None else (first, second)])
    words = [*first, *(second or [])]
    pieces = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word)) for word in words]
    assert found.word_ids is not None and found.num_words == len(words)
    assert [found.input_ids[found.word_ids == i].tolist() for i in range(len(words))] == pieces
    assert found.special is not None and found.special.tolist() == (found.word_ids < 0).tolist()


def test_words_of_a_tokenizer_of_characters_keep_the_blanks_of_the_text(ours: dict[str, TextTokenizer]) -> None:
    words, text = ours["canine"]([["the", "bank"], "the bank"])
    assert words.input_ids.tolist() == text.input_ids.tolist()
    assert words.word_ids is not None and words.word_ids.tolist() == [-1, 0, 0, 0, 1, 1, 1, 1, 1, -1]


def test_an_end_that_the_text_has_already_is_not_special(ours: dict[str, TextTokenizer]) -> None:
    with pytest.warns(UserWarning, match="already has"):
        [found] = ours["byt5"](["a</s>"])
    assert found.input_ids.tolist() == [100, 1]
    assert found.special is not None and found.special.tolist() == [False, False]


WAYS: dict[str, dict[str, Any]] = {
    "whole": {"max_length": 1000},
    "windows": {"max_length": 9, "overflow": "windows", "stride": 2},
    "truncated": {"max_length": 7, "overflow": "truncate"},
    "in words": {"max_length": 9, "overflow": "windows", "word_splitter": str.split},
    "after a prompt": {"max_length": 12, "overflow": "truncate", "prompt": "the river: ", "prompt_counts": False},
    "without segments": {"max_length": 9, "overflow": "truncate", "segments": False},
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[TextTokenizer, TextTokenizer]]:
    """BERT's tokenizer twice, in Rust and in Python, of one vocabulary."""
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(SPECIAL + ENGLISH), "utf-8")

    def make(side: str, options: dict[str, Any]) -> tuple[TextTokenizer, TextTokenizer]:
        fast = BertTokenizer(vocab={token: i for i, token in enumerate(SPECIAL + ENGLISH)}, truncation_side=side)
        slow = BertTokenizerLegacy(str(path), truncation_side=side)
        return TextTokenizer(fast, **options), TextTokenizer(slow, **options)

    return make


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=15)
@given(
    texts=st.lists(
        st.lists(st.sampled_from([*ENGLISH[:4], "unbelievable", "don't", "x", "[MASK]"]), max_size=12).map(" ".join)
        | st.lists(st.sampled_from([*ENGLISH[:4], "unbelievable", ""]), max_size=8),
        max_size=4,
    ),
    pair=st.sampled_from([None, "the bank", ["the", "unbelievable"]]),
)
def test_windows_cuts_words_and_prompts_are_those_of_the_same_tokenizer_in_rust(
    way: str, side: str, texts: list[Any], pair: Any, both: Callable[..., tuple[TextTokenizer, TextTokenizer]]
) -> None:
    fast, slow = both(side, WAYS[way])
    texts += [] if pair is None or way == "windows" else [(pair, text) for text in texts if type(text) is type(pair)]
    assert list(map(plain, slow(texts))) == list(map(plain, fast(texts)))
    assert slow.batch(texts).num_tokens == fast.batch(texts).num_tokens


def plain(text: TokenizedText) -> dict[str, Any]:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name in text.__dataclass_fields__
        for value in [getattr(text, name)]
    }


@pytest.mark.parametrize("kind", MODELS)
def test_vectors_are_those_of_the_librarys_own_call(kind: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[kind]
    model = make_model(kind, tokenizer)
    found = Encoder(model, tokenizer)(ROWS)
    if kind != "canine":  # whose vectors depend on the padding
        padded = tokenizer(ROWS, padding=True, return_tensors="pt")
        right = model(**padded).last_hidden_state.detach()
        assert found.padded()[1].tolist() == padded["attention_mask"].bool().tolist()
        assert (found.padded()[0] - right)[found.padded()[1]].abs().max() < 1e-5
    for i, text in enumerate(ROWS):
        alone = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].detach()
        assert (found[i] - alone).abs().max() < 1e-5


def test_japanese_words_come_from_mecab(tmp_path: Path) -> None:
    pytest.importorskip("fugashi")
    pytest.importorskip("ipadic")
    tokenizer = japanese(tmp_path, word_tokenizer_type="mecab", mecab_kwargs={"mecab_dic": "ipadic"})
    tokenizer.save_pretrained(tmp_path / "saved")
    make_model("japanese", tokenizer).save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    encoder = Encoder.from_pretrained(tmp_path / "saved")
    sent: TextTokenizer = pickle.loads(pickle.dumps(encoder.tokenizer))
    [found] = sent(["東京は夜の七時です。"])
    assert (
        found.input_ids.tolist() == tokenizer("東京は夜の七時です。")["input_ids"] == [2, 5, 7, 8, 9, 10, 11, 12, 16, 3]
    )


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    names = []
    for shard in range(2):
        rows = [{"text": " ".join(["tôi", "là"] * (row % 5) + ["the"])} for row in range(12)]
        (tmp_path / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        names.append(str(tmp_path / f"{shard}.jsonl"))
    return names


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_exactly(workers: int, shards: list[str], tokenizers: dict[str, Any]) -> None:
    encoder = Encoder(make_model("phobert", tokenizers["phobert"]), tokenizers["phobert"])
    make = partial(bertstream.stream, shards, encoder, batch_size=4, shuffle=True, num_workers=workers)
    assert_resumes_exactly(make, cuts=[0, 3])


@pytest.mark.parametrize("kind", ["japanese", "bertweet"])
def test_workers_tokenize_as_the_loop_does(kind: str, tokenizers: dict[str, Any]) -> None:
    encoder = Encoder(make_model(kind, tokenizers[kind]), tokenizers[kind])
    collate = TokenCollate(encoder)
    collate(ROWS)  # one that was used before
    loader = DataLoader(ROWS, batch_size=3, collate_fn=collate, num_workers=1)  # type: ignore[arg-type]
    found = [batch.values.numpy() for batch in bertstream.wrap(loader, encoder)]
    right = [encoder(ROWS[:3]).values.numpy(), encoder(ROWS[3:]).values.numpy()]
    assert all(np.allclose(one, other, atol=1e-6) for one, other in zip(found, right, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_spawned_worker_unpickles_tokenizes_the_same(kind: str, ours: dict[str, TextTokenizer]) -> None:
    sent: TextTokenizer = pickle.loads(pickle.dumps(ours[kind]))
    assert list(map(plain, sent(ROWS))) == list(map(plain, ours[kind](ROWS)))


def test_identity_follows_vocabulary_merges_options_and_class_not_the_folder(tmp_path: Path) -> None:
    def identity(name: str, make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        (tmp_path / name).mkdir()
        tokenizer = make(tmp_path / name, *arguments, **options)
        tokenizer.tokenize("the tôi")  # fills caches
        return TextTokenizer(tokenizer, max_length=50).identity

    same = identity("a", phobert)
    assert identity("b", phobert) == same
    others = [
        identity("c", phobert, MERGES[:-1]),
        identity("d", phobert, MERGES, SYLLABLES[::-1]),
        identity("e", KINDS["bertweet"]),
        identity("f", japanese),
        identity("g", japanese, do_lower_case=True),
        identity("h", japanese, subword_tokenizer_type="character"),
        identity("i", japanese, mask_token="[mask]"),
    ]
    assert len({same, *others}) == 8
    phobert(tmp_path / "a").save_pretrained(tmp_path / "saved")
    reloaded = type(phobert(tmp_path / "a")).from_pretrained(tmp_path / "saved")
    assert TextTokenizer(reloaded, max_length=50).identity == same
    assert pickle.loads(pickle.dumps(TextTokenizer(reloaded, max_length=50))).identity == same


def test_the_log_says_once_a_class_that_it_is_slow(
    tokenizers: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python_backend, "_NAMED", set())
    for kind in ("phobert", "phobert", "esm"):
        TextTokenizer(tokenizers[kind], max_length=50)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["PhobertTokenizer", "EsmTokenizer"]
    assert all("num_workers=" in record.getMessage() for record in caplog.records)
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


class Letters(PreTrainedTokenizer):
    """A user's own: one id a letter, from 10."""

    def __init__(self, **options: Any) -> None:
        super().__init__(special_tokens_pattern=options.pop("pattern", "none"), **options)

    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + i): 10 + i for i in range(26)} | self.added_tokens_encoder

    @property
    def vocab_size(self) -> int:
        return len(self.get_vocab())

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        if "!" in text:
            raise RuntimeError("no shouting")
        return list(text.replace(" ", ""))

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.get_vocab().get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(87 + index)


class Shapes(Letters):
    """Gives its model more than ids, as RoCBert's."""

    def __call__(self, *texts: Any, **options: Any) -> Any:
        return super().__call__(*texts, **options) | {"input_shape_ids": [1]}


class Doubled(Letters):
    """Does something else when it is called."""

    def __call__(self, *texts: Any, **options: Any) -> Any:
        return {"input_ids": super().__call__(*texts, **options)["input_ids"] * 2}


def test_a_users_own_class_needs_no_special_tokens() -> None:
    assert TextTokenizer(Letters(), max_length=9)(["ab c"])[0].input_ids.tolist() == [10, 11, 12]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Shapes, "Shapes makes input_shape_ids too: its model takes more than ids"),
        (Doubled, r"Doubled\('a b'\) gives the ids \[10, 11, 10, 11\], its parts give \[10, 11\]"),
        (
            partial(Letters, pattern="bos_eos", bos_token="a"),
            "special tokens .* that it does not have: set its cls_token",
        ),
        (object, r"tokenizer is an object without tokenize\(\): pass a transformers tokenizer, or None"),
        (lambda: str.split, "without tokenize"),
    ],
)
def test_what_cannot_be_followed_is_refused(tokenizer: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextTokenizer(tokenizer(), max_length=9)


def test_a_text_on_which_the_tokenizers_own_code_fails_is_named() -> None:
    tokenizer = TextTokenizer(Letters(), max_length=9)
    with pytest.raises(EncoderError, match="text 2: Letters fails on 'ab!': RuntimeError: no shouting") as caught:
        tokenizer(["ab", ["a"], "ab!"])
    assert caught.value.records == (2,)
    with pytest.raises(
        EncoderError, match="text 1: Letters fails on 'aB': .* no id for its token 'B', and no unk_token"
    ):
        tokenizer(["ab", "aB"])


def test_a_stream_skips_and_counts_such_texts_where_it_may(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": "a!"}\n{"text": "b"}\n', "utf-8")
    encoder = Encoder(make_model("phobert", Letters(pad_token="a")), Letters())
    reading = StreamConfig(max_bad_records=1)
    with bertstream.stream(str(tmp_path / "a.jsonl"), encoder, reading=reading) as loader:
        assert [len(batch["text"]) for batch in loader] == [2]
    with (
        bertstream.stream(str(tmp_path / "a.jsonl"), encoder) as loader,
        pytest.raises(bertstream.ShardError, match=r"a.jsonl, record 1, field 'text': .*Letters fails on 'a!'"),
    ):
        list(loader)


def test_a_vocabulary_of_another_model_is_refused(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    tokenizer = phobert(tmp_path, words=[*SYLLABLES, *map(str, range(40))])
    with pytest.raises(EncoderError, match="the tokenizer's vocabulary has 59 entries, the model's embedding table 20"):
        Encoder(make_model("phobert", tokenizers["phobert"]), tokenizer)
    tokenizer = phobert(tmp_path)
    tokenizer.add_tokens(["new"])
    with pytest.raises(EncoderError, match=r"added tokens \['new'\] have ids up to 20, .* 20 rows: .*resize_token"):
        Encoder(make_model("phobert", tokenizers["phobert"]), tokenizer)


def test_spans_are_refused_in_words(tokenizers: dict[str, Any]) -> None:
    found = Encoder(make_model("phobert", tokenizers["phobert"]), tokenizers["phobert"])(["the"])
    with pytest.raises(ConfigError, match="written in Python does not say which characters a token is"):
        found.spans()
