"""The encode stage of a loader: batches go to the encoder in groups, and come out one by one with their vectors."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from ..caching.cached_encoder import CachedEncoder
from ..embeddings import Embeddings, SupportsEncode
from ..errors import BertstreamError, EncoderError
from ..reading.window import Skip
from ..system.cuda import SideStream
from ..system.process import trim_heap
from ..tokens import TokenBatch
from .clocks import Stages
from .coalesce import encode_together
from .epoch import Run
from .fields import Place, texts_of
from .groups import Groups
from .source import Entry

logger = logging.getLogger(__name__)

_TRIM_EVERY_S = 2.0
"""Between two moments at which the heap's holes are given back, while vectors are made on a CPU."""


@dataclass
class EncodeCounts:
    """What went to the encoder, over the stage's life, where there is no cache; not a text's repeats within a call."""

    repeated_texts: int = 0
    encode_calls: int = 0
    encoded_tokens: int = 0


@dataclass
class Ready:
    """A batch whose vectors are queued on the side stream, with the event behind them.

    Attributes:
        entry: what was read.
        embeddings: by the place of the texts; tokens where the encoder is trained.
        tokens: in all of them.
    """

    entry: Entry
    embeddings: Mapping[Place | None, Embeddings | TokenBatch]
    event: torch.cuda.Event | None
    times_frozen: int
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = sum(batch.num_tokens for batch in self.batches)

    @property
    def batches(self) -> list[TokenBatch]:
        """The tokens behind the vectors, place by place."""
        return [_tokens(embeddings) for embeddings in self.embeddings.values()]


