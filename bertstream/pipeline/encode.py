"""Tokens to vectors, group by group: texts are tokenized if need be, encoded together, and dealt to their batches."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from ..caching.cached_encoder import CachedEncoder
from ..embeddings import Embeddings, SupportsEncode, SupportsTraining
from ..errors import BertstreamError, EncoderError
from ..reading.lane_batches import LaneEnd
from ..system.cuda import SideStream
from ..system.process import trim_heap
from ..tokens import TokenBatch
from .clocks import StageClocks
from .coalesce import encode_together
from .fields import Field
from .groups import GroupBudget
from .progress import Entry
from .source import EpochStatus

logger = logging.getLogger(__name__)

_TRIM_EVERY_S = 2.0
"""Seconds between two times that the heap's holes are returned to the system, while vectors are made on a CPU."""


@dataclass
class EncodeCounts:
    """Encoder calls and tokens without a cache; duplicates in a call count once."""

    repeated_texts: int = 0
    encode_calls: int = 0
    encoded_tokens: int = 0


@dataclass
class Ready:
    """A batch whose vectors are queued on the side stream.

    Attributes:
        entry: what was read.
        embeddings: by the field of the texts; tokens where the encoder is trained.
        event: recorded after the vectors; None on a CPU.
        times_frozen: of the encoder when they were made.
        tokens: in all of them.
    """

    entry: Entry
    embeddings: Mapping[Field | None, Embeddings | TokenBatch]
    event: torch.cuda.Event | None
    times_frozen: int
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = sum(batch.num_tokens for batch in self.batches)

    @property
    def batches(self) -> list[TokenBatch]:
        """The tokens of each field."""
        return [_tokens(embeddings) for embeddings in self.embeddings.values()]


class BatchEncoder:
    """What makes a loader's vectors, for all of its epochs: the encoder, its cache, its stream, its counts.

    Args:
        encoder: makes the vectors.
        cached: the same with a cache in front of it, or None.
        clocks: the "encode" clock.
        deterministic: whether forwards have a size that nothing measures.
    """

    def __init__(
        self, encoder: SupportsEncode, cached: CachedEncoder | None, clocks: StageClocks, *, deterministic: bool = False
    ) -> None:
        self.counts = EncodeCounts()
        self._encoder = encoder
        self._training = encoder if isinstance(encoder, SupportsTraining) else None
        self._cached = cached
        self._clocks = clocks
        self._deterministic = deterministic
        self._device = encoder.device
        self._side = SideStream(self._device)
        self._said_trainable = False

    @property
    def device(self) -> torch.device:
        """The encoder's."""
        return self._encoder.device

    @property
    def forward_tokens(self) -> int:
        """Tokens of one forward at most."""
        fixed = self._fixed_forward_tokens
        return self._encoder.max_forward_tokens if fixed is None else fixed

    def follow_loop(self) -> None:
        """Encode after all that the loop has done to the weights; its thread calls this as an epoch begins."""
        if self._encoder.device != self._device:  # it was moved
            self._device = self._encoder.device
            self._side = SideStream(self._device)
        self._side.follow()

    def encode_group(self, group: list[Entry]) -> Iterator[Ready | Entry]:
        """The group's batches with their vectors, by one call of the encoder; `LaneEnd`s as they are.

        If the call fails, batches are encoded one by one, so that the error is that of one batch and in its place.

        Args:
            group: emptied, so that memory is freed as the batches are received.
        """
        texts = [tokens for entry in group for tokens in entry.texts.values()]
        found: deque[Embeddings] | deque[TokenBatch] | None = None
        times_frozen = self._times_frozen
        if self._yields_tokens:
            found = deque(texts)
        elif texts:
            try:
                found = deque(self._together(texts))
            except Exception as error:
                if len(texts) > 1:
                    logger.info("%d batches failed together, and are encoded one by one: %r", len(texts), error)
        event = self._side.mark()
        entries = deque(group)
        group.clear()
        del texts
        while entries:
            entry = entries.popleft()
            if not entry.texts:
                yield entry
                continue
            embeddings: dict[Field | None, Embeddings | TokenBatch]
            if found is None:
                with _numbered(entry.number):
                    embeddings = {name: self._alone(tokens) for name, tokens in entry.texts.items()}
                event = self._side.mark()
            else:
                embeddings = {name: found.popleft() for name in entry.texts}
            ready = Ready(entry, embeddings, event, times_frozen)
            del entry, embeddings
            yield ready
            del ready  # its memory is the consumer's now, not ours until the next batch

    def receive(self, item: Ready) -> None:
        """Make the vectors safe to use in the calling thread; a trained encoder's are for the model to compute."""
        if self._yields_tokens:
            item.embeddings = {name: _bare(_tokens(found)) for name, found in item.embeddings.items()}
            if not self._said_trainable:
                self._said_trainable = True
                logger.info("the encoder is trained: loops receive TokenBatches, and a cache is off")
            return
        not_encoded = any(isinstance(found, TokenBatch) for found in item.embeddings.values())
        if not_encoded or item.times_frozen != self._times_frozen:  # it was trained since, and frozen again
            item.embeddings = {name: self._alone(_tokens(found)) for name, found in item.embeddings.items()}
            item.event = self._side.mark()
        parts = [(e.values, e.cu_seqlens, e.present) for e in item.embeddings.values() if isinstance(e, Embeddings)]
        self._side.hand_over(item.event, [tensor for part in parts for tensor in part if tensor is not None])

    def _together(self, texts: list[TokenBatch], *, once: bool = True) -> list[Embeddings]:
        with self._clocks.run("encode", len(texts)), self._side.run():
            # A cache finds repeats itself.
            found, repeats = encode_together(self._encode, texts, once=once and self._cached is None)
        self.counts.repeated_texts += repeats
        return found

    def _encode(self, batch: TokenBatch) -> Embeddings:
        fixed = self._fixed_forward_tokens
        if self._cached is not None:
            return self._cached.encode(batch, max_forward_tokens=fixed)  # which counts for itself
        if fixed is not None and self._training is not None:
            found = self._training.encode(batch, max_forward_tokens=fixed)
        else:
            found = self._encoder.encode(batch)
        self.counts.encode_calls += 1
        self.counts.encoded_tokens += batch.num_tokens
        return found

    def _alone(self, tokens: TokenBatch) -> Embeddings:
        """The batch as it is, so that an error names its texts by their indices."""
        try:
            return self._together([tokens], once=False)[0]
        except BertstreamError:
            raise
        except Exception as error:
            raise EncoderError(f"the encoder failed on {tokens!r}: {type(error).__name__}: {error}") from error

    @property
    def _fixed_forward_tokens(self) -> int | None:
        if not self._deterministic or self._training is None:
            return None
        return self._training.default_forward_tokens

    @property
    def _yields_tokens(self) -> bool:
        return self._training is not None and self._training.trainable

    @property
    def _times_frozen(self) -> int:
        return 0 if self._training is None else self._training.times_frozen


