"""The things that flow: a text as read, texts as tokens, texts as vectors.

Shapes: B texts, T tokens of the longest text, N tokens in all, H hidden size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .errors import ConfigError, ShardError

Text: TypeAlias = str | list[str] | tuple[str, str] | tuple[list[str], list[str]]
"""One text: a string, a list of words, or a pair of either."""

Int32Array: TypeAlias = npt.NDArray[np.int32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
Indices: TypeAlias = npt.NDArray[np.int64]


@dataclass(slots=True)
class Record:
    """One text as it was read, with its place.

    Attributes:
        text: the text, a list of words, or a pair of texts.
        fields: the record's other fields, by name, untouched.
        key: a name that is unique in its shard.
        shard: the path or URL of the shard.
        index: position in the shard, counted from 0, broken records included.
        offset: byte of the shard at which the record begins; 0 where reading cannot begin anew there.
    """

    text: Text
    fields: dict[str, Any]
    key: str
    shard: str
    index: int
    offset: int = 0


@dataclass(slots=True)
class TokenizedText:
    """The token ids of one text, special tokens included.

    A text that is longer than the model takes may come as several windows, one after the other, which overlap.

    Attributes:
        input_ids: [L] int32.
        special: [L] bool, the special tokens that frame a text; None for none.
        token_type_ids: [L] int32, the segment of each token in a pair of texts; None for a single text.
        word_ids: [L] int32, the word each token belongs to, -1 for special tokens; None unless the text was a list of
            words. Words of a pair are counted through both.
        num_words: how many words the text had, those that were cut included; 0 unless it was a list of words.
        cut_tokens: how many tokens truncation dropped.
        words_cut: [num_words] bool, the words that truncation left without a token; None where none was cut.
        window_lengths: [W] int32, the tokens of each window; None for a single one.
        owned: [L] bool, the tokens whose vectors are used, each of the text's tokens in one window; None for all.
    """

    input_ids: Int32Array
    special: BoolArray | None = None
    token_type_ids: Int32Array | None = None
    word_ids: Int32Array | None = None
    num_words: int = 0
    cut_tokens: int = 0
    words_cut: BoolArray | None = None
    window_lengths: Int32Array | None = None
    owned: BoolArray | None = None


class OpenPiece(NamedTuple):
    """How far a lane has read one of its pieces.

    Attributes:
        piece: which of the lane's pieces.
        records: how many of its records were read, broken ones included.
        offset: byte of the shard at which the last of these begins; 0 where reading cannot begin anew there.
    """

    piece: int
    records: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Cursor:
    """A lane's place: what it yields next is a pure function of this and of the stream's settings.

    Attributes:
        epoch: counted from 0.
        lane: which lane of the stream.
        next_piece: the first of the lane's pieces (a shard, or a part of one) that was not begun before the window.
        open: the pieces that were being read where the window starts, the next one to be read first.
        batch: how many of the window's batches were handed out.
    """

    epoch: int
    lane: int
    next_piece: int = 0
    open: tuple[OpenPiece, ...] = ()
    batch: int = 0


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What the reading of a window met; the window's first batch carries it.

    Attributes:
        read: records that were read, broken ones included.
        bad: the broken records that were passed over, and the broken shards whose rest was.
    """

    read: int
    bad: tuple[ShardError, ...] = ()


_ONLY_EMBEDDINGS_HAVE = frozenset(
    (
        "values",
        "vectors",
        "output",
        "present",
        "layers",
        "padded",
        "padded_present",
        "nested",
        "packed_sequence",
        "as_layout",
        "align",
        "to",
        "pin_memory",
    )
)
"""Public names of `Embeddings` that `TokenBatch` lacks; a test compares."""


