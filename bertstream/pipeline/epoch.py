"""One epoch of a loader, from what is read to the training loop: a chain of generators, and one owner of their end.

    read -> tokenize -> gather -> in lockstep -> encode -> ahead -> hand over

Each stage takes an iterator and is one. `Epoch.batches` composes them, top to bottom.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

from ..embeddings import Layout
from ..errors import LoaderClosedError, described
from ..reading.dataset import TextStream
from ..system.distributed import Peers
from ..system.process import release_openmp_threads, torch_modes, usable_cores
from ..system.threads import Prefetcher
from ..tokens import SupportsTokenize, TokenBatch
from .clocks import StageClocks
from .encode import BatchEncoder, Ready, encode, tokenize
from .fields import Field, texts_of, with_vectors
from .groups import GroupBudget, gather, group_tokens
from .lockstep import LoopStatus, in_lockstep
from .source import Entry, Progress, Source, read
from .step_clock import StepClock

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LEFT_WAIT_S = 10.0
"""How long a loop that was left waits for the item that its worker has in progress."""

_PREFETCH = {"cpu": 8}
"""Forwards' worth of tokens that the encoder runs ahead in its thread; 2 on other devices. Encoding times vary more
from batch to batch than steps do: with 2 on a CPU, a step that sleeps as long as encoding took 1.25 times as long."""


@dataclass
class Counts:
    """What the loop received, over the loader's life."""

    epochs: int = 0
    batches: int = 0
    texts: int = 0
    tokens: int = 0
    cut_texts: int = 0
    cut_words: int = 0
    cut_tokens: int = 0
    left_texts: int = 0
    padded_tokens: int = 0
    room_wait_s: float = 0.0
    peak_ahead_tokens: int = 0

    def received(self, batches: list[TokenBatch]) -> None:
        """Add the texts of one batch."""
        self.batches += 1
        for tokens in batches:
            self.texts += len(tokens)
            self.tokens += tokens.num_tokens
            self.padded_tokens += len(tokens) * int(tokens.lengths.max(initial=0))
            self.cut_texts += int((tokens.cut_tokens > 0).sum())
            self.cut_words += int(tokens.cut_words.sum())
            self.cut_tokens += int(tokens.cut_tokens.sum())

    def left(self, texts: int) -> None:
        """Add texts that nobody receives."""
        self.left_texts += texts


@dataclass(kw_only=True)
class Parts:
    """What all epochs of a loader use.

    Attributes:
        progress: what is read, and how far the loop is.
        stream: the `TextStream` that is read; None for any other source.
        encoder: makes the vectors.
        tokenizer: for texts that are not tokenized yet.
        text, pair, into, layout, prefetch, deterministic: as for `wrap`.
        peers: the other ranks of a stream; None where there are none, or they need not end together.
        clocks, counts: what `stats` reports.
    """

    progress: Progress
    stream: TextStream | None
    encoder: BatchEncoder
    tokenizer: SupportsTokenize
    text: tuple[Field, ...] | None
    pair: Field | None
    into: tuple[Field, ...] | None
    layout: Layout | None
    prefetch: int | None
    deterministic: bool
    peers: Peers | None = None
    clocks: StageClocks
    counts: Counts = field(default_factory=Counts)


