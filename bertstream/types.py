"""The things that flow: a text as read, texts as tokens, texts as vectors.

Shapes: B texts, T tokens of the longest text, N tokens in all, H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .cuda import to_device
from .errors import ConfigError, ShardError, check_choice, shortened

Text: TypeAlias = str | list[str] | tuple[str, str] | tuple[list[str], list[str]]
"""One text: a string, a list of words, or a pair of either."""

Int32Array: TypeAlias = npt.NDArray[np.int32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
Output: TypeAlias = Literal["tokens", "words", "sentence"]
Layout: TypeAlias = Literal["padded", "nested", "packed_sequence", "flat"]


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
        """What a loop meets that asks for vectors where the encoder is trained, and the model is to compute them."""
        way_out = (
            ": these are tokens, not vectors; a loader hands them out while its encoder is trained, for "
            "bertstream.BertEmbedding(encoder) to embed inside the model"
            if name in Embeddings.__dataclass_fields__ or hasattr(Embeddings, name)
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


@dataclass(eq=False)
class Embeddings:
    """A batch of texts as vectors, without padding.

    It owns its tensors; on CUDA they are safe to use on the stream that was current when the batch was handed out.

    Attributes:
        values: [N, H] one row a token or a word, texts one after the other, or [B, H] one row a text for sentence
            output; [N, K, H] where K layers are stacked.
        cu_seqlens: [B + 1] int32, device of `values`; text i owns rows cu_seqlens[i]:cu_seqlens[i + 1].
        lengths: [B] int64 on the CPU, rows of each text (what `pack_padded_sequence` asks for).
        tokens: the texts as tokens, on the host.
        output: "tokens", "words" or "sentence": what a row stands for.
        word_ids: [N] int32 on the host, the word of each row, -1 where a row stands for none or for a word that was
            cut; None where no text is a list of words.
        present: [N] bool, device of `values`: False for a word without a vector, because it was cut or no token stands
            for it (a blank, say); its row is zeros. None for tokens and sentences, which all have one.
        layers: which layers of the model the rows were made of, counted from 0; empty where that is not known.
    """

    values: Tensor
    cu_seqlens: Tensor
    lengths: Tensor
    tokens: TokenBatch
    output: Output
    word_ids: Int32Array | None = None
    present: Tensor | None = None
    layers: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        """The rows of one text: [L, H], or [H] for sentence output; a view of `values`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"text {index} of a batch of {len(self)}")
        if self.output == "sentence":
            return self.values[index]
        end = int(self.lengths.cumsum(0)[index])
        return self.values[end - int(self.lengths[index]) : end]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.values if self.output == "sentence" else self.values.split(self.lengths.tolist()))

    def __repr__(self) -> str:
        kind = f"{self.values.dtype}, {self.values.device}".replace("torch.", "")
        return f"Embeddings({len(self)} texts, {self.output} {list(self.values.shape)}, {kind})"

    @property
    def vectors(self) -> Tensor:
        """[B, H], one vector a text; only for sentence output."""
        if self.output != "sentence":
            raise ConfigError(
                f"these are {self.output} vectors, several a text: ask the encoder for output='sentence', or use "
                ".padded(), .nested() or .packed_sequence()"
            )
        return self.values

    def padded(self) -> tuple[Tensor, Tensor]:
        """Every text filled up with zeros to the longest.

        Returns:
            [B, T, H] in the dtype of `values`, and the mask [B, T] bool, True where a text has a row.
        """
        self._refuse_sentence("padded")
        device, total, sizes = self.values.device, len(self.values), self.values.shape[1:]
        longest = int(self.lengths.max()) if len(self) else 0
        lengths = self.cu_seqlens.diff()
        # Device arithmetic alone, so that the CPU never waits for the vectors.
        texts = torch.arange(len(self), device=device).repeat_interleave(lengths, output_size=total)
        rows = torch.arange(total, device=device) - self.cu_seqlens[texts] + texts * longest
        flat = self.values.new_zeros(len(self) * longest, *sizes).index_copy_(0, rows, self.values)
        return flat.view(len(self), longest, *sizes), torch.arange(longest, device=device) < lengths[:, None]

    def padded_present(self) -> Tensor:
        """[B, T] bool beside `padded()`: True where a row stands for a vector, False for a word without one, too."""
        present = torch.ones_like(self.values[:, 0], dtype=torch.bool) if self.present is None else self.present
        return dataclasses.replace(self, values=present).padded()[0]

    def nested(self) -> Tensor:
        """A jagged nested tensor [B, j, H] over the same memory."""
        self._refuse_sentence("nested")
        if not len(self):
            raise ConfigError("an empty batch has no nested form")
        return torch.nested.nested_tensor_from_jagged(
            self.values,
            self.cu_seqlens.to(torch.int64),
            min_seqlen=int(self.lengths.min()),
            max_seqlen=int(self.lengths.max()),
        )

    def packed_sequence(self) -> PackedSequence:
        """What `nn.LSTM` and `nn.GRU` take, built without padding and without `enforce_sorted` worries.

        Raises:
            ConfigError: a text has no row at all (PackedSequence has no such texts).
        """
        self._refuse_sentence("packed_sequence")
        empty = torch.nonzero(self.lengths == 0).flatten().tolist()
        if empty or not len(self):
            raise ConfigError(f"a PackedSequence cannot hold texts without a row: texts {empty} of {len(self)}")
        lengths = self.lengths.numpy()
        order = np.argsort(-lengths, kind="stable")
        ranks = np.argsort(order)
        steps = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        # Step by step, and within a step the longest text first.
        gather = np.lexsort((np.repeat(ranks, lengths), steps))
        device = self.values.device
        return PackedSequence(
            self.values.index_select(0, to_device(gather, device)),
            torch.from_numpy(np.bincount(steps)),
            to_device(order, device),
            to_device(ranks, device),
        )

    def as_layout(self, layout: Layout) -> Any:
        """Plain tensors: (values, mask), a nested tensor, a PackedSequence, or (values, cu_seqlens); sentence output is
        one [B, H] in every layout."""
        check_choice("layout", layout, Layout)
        if self.output == "sentence":
            return self.values
        if layout == "flat":
            return self.values, self.cu_seqlens
        return getattr(self, layout)()

    def align(self, tags: Sequence[Sequence[float] | Tensor], pad: float = -100) -> Tensor:
        """Lay one number a word out as the vectors are.

        Word output: each word's row gets its number. Token output: a word gives its number to its first token; the
        others and the special tokens get `pad` (what `F.cross_entropy` ignores), as does the padding. Numbers of words
        that truncation cut are dropped, and in token output those of words without any token (a blank, say) too.

        Args:
            tags: for each text, one number a word of the text as it was given.
            pad: what rows without a number get.
        Returns:
            [B, T] on the device of `values`: int64 where all numbers, `pad` included, are whole, float32 otherwise.
        Raises:
            ConfigError: the texts were not lists of words, or a text has another count of words than of tags.
        """
        self._refuse_sentence("align")
        word_ids = self.word_ids
        if word_ids is None:
            raise ConfigError("align needs texts that are lists of words; these were plain strings")
        if len(tags) != len(self):
            raise ConfigError(f"{len(tags)} rows of tags for {len(self)} texts")
        rows_of_tags = [_numbers(row, text) for text, row in enumerate(tags)]
        counts = np.fromiter(map(len, rows_of_tags), np.int64, len(self))
        wrong = np.flatnonzero(counts != self.tokens.num_words)
        if len(wrong):
            i = int(wrong[0])
            fields = self.tokens.fields
            stood = f" (record {fields['__index__'][i]} of {fields['__shard__'][i]})" if "__shard__" in fields else ""
            padded = (counts >= self.tokens.num_words).all() and len(set(counts.tolist())) == 1 < len(counts)
            way_out = ": padded tags? Give those of each text alone" if padded else ""
            words = self.tokens.num_words[i]
            raise ConfigError(f"text {i} of the batch{stood} has {words} words but {counts[i]} tags{way_out}")
        # An empty list has no dtype to say: as float32 it would turn the other texts' integers into floats.
        flat = torch.cat([row for row in rows_of_tags if len(row)] or [torch.zeros(0, dtype=torch.int64)])
        whole = not flat.is_floating_point() and float(pad).is_integer()
        flat = flat.to(torch.int64 if whole else torch.float32)
        lengths = self.lengths.numpy()
        texts = np.repeat(np.arange(len(self)), lengths)
        word_of_row = np.where(word_ids < 0, -1, word_ids + (np.cumsum(counts) - counts)[texts])
        first = word_of_row != np.concatenate([[-1], word_of_row[:-1]])
        rows = np.flatnonzero(first & (word_of_row >= 0))
        out = flat.new_full((len(self), lengths.max(initial=0)), pad)
        steps = rows - (np.cumsum(lengths) - lengths)[texts[rows]]
        out[torch.from_numpy(texts[rows]), torch.from_numpy(steps)] = flat[torch.from_numpy(word_of_row[rows])]
        return to_device(out, self.values.device)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Embeddings:
        """The same batch with its tensors on another device; `lengths` stay on the CPU."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Embeddings:
        """The same batch in page-locked host memory."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Embeddings:
        present = None if self.present is None else move(self.present)
        return dataclasses.replace(self, values=move(self.values), cu_seqlens=move(self.cu_seqlens), present=present)

    def _refuse_sentence(self, name: str) -> None:
        if self.output == "sentence":
            raise ConfigError(f"sentence output is one vector a text: use .vectors, not .{name}()")


def _numbers(row: Any, text: int) -> Tensor:
    try:
        numbers = torch.as_tensor(row, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        numbers = None
    if numbers is None or numbers.dim() != 1:
        raise ConfigError(f"tags of text {text} are {shortened(row)}: give a list of numbers, one a word")
    return numbers


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


class SupportsEncode(Protocol):
    """What a loader asks of an encoder; tests and users may bring their own."""

    @property
    def tokenizer(self) -> SupportsTokenize: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def max_forward_tokens(self) -> int: ...

    def encode(self, batch: TokenBatch) -> Embeddings: ...


class SupportsCache(SupportsEncode, Protocol):
    """What a cache asks of an encoder beyond that: to say what its vectors depend on, and to do without encoding."""

    @property
    def row_shape(self) -> tuple[int, ...]: ...

    @property
    def output_dtype(self) -> torch.dtype: ...

    def fingerprint(self) -> bytes | None: ...

    def row_counts(self, batch: TokenBatch) -> Int32Array: ...

    def assemble(self, values: Tensor, batch: TokenBatch) -> Embeddings: ...
