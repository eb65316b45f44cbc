"""`TokenBatch` keeps texts flat and apart, whatever is joined, picked or filled in."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bertstream import ConfigError, tokens
from bertstream.cursors import Cursor, OpenPiece
from bertstream.embeddings import Embeddings
from bertstream.testing import FakeTokenizer
from bertstream.tokens import (
    Record,
    Text,
    TokenBatch,
    TokenizedText,
    cumulate,
    hash_texts,
    tokenize_batch,
)

LENGTHS = st.lists(st.integers(0, 9), max_size=8)


def text_of(length: int) -> TokenizedText:
    return TokenizedText(np.zeros(length, np.int32))


@st.composite
def any_text(draw: st.DrawFn) -> TokenizedText:
    """A text with or without each array that a text may have, every entry drawn."""
    windows = draw(st.lists(st.integers(1, 3), max_size=3))
    length, words = sum(windows), draw(st.integers(0, 4))

    def array(size: int, kind: type) -> np.ndarray | None:
        drawn = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
        return np.array(drawn, kind) if draw(st.booleans()) else None

    return TokenizedText(
        np.array(draw(st.lists(st.integers(0, 99), min_size=length, max_size=length)), np.int32),
        special=array(length, np.bool_),
        token_type_ids=array(length, np.int32),
        word_ids=array(length, np.int32),
        num_words=words,
        cut_tokens=draw(st.integers(0, 3)),
        words_cut=array(words, np.bool_),
        window_lengths=np.array(windows, np.int32) if length and draw(st.booleans()) else None,
        owned=array(length, np.bool_),
    )


def same(found: TokenBatch, right: TokenBatch) -> bool:
    for field in dataclasses.fields(TokenBatch):
        a, b = getattr(found, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray) and not (a.dtype == b.dtype and np.array_equal(a, b)):
            return False
        if not isinstance(a, np.ndarray) and a != b:
            return False
    return True


@given(st.lists(st.lists(any_text(), max_size=4), min_size=1, max_size=4))
def test_concatenated_batches_equal_one_batch_of_all_texts(groups: list[list[TokenizedText]]) -> None:
    found = TokenBatch.concat([TokenBatch.from_texts(group) for group in groups])
    right = TokenBatch.from_texts([text for group in groups for text in group])
    if any(len(text.input_ids) and text.special is None for group in groups for text in group):
        found.special = right.special  # a batch of texts that do not say makes the whole say nothing
    assert same(found, right)


@given(st.lists(any_text(), min_size=1, max_size=5), st.data())
def test_picked_texts_equal_a_batch_of_these_texts(texts: list[TokenizedText], data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=6))
    whole = TokenBatch.from_texts(texts)
    whole.fields, whole.cursor = {"label": list(range(len(texts)))}, Cursor(0, 0)
    found = whole.pick(np.array(indices, np.int64))
    alone = TokenBatch.from_texts([*texts, *(texts[i] for i in indices)])  # all texts: the same arrays are filled in
    rest = np.arange(len(texts), len(alone))
    assert same(found, alone.pick(rest)) and not found.fields and found.cursor is None
    assert found.lengths.tolist() == [len(texts[i].input_ids) for i in indices]
    ids = [id for i in indices for id in texts[i].input_ids.tolist()]
    assert found.input_ids.tolist() == ids and found.num_words.tolist() == [texts[i].num_words for i in indices]


@given(st.lists(any_text(), min_size=1, max_size=5), st.data())
def test_a_part_is_what_picking_its_texts_gives(texts: list[TokenizedText], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(texts)))
    stop = data.draw(st.integers(start, len(texts)))
    whole = TokenBatch.from_texts(texts)
    assert same(whole.part(start, stop), whole.pick(np.arange(start, stop)))


@given(st.lists(any_text(), min_size=1, max_size=5), st.data())
def test_a_picked_batch_without_idle_arrays_is_the_batch_of_its_texts(
    texts: list[TokenizedText], data: st.DataObject
) -> None:
    names = ("token_type_ids", "word_ids", "words_cut", "window_lengths", "owned")
    indices = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=6))
    found = TokenBatch.from_texts(texts).pick(np.array(indices, np.int64))
    right = TokenBatch.from_texts([texts[i] for i in indices])
    if right.special is None and found.special is not None:
        right.special = np.zeros(right.num_tokens, np.bool_)
    for batch in (found, right):
        arrays = {name: getattr(batch, name) for name in names}
        batch.drop_idle(names)
        for name, array in arrays.items():
            if getattr(batch, name) is None and array is not None and name != "window_lengths":
                assert set(array.tolist()) <= {{"token_type_ids": 0, "word_ids": -1, "owned": True}.get(name, False)}
    assert same(found, right)
    found.drop_idle(())
    assert same(found, right), "only what is named is dropped"


def test_a_tokenizers_own_batch_is_asked_where_it_has_one() -> None:
    class Own(FakeTokenizer):
        def batch(self, texts: Sequence[Text]) -> TokenBatch:
            return TokenBatch.from_texts([text_of(3)] * len(texts))

    assert tokenize_batch(FakeTokenizer(), ["a", "b c"]).lengths.tolist() == [1, 2]
    found = tokenize_batch(Own(), ["a", "b c"])
    assert found.lengths.tolist() == [3, 3] and found.hashes is not None and found.hashes[0] == found.hashes[1]


@given(st.lists(st.lists(any_text(), max_size=3), min_size=1, max_size=3), st.booleans())
def test_joined_batches_keep_their_hashes_if_all_have_them(groups: list[list[TokenizedText]], some: bool) -> None:
    batches = [TokenBatch.from_texts(group) for group in groups]
    for batch in batches[some:]:
        batch.hashes = hash_texts(batch)
    whole = TokenBatch.concat(batches)
    assert whole.hashes is None if some else np.array_equal(whole.hashes, hash_texts(whole))


def test_every_array_declares_its_axis() -> None:
    """Else `pick` and `concat` would leave it out."""
    for kind, others in ((TokenizedText, set()), (TokenBatch, {"cu_seqlens"}), (Embeddings, {"cu_seqlens", "lengths"})):
        arrays = {field.name for field in dataclasses.fields(kind) if "Array" in field.type or "Tensor" in field.type}
        declared = {field.name for field in dataclasses.fields(kind) if "axis" in field.metadata}
        assert declared == arrays - others, kind


def test_names_that_only_embeddings_have_are_listed() -> None:
    def public(kind: type) -> set[str]:
        names = {*dir(kind), *(field.name for field in dataclasses.fields(kind))}
        return {name for name in names if not name.startswith("_")}

    assert public(Embeddings) - public(TokenBatch) - {"tokens"} == tokens._ONLY_EMBEDDINGS_HAVE


def test_tokens_explain_that_the_model_makes_the_vectors() -> None:
    batch = TokenBatch.from_texts([text_of(2)])
    with pytest.raises(AttributeError, match=r"no attribute 'padded': .*BertEmbedding"):
        batch.padded()
    with pytest.raises(AttributeError, match=r"no attribute 'values': .*BertEmbedding"):
        batch.values  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'other'$"):
        batch.other  # noqa: B018
    assert copy.deepcopy(batch).num_tokens == pickle.loads(pickle.dumps(batch)).num_tokens == batch.num_tokens


@given(LENGTHS)
@example([])
def test_cumulate_gives_the_start_of_each_text_and_the_end_of_the_last(lengths: list[int]) -> None:
    cu_seqlens = cumulate(np.array(lengths, np.int64))
    assert cu_seqlens.dtype == np.int32
    assert cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), max_size=6))
def test_a_token_batch_holds_each_texts_ids_one_after_the_other(shapes: list[tuple[int, bool, bool]]) -> None:
    texts = [
        TokenizedText(
            np.arange(length, dtype=np.int32) + 10 * number,
            token_type_ids=np.ones(length, np.int32) if pair else None,
            word_ids=np.arange(length, dtype=np.int32) if words else None,
            num_words=length if words else 0,
            cut_tokens=number,
        )
        for number, (length, pair, words) in enumerate(shapes)
    ]
    batch = TokenBatch.from_texts(texts)
    assert len(batch) == len(texts) and batch.num_tokens == len(batch.input_ids)
    assert batch.lengths.tolist() == [length for length, _, _ in shapes]
    assert (batch.token_type_ids is None) == (not any(pair for _, pair, _ in shapes))
    assert (batch.word_ids is None) == (not any(words for _, _, words in shapes))
    for i, text in enumerate(texts):
        rows = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
        assert batch.input_ids[rows].tolist() == text.input_ids.tolist()
        if batch.token_type_ids is not None:
            assert batch.token_type_ids[rows].tolist() == [int(shapes[i][1])] * shapes[i][0]
        if batch.word_ids is not None:
            assert batch.word_ids[rows].tolist() == (list(range(shapes[i][0])) if shapes[i][2] else [-1] * shapes[i][0])
    assert batch.num_words.tolist() == [text.num_words for text in texts]
    assert batch.cut_tokens.tolist() == list(range(len(texts)))
    arrays = (batch.input_ids, batch.token_type_ids, batch.word_ids, batch.num_words, batch.cut_tokens)
    assert all(array is None or array.dtype == np.int32 for array in arrays)


def test_records_cursors_and_batches_can_be_sent_to_another_process() -> None:
    record = Record("a text", {"label": 1}, "key", "a.tar", 3)
    assert pickle.loads(pickle.dumps(record)) == record
    cursor = Cursor(1, 2, 3, (), 5)
    assert pickle.loads(pickle.dumps(cursor)) == cursor
    opened = Cursor(1, 2, 3, (OpenPiece(0, 7, 512), OpenPiece(4)), 5)
    again = pickle.loads(pickle.dumps(opened))
    assert again == opened and all(type(piece) is OpenPiece for piece in again.open)
    batch = TokenBatch.from_texts([text_of(2), text_of(0)])
    batch.fields, batch.cursor = {"label": np.array([1, 2])}, cursor
    back = pickle.loads(pickle.dumps(batch))
    assert back.cu_seqlens.tolist() == [0, 2, 2] and back.fields["label"].tolist() == [1, 2] and back.cursor == cursor


def test_the_representation_is_one_line() -> None:
    batch = TokenBatch.from_texts([text_of(2), text_of(1)])
    assert repr(batch) == "TokenBatch(2 texts, 3 tokens)"
    batch.fields["label"] = [1, 2]
    assert repr(batch) == "TokenBatch(2 texts, 3 tokens, fields=['label'])"


def test_padded_ids_that_are_no_ids_and_masks_that_are_added_are_refused() -> None:
    ids, mask = torch.tensor([[5, 6, 0]]), torch.tensor([[1.0, 1, 0]])
    assert TokenBatch.from_padded(ids, mask).input_ids.tolist() == [5, 6]
    with pytest.raises(ConfigError, match=r"input_ids are torch.float32, no ids of tokens"):
        TokenBatch.from_padded(ids.float(), mask)
    with pytest.raises(ConfigError, match=r"attention_mask has -1e\+09, .*1 where a token is real and 0 for padding"):
        TokenBatch.from_padded(ids, (1 - mask) * -1e9)


@pytest.mark.parametrize("ids", [[[1, 2]], np.ones((1, 2)), None], ids=lambda value: type(value).__name__)
def test_padded_ids_that_are_no_tensors_are_refused_with_the_way_to_get_them(ids: Any) -> None:
    for given_ids, mask in ((ids, ids), (torch.ones(1, 2), ids), (ids, torch.ones(1, 2))):
        with pytest.raises(
            ConfigError, match=rf"{type(ids).__name__}.*: pass tensors \[B, T\], as return_tensors='pt'"
        ):
            TokenBatch.from_padded(given_ids, mask)
