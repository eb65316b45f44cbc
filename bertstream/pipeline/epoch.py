"""One epoch of a loader: a chain of generators from what is read to the training loop, and one owner of its end.

    read         Source -> Entry           a batch as it was read, or the end of a lane
    tokenize     Entry -> Entry            with its texts as tokens; a stream's arrive as tokens
    gather       Entry -> [Entry]          a group, as large as the budget allows
    in lockstep  [Entry] -> [Entry]        with ranks: the same number of batches on each
    encode       [Entry] -> Ready | Entry  with vectors; tells the budget how long that took
    ahead        the same items            from here up in the encode thread, as soon as that pays
    hand over    Ready -> batch            in the loop's thread: the user's batch, with vectors

`Epoch` composes them. Whatever ends it, `Epoch.close` does the rest, and is the one place that tells other ranks.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np

from ..embeddings import Layout
from ..encoding.cutting import warn_of_cut
from ..errors import LoaderClosedError, described
from ..reading.dataset import TextStream
from ..reading.options import SOURCE
from ..system.distributed import Peers
from ..system.process import release_openmp_threads, torch_modes, usable_cores
from ..system.threads import Prefetcher
from ..tokens import SupportsTokenize, TokenBatch
from .clocks import StageClocks
from .encode import BatchEncoder, Ready, encode, tokenize
from .fields import Field, texts_of, with_vectors
from .groups import GroupBudget, gather, group_tokens
from .lockstep import in_lockstep
from .progress import Entry, Progress
from .source import EpochStatus, Source, read
from .step_clock import StepClock

T = TypeVar("T")

_LEFT_WAIT_S = 10.0
"""How long a loop that was left waits for the item that its worker has in progress."""

ANOTHER_BEGAN = "another iteration of this loader began: for two loops, make two loaders"

_PREFETCH = {"cpu": 8}
"""Forwards' worth of tokens that the encoder runs ahead in its thread; 2 on other devices. Encoding times vary more
from batch to batch than steps do: on a CPU with 2, an epoch whose steps sleep as long as encoding takes was 1.25 times
as long."""


@dataclass
class Counts:
    """What the loop received, over the loader's life.

    Attributes:
        source_texts: of each source of a mixture, how many texts; empty for anything else.
    """

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
    source_texts: list[int] = field(default_factory=list)

    def received(self, batches: list[TokenBatch]) -> None:
        """Add the texts of one batch."""
        self.batches += 1
        for tokens in batches:
            self.texts += len(tokens)
            self.tokens += tokens.num_tokens
            if self.source_texts:
                counts = np.bincount(tokens.fields[SOURCE], minlength=len(self.source_texts)).tolist()
                self.source_texts = [before + new for before, new in zip(self.source_texts, counts, strict=True)]
            self.padded_tokens += len(tokens) * int(tokens.lengths.max(initial=0))
            if tokens.cut_tokens.any():
                self.cut_texts += np.count_nonzero(tokens.cut_tokens)
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
        text, pair, mask, token_type_ids, into, layout, prefetch, deterministic: as for `wrap`.
        peers: the other ranks of a stream; None where there are none, or they need not end together.
        clocks, counts: what `stats` reports.
    """

    progress: Progress
    stream: TextStream | None
    encoder: BatchEncoder
    tokenizer: SupportsTokenize
    text: tuple[Field, ...] | None
    pair: Field | None
    mask: tuple[Field, ...] | None
    token_type_ids: tuple[Field, ...] | None
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
        self._status = EpochStatus()
        self._clock = StepClock(usable_cores())
        self._source = Source(parts.progress, parts.clocks)
        self._ready: Generator[Ready | Entry, None, None] | None = None
        self._worker: Prefetcher[Ready | Entry] | None = None
        self._process = os.getpid()
        self._ended = False
        self._ended_by: int | None = None
        self._step_started: float | None = None
        self._number: int | None = None  # while it is neither finished nor yet to begin
        self._before = parts.counts  # a copy of them, from when it begins

    def batches(self) -> Generator[Any, None, None]:
        """The epoch's batches with their vectors. However the loop ends, everything else ends here.

        Raises:
            LoaderClosedError: the loader was closed, or began another epoch.
        """
        status = self._status
        reason = "it stopped iterating"
        timeout_s = None
        try:
            try:
                if status.closed_by is None:
                    yield from self._run()
            except GeneratorExit:
                # A loop that is left may be closed by a garbage collection, anywhere: also within a forward, whose lock
                # the worker waits for. So the wait for the worker has an end.
                timeout_s = _LEFT_WAIT_S
                self.finish_if_whole()
                raise
            except Exception as error:
                reason = described(error)
                if status.closed_by is None:  # else a stage fell over because it was closed
                    raise
            finally:
                self._end(reason, timeout_s)
        finally:
            self._end(reason, timeout_s)  # again: Ctrl-C may have struck in the first
        if status.closed_by is not None:
            raise LoaderClosedError(status.closed_by)

    def _run(self) -> Generator[Any, None, None]:
        """The stages, top to bottom."""
        parts, status = self._parts, self._status
        self._before = replace(parts.counts)
        self._number = parts.progress.epoch
        started = self._waits()
        if parts.peers is not None:
            parts.peers.begin()
        parts.encoder.follow_loop()
        # In the loop's thread: a sampler draws its seed from torch's global generator with the first batch, at the same
        # point of the user's program whatever is prefetched.
        self._source.open()

        texts = partial(
            texts_of,
            fields=parts.text,
            tokenizer=parts.tokenizer,
            pair=parts.pair,
            mask=parts.mask,
            token_type_ids=parts.token_type_ids,
        )
        budget: GroupBudget[Entry] = GroupBudget(
            attrgetter("weight"), limit=self._group_limit(), by_the_clock=not parts.deterministic
        )
        entries = tokenize(read(self._source, parts.stream), texts, parts.clocks, status)
        groups = gather(entries, budget)
        if parts.peers is not None and parts.stream is not None:
            groups = in_lockstep(groups, budget, parts.stream, parts.peers, status, parts.counts.left)
        ready = self._ready = encode(groups, budget, parts.encoder, status)
        yield from self._hand_over(self._ahead(ready, budget), started)

        if status.closed_by is None:
            self._finish()

    def _finish(self) -> None:
        """The loop has all of the epoch: the next one follows."""
        number, self._number = self._number, None
        if number is not None:
            self._parts.progress.end_epoch(number)
            self._parts.counts.epochs += 1
            _report_truncation(self._before, self._parts.counts, self._parts.progress.round)

    def finish_if_whole(self) -> None:
        """Count an epoch of whose batches the loop is known to have all, and whose end it never asked for."""
        if self._number is not None and self._parts.progress.has_all:
            self._finish()

    def close(self, closed_by: str) -> None:
        """End the epoch from outside its loop, in any thread: its next batch raises `LoaderClosedError`.

        Args:
            closed_by: the message of that error.
        """
        status = self._status
        status.closed_by = status.closed_by or closed_by
        status.is_over = True
        if status.waits_since is not None and self._worker is None:
            return  # the loop's thread is within a stage: it sees that the epoch is over, and ends it
        self._end("it stopped iterating", None)

    def _end(self, reason: str, timeout_s: float | None) -> None:
        """End everything that the epoch has begun; what an interrupted call has not done, the next one does.

        Args:
            reason: what the other ranks are told, unless all have agreed on the end.
            timeout_s: seconds to wait for what the worker has in progress; None waits as long as it takes.
        """
        this_thread = threading.get_ident()
        if self._ended or self._ended_by not in (None, this_thread):
            return  # it has ended, or another thread is ending it
        if self._process != os.getpid():
            return  # in a forked child: the workers and ranks are its parent's
        self._ended_by = this_thread
        self._status.is_over = True
        if self._parts.peers is not None and not self._status.ranks_have_ended:
            with suppress(Exception):  # the store may be gone with the rank that held it
                self._parts.peers.leave(reason)
        worker = self._worker
        if worker is not None:
            if not worker.close(timeout_s):
                self._ended = True  # its thread closes the stages and the source when the item in progress is done
                return
            self._worker = None
            self._parts.counts.room_wait_s += worker.put_wait_s
            self._parts.counts.peak_ahead_tokens = max(self._parts.counts.peak_ahead_tokens, worker.peak_weight)
        if self._ready is not None:
            # It is running where a garbage collection in the worker's thread ends the epoch: that closes it next.
            with suppress(ValueError):
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
        while not self._status.is_over:
            if self._worker is None and self._runs_ahead():
                items = self._worker = Prefetcher(
                    _within(torch_modes(), ready, self._source),
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
            if self._status.is_over:
                return
            entry = item.entry if isinstance(item, Ready) else item
            parts.progress.count(entry.report)
            if isinstance(item, Ready):
                with parts.clocks.run("hand_over", 1):
                    parts.encoder.receive(item)
                    batch = with_vectors(
                        entry.item, item.embeddings, text=parts.text, into=parts.into, layout=parts.layout
                    )
                    parts.progress.received(entry)
                    parts.counts.received(item.batches)
                del item, entry  # their memory is the consumer's now, not ours until the next batch
                parts.clocks.add("wait", started, 1)
                self._status.waits_since = None
                self._step_started = time.perf_counter()
                self._clock.begin()
                yield batch
                del batch
                self.end_step()
                started = self._waits()
            else:
                parts.progress.received(entry)

    def end_step(self) -> None:
        """The loop's step is over; what the loop does until it asks for the next batch is no step."""
        if self._step_started is not None:
            self._clock.end()
            self._parts.clocks.add("step", self._step_started, 1)
            self._step_started = None

    def _waits(self) -> float:
        self._status.waits_since = time.monotonic()
        return time.perf_counter()


class Epochs:
    """The epochs of a loader, one at a time.

    Args:
        parts: what they share.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._running: weakref.ref[Epoch] | None = None

    def begin(self) -> Generator[Any, None, None]:
        """The batches of the next epoch."""
        epoch = Epoch(self._parts)
        self._running = weakref.ref(epoch)
        return epoch.batches()

    def counts(self) -> dict[str, int]:
        """How many epochs the loop has received whole, for `stats`."""
        return {"epochs": self._parts.counts.epochs}

    def make_way(self) -> None:
        """Another iteration was asked for: end the one that is running."""
        epoch = self._running() if self._running is not None else None
        if epoch is not None:
            epoch.finish_if_whole()
        self.stop(ANOTHER_BEGAN)

    def stop(self, reason: str) -> None:
        """End what is running, in any thread: its loop gets a `LoaderClosedError` with this reason."""
        epoch = self._running() if self._running is not None else None
        if epoch is not None:
            epoch.close(reason)
        self._running = None


def _within(
    modes: AbstractContextManager[object], items: Generator[T, None, None], source: Source
) -> Generator[T, None, None]:
    """The items, each made within these modes in the thread that asks for it, which closes all of it at the end."""
    try:
        with modes:
            yield from items
    finally:
        items.close()
        source.close()


def _report_truncation(before: Counts, after: Counts, where: str) -> None:
    texts = after.cut_texts - before.cut_texts
    if texts:
        warn_of_cut(
            f"in this {where}",
            texts,
            after.texts - before.texts,
            after.cut_words - before.cut_words,
            after.cut_tokens - before.cut_tokens,
        )
