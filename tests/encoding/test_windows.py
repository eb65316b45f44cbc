"""Windows over long texts: every token has one vector, from the window in which its word is farthest from an edge.

Token i of a numbered text has the id i, and a pair's second text counts on from `SECOND`: what a window holds is read
off its ids.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from bertstream import ConfigError, Encoder, EncoderError
from bertstream.encoding.tokenizer import TextTokenizer
from bertstream.tokens import Text, TokenizedText

SECOND, CLS, SEP = 1000, 2000, 2001


def numbered() -> Any:
    """A tokenizer of numbers, which cuts the word "3.4.5" into three tokens."""
    vocabulary = {str(i): i for i in range(CLS)} | {"[CLS]": CLS, "[SEP]": SEP}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[SEP]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(".", "removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return SimpleNamespace(backend_tokenizer=tokenizer)


NUMBERED = numbered()


def tokenize(text: Text, max_length: int, stride: int) -> TokenizedText:
    return TextTokenizer(NUMBERED, max_length=max_length, overflow="windows", stride=stride)([text])[0]


def spelled(sizes: list[int], start: int = 0) -> list[str]:
    """Words of these many tokens each."""
    ends = np.cumsum([start, *sizes])
    return [".".join(map(str, range(a, b))) for a, b in pairwise(ends.tolist())]


class Window(NamedTuple):
    ids: list[int]
    owned: list[bool]


def windows_of(text: TokenizedText) -> list[Window]:
    if text.window_lengths is None:
        return [Window(text.input_ids.tolist(), [True] * len(text.input_ids))]
    assert text.owned is not None and text.window_lengths.sum() == len(text.input_ids)
    cuts = np.cumsum(text.window_lengths)[:-1]
    parts = zip(np.split(text.input_ids, cuts), np.split(text.owned, cuts), strict=True)
    return [Window(ids.tolist(), owned.tolist()) for ids, owned in parts]


@dataclass
class Case:
    """A text, or a pair whose second text slides, and the windows it is put into."""

    first: list[str] | None
    sizes: list[int]
    in_words: bool
    max_length: int
    stride: int

    @property
    def start(self) -> int:
        return 0 if self.first is None else SECOND

    @property
    def text(self) -> Text:
        words = spelled(self.sizes, self.start)
        if self.first is None:
            return words if self.in_words else " ".join(words)
        return (self.first, words) if self.in_words else (" ".join(self.first), " ".join(words))

    @property
    def before(self) -> list[int]:
        """The ids before the sliding tokens of every window."""
        return [CLS] if self.first is None else [CLS, *range(sum(word.count(".") + 1 for word in self.first)), SEP]

    @property
    def content(self) -> range:
        """The sliding tokens."""
        return range(self.start, self.start + sum(self.sizes))

    @property
    def units(self) -> list[range]:
        """The sliding tokens that are owned together: a word's in a list of words, else each by itself."""
        ends = np.cumsum([self.start, *self.sizes]).tolist() if self.in_words else [*self.content, self.content.stop]
        return [range(a, b) for a, b in pairwise(ends)]

    def windows(self) -> list[Window]:
        return windows_of(tokenize(self.text, self.max_length, self.stride))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    first = spelled(draw(st.lists(st.integers(1, 3), max_size=3))) if draw(st.booleans()) else None
    case = Case(first, draw(st.lists(st.integers(1, 6), min_size=1, max_size=40)), draw(st.booleans()), 0, 0)
    room = draw(st.integers(2, 20))
    case.max_length = len(case.before) + room + 1
    # Of a single text too the stride must be one that a pair of texts, with its third special token, could have.
    case.stride = draw(st.integers(0, room - (2 if first is None else 1)))
    return case


@given(case=cases())
def test_windows_cover_the_text_and_overlap_by_the_stride(case: Case) -> None:
    before = len(case.before)
    windows = case.windows()
    spans = [range(w.ids[before], w.ids[-2] + 1) for w in windows]
    for window, span in zip(windows, spans, strict=True):
        assert window.ids == [*case.before, *span, SEP]
        assert len(window.ids) <= case.max_length
        assert len(window.ids) == case.max_length or len(windows) == 1
    assert spans[0].start == case.content.start and spans[-1].stop == case.content.stop
    assert all(a.start < b.start and len({*a} & {*b}) >= case.stride for a, b in pairwise(spans))
    assert (len(windows) == 1) == (before + len(case.content) + 1 <= case.max_length)


@given(case=cases())
def test_every_token_is_owned_once_and_in_order(case: Case) -> None:
    owned = [id for window in case.windows() for id, mine in zip(window.ids, window.owned, strict=True) if mine]
    assert owned == [*case.before, *case.content, SEP]


