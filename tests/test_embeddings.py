"""`Embeddings` gives the same rows in every layout, and lays per-word numbers out like the rows."""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
import pickle
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import host_must_not_wait
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from bertstream.embeddings import Embeddings, Layout
from bertstream.errors import ConfigError
from bertstream.tokens import TokenBatch, TokenizedText

H = 3
LENGTHS = st.lists(st.integers(0, 9), max_size=8)
FULL_LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)
LAYOUTS: tuple[Layout, ...] = ("padded", "nested", "packed_sequence", "flat")


def text_of(length: int) -> TokenizedText:
    return TokenizedText(np.zeros(length, np.int32))


def embeddings_of(texts: Sequence[TokenizedText], values: Tensor | None = None) -> Embeddings:
    """Token output for these texts; by default every number in it is another one."""
    tokens = TokenBatch.from_texts(texts)
    if values is None:
        values = torch.arange(1.0, tokens.num_tokens * H + 1).view(-1, H)
    lengths = torch.from_numpy(tokens.lengths.astype(np.int64))
    return Embeddings(values, torch.from_numpy(tokens.cu_seqlens), lengths, tokens, "tokens", tokens.word_ids)


def tokens_of(lengths: Sequence[int], values: Tensor | None = None) -> Embeddings:
    return embeddings_of([text_of(length) for length in lengths], values)


def sentences_of(values: Tensor) -> Embeddings:
    count = len(values)
    cu_seqlens, lengths = torch.arange(count + 1, dtype=torch.int32), torch.ones(count, dtype=torch.int64)
    return Embeddings(values, cu_seqlens, lengths, TokenBatch.from_texts([text_of(4)] * count), "sentence")


def rows_of(embeddings: Embeddings) -> list[Tensor]:
    """The rows text by text, by the definition of cu_seqlens."""
    bounds = embeddings.cu_seqlens.tolist()
    return [embeddings.values[start:end] for start, end in pairwise(bounds)]


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# Forms of one batch.


@given(LENGTHS)
@example([])
@example([0, 0])
def test_padded_holds_each_texts_rows_and_zeros_after_them(lengths: list[int]) -> None:
    embeddings = tokens_of(lengths)
    values, mask = embeddings.padded()
    assert values.shape == (len(lengths), max(lengths, default=0), H)
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == lengths
    assert same([row[real] for row, real in zip(values, mask, strict=True)], rows_of(embeddings))
    assert same([row[:length] for row, length in zip(values, lengths, strict=True)], rows_of(embeddings))
    assert not values[~mask].any()


@given(LENGTHS)
@example([])
@example([0, 2])
def test_the_key_padding_mask_is_the_opposite_of_the_mask_of_padded(lengths: list[int]) -> None:
    embeddings = tokens_of(lengths)
    found = embeddings.key_padding_mask()
    assert found.dtype == torch.bool and torch.equal(found, ~embeddings.padded()[1])


def test_attention_with_the_key_padding_mask_ignores_the_padding() -> None:
    torch.manual_seed(0)
    embeddings = tokens_of([2, 4], torch.randn(6, 4))
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    x, _ = embeddings.padded()
    found, _ = attention(x, x, x, key_padding_mask=embeddings.key_padding_mask())
    alone = embeddings[0][None]
    torch.testing.assert_close(found[:1, :2], attention(alone, alone, alone)[0])


@given(LENGTHS.filter(len))
@example([0])
def test_nested_holds_each_texts_rows_in_the_same_memory(lengths: list[int]) -> None:
    embeddings = tokens_of(lengths)
    nested = embeddings.nested()
    assert same(nested.unbind(), rows_of(embeddings))
    assert nested.values().data_ptr() == embeddings.values.data_ptr()
    assert torch.equal(torch.nested.to_padded_tensor(nested, 0.0), embeddings.padded()[0])


@given(FULL_LENGTHS)
def test_packed_sequence_unpacks_to_each_texts_rows(lengths: list[int]) -> None:
    embeddings = tokens_of(lengths)
    values, found = pad_packed_sequence(embeddings.packed_sequence(), batch_first=True)
    assert found.tolist() == lengths
    assert torch.equal(values, embeddings.padded()[0])