class Epoch:
    """One iteration of a loader. The training loop iterates `batches`, which alone keeps the epoch alive.

    Args:
        parts: what the loader's epochs share.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._loop = LoopStatus()
        self._clock = StepClock(usable_cores())
        self._source = Source(parts.progress, parts.clocks)
        self._ready: Generator[Ready | Entry, None, None] | None = None
        self._worker: Prefetcher[Ready | Entry] | None = None
        self._ended = False

    def batches(self) -> Generator[Any, None, None]:
        """The epoch's batches with their vectors. However the loop ends, everything else ends here.

        Raises:
            LoaderClosedError: the loader was closed, or began another epoch.
        """
        parts, loop = self._parts, self._loop
        reason, timeout_s = "it stopped iterating", None
        if loop.closed_by is not None:  # before the first batch was asked for
            raise LoaderClosedError(loop.closed_by)
        try:
            try:
                before, number = replace(parts.counts), parts.progress.epoch
                started = self._waits()
                parts.encoder.follow_loop()
                if parts.peers is not None:
                    parts.peers.begin()
                # In the loop's thread: a sampler draws its seed from torch's global generator with the first batch, at
                # the same point of the user's program whatever is prefetched.
                self._source.open()

                texts = partial(texts_of, fields=parts.text, tokenizer=parts.tokenizer, pair=parts.pair)
                budget = GroupBudget(
                    attrgetter("weight"), limit=self._group_limit(), by_the_clock=not parts.deterministic
                )
                entries = tokenize(read(self._source, parts.stream), texts, parts.clocks, loop)
                groups = gather(entries, budget)
                if parts.peers is not None and parts.stream is not None:
                    groups = in_lockstep(groups, budget, parts.stream, parts.peers, loop, parts.counts.left)
                ready = self._ready = encode(groups, budget, parts.encoder, loop)
                yield from self._hand_over(self._ahead(ready, budget), started)

                if loop.closed_by is None:
                    parts.progress.end_epoch(number)
                    parts.counts.epochs += 1
                    _report_truncation(before, parts.counts)
            except GeneratorExit:
                # A loop that is left may be closed by a garbage collection, anywhere: also within a forward, whose lock
                # the worker waits for. So the wait for the worker has an end.
                timeout_s = _LEFT_WAIT_S
                raise
            except Exception as error:
                reason = described(error)
                raise
            finally:
                self.close(reason, timeout_s=timeout_s)
        finally:
            self.close(reason, timeout_s=timeout_s)  # again: Ctrl-C may have struck in the first
        if loop.closed_by is not None:
            raise LoaderClosedError(loop.closed_by)

    def close(self, reason: str, *, closed_by: str | None = None, timeout_s: float | None = None) -> None:
        """End the epoch, from any thread and more than once: ranks are told, the worker stops, the source is closed.

        Args:
            reason: what the other ranks are told, unless all have agreed on the end.
            closed_by: what the loop's next batch raises; None for nothing.
            timeout_s: seconds to wait for what the worker has in progress; None waits as long as it takes.
        """
        loop, worker = self._loop, self._worker
        if self._ended:
            return
        loop.closed_by = loop.closed_by or closed_by
        loop.is_over = True
        if self._parts.peers is not None and not loop.ranks_have_ended:
            with suppress(Exception):  # the store may be gone with the rank that held it
                self._parts.peers.leave(reason)
        if worker is not None:
            ended = worker.close(timeout_s)
            self._parts.counts.room_wait_s += worker.put_wait_s
            self._parts.counts.peak_ahead_tokens = max(self._parts.counts.peak_ahead_tokens, worker.peak_weight)
            self._worker = None
            if not ended:
                self._ended = True  # the worker closes what it reads when it ends
                return
        with suppress(ValueError):  # the loop's thread is in it, and closes it next
            if self._ready is not None:
                self._ready.close()
            self._source.close()
            self._ended = True

    def _group_limit(self) -> int:
        encoder = self._parts.encoder
        # prefetch=0 reads nothing ahead.
        return 1 if self._parts.prefetch == 0 else group_tokens(encoder.forward_tokens, encoder.device)

    def _ahead(
        self, ready: Generator[Ready | Entry, None, None], budget: GroupBudget[Entry]
    ) -> Generator[Ready | Entry, None, None]:
        """The same items, made in a thread ahead of the loop as soon as that pays."""
        parts = self._parts
        device = parts.encoder.device.type
        limit = (parts.prefetch or _PREFETCH.get(device, 2)) * parts.encoder.forward_tokens
        items: Iterator[Ready | Entry] = ready
        while not self._loop.is_over:
            if self._worker is None and self._runs_ahead():
                items = self._worker = Prefetcher(
                    _within(torch_modes(), ready),
                    weigh=lambda item: item.tokens if isinstance(item, Ready) else 0,
                    # All of one group waits while the next is encoded, or nothing would overlap.
                    limit=lambda: max(limit, budget.heaviest),
                    stage="encode",
                )
                self._worker.start()
            if items is not ready and device == "cpu":
                release_openmp_threads()
            item = next(items, None)
            if item is None:
                return
            yield item
            del item  # its memory is the consumer's now, not ours until the next batch

    def _runs_ahead(self) -> bool:
        if self._parts.prefetch is not None:
            return self._parts.prefetch > 0
        return self._parts.encoder.device.type != "cpu" or self._clock.leaves_room()

    def _hand_over(self, items: Iterator[Ready | Entry], started: float) -> Generator[Any, None, None]:
        """The user's batches with vectors in them; the progress and all counts follow what the loop receives."""
        parts = self._parts
        for item in items:
            if self._loop.is_over:
                return
            entry = item.entry if isinstance(item, Ready) else item
            parts.progress.count(entry.report)
            if isinstance(item, Ready):
                with parts.clocks.run("hand_over", 1):
                    parts.encoder.receive(item)
                    parts.progress.received(entry)
                    parts.counts.received(item.batches)
                    batch = with_vectors(
                        entry.item, item.embeddings, text=parts.text, into=parts.into, layout=parts.layout
                    )
                del item, entry  # their memory is the consumer's now, not ours until the next batch
                parts.clocks.add("wait", started, 1)
                self._loop.waits_since = None
                received = time.perf_counter()
                self._clock.begin()
                yield batch
                self._clock.end()
                del batch
                parts.clocks.add("step", received, 1)
                started = self._waits()
            else:
                parts.progress.received(entry)

    def _waits(self) -> float:
        self._loop.waits_since = time.monotonic()
        return time.perf_counter()


def _within(modes: AbstractContextManager[object], items: Iterator[T]) -> Iterator[T]:
    """The items, each made within these modes in whatever thread asks for it."""
    with modes:
        yield from items


def _report_truncation(before: Counts, after: Counts) -> None:
    texts = after.cut_texts - before.cut_texts
    if texts:
        logger.warning(
            "truncation cut %d of %d texts in this epoch, by %d words and %d tokens in all: overflow='windows' keeps "
            "them",
            texts,
            after.texts - before.texts,
            after.cut_words - before.cut_words,
            after.cut_tokens - before.cut_tokens,
        )