@given(case=cases())
def test_special_tokens_belong_to_the_first_and_last_window(case: Case) -> None:
    windows, before = case.windows(), len(case.before)
    assert [all(window.owned[:before]) for window in windows] == [True] + [False] * (len(windows) - 1)
    assert [any(window.owned[:before]) for window in windows] == [True] + [False] * (len(windows) - 1)
    assert [window.owned[-1] for window in windows] == [False] * (len(windows) - 1) + [True]


@given(case=cases())
def test_a_word_is_owned_by_the_window_in_which_it_is_farthest_from_an_edge(case: Case) -> None:
    before, content = len(case.before), case.content
    windows = case.windows()
    spans = [range(window.ids[before], window.ids[-2] + 1) for window in windows]
    owner = {
        id: number
        for number, window in enumerate(windows)
        for id, mine in zip(window.ids, window.owned, strict=True)
        if mine and id in content
    }

    def distance(unit: range, span: range) -> float:
        """Tokens between the unit and the nearest edge beyond which the text continues; negative if cut there."""
        left = np.inf if span.start == content.start else unit.start - span.start
        right = np.inf if span.stop == content.stop else span.stop - unit.stop
        return min(left, right)

    for word in case.units:
        held = any(span.start <= word.start and word.stop <= span.stop for span in spans)
        for unit in [word] if held else [range(id, id + 1) for id in word]:
            distances = [distance(unit, span) for span in spans]
            # Of windows that are as good it is the earliest, as `index` finds it.
            assert {owner[id] for id in unit} == {distances.index(max(distances))}


def test_a_long_word_that_no_window_holds_is_pieced_together() -> None:
    text = tokenize(["0.1.2.3.4.5.6.7.8.9"], 8, 2)
    assert [[*w.ids] for w in windows_of(text)] == [[CLS, *range(6), SEP], [CLS, *range(4, 10), SEP]]
    assert [sum(w.owned) for w in windows_of(text)] == [1 + 5, 5 + 1]


def prompted(words: Text, prompt: str) -> TokenizedText:
    return TextTokenizer(NUMBERED, max_length=7, overflow="windows", stride=2, prompt=prompt)([words])[0]


@pytest.mark.parametrize("prompt", ["7 ", "7 8 9 ", "7.8 9 ", "1 2 3 4 5 6 7 8 9 "])
def test_a_prompt_before_a_list_of_words_is_windowed_with_it_word_by_word(prompt: str) -> None:
    words = spelled([1, 3, 1, 2, 1, 1, 2, 1], start=20)
    tokens = [*prompt.replace(".", " ").split(), *".".join(words).split(".")]
    windows = windows_of(prompted(words, prompt))
    owned = [[i for i, mine in zip(*window, strict=True) if mine] for window in windows]
    assert len(windows) > 2 and [i for mine in owned for i in mine] == [CLS, *map(int, tokens), SEP]