@given(FULL_LENGTHS)
def test_packed_sequence_gives_an_lstm_what_torchs_own_packing_gives_it(lengths: list[int]) -> None:
    torch.manual_seed(0)
    embeddings = tokens_of(lengths, torch.randn(sum(lengths), H))
    lstm = nn.LSTM(H, 4, bidirectional=True, batch_first=True)
    theirs = pack_padded_sequence(embeddings.padded()[0], embeddings.lengths, batch_first=True, enforce_sorted=False)
    packed = embeddings.packed_sequence()
    assert packed.batch_sizes.device.type == "cpu" and torch.equal(packed.batch_sizes, theirs.batch_sizes)
    (output, (state, _)), (right, (right_state, _)) = lstm(packed), lstm(theirs)
    torch.testing.assert_close(pad_packed_sequence(output)[0], pad_packed_sequence(right)[0])
    torch.testing.assert_close(state, right_state)


@pytest.mark.parametrize("shape", [(H,), (2, H), (2, 3, H)], ids=str)
@given(lengths=LENGTHS)
@example(lengths=[])
def test_the_mask_of_present_rows_has_one_entry_a_place_whatever_a_row_is(
    shape: tuple[int, ...], lengths: list[int]
) -> None:
    embeddings = tokens_of(lengths, torch.ones(sum(lengths), *shape))
    _, mask = embeddings.padded()
    assert embeddings.padded_present().dtype == torch.bool and torch.equal(embeddings.padded_present(), mask)
    present = torch.arange(sum(lengths)) % 2 == 0
    missing = dataclasses.replace(embeddings, present=present)
    assert missing.padded_present().shape == mask.shape and torch.equal(missing.padded_present()[mask], present)


@given(LENGTHS)
@example([])
def test_iterating_and_indexing_give_each_texts_rows_as_views(lengths: list[int]) -> None:
    embeddings = tokens_of(lengths)
    wanted = rows_of(embeddings)
    assert len(embeddings) == len(lengths)
    iterated = list(embeddings)
    indexed = [embeddings[i] for i in range(len(lengths))]
    from_the_end = [embeddings[i - len(lengths)] for i in range(len(lengths))]
    assert all(same(found, wanted) for found in (iterated, indexed, from_the_end))
    embeddings.values.zero_()
    assert not any(row.any() for row in (*iterated, *indexed, *from_the_end))
    for index in (len(lengths), -len(lengths) - 1):
        with pytest.raises(IndexError, match=f"text {index} of a batch of {len(lengths)}"):
            embeddings[index]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_layout_keeps_the_dtype(dtype: torch.dtype) -> None:
    embeddings = tokens_of([2, 1], torch.randn(3, H).to(dtype))
    assert embeddings.padded()[0].dtype == dtype
    assert embeddings.nested().dtype == dtype
    assert embeddings.packed_sequence().data.dtype == dtype


def test_pad_ids_and_zero_vectors_are_no_padding() -> None:
    """Trap 11: a pad id may equal another token's, so lengths come from cu_seqlens only."""
    embeddings = tokens_of([3, 1], torch.zeros(4, H))  # every id is 0, BERT's [PAD]
    assert embeddings.padded()[1].tolist() == [[True, True, True], [True, False, False]]


@given(LENGTHS, st.sampled_from(["padded", "nested", "packed_sequence"]))
def test_gradients_flow_back_to_the_rows_they_came_from(lengths: list[int], layout: str) -> None:
    assume(layout == "padded" or (lengths and (layout == "nested" or min(lengths))))
    values = torch.randn(sum(lengths), H, requires_grad=True)
    embeddings = tokens_of(lengths, values)
    weights = torch.randn(sum(lengths), H)
    out, weights_out = (getattr(tokens_of(lengths, rows), layout)() for rows in (embeddings.values, weights))
    flat, flat_weights = {
        "padded": lambda: (out[0], weights_out[0]),
        "nested": lambda: (out.values(), weights_out.values()),
        "packed_sequence": lambda: (out.data, weights_out.data),
    }[layout]()
    (flat * flat_weights).sum().backward()
    assert values.grad is not None and torch.equal(values.grad, weights)


