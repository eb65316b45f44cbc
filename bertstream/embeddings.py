"""Texts as vectors, their layouts, and the protocols of an encoder.

Shapes: B texts, T tokens of the longest text, N rows in all, H hidden size.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, overload, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .columns import axis, concatenated, picked
from .errors import ConfigError, check_at_least, check_choice, shortened
from .system.cuda import to_device
from .tokens import Indices, Int32Array, SupportsTokenize, TokenBatch, cumulate, rows_of, steps
from .word_tags import align_tags

Output: TypeAlias = Literal["tokens", "words", "sentence"]
Layout: TypeAlias = Literal["padded", "nested", "packed_sequence", "flat"]


class SupportsSpans(Protocol):
    """What finds the characters of rows: it pickles, and is asked only when a user asks."""

    def spans(self, rows: Embeddings) -> Indices: ...

    def strings(self, rows: Embeddings) -> list[str]: ...


@dataclass(eq=False)
class Embeddings:
    """A batch of texts as vectors, without padding.

    `embeddings[i]` is the rows of one text; `embeddings[0:2]`, `split` and `concat` give `Embeddings`. It owns its
    tensors; on CUDA they are safe to use on the stream that was current when the loop received the batch.

    Attributes:
        values: [N, H] one row a token or a word, texts one after the other, or [B, H] one row a text for sentence
            output; [N, K, H] where K layers are stacked.
        cu_seqlens: [B + 1] int32, device of `values`; text i owns rows cu_seqlens[i]:cu_seqlens[i + 1].
        lengths: [B] int64 on the CPU, rows of each text (what `pack_padded_sequence` takes).
        tokens: the texts as tokens, on the host.
        output: "tokens", "words" or "sentence": what a row is of.
        word_ids: [N] int32 on the host, the word of each row, -1 for a row of no word or of a word that was cut; None
            if no text is a list of words.
        present: [N] bool, device of `values`: False for a word without a vector, because it was cut or has no
            token (such as " "); its row is zeros. None for tokens and sentences, which all have one.
        layers: the layers of the model that the rows were made of, counted from 0; empty if not known.
        finder: finds the characters of the rows, for `spans`; None if no tokenizer is known.
    """

    values: Tensor = field(metadata=axis("rows"))
    cu_seqlens: Tensor
    lengths: Tensor
    tokens: TokenBatch
    output: Output
    word_ids: Int32Array | None = field(default=None, metadata=axis("host rows", np.int32(-1)))
    present: Tensor | None = field(default=None, metadata=axis("rows", True))
    layers: tuple[int, ...] = ()
    finder: SupportsSpans | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice | list[int] | list[bool] | npt.NDArray[Any] | Tensor) -> Embeddings: ...

    def __getitem__(self, index: Any) -> Tensor | Embeddings:
        """The rows of one text: [L, H], or [H] for sentence output; a view of `values`.

        For a slice, or a list or array on the host of indices or of B booleans: `Embeddings` of these texts, a copy.
        """
        if isinstance(index, slice) or (isinstance(index, (list, np.ndarray, Tensor)) and np.ndim(index) == 1):
            return self._chosen(index)
        try:
            index = operator.index(index)
        except TypeError as error:
            raise TypeError(
                f"embeddings[{shortened(index)}]: write the index of a text, a slice such as [0:2], or a list or array"
            ) from error
        if not -len(self) <= index < len(self):
            raise IndexError(f"text {index} of a batch of {len(self)}")
        if self.output == "sentence":
            return self.values[index]
        end = int(self.lengths.cumsum(0)[index])
        return self.values[end - int(self.lengths[index]) : end]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.values if self.output == "sentence" else self.values.split(self.lengths.tolist()))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """TypeError that names the tensors in here: torch's own says that it wants one, not where one is."""
        name = getattr(function, "__name__", str(function))
        raise TypeError(
            f"torch's {name}() takes tensors, and was given Embeddings: pass .padded(), which is (vectors, mask), "
            ".packed_sequence(), .nested(), or .vectors of sentence output; layout= makes a loader yield tensors"
        )

    if not TYPE_CHECKING:  # for a type checker an unknown name stays an error

        def __getattr__(self, name: str) -> Any:
            """AttributeError that says where the tensors are, to those who take this for one."""
            where = ": it is no tensor; .vectors of sentence output is, and .padded() is two, (vectors, mask)"
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}{where if hasattr(Tensor, name) else ''}"
            )

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
        """Each text padded with zeros to the longest.

        Returns:
            [B, T, H] in the dtype of `values`, and the mask [B, T] bool, True where a text has a row. torch's attention
            layers take the opposite mask: `key_padding_mask`.
        """
        self._refuse_sentence("padded")
        device, total, sizes = self.values.device, len(self.values), self.values.shape[1:]
        longest = int(self.lengths.max()) if len(self) else 0
        lengths = self.cu_seqlens.diff()
        # Device arithmetic only: the CPU never waits for the vectors.
        texts = torch.arange(len(self), device=device).repeat_interleave(lengths, output_size=total)
        rows = torch.arange(total, device=device) - self.cu_seqlens[texts] + texts * longest
        flat = self.values.new_zeros(len(self) * longest, *sizes).index_copy_(0, rows, self.values)
        return flat.view(len(self), longest, *sizes), torch.arange(longest, device=device) < lengths[:, None]

    def key_padding_mask(self) -> Tensor:
        """[B, T] bool, True where attention must ignore a place of `padded()`: torch's meaning of a mask.

        For `nn.MultiheadAttention(..., key_padding_mask=)` and `nn.TransformerEncoder(..., src_key_padding_mask=)`. It
        is the opposite of the mask of `padded()`. A text without any row is True throughout, and attention gives NaN
        for it.
        """
        self._refuse_sentence("key_padding_mask")
        longest = int(self.lengths.max()) if len(self) else 0
        return torch.arange(longest, device=self.values.device) >= self.cu_seqlens.diff()[:, None]

    def padded_present(self) -> Tensor:
        """[B, T] bool beside `padded()`: True where a row has a vector; False for padding and words without one."""
        self._refuse_sentence("padded_present")
        present = self.present
        if present is None:
            present = torch.ones(len(self.values), dtype=torch.bool, device=self.values.device)
        return dataclasses.replace(self, values=present).padded()[0]

    def nested(self) -> Tensor:
        """A jagged nested tensor [B, j, H] over the same memory."""
        self._refuse_sentence("nested")
        if not len(self):
            raise ConfigError("a batch without texts has no nested form")
        return torch.nested.nested_tensor_from_jagged(
            self.values,
            self.cu_seqlens.to(torch.int64),
            min_seqlen=int(self.lengths.min()),
            max_seqlen=int(self.lengths.max()),
        )

    def packed_sequence(self) -> PackedSequence:
        """A PackedSequence for `nn.LSTM` and `nn.GRU`, built without padding; texts may be in any order.

        Raises:
            ConfigError: a text has no row, which a PackedSequence cannot express.
        """
        self._refuse_sentence("packed_sequence")
        empty = torch.nonzero(self.lengths == 0).flatten().tolist()
        if empty or not len(self):
            raise ConfigError(f"a PackedSequence cannot hold texts without a row: texts {empty} of {len(self)}")
        lengths = self.lengths.numpy()
        order = np.argsort(-lengths, kind="stable")
        ranks = np.argsort(order)
        turns = steps(lengths)
        # Step by step, longest text first within a step.
        gather = np.lexsort((np.repeat(ranks, lengths), turns))
        device = self.values.device
        return PackedSequence(
            self.values.index_select(0, to_device(gather, device)),
            torch.from_numpy(np.bincount(turns)),
            to_device(order, device),
            to_device(ranks, device),
        )

    def as_layout(self, layout: Layout) -> Any:
        """Plain tensors: (values, mask), a nested tensor, a PackedSequence, or (values, cu_seqlens).

        Sentence output is one [B, H] in every layout.
        """
        check_choice("layout", layout, Layout)
        if self.output == "sentence":
            return self.values
        if layout == "flat":
            return self.values, self.cu_seqlens
        return getattr(self, layout)()

    def align(
        self, tags: Sequence[Sequence[float | str] | Tensor], pad: float = -100, *, names: Sequence[str] | None = None
    ) -> Tensor:
        """Lay one number a word out like the vectors.

        Word output: each word's row gets its number. Token output: a word's number goes to its first token; the other
        tokens, the special tokens and the padding get `pad` (which `F.cross_entropy` ignores by default). Numbers of
        words that truncation cut are dropped, and in token output those of words without a token (such as
        " ").

        Args:
            tags: for each text, one number for each word of the original text.
            pad: the number of rows without one.
            names: all labels in the order of their numbers, from 0, where the tags are labels such as "B-PER".
        Returns:
            [B, T] on the device of `values`: int64 if all numbers, `pad` included, are whole, else float32.
        Raises:
            ConfigError: the texts were not lists of words, a text has another number of words than of tags, or a tag
                is none of `names`.
        """
        self._refuse_sentence("align")
        return to_device(
            align_tags(tags, pad, self.lengths.numpy(), self.word_ids, self.tokens, names), self.values.device
        )

    def spans(self) -> Tensor:
        """Which characters each row is of: `text[start:end]` of the text as it was given.

        The texts are tokenized again for it, so it costs nothing until it is called. It needs the texts: an encoder
        that is called with texts keeps them, and so does `wrap`; `stream` does with `into=`, and `TokenCollate` with
        `keep_text=True`.

        Returns:
            [N, 4] int64 on the CPU. Of each row: the index of its text; the part of a pair, 0 or 1; its first
            character; one past its last. In a list of words these are characters of the row's word, whose index is in
            `word_ids`; in a string, of the string, also where a word splitter split it. The last three are -1 for
            special tokens, a prompt's tokens, and words that truncation cut.
        Raises:
            ConfigError: the texts were not kept, or this is sentence output, whose rows are whole texts; or the place
                of a splitter's words in their string is not clear.
            EncoderError: a text has other tokens now: it was changed meanwhile.
        """
        return torch.from_numpy(self._finder("spans").spans(self))

    def strings(self) -> list[str]:
        """The string of each row, `text[start:end]` by `spans`; it raises what `spans` raises.

        Rows without characters have their token's own string, such as "[CLS]"; words that truncation cut have "".
        """
        return self._finder("strings").strings(self)

    def _finder(self, name: str) -> SupportsSpans:
        self._refuse_sentence(name)
        if self.tokens.texts is None:
            raise ConfigError(
                f"{name}() needs the texts, and these were not kept, or came as ids: call the encoder with texts, "
                "write into= in stream (the text then stays in the batch too), or keep_text=True in TokenCollate"
            )
        if self.finder is None:
            raise ConfigError(f"{name}() needs a tokenizer that says where tokens are: take vectors of an Encoder")
        return self.finder

    def split(self, sizes: int | Sequence[int]) -> list[Embeddings]:
        """Cut the batch into consecutive ones, as `torch.split` does; each is a copy.

        Args:
            sizes: texts of each, which sum to B; or one number, with fewer texts in the last if that does not divide B.
        Raises:
            ConfigError: the sizes do not sum to B.
        """
        if isinstance(sizes, int):
            check_at_least("sizes", sizes, 1)
            sizes = [min(sizes, len(self) - start) for start in range(0, len(self), sizes)]
        sizes = [operator.index(size) for size in sizes]
        if sum(sizes) != len(self) or min(sizes, default=0) < 0:
            raise ConfigError(
                f"split(sizes={shortened(sizes)}) of {len(self)} texts: the sizes sum to {sum(sizes)}; write how many "
                "texts each part has"
            )
        return [self[start:end] for start, end in pairwise(accumulate(sizes, initial=0))]

    @classmethod
    def concat(cls, parts: Sequence[Embeddings]) -> Embeddings:
        """The texts of several batches as one; of `tokens.fields`, those that all have.

        Args:
            parts: at least one, all of one encoder and on one device.
        Raises:
            ConfigError: there are none, or their output, layers, sizes, dtypes or devices differ.
        """
        kinds = [(e.output, e.layers, list(e.values.shape[1:]), e.values.dtype, e.values.device) for e in parts]
        other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
        if not parts or other is not None:
            differ = "there are none" if other is None else f"part 0 has {kinds[0]}, part {other} has {kinds[other]}"
            raise ConfigError(
                f"concat takes Embeddings of the same (output, layers, shape of a row, dtype, device): {differ}"
            )
        counts = [len(part.values) for part in parts]
        lengths = torch.cat([part.lengths for part in parts])
        return dataclasses.replace(
            parts[0],
            cu_seqlens=to_device(cumulate(lengths.numpy()), parts[0].values.device),
            lengths=lengths,
            tokens=TokenBatch.concat([part.tokens for part in parts], with_fields=True),
            **concatenated(cls, parts, {"rows": counts, "host rows": counts}),
        )

    def _chosen(self, index: Any) -> Embeddings:
        if not isinstance(index, slice):
            index = np.asarray(index) if len(index) else slice(0)
        texts = np.arange(len(self))[index]
        run = isinstance(index, slice) and len(texts) > 0 and index.step in (None, 1)
        rows = slice(int(texts[0]), int(texts[-1]) + 1) if run else texts
        return self.pick(rows, self.tokens.pick(texts, with_fields=True))

    def pick(self, indices: Indices | slice, tokens: TokenBatch) -> Embeddings:
        """A copy of the rows of these texts, as the embeddings of `tokens`; a text may come several times.

        Args:
            indices: [b], on the host; or a slice from one text to another, which costs less.
            tokens: the picked texts, which may say less than `self.tokens` does: `word_ids` follow theirs.
        """
        lengths = self.lengths.numpy()
        device = self.values.device
        bounds = cumulate(lengths)
        if isinstance(indices, slice):
            run = slice(int(bounds[indices.start]), int(bounds[indices.stop]))
            found = picked(self, {"rows": run, "host rows": run})
        else:
            rows = rows_of(indices, bounds)
            found = picked(self, {"rows": to_device(rows, device), "host rows": rows})
        lengths = lengths[indices].copy()
        if tokens.word_ids is None and self.output != "words":
            found["word_ids"] = None
        return dataclasses.replace(
            self,
            cu_seqlens=to_device(cumulate(lengths), device),
            lengths=torch.from_numpy(lengths),
            tokens=tokens,
            **found,
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Embeddings:
        """The same batch with its tensors on another device; `lengths` stay on the CPU."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Embeddings:
        """The same batch in page-locked host memory."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Embeddings:
        present = None if self.present is None else move(self.present)
        return dataclasses.replace(self, values=move(self.values), cu_seqlens=move(self.cu_seqlens), present=present)

    def __getstate__(self) -> dict[str, Any]:
        """Without texts nothing is found, so the finder's vocabulary stays out of the pickle."""
        return self.__dict__ | ({"finder": None} if self.tokens.texts is None else {})

    def _refuse_sentence(self, name: str) -> None:
        if self.output == "sentence":
            raise ConfigError(f"sentence output is one vector a text: use .vectors, not .{name}()")


class SupportsEncode(Protocol):
    """What a loader needs of an encoder; tests and users may bring their own."""

    @property
    def tokenizer(self) -> SupportsTokenize: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def max_forward_tokens(self) -> int: ...

    def encode(self, batch: TokenBatch) -> Embeddings: ...


@runtime_checkable
class SupportsTraining(SupportsEncode, Protocol):
    """What a loader also uses where an encoder has it: weights that may be trained, and forwards of a measured size."""

    @property
    def trainable(self) -> bool:
        """Whether it was unfrozen: a loader then yields `TokenBatch`es, and the model embeds them."""

    @property
    def times_frozen(self) -> int:
        """How often it was frozen; vectors from before the last time may be of other weights."""

    @property
    def default_forward_tokens(self) -> int:
        """Tokens of one forward before anything is measured: the user's number, or the default of the device."""

    def calibrate(self) -> int:
        """Measure the fastest `max_forward_tokens`, once, and return it."""

    def encode(self, batch: TokenBatch, *, max_forward_tokens: int | None = None) -> Embeddings:
        """Encode a batch; `max_forward_tokens` is the size of this call's forwards alone."""


@runtime_checkable
class SupportsCache(SupportsEncode, Protocol):
    """What a cache needs of an encoder: what its vectors depend on, and a way to build `Embeddings` from rows."""

    @property
    def row_shape(self) -> tuple[int, ...]: ...

    @property
    def output_dtype(self) -> torch.dtype: ...

    def encode(self, batch: TokenBatch, *, max_forward_tokens: int | None = None) -> Embeddings: ...

    def fingerprint(self) -> bytes | None: ...

    def row_counts(self, batch: TokenBatch) -> Int32Array: ...

    def assemble(self, values: Tensor, batch: TokenBatch) -> Embeddings: ...