@given(case=cases(), more=st.integers(0, 3))
def test_a_text_that_fits_is_tokenized_as_without_windows(case: Case, more: int) -> None:
    longest = len(case.before) + len(case.content) + 1 + more
    assume(longest > case.stride + 3)
    found = tokenize(case.text, longest, case.stride)
    right = TextTokenizer(NUMBERED, max_length=longest)([case.text])[0]
    assert found.window_lengths is None and found.owned is None
    for name in ("input_ids", "special", "token_type_ids", "word_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(right, name))


@given(case=cases())
def test_words_and_segments_go_with_their_tokens(case: Case) -> None:
    found = tokenize(case.text, case.max_length, case.stride)
    whole = TextTokenizer(NUMBERED, max_length=10_000)([case.text])[0]
    assert found.num_words == whole.num_words and found.cut_tokens == 0
    mine = np.ones(len(found.input_ids), bool) if found.owned is None else found.owned
    for name in ("input_ids", "special", "token_type_ids", "word_ids"):
        parts = getattr(found, name), getattr(whole, name)
        if parts[1] is None:
            assert parts[0] is None
        else:
            np.testing.assert_array_equal(parts[0][mine], parts[1])


@pytest.mark.parametrize("stride", [9, 400])
def test_a_stride_that_is_not_below_the_room_is_refused(stride: int) -> None:
    with pytest.raises(ConfigError, match=f"stride={stride}: windows of 12 tokens overlap by 0 to 8"):
        TextTokenizer(NUMBERED, max_length=12, overflow="windows", stride=stride)
    TextTokenizer(NUMBERED, max_length=12, overflow="windows", stride=8)
    with pytest.raises(ConfigError, match="stride=-1: write a whole number of at least 0"):
        TextTokenizer(NUMBERED, max_length=12, overflow="windows", stride=-1)


def test_windows_without_room_for_a_token_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_length=3: .* no window has room"):
        TextTokenizer(NUMBERED, max_length=3, overflow="windows")
    TextTokenizer(NUMBERED, max_length=3, overflow="truncate")


@pytest.mark.parametrize("first", [range(6), range(40)])
def test_a_pair_whose_first_text_leaves_no_room_is_refused(first: range) -> None:
    tokenizer = TextTokenizer(NUMBERED, max_length=12, overflow="windows", stride=3)
    pair = (" ".join(map(str, first)), "1000 1001 1002 1003 1004 1005")
    message = f"text 1: .* room for {max(0, 9 - len(first))} tokens.*stride=3: shorten the first text"
    with pytest.raises(EncoderError, match=message) as caught:
        tokenizer(["0 1 2", pair])
    assert caught.value.records == (1,)


LONG = "In the spring the unbelievable river banks, electroencephalographically speaking, sprang up. "
LONG_TEXTS: list[Text] = [LONG * 9, "short", (LONG * 9).split(), (LONG, LONG * 4), (LONG.split(), (LONG * 4).split())]


@pytest.fixture(scope="module")
def windowed(minilm: Encoder, minilm_folder: str) -> Callable[..., Encoder]:
    """All-MiniLM-L6-v2, or another model, over windows of 64 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    options = {"overflow": "windows", "max_length": 64, "stride": 16}
    return lambda model=minilm.model, **more: Encoder(model, tokenizer, **options | more)


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).eval()


def test_each_window_is_encoded_as_a_text_of_its_own(windowed: Callable[..., Encoder], minilm_folder: str) -> None:
    plain = AutoModel.from_pretrained(minilm_folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = windowed()
    for text, found in zip(LONG_TEXTS, tokens(LONG_TEXTS), strict=True):
        windows = windows_of(tokens.tokenizer([text])[0])
        assert len(windows) > 1 or text == "short"
        inputs = {"input_ids": torch.tensor([window.ids for window in windows])}  # all of one length: nothing is padded
        if isinstance(text, tuple):
            seps = (inputs["input_ids"] == 102).long()
            inputs["token_type_ids"] = seps.cumsum(1) - seps
        with torch.no_grad():
            right = plain(**inputs).last_hidden_state
        owned = torch.tensor([window.owned for window in windows])
        torch.testing.assert_close(found, right[owned], atol=1e-5, rtol=0)


def test_words_and_sentences_are_pooled_over_all_windows(windowed: Callable[..., Encoder]) -> None:
    windowed = functools.partial(windowed, tiny_bert())
    tokens = windowed()(LONG_TEXTS)
    sentences = windowed(output="sentence", pooling=("mean", "max", "cls"))(LONG_TEXTS).vectors
    right = torch.stack([torch.cat([rows.double().mean(0), rows.amax(0), rows[0]]) for rows in tokens])
    torch.testing.assert_close(sentences.double(), right, atol=1e-6, rtol=0)
    bare = windowed(special_tokens=False)(LONG_TEXTS)
    sentences = windowed(output="sentence", special_tokens=False)(LONG_TEXTS).vectors
    right = torch.stack([rows.double().mean(0) for rows in bare])
    torch.testing.assert_close(sentences.double(), right, atol=1e-6, rtol=0)
    lists = LONG_TEXTS[2::2]
    words, tokens = windowed(output="words")(lists), windowed()(lists)
    assert words.present is not None and words.present.all() and tokens.word_ids is not None
    word_ids = np.split(tokens.word_ids, tokens.lengths.cumsum(0)[:-1].tolist())
    for found, rows, ids in zip(words, tokens, word_ids, strict=True):
        right = torch.stack([rows[torch.from_numpy(ids == number)].mean(0) for number in range(len(found))])
        torch.testing.assert_close(found, right, atol=1e-6, rtol=0)


def test_texts_that_fit_have_the_same_vectors_bit_for_bit(
    windowed: Callable[..., Encoder], sentences: list[str]
) -> None:
    short: list[Text] = [*sorted(sentences, key=len)[:20], ["a", "list"], ("a", "pair")]
    whole = windowed(overflow="error", stride=0)
    assert torch.equal(windowed()(short).values, whole(short).values)


def test_windows_over_a_megabyte_take_seconds(windowed: Callable[..., Encoder]) -> None:
    encoder = windowed(tiny_bert(), output="words", max_length=512, stride=128)
    text = LONG * (2**20 // len(LONG) + 1)
    started = time.perf_counter()
    found = encoder([text, "short"])
    # It takes two or three on two cores; what it must not do is to grow with the square of the text.
    assert time.perf_counter() - started < 60
    assert found.lengths.tolist() == [len(text.split()), 1]
    assert found.present is not None and found.present.all()