@pytest.mark.parametrize("lengths", [[2, 0, 1, 0], [0]])
def test_a_packed_sequence_refuses_texts_without_a_row_and_names_them(lengths: list[int]) -> None:
    """Trap 18."""
    empty = [i for i, length in enumerate(lengths) if not length]
    with pytest.raises(ConfigError, match=rf"texts \[{', '.join(map(str, empty))}\] of {len(lengths)}"):
        tokens_of(lengths).packed_sequence()


@pytest.mark.parametrize("form", ["nested", "packed_sequence"])
def test_an_empty_batch_is_refused_by_layouts_that_torch_cannot_express(form: str) -> None:
    with pytest.raises(ConfigError):
        getattr(tokens_of([]), form)()


# Layouts by name, and sentence output.


def test_a_layout_by_name_is_the_method_of_that_name() -> None:
    embeddings = tokens_of([2, 1])
    assert same(embeddings.as_layout("padded"), embeddings.padded())
    assert same(embeddings.as_layout("nested").unbind(), embeddings.nested().unbind())
    assert torch.equal(embeddings.as_layout("packed_sequence").data, embeddings.packed_sequence().data)
    assert embeddings.as_layout("flat") == (embeddings.values, embeddings.cu_seqlens)


@pytest.mark.parametrize("output", ["tokens", "sentence"])
def test_an_unknown_layout_is_refused_with_the_known_ones(output: str) -> None:
    embeddings = tokens_of([1]) if output == "tokens" else sentences_of(torch.ones(1, H))
    with pytest.raises(ConfigError, match="layout='align': write one of 'padded', 'nested', 'packed_sequence', 'flat'"):
        embeddings.as_layout("align")  # type: ignore[arg-type]


def test_sentence_output_is_one_vector_a_text_in_every_layout() -> None:
    values = torch.randn(4, H)
    embeddings = sentences_of(values)
    assert embeddings.vectors is values
    assert all(embeddings.as_layout(layout) is values for layout in LAYOUTS)
    assert len(embeddings) == 4 and same(list(embeddings), list(values))
    assert torch.equal(embeddings[-1], values[3])
    assert list(sentences_of(torch.zeros(0, H))) == []


@pytest.mark.parametrize(
    "form",
    [
        Embeddings.padded,
        Embeddings.padded_present,
        Embeddings.key_padding_mask,
        Embeddings.nested,
        Embeddings.packed_sequence,
        lambda e: e.align([[1]]),
    ],
)
def test_sentence_output_refuses_forms_of_several_rows(form: Callable[[Embeddings], Any]) -> None:
    with pytest.raises(ConfigError, match="use .vectors"):
        form(sentences_of(torch.ones(1, H)))


def test_token_output_has_no_vectors() -> None:
    with pytest.raises(ConfigError, match="output='sentence'"):
        _ = tokens_of([2]).vectors


# Numbers a word.


@st.composite
def texts_of_words(draw: st.DrawFn) -> TokenizedText:
    """Words of no, one or several tokens between two special tokens, perhaps cut by truncation."""
    tokens_per_word = draw(st.lists(st.integers(0, 3), max_size=6))
    content = [word for word, count in enumerate(tokens_per_word) for _ in range(count)]
    kept = draw(st.integers(0, len(content)))
    special = draw(st.booleans())
    word_ids = [-1] * special + content[:kept] + [-1] * special
    return TokenizedText(
        np.zeros(len(word_ids), np.int32),
        word_ids=np.array(word_ids, np.int32),
        num_words=len(tokens_per_word),
        cut_tokens=len(content) - kept,
    )


@st.composite
def word_batches(draw: st.DrawFn) -> list[TokenizedText]:
    """At least one text is a list of words; the others may be plain strings."""
    texts = [
        draw(texts_of_words()),
        *draw(st.lists(st.one_of(texts_of_words(), st.builds(text_of, st.integers(0, 4))))),
    ]
    return draw(st.permutations(texts))


def aligned_by_a_loop(texts: Sequence[TokenizedText], tags: Sequence[Sequence[float]], pad: float) -> list[list[float]]:
    longest = max(len(text.input_ids) for text in texts)
    out = []
    for text, row in zip(texts, tags, strict=True):
        line, seen = [], set()
        for word in [] if text.word_ids is None else text.word_ids.tolist():
            line.append(pad if word < 0 or word in seen else row[word])
            seen.add(word)
        out.append(line + [pad] * (longest - len(line)))
    return out