@dataclass(eq=False)
class TokenBatch:
    """A batch of texts as tokens, without padding, on the host.

    Attributes:
        input_ids: [N] int32, the texts one after the other.
        cu_seqlens: [B + 1] int32; text i owns tokens cu_seqlens[i]:cu_seqlens[i + 1].
        special: [N] bool, the special tokens that frame texts; None where there are none.
        token_type_ids: [N] int32 segment ids, or None where every text is a single one.
        word_ids: [N] int32, the word of each token, -1 for none; None where no text is a list of words.
        num_words: [B] int32, words of each text, those that were cut included.
        cut_tokens: [B] int32, tokens of each text that truncation dropped.
        words_cut: [sum of num_words] bool, the words that truncation left without a token; None where none was cut.
        window_lengths: [W] int32, tokens of each window of each text, W >= B; None where every text is one window.
        owned: [N] bool, the tokens whose vectors are used, where windows overlap; None for all.
        fields: the records' other fields by name, one entry a text: an array [B] of numbers, or a list.
        cursor: the stream's place after this batch; None for a batch that no stream made.
        report: what the reading of the batch's window met, on the first batch of a window.
    """

    input_ids: Int32Array
    cu_seqlens: Int32Array
    special: BoolArray | None
    token_type_ids: Int32Array | None
    word_ids: Int32Array | None
    num_words: Int32Array
    cut_tokens: Int32Array
    words_cut: BoolArray | None = None
    window_lengths: Int32Array | None = None
    owned: BoolArray | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    cursor: Cursor | None = None
    report: ReadReport | None = None

    def __getattr__(self, name: str) -> NoReturn:
        """Explain why vectors are missing: a trained encoder's loader yields tokens, and the model computes them."""
        way_out = (
            ": these are tokens, not vectors; a loader hands them out while its encoder is trained, for "
            "bertstream.BertEmbedding(encoder) to embed inside the model"
            if name in _ONLY_EMBEDDINGS_HAVE
            else ""
        )
        raise AttributeError(f"a TokenBatch has no attribute {name!r}{way_out}")

    @classmethod
    def from_texts(cls, texts: Sequence[TokenizedText]) -> TokenBatch:
        """Lay texts out one after the other; what a text lacks and others have is filled in."""
        lengths = np.fromiter((len(text.input_ids) for text in texts), np.int32, len(texts))
        num_words = np.fromiter([text.num_words for text in texts], np.int32, len(texts))

        def lay_out(name: str, absent: Any, sizes: Int32Array = lengths) -> Any:
            parts = list(map(attrgetter(name), texts))
            lacking = [part is None for part in parts]
            if all(lacking):
                return None
            if any(lacking):
                parts = [np.full(n, absent) if part is None else part for part, n in zip(parts, sizes, strict=True)]
            return np.concatenate(parts)

        windows = None
        if any(text.window_lengths is not None for text in texts):
            windows = np.concatenate(
                [
                    lengths[i : i + 1] if text.window_lengths is None else text.window_lengths
                    for i, text in enumerate(texts)
                ]
            )
        return cls(
            input_ids=np.concatenate([text.input_ids for text in texts]) if texts else np.zeros(0, np.int32),
            cu_seqlens=cumulate(lengths),
            special=lay_out("special", False),
            token_type_ids=lay_out("token_type_ids", np.int32(0)),
            word_ids=lay_out("word_ids", np.int32(-1)),
            window_lengths=windows,
            owned=lay_out("owned", True),
            num_words=num_words,
            cut_tokens=np.fromiter([text.cut_tokens for text in texts], np.int32, len(texts)),
            words_cut=lay_out("words_cut", False, num_words),
        )

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def __repr__(self) -> str:
        fields = f", fields={list(self.fields)}" if self.fields else ""
        return f"TokenBatch({len(self)} texts, {self.num_tokens} tokens{fields})"

    @property
    def num_tokens(self) -> int:
        """Tokens in all, special tokens included."""
        return len(self.input_ids)

    @classmethod
    def from_padded(cls, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> TokenBatch:
        """Data that is tokenized already, padded on either side.

        Args:
            input_ids: [B, T] integers.
            attention_mask: [B, T], other than 0 where a token is real.
            token_type_ids: [B, T] segment ids, or None.
        Raises:
            ConfigError: the shapes differ.
        """
        real = attention_mask != 0
        shapes = [list(part.shape) for part in (input_ids, attention_mask, token_type_ids) if part is not None]
        if input_ids.dim() != 2 or any(shape != shapes[0] for shape in shapes):
            raise ConfigError(f"padded ids, their mask and their segment ids are one [B, T]; these are {shapes}")
        nothing = np.zeros(len(input_ids), np.int32)
        return cls(
            input_ids=input_ids[real].cpu().numpy().astype(np.int32),
            cu_seqlens=cumulate(real.sum(1).cpu().numpy()),
            special=None,
            token_type_ids=None if token_type_ids is None else token_type_ids[real].cpu().numpy().astype(np.int32),
            word_ids=None,
            num_words=nothing,
            cut_tokens=nothing,
        )

    def picked(self, texts: npt.NDArray[np.integer[Any]]) -> TokenBatch:
        """These of its texts, by their places, without fields and cursor."""
        tokens = rows_of(texts, self.cu_seqlens)
        words = None if self.words_cut is None else rows_of(texts, cumulate(self.num_words))
        windows = None
        if self.window_lengths is not None:
            counts = np.bincount(self._window_texts(), minlength=len(self))
            windows = self.window_lengths[rows_of(texts, cumulate(counts))]

        def pick(array: Any, places: Any) -> Any:
            return None if array is None else array[places]

        return TokenBatch(
            input_ids=self.input_ids[tokens],
            cu_seqlens=cumulate(self.lengths[texts]),
            special=pick(self.special, tokens),
            token_type_ids=pick(self.token_type_ids, tokens),
            word_ids=pick(self.word_ids, tokens),
            num_words=self.num_words[texts],
            cut_tokens=self.cut_tokens[texts],
            words_cut=pick(self.words_cut, words),
            window_lengths=windows,
            owned=pick(self.owned, tokens),
        )

    def _window_texts(self) -> npt.NDArray[Any]:
        """[W] the text of each window; an empty text is one empty window."""
        assert self.window_lengths is not None
        starts = np.cumsum(self.window_lengths) - self.window_lengths
        texts = np.searchsorted(self.cu_seqlens, starts, "right") - 1
        texts[self.window_lengths == 0] = np.flatnonzero(self.lengths == 0)
        return texts

    @property
    def cut_words(self) -> Int32Array:
        """[B] int32, how many words of each text truncation left without a token."""
        if self.words_cut is None:
            return np.zeros(len(self), np.int32)
        return np.diff(cumulate(self.words_cut)[cumulate(self.num_words)])

    @property
    def lengths(self) -> Int32Array:
        """[B] int32, tokens of each text."""
        return np.diff(self.cu_seqlens)


def cumulate(lengths: npt.NDArray[Any]) -> Int32Array:
    """[B + 1] int32: where each text begins, and after the last one where it ends."""
    cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    return cu_seqlens


def rows_of(texts: npt.NDArray[Any], cu_seqlens: Int32Array) -> npt.NDArray[Any]:
    """Where the rows of these texts lie, text by text, if text i owns rows cu_seqlens[i]:cu_seqlens[i + 1]."""
    lengths = np.diff(cu_seqlens)[texts]
    rows: npt.NDArray[Any] = steps(lengths) + np.repeat(cu_seqlens[:-1][texts], lengths)
    return rows


def steps(lengths: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """0, 1, 2, ... within each text, the texts one after the other."""
    counted: npt.NDArray[Any] = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return counted


class SupportsTokenize(Protocol):
    """What a stream asks of a tokenizer: light, and safe to send to worker processes."""

    def __call__(self, texts: Sequence[Text]) -> list[TokenizedText]: ...


def join(batches: Sequence[TokenBatch]) -> TokenBatch:
    """The batches one after the other, without fields and cursors; what one lacks and others have is filled in.

    But for the special tokens: where one batch does not say which they are, it is not known of the whole.
    """
    texts = [len(batch) for batch in batches]
    tokens = [batch.num_tokens for batch in batches]
    words = [int(batch.num_words.sum()) for batch in batches]

    def lay_out(name: str, absent: Any, sizes: Sequence[int]) -> Any:
        parts = [getattr(batch, name) for batch in batches]
        if all(part is None for part in parts):
            return None
        return np.concatenate(
            [np.full(n, absent) if part is None else part for part, n in zip(parts, sizes, strict=True)]
        )

    unknown = any(batch.special is None and batch.num_tokens for batch in batches)
    windows = None
    if any(batch.window_lengths is not None for batch in batches):
        windows = np.concatenate([b.lengths if b.window_lengths is None else b.window_lengths for b in batches])
    return TokenBatch(
        input_ids=lay_out("input_ids", np.int32(0), tokens),
        cu_seqlens=cumulate(np.concatenate([batch.lengths for batch in batches])),
        special=None if unknown else lay_out("special", False, tokens),
        token_type_ids=lay_out("token_type_ids", np.int32(0), tokens),
        word_ids=lay_out("word_ids", np.int32(-1), tokens),
        num_words=lay_out("num_words", np.int32(0), texts),
        cut_tokens=lay_out("cut_tokens", np.int32(0), texts),
        words_cut=lay_out("words_cut", False, words),
        window_lengths=windows,
        owned=lay_out("owned", True, tokens),
    )


def distinct(texts: Sequence[Hashable]) -> tuple[Indices, Indices]:
    """Where each distinct text comes first, and which of these each text is."""
    slots: dict[Hashable, int] = {}
    slot_of_text = np.fromiter((slots.setdefault(text, len(slots)) for text in texts), np.int64, len(texts))
    return np.unique(slot_of_text, return_index=True)[1], slot_of_text


def text_bytes(batch: TokenBatch) -> list[bytes]:
    """All that enters the model for each text, as bytes: the same for the same text, in whatever batch it comes.

    That is its token ids, segment ids, words, special tokens and windows; what is not said is said as its default.
    """
    starts = batch.cu_seqlens[:-1] + np.arange(len(batch))  # one row more before each text
    rows = np.zeros((batch.num_tokens + len(batch), 4), np.int32)
    tokens = np.ones(len(rows), np.bool_)
    tokens[starts] = False
    flags = np.zeros(batch.num_tokens, np.int32)
    if batch.special is not None:
        flags += batch.special
    if batch.owned is not None:
        flags += 2 * ~batch.owned
    if batch.window_lengths is not None:
        windows = np.cumsum(batch.window_lengths) - batch.window_lengths
        flags[windows[batch.window_lengths > 0]] += 4
        # A text in one window is the same text where no other has several.
        flags[batch.cu_seqlens[:-1][batch.lengths > 0]] &= ~4
    rows[tokens, 0] = batch.input_ids
    if batch.token_type_ids is not None:
        rows[tokens, 1] = batch.token_type_ids
    rows[tokens, 2] = -1 if batch.word_ids is None else batch.word_ids
    rows[tokens, 3] = flags
    rows[starts, 0] = batch.num_words
    data = rows.tobytes()
    bounds = (16 * np.append(starts, len(rows))).tolist()
    return [data[start:end] for start, end in pairwise(bounds)]