class EncodeStage:
    """What turns the batches of each epoch into batches with vectors, in a thread of its own or not.

    Args:
        encoder: what makes the vectors.
        cached: the same behind a cache, or None.
        places: where the texts are in a batch, None where a batch is bare texts.
        pair: where the second texts of pairs are.
        stages: the clocks of "tokenize" and "encode".
    """

    def __init__(
        self,
        encoder: SupportsEncode,
        cached: CachedEncoder | None,
        places: tuple[Place, ...] | None,
        stages: Stages,
        *,
        pair: Place | None = None,
    ) -> None:
        self.counts = EncodeCounts()
        self._encoder = encoder
        self._cached = cached
        self._places = places
        self._pair = pair
        self._stages = stages
        self._device = encoder.device
        self._side = SideStream(self._device)
        self._said_trainable = False

    def begin(self) -> None:
        """To be called by the thread that iterates, before `run`: what it did to the weights comes first."""
        if self._encoder.device != self._device:  # it was moved
            self._device = self._encoder.device
            self._side = SideStream(self._device)
        self._side.follow()

    def run(
        self,
        entries: Iterator[Entry],
        run: Run,
        *,
        limit: int,
        by_the_clock: bool,
        in_step: Callable[[Groups[Entry]], Generator[list[Entry], None, None]] = iter,
    ) -> Generator[Ready | Skip, None, None]:
        """One epoch: what the worker thread runs, or `next()` itself.

        Args:
            entries: what is read.
            run: its worker, once there is one, is told how much one group weighs.
            limit, by_the_clock: of `Groups`.
            in_step: from the groups to those that are encoded, where other ranks have a say.
        """
        groups = Groups(
            self._tokenized(entries, run), weigh=lambda entry: entry.weight, limit=limit, by_the_clock=by_the_clock
        )
        trimmed = time.perf_counter()
        steps = in_step(groups)
        try:
            for group in steps:
                if run.is_over:
                    return
                started = time.perf_counter()
                if self._device.type == "cpu" and started - trimmed > _TRIM_EVERY_S:
                    trim_heap()
                    trimmed = started
                weight = sum(entry.weight for entry in group)
                ready = self._encode(group)
                del group
                item = next(ready)  # which encodes them all
                groups.encoded(weight, time.perf_counter() - started)
                if run.worker is not None:  # all of it waits while the next group is encoded, or nothing would overlap
                    run.worker.raise_limit(weight)
                yield item
                del item  # its memory is the consumer's now, not ours until the next group
                yield from ready
        except Exception as error:
            steps.throw(error)  # there other ranks are told of it, and it is raised again

    def hand_over(self, item: Ready) -> None:
        """Make the vectors safe to use here; those of an encoder that is trained are for the model to compute."""
        if self._hands_out_tokens:
            item.embeddings = {place: _bare(_tokens(found)) for place, found in item.embeddings.items()}
            if not self._said_trainable:
                self._said_trainable = True
                logger.info("the encoder is trained: batches are handed out as TokenBatches, and a cache is off")
            return
        not_encoded = any(isinstance(found, TokenBatch) for found in item.embeddings.values())
        if not_encoded or item.times_frozen != self._times_frozen:  # it was trained meanwhile, and frozen again
            item.embeddings = {place: self._alone(_tokens(found)) for place, found in item.embeddings.items()}
            item.event = self._side.mark()
        parts = [(e.values, e.cu_seqlens, e.present) for e in item.embeddings.values() if isinstance(e, Embeddings)]
        self._side.hand_over(item.event, [tensor for part in parts for tensor in part if tensor is not None])

    def _tokenized(self, entries: Iterator[Entry], run: Run) -> Iterator[Entry]:
        number = 0
        for entry in entries:
            if run.is_over:  # whoever ended it waits for us, and not for all that a group takes
                return
            if not isinstance(entry.item, Skip):
                with self._stages.run("tokenize", 1), _numbered(number):
                    entry.texts = texts_of(entry.item, self._places, self._encoder.tokenizer, self._pair)
                entry.number = number
                number += 1
            yield entry

    def _encode(self, group: list[Entry]) -> Iterator[Ready | Skip]:
        """The group's batches with their vectors, by one call of the encoder.

        Where that fails they are encoded one by one, so that the error comes in its place, and is of one batch.
        """
        texts = [tokens for entry in group for tokens in entry.texts.values()]
        found: deque[Embeddings] | deque[TokenBatch] | None = None
        times_frozen = self._times_frozen
        if self._hands_out_tokens:
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
        while entries:
            entry = entries.popleft()
            if not entry.texts:
                yield entry.item
                continue
            embeddings: dict[Place | None, Embeddings | TokenBatch]
            if found is None:
                with _numbered(entry.number):
                    embeddings = {place: self._alone(tokens) for place, tokens in entry.texts.items()}
                event = self._side.mark()
            else:
                embeddings = {place: found.popleft() for place in entry.texts}
            ready = Ready(entry, embeddings, event, times_frozen)
            del entry, embeddings
            yield ready
            del ready  # its memory is the consumer's now, not ours until the next batch

    def _together(self, texts: list[TokenBatch], *, once: bool = True) -> list[Embeddings]:
        def encode(batch: TokenBatch) -> Embeddings:
            if self._cached is not None:
                return self._cached.encode(batch)  # which counts for itself
            found = self._encoder.encode(batch)
            self.counts.encode_calls += 1
            self.counts.encoded_tokens += batch.num_tokens
            return found

        with self._stages.run("encode", len(texts)), self._side.run():
            found, repeats = encode_together(encode, texts, once=once and self._cached is None)  # a cache looks itself
        self.counts.repeated_texts += repeats
        return found

    def _alone(self, tokens: TokenBatch) -> Embeddings:
        """The batch as it is, so that an error names its texts by their places."""
        try:
            return self._together([tokens], once=False)[0]
        except BertstreamError:
            raise
        except Exception as error:
            raise EncoderError(f"the encoder failed on {tokens!r}: {type(error).__name__}: {error}") from error

    @property
    def _hands_out_tokens(self) -> bool:
        return getattr(self._encoder, "trainable", False)

    @property
    def _times_frozen(self) -> int:
        return getattr(self._encoder, "times_frozen", 0)


@contextmanager
def _numbered(batch: int) -> Iterator[None]:
    """Errors of the encoder from inside say which batch of the epoch it was."""
    try:
        yield
    except EncoderError as error:
        raise EncoderError(f"batch {batch}: {error}", records=error.records) from error


def _tokens(embeddings: Embeddings | TokenBatch) -> TokenBatch:
    return embeddings if isinstance(embeddings, TokenBatch) else embeddings.tokens


def _bare(tokens: TokenBatch) -> TokenBatch:
    """The tokens without what a stream's batch carries beside them."""
    return replace(tokens, fields={}, cursor=None, report=None)