@given(word_batches(), st.data())
def test_align_equals_a_loop_over_tokens(texts: list[TokenizedText], data: st.DataObject) -> None:
    number: st.SearchStrategy[float] = data.draw(
        st.sampled_from([st.integers(-5, 5), st.floats(-5, 5, width=32), st.booleans()])
    )
    tags = [data.draw(st.lists(number, min_size=text.num_words, max_size=text.num_words)) for text in texts]
    pad = data.draw(st.sampled_from([-100, 0, -1.0, 0.5]))
    embeddings = embeddings_of(texts)
    found = embeddings.align(tags, pad=pad)
    assert found.shape == embeddings.padded()[1].shape
    assert found.tolist() == aligned_by_a_loop(texts, tags, pad)
    flat = [tag for row in tags for tag in row]
    whole = not any(isinstance(tag, float) for tag in flat) and float(pad).is_integer()
    assert found.dtype == (torch.int64 if whole else torch.float32)


def two_texts() -> Embeddings:
    """[CLS] un ##like ##ly [SEP] of a two-word text whose second word was cut, and an empty list of words."""
    first = TokenizedText(np.zeros(5, np.int32), word_ids=np.array([-1, 0, 0, 0, -1], np.int32), num_words=2)
    second = TokenizedText(np.zeros(2, np.int32), word_ids=np.array([-1, -1], np.int32), num_words=0)
    return embeddings_of([first, second])


@pytest.mark.parametrize(
    ("tags", "dtype"),
    [
        ([[7, 8], []], torch.int64),
        ([[True, False], []], torch.int64),
        ([[7.5, 8], []], torch.float32),
        ([torch.tensor([7, 8], dtype=torch.int16), torch.tensor([])], torch.int64),
        ([np.array([7, 8], np.float64), np.array([])], torch.float32),
    ],
)
def test_a_text_without_words_does_not_change_the_dtype(tags: list[Any], dtype: torch.dtype) -> None:
    aligned = two_texts().align(tags)
    assert aligned.dtype == dtype
    assert aligned.tolist() == [[-100, float(tags[0][0]), -100, -100, -100], [-100] * 5]


def test_what_align_fills_with_is_ignored_by_cross_entropy() -> None:
    """Trap 15: labels of words that were cut are dropped, and shapes stay equal."""
    embeddings = two_texts()
    logits = embeddings.padded()[0]
    loss = F.cross_entropy(logits.flatten(0, 1), embeddings.align([[2, 1], []]).flatten())
    torch.testing.assert_close(loss, F.cross_entropy(logits[0, 1:2], torch.tensor([2])))