def tokenize(
    entries: Iterator[Entry],
    texts_of: Callable[[object], Mapping[Field | None, TokenBatch]],
    clocks: StageClocks,
    status: EpochStatus,
) -> Iterator[Entry]:
    """The entries with their texts as tokens, and numbered.

    Args:
        entries: what was read.
        texts_of: from a batch to its tokens by field.
        clocks: the "tokenize" clock.
        status: once the epoch is over the entries end, so that nobody waits for a whole group to be read.
    """
    number = 0
    for entry in entries:
        if status.is_over:
            return
        if not isinstance(entry.item, LaneEnd):
            with clocks.run("tokenize", 1), _numbered(number):
                entry.set_texts(texts_of(entry.item))
            entry.number = number
            number += 1
        yield entry


def encode(
    groups: Iterator[list[Entry]], budget: GroupBudget[Entry], encoder: BatchEncoder, status: EpochStatus
) -> Generator[Ready | Entry, None, None]:
    """The groups' batches one by one, with their vectors.

    Args:
        groups: batches to encode in one call.
        budget: is told how long each group took.
        encoder: makes the vectors.
        status: nothing is encoded once the epoch is over.
    """
    trimmed = time.perf_counter()
    for group in groups:
        if status.is_over:
            return
        started = time.perf_counter()
        if encoder.device.type == "cpu" and started - trimmed > _TRIM_EVERY_S:
            trim_heap()
            trimmed = started
        weight = sum(entry.weight for entry in group)
        ready = encoder.encode_group(group)
        del group
        item = next(ready)  # which encodes them all
        budget.encoded(weight, time.perf_counter() - started)
        yield item
        del item  # its memory is the consumer's now, not ours until the next group
        yield from ready


@contextmanager
def _numbered(batch: int) -> Iterator[None]:
    """Put the batch's number into an `EncoderError` from inside."""
    try:
        yield
    except EncoderError as error:
        raise EncoderError(f"batch {batch}: {error}", records=error.records) from error


def _tokens(embeddings: Embeddings | TokenBatch) -> TokenBatch:
    return embeddings if isinstance(embeddings, TokenBatch) else embeddings.tokens


def _bare(tokens: TokenBatch) -> TokenBatch:
    """The tokens alone, without a stream's fields, cursor and report."""
    return replace(tokens, fields={}, cursor=None, report=None)