def test_a_pad_that_is_no_whole_number_is_not_rounded() -> None:
    assert math.isnan(two_texts().align([[7, 8], []], pad=math.nan)[1, 0])


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([[1, 2]], "1 rows of tags for 2 texts"),
        ([[1, 2], [3]], "text 1 of the batch has 0 words but 1 tags"),
        ([[1], []], "text 0 of the batch has 2 words but 1 tags"),
        ([[1, 2, -100], [-100] * 3], "text 0 of the batch has 2 words but 3 tags: padded tags"),
        ([["B", "O"], []], r"tags of text 0 are \['B', 'O'\]: give a list of numbers, one a word"),
        ([[1, 2], None], "tags of text 1 are None"),
        ([5, 6], "tags of text 0 are 5"),
        (torch.tensor([5, 6]), r"tags of text 0 are tensor\(5\)"),
        ([[[1], [2]], []], "tags of text 0 are"),
        ([["x" * 1000, "O"], []], r"tags of text 0 are \['x{55}\.\.\.: give"),
    ],
)
def test_align_refuses_what_it_cannot_lay_out_and_names_the_text(tags: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        two_texts().align(tags)


def test_align_names_the_record_of_a_text_that_a_stream_read() -> None:
    embeddings = two_texts()
    embeddings.tokens.fields.update(__shard__=["a.jsonl", "b.jsonl"], __index__=np.array([7, 8]))
    with pytest.raises(ConfigError, match=r"^text 1 of the batch \(record 8 of b.jsonl\) has 0 words but 1 tags"):
        embeddings.align([[1, 2], [3]])


def test_align_refuses_plain_strings() -> None:
    with pytest.raises(ConfigError, match="plain strings"):
        tokens_of([2]).align([[1, 2]])


# Rows of some texts, other devices and processes.


def test_to_moves_the_tensors_and_leaves_the_lengths_on_the_cpu() -> None:
    embeddings = tokens_of([2, 1])
    moved = embeddings.to("meta")
    assert (moved.values.device.type, moved.cu_seqlens.device.type, moved.lengths.device.type) == (
        "meta",
        "meta",
        "cpu",
    )
    assert moved.tokens is embeddings.tokens and moved.output == "tokens"
    assert embeddings.values.device.type == "cpu"
    assert embeddings.to("cpu").values is embeddings.values


@pytest.mark.cuda
def test_pin_memory_is_what_a_dataloader_pins() -> None:
    embeddings = tokens_of([2, 1])
    for pinned in (embeddings.pin_memory(), next(iter(DataLoader([embeddings], batch_size=None, pin_memory=True)))):
        assert pinned.values.is_pinned() and pinned.cu_seqlens.is_pinned()
        assert torch.equal(pinned.values, embeddings.values)


@pytest.mark.cuda
def test_no_form_makes_the_cpu_wait_for_the_device() -> None:
    def forms(embeddings: Embeddings) -> list[Tensor]:
        values, mask = embeddings.padded()
        packed = embeddings.packed_sequence()
        aligned, ignored = embeddings.align([[7, 8], []]), embeddings.key_padding_mask()
        return [values, mask, packed.data, embeddings.nested().values(), aligned, ignored]

    here = two_texts()
    there = here.to("cuda")
    with host_must_not_wait():
        found = forms(there)
    assert all(tensor.is_cuda for tensor in found)
    assert same([tensor.cpu() for tensor in found], forms(here))


@given(word_batches(), st.data())
def test_picked_texts_keep_their_rows(texts: list[TokenizedText], data: st.DataObject) -> None:
    embeddings = embeddings_of(texts)
    embeddings.present = torch.arange(len(embeddings.values)) % 2 == 0
    indices = np.array(data.draw(st.lists(st.integers(0, len(texts) - 1))), np.int64)
    tokens = embeddings.tokens.pick(indices)
    found = embeddings.pick(indices, tokens)
    assert found.tokens is tokens and found.lengths.tolist() == embeddings.lengths[indices].tolist()
    assert found.cu_seqlens.dtype == torch.int32
    assert same(list(found), [embeddings[i] for i in indices.tolist()])
    rows = [np.arange(*embeddings.cu_seqlens[i : i + 2].tolist()) for i in indices.tolist()]
    flat = np.concatenate([np.zeros(0, np.int64), *rows])
    assert embeddings.word_ids is not None and found.present is not None
    np.testing.assert_array_equal(found.word_ids, embeddings.word_ids[flat])
    assert found.present.tolist() == embeddings.present[flat].tolist()
    assert embeddings.pick(indices, tokens_of(found.lengths.tolist()).tokens).word_ids is None


def test_embeddings_can_be_sent_to_another_process() -> None:
    embeddings = tokens_of([2, 1])
    assert torch.equal(pickle.loads(pickle.dumps(embeddings)).values, embeddings.values)


def test_the_representation_is_one_line() -> None:
    embeddings = tokens_of([2, 1], torch.zeros(3, H, dtype=torch.bfloat16))
    assert repr(embeddings) == "Embeddings(2 texts, tokens [3, 3], bfloat16, cpu)"


@given(st.lists(texts_of_words(), min_size=1, max_size=6), st.data())
def test_a_run_of_texts_is_picked_as_by_its_indices(texts: list[TokenizedText], data: st.DataObject) -> None:
    start, end = sorted(data.draw(st.tuples(st.integers(0, len(texts)), st.integers(0, len(texts)))))
    whole = embeddings_of(texts)
    tokens = TokenBatch.from_texts(texts[start:end])
    found, right = whole.pick(slice(start, end), tokens), whole.pick(np.arange(start, end), tokens)
    assert torch.equal(found.values, right.values) and found.tokens is tokens
    assert torch.equal(found.cu_seqlens, right.cu_seqlens) and torch.equal(found.lengths, right.lengths)
    assert np.array_equal(found.word_ids, right.word_ids)  # type: ignore[arg-type]
    found.values.fill_(7.5)
    assert not (whole.values == 7.5).any(), "a copy"


def test_lists_without_a_word_align_to_no_tag() -> None:
    assert tokens_of([2]).align([[]]).tolist() == [[-100, -100]]


# Some of the texts, and several batches as one.


@st.composite
def mixed_batches(draw: st.DrawFn) -> Embeddings:
    """Texts of words or of none, with a label each, and a word without a vector here and there."""
    embeddings = embeddings_of(draw(st.lists(st.one_of(texts_of_words(), st.builds(text_of, st.integers(0, 4))))))
    count = len(embeddings)
    embeddings.tokens.fields = {"label": np.arange(count), "name": [f"text {i}" for i in range(count)]}
    embeddings.tokens.texts = [f"text {i}" for i in range(count)]
    embeddings.present = torch.arange(len(embeddings.values)) % 3 > 0 if draw(st.booleans()) else None
    return embeddings


def assert_same(found: Embeddings, right: Embeddings) -> None:
    for name in ("values", "cu_seqlens", "lengths"):
        assert torch.equal(getattr(found, name), getattr(right, name)), name
    assert found.present is None if right.present is None else torch.equal(found.present, right.present)  # type: ignore[arg-type]
    # A batch of strings alone has no word ids; picked from a larger one, they are all -1.
    words = [np.full(len(e.values), -1) if e.word_ids is None else e.word_ids for e in (found, right)]
    assert np.array_equal(*words)
    assert found.tokens.input_ids.tolist() == right.tokens.input_ids.tolist()
    assert found.tokens.fields["label"].tolist() == right.tokens.fields["label"].tolist()
    assert found.tokens.fields["name"] == right.tokens.fields["name"] == found.tokens.texts == right.tokens.texts


SLICES = st.builds(slice, *[st.none() | st.integers(-7, 7)] * 2, st.none() | st.integers(-3, 3).filter(bool))


@given(mixed_batches(), SLICES, st.data())
@example(tokens_of([]), slice(None), None)
def test_texts_are_chosen_as_from_a_list(embeddings: Embeddings, texts: slice, data: st.DataObject | None) -> None:
    if data is None:
        assert len(embeddings[texts]) == len(embeddings[[]]) == 0
        return
    numbers = list(range(len(embeddings)))[texts]
    found = embeddings[texts]
    assert same(list(found), [embeddings[i] for i in numbers])
    assert found.tokens.texts == [f"text {i}" for i in numbers] == found.tokens.fields["name"]
    assert found.tokens.fields["label"].tolist() == numbers
    assert found.lengths.tolist() == [len(embeddings[i]) for i in numbers]
    mask = np.isin(np.arange(len(embeddings)), numbers)
    for way in (numbers, np.array(numbers, np.int64), torch.tensor(numbers, dtype=torch.int64)):
        assert_same(embeddings[way], found)
    assert_same(embeddings[mask], embeddings[sorted(numbers)])
    if len(mask):
        assert_same(embeddings[mask.tolist()], embeddings[mask])


@given(mixed_batches(), st.data())
@example(tokens_of([]), None)
def test_parts_of_a_batch_make_up_the_whole(embeddings: Embeddings, data: st.DataObject | None) -> None:
    cuts = [] if data is None else sorted(data.draw(st.lists(st.integers(0, len(embeddings)), max_size=4)))
    sizes = np.diff([0, *cuts, len(embeddings)])
    parts = embeddings.split(sizes.tolist())
    assert list(map(len, parts)) == sizes.tolist()
    if data is None:
        assert len(Embeddings.concat(parts)) == 0 and embeddings.split(3) == []
        return
    whole = Embeddings.concat(parts)
    assert_same(whole, embeddings)
    for part, start in zip(parts, np.cumsum(sizes) - sizes, strict=True):
        assert_same(part, embeddings[start : start + len(part)])
        assert_same(part, whole[start : start + len(part)])


@given(mixed_batches(), st.integers(1, 5))
def test_split_by_one_size_cuts_as_torch_does(embeddings: Embeddings, size: int) -> None:
    right = torch.arange(len(embeddings)).split(size) if len(embeddings) else []
    found = embeddings.split(size)
    assert [part.tokens.fields["label"].tolist() for part in found] == [part.tolist() for part in right]


def test_gradients_flow_through_slices_and_concat() -> None:
    values = torch.randn(6, H, requires_grad=True)
    parts = tokens_of([1, 2, 3], values)
    Embeddings.concat([parts[2:], parts[:1], parts[2:]]).values.sum().backward()
    assert values.grad is not None and values.grad[:, 0].tolist() == [1, 0, 0, 2, 2, 2]


def test_sentences_are_sliced_and_joined_too() -> None:
    whole = sentences_of(torch.randn(5, H))
    assert torch.equal(whole[1:4].vectors, whole.values[1:4])
    assert torch.equal(Embeddings.concat(whole.split([4, 1])).vectors, whole.values)


@pytest.mark.parametrize("index", [(0, 1), "a", 1.0, None, [[0]]], ids=repr)
def test_an_index_that_is_none_is_refused(index: Any) -> None:
    with pytest.raises(TypeError, match=r"embeddings\[.*\]: write the index of a text, a slice such as \[0:2\]"):
        tokens_of([1, 2])[index]


@pytest.mark.parametrize("index", [[0, 2], np.array([True]), [0.5]], ids=repr)
def test_a_list_that_does_not_fit_the_batch_is_refused(index: Any) -> None:
    with pytest.raises(IndexError):
        tokens_of([1, 2])[index]


@pytest.mark.parametrize("sizes", [[1, 2], [3, -1], [1], []], ids=repr)
def test_sizes_that_do_not_sum_to_the_batch_are_named(sizes: list[int]) -> None:
    with pytest.raises(
        ConfigError, match=rf"split\(sizes={re.escape(repr(sizes))}\) of 2 texts: .* sum to {sum(sizes)}"
    ):
        tokens_of([1, 2]).split(sizes)
    with pytest.raises(ConfigError, match="sizes=0"):
        tokens_of([1, 2]).split(0)


def test_batches_that_are_not_alike_are_not_joined() -> None:
    a, wide, half = tokens_of([1]), tokens_of([1], torch.zeros(1, 4)), tokens_of([1], torch.zeros(1, H).half())
    for other in (wide, half, sentences_of(torch.zeros(1, H)), dataclasses.replace(a, layers=(2,))):
        with pytest.raises(ConfigError, match=r"part 0 has .*'tokens'.*, part 2 has "):
            Embeddings.concat([a, a, other])
    with pytest.raises(ConfigError, match="there are none"):
        Embeddings.concat([])
    b = dataclasses.replace(tokens_of([1]))
    a.tokens.fields, b.tokens.fields = {"label": np.ones(1), "x": [1]}, {"x": [2], "y": [0]}
    assert Embeddings.concat([a, b]).tokens.fields == {"x": [1, 2]}


@pytest.mark.parametrize(
    "run", [torch.nn.Linear(2, 1), torch.stack, lambda e: torch.nn.functional.mse_loss(torch.ones(2), e)]
)
def test_a_layer_or_loss_that_is_given_embeddings_names_the_tensors_in_them(run: Callable[[Any], Any]) -> None:
    embeddings = tokens_of([1, 2])
    with pytest.raises(TypeError, match=r"takes tensors, and was given Embeddings: pass \.padded\(\)"):
        run(embeddings)


@pytest.mark.parametrize("name", ["shape", "numpy", "cpu", "mean"])
def test_an_attribute_of_tensors_that_embeddings_lack_names_the_tensors_in_them(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"no attribute '{name}': it is no tensor; \.vectors .* \.padded\(\)"):
        getattr(tokens_of([2, 3]), name)


def test_any_other_attribute_that_embeddings_lack_is_named_as_python_does() -> None:
    with pytest.raises(AttributeError, match=r"^'Embeddings' object has no attribute 'vector'$"):
        operator.attrgetter("vector")(tokens_of([2, 3]))


def test_embeddings_are_copied_with_all_that_they_have() -> None:
    assert torch.equal(copy.deepcopy(tokens_of([2, 3])).values, tokens_of([2, 3]).values)
