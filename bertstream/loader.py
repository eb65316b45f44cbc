"""The iterable that a training loop holds: batches come in as text or tokens and go out with embeddings."""

from __future__ import annotations

import inspect
import logging
import os
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

from .cache import EmbeddingCache
from .collate import Place, as_places, as_tensors, get_place, put_places
from .cuda import SideStream
from .dataset import Shards, Skip, StreamConfig, TextStream
from .distributed import Peers, can_talk, rank_and_world_size
from .errors import BertstreamError, ConfigError, EncoderError, LoaderClosedError, StateError, check_choice
from .lanes import STATE_VERSION, LaneQueue, cursor_from_json, cursor_to_json, pack_state
from .prefetch import Prefetcher
from .types import Cursor, Embeddings, Layout, ReadReport, SupportsEncode, TokenBatch

logger = logging.getLogger(__name__)

T = TypeVar("T")

_WORKER_BATCHES = 8
"""Token batches that each worker process of a stream may have ready."""


def wrap(
    loader: Iterable[Any],
    encoder: SupportsEncode,
    *,
    text: Place | Sequence[Place] | None = None,
    into: Place | Sequence[Place] | None = None,
    layout: Layout | None = None,
    prefetch: int = 2,
    cache: EmbeddingCache | None = None,
    allow_replicated: bool = False,
) -> EmbeddingLoader:
    """Put embeddings into the batches of a loader that you already have.

    Every other field, the order and the batch boundaries stay as they are.

    Args:
        loader: a DataLoader, or any iterable of batches: dicts, tuples, lists, namedtuples or dataclasses that hold
            texts, or bare lists of texts. Texts are strings or lists of words; where a `TokenCollate` has tokenized
            them already, they are taken so. Padded `input_ids` [B, T] are taken in a dict that has their
            `attention_mask` (and `token_type_ids`, for pairs) beside them.
        encoder: what turns them into vectors.
        text: the key, position or attribute of the texts, or several; None where a batch is the bare texts.
        into: where the vectors go instead (a new key of a dict), one for each of `text`; the texts then stay.
        layout: None hands out `Embeddings`; "padded", "nested", "packed_sequence" or "flat" hand out plain tensors. In
            a dict the padded mask stands under the key with `_mask` behind it; elsewhere the place holds
            (values, mask). "flat" is (values, cu_seqlens), and sentence output is one [B, H] in every layout.
        prefetch: how far the encoder runs ahead, in forwards' worth of tokens (`encoder.max_forward_tokens`); one
            batch at least. 0 encodes in `next()` itself, without a thread. A DataLoader without workers is read in the
            thread, all but an epoch's first batch: where its dataset is bound to your thread (a sqlite connection) or
            draws from torch's global generator, give it `num_workers=1`, or take 0 here.
        cache: where vectors are kept, so that none is computed twice; what several loaders share.
        allow_replicated: accept that every rank reads all of the data (not checked where the dataset is an
            IterableDataset, which shares out its data itself).
    Raises:
        ConfigError: an argument is out of range, or several ranks would each read all of the data.
    """
    if not isinstance(loader, Iterable):
        raise ConfigError(f"loader is a {type(loader).__name__}: pass an iterable of batches")
    places, targets = as_places(text), as_places(into)
    if targets is not None and places is None and _text_stream(loader) is None:
        raise ConfigError(f"into={into!r} has no effect where a batch is bare texts: name their place with text=")
    if targets is not None and len(targets) != len(places or (None,)):
        raise ConfigError(f"into={into!r} for text={text!r}: name one place for each text")
    if not allow_replicated:
        _refuse_replicated(loader)
    return EmbeddingLoader(loader, encoder, text=places, into=targets, layout=layout, prefetch=prefetch, cache=cache)


def stream(
    shards: Shards,
    encoder: SupportsEncode,
    *,
    text: str = "text",
    pair: str | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    fields: Mapping[str, Callable[[Any], Any]] | Sequence[str] | None = None,
    num_workers: int = 0,
    into: str | None = None,
    layout: Layout | None = None,
    prefetch: int = 2,
    cache: EmbeddingCache | None = None,
    reading: StreamConfig | None = None,
) -> EmbeddingLoader:
    """Read text shards, bucket them by length, and hand out batches with embeddings.

    A batch is a dict: the record's fields, `__key__`, `__shard__` and `__index__`, and the vectors under the text's
    name. Numbers are tensors [B], all else is a list with one entry a text.

    Args:
        shards: paths or URLs of WebDataset tars, jsonl, csv, tsv or txt files, each also with `.gz`; braces
            (`train-{000..146}.tar`), globs, or a list of them. Or a dataset of rows: a Hugging Face `Dataset` or
            `IterableDataset`, or a list or map-style dataset of dicts.
        encoder: what turns texts into vectors.
        text: the field that holds the text: a member of a tar or a key of its json member, a key of a json line, a
            column; lines of a txt file have the one field "text".
        pair: the field that holds the second text, where a record is a pair of texts; the vectors of both stand under
            `text`, with segment ids behind them.
        batch_size: texts in a batch, of about equal length; 32 if neither this nor `max_tokens` is given.
        max_tokens: real tokens in a batch at most, special tokens counted and padding not. A text that is longer is a
            batch of its own.
        shuffle: shuffles by seed and epoch; each full iteration advances the epoch.
        seed: of the shuffle.
        fields: which other fields a batch carries: names, or name -> function of the raw value (`{"label": int}`);
            None carries all as they are.
        num_workers: processes that read and tokenize; 0 does both in the encode worker's thread. The batches and their
            order do not depend on it.
        into: the key for the vectors; the text then stays under its own.
        layout: as for `wrap`.
        prefetch: as for `wrap`.
        cache: as for `wrap`.
        reading: window, lanes and what else reading may need.
    Raises:
        ConfigError: an argument is out of range, or there are more ranks than lanes.
        ShardError: a shard is missing or holds no record.
    """
    if num_workers < 0:
        raise ConfigError(f"num_workers={num_workers}: write a number of at least 0")
    _check_encoder(encoder)
    dataset = TextStream(
        shards,
        encoder,
        text=text,
        pair=pair,
        batch_size=batch_size,
        max_tokens=max_tokens,
        shuffle=shuffle,
        seed=seed,
        fields=fields,
        keep_text_as=text if into is not None else None,
        reading=reading,
    )
    # A lane's batches come in turns with the others', so a worker that is behind for a moment must not stop the rest.
    ahead = _WORKER_BATCHES if num_workers else None
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, prefetch_factor=ahead)
    targets = None if into is None else (into,)
    return EmbeddingLoader(loader, encoder, text=(text,), into=targets, layout=layout, prefetch=prefetch, cache=cache)


@dataclass
class _Counts:
    """What passed through, over the loader's life."""

    epochs: int = 0
    batches: int = 0
    texts: int = 0
    tokens: int = 0
    cut_texts: int = 0
    cut_words: int = 0
    cut_tokens: int = 0
    bad_records: int = 0
    bad_shards: int = 0
    left_texts: int = 0
    read_s: float = 0.0
    tokenize_s: float = 0.0
    encode_s: float = 0.0
    room_wait_s: float = 0.0
    consumer_wait_s: float = 0.0
    peak_ahead_tokens: int = 0


@dataclass
class _Run:
    """What an iteration and whoever ends it both know of it."""

    worker: Prefetcher[_Ready | Skip] | None = None
    ended_by: str | None = None
    is_over: bool = False
    waits_since: float | None = None


class _Iteration(Iterator[Any]):
    """What a training loop iterates. Dropping it ends the worker: it holds the only reference to the generator."""

    def __init__(self, batches: Generator[Any, None, None], run: _Run) -> None:
        self._batches = batches
        self._run = run

    def __next__(self) -> Any:
        self._run.waits_since = time.monotonic()
        for batch in self._batches:
            self._run.waits_since = None
            return batch
        if self._run.ended_by is not None:
            raise LoaderClosedError(self._run.ended_by)
        raise StopIteration

    def end(self, reason: str) -> None:
        """Stop the worker, from whatever thread; the next `next()` says why."""
        if inspect.getgeneratorstate(self._batches) == inspect.GEN_CLOSED:
            return
        self._run.ended_by = reason
        self._run.is_over = True
        if self._run.worker is not None:
            self._run.worker.close()
        # A loop that waits in another thread has the generator running: it wakes up, and ends it there.
        with suppress(ValueError):
            self._batches.close()


@dataclass
class _Ready:
    """A batch whose vectors are queued on the side stream, with the event behind them."""

    batch: Any
    embeddings: dict[Place | None, Embeddings]
    event: torch.cuda.Event | None
    source_state: Any = None
    cursors: Sequence[Cursor | None] = ()
    tokens: int = field(init=False)

    @property
    def report(self) -> ReadReport | None:
        """What reading the batch met."""
        return self.batch.report if isinstance(self.batch, TokenBatch) else None

    def __post_init__(self) -> None:
        self.tokens = sum(embeddings.tokens.num_tokens for embeddings in self.embeddings.values())


class EmbeddingLoader:
    """Batches with embeddings, encoded ahead of the training loop by one worker thread; made by `wrap` and `stream`.

    Iterate it once an epoch. One iteration runs at a time: a new one ends the one before it, whose loop then gets a
    `LoaderClosedError`. Leaving a loop early stops the worker and its processes; so do `close()` and the end of a
    `with` block. Workers of a wrapped DataLoader with `persistent_workers` are its own and stay.
    """

    def __init__(
        self,
        source: Iterable[Any],
        encoder: SupportsEncode,
        *,
        text: tuple[Place, ...] | None,
        into: tuple[Place, ...] | None,
        layout: Layout | None,
        prefetch: int,
        cache: EmbeddingCache | None = None,
    ) -> None:
        _check_encoder(encoder)
        if layout is not None:
            check_choice("layout", layout, Layout)
        if prefetch < 0:
            raise ConfigError(f"prefetch={prefetch}: write a number of at least 0")
        self._stream = _text_stream(source)
        if self._stream is not None and text is None:
            text = (self._stream.text,)
        self.encoder = encoder
        self._cache = cache
        self._encode_texts = encoder.encode if cache is None else cache.of(encoder).encode
        self._source = source
        self._places = text
        self._into = into
        self._layout = layout
        self._prefetch = prefetch
        self._device = encoder.device
        self._side = SideStream(self._device)
        self._counts = _Counts()
        self._own_epoch = 0
        self._closed = False
        self._read_once = False
        self._queues: list[LaneQueue | None] | None = None
        self._peers: Peers | None = None
        if self._stream is not None and self._stream.uneven != "leave" and can_talk():
            self._peers = Peers(self._stream.rank_timeout_s)
        rank, world_size = rank_and_world_size()
        if self._stream is not None and (rank, world_size) != (self._stream.rank, self._stream.world_size):
            raise ConfigError(
                f"the TextStream was made as rank {self._stream.rank} of {self._stream.world_size}, this is rank "
                f"{rank} of {world_size}: make it after torch.distributed is initialised"
            )
        self._source_state: Any = None
        self._running: weakref.ref[_Iteration] | None = None

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"epoch {self.epoch}, {self._counts.batches} batches so far"
        return f"EmbeddingLoader({type(self._source).__name__}, {state})"

    def __iter__(self) -> Iterator[Any]:
        """Start an epoch.

        Raises:
            LoaderClosedError: the loader was closed.
            ConfigError: the wrapped iterable can be read only once, and was.
        """
        if self._closed:
            raise LoaderClosedError("this EmbeddingLoader was closed: make a new one with wrap or stream")
        self._stop("another iteration of this loader began: two loops at once need two loaders")
        if self.encoder.device != self._device:  # it was moved
            self._device = self.encoder.device
            self._side = SideStream(self._device)
        run = _Run()
        iteration = _Iteration(self._iterate(run), run)
        self._running = weakref.ref(iteration)
        return iteration

    def __len__(self) -> int:
        """Batches of an epoch, where the wrapped loader knows it; TypeError otherwise."""
        if self._stream is not None:
            raise TypeError("the number of a stream's batches is not known before its shards were read")
        return len(self._source)  # type: ignore[arg-type]

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration is, counted from 0; each full iteration advances it by one.

        A `TextStream` follows it. The samplers of a wrapped DataLoader do not: as without bertstream, call `set_epoch`.
        """
        return self._own_epoch if self._stream is None else self._stream.epoch

    @property
    def dataset(self) -> Any:
        """The wrapped loader's dataset."""
        return self._source.dataset  # type: ignore[attr-defined]

    @property
    def sampler(self) -> Any:
        """The wrapped loader's sampler."""
        return self._source.sampler  # type: ignore[attr-defined]

    @property
    def batch_sampler(self) -> Any:
        """The wrapped loader's batch sampler."""
        return self._source.batch_sampler  # type: ignore[attr-defined]

    def set_epoch(self, epoch: int) -> None:
        """Choose the next iteration's epoch, and hand it to every part of the wrapped loader that has `set_epoch`.

        A state that was loaded keeps its place where the epoch is its own.
        """
        if epoch < 0:
            raise ConfigError(f"epoch={epoch}: write a number of at least 0")
        if epoch != self.epoch:
            self._queues = None
        self._own_epoch = epoch
        parts: list[Any] = [self._source]
        parts += [getattr(self._source, name, None) for name in ("batch_sampler", "sampler", "dataset")]
        parts.append(getattr(parts[1], "sampler", None))
        for part in {id(part): part for part in parts}.values():
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The place behind the batch that was handed out last, whatever was read ahead; small, and plain JSON.

        For a `stream` it says from where on each lane goes on; it loads with any number of workers, prefetch and ranks.
        For a wrapped DataLoader it is the DataLoader's own (torchdata's `StatefulDataLoader` has one).

        Raises:
            StateError: what is wrapped has no `state_dict`, so it cannot say where it is.
        """
        if self._stream is None:
            state = self._source_state or self._state_of_source()
            return {"version": STATE_VERSION, "epoch": self._own_epoch, "source": state}
        queues = self._stream.starting_queues()
        if self._queues is not None:
            queues = [None if queue is None else queue.cursors for queue in self._queues]
        return pack_state(self._stream.settings, self.epoch, queues, self._stream.bad_records)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on behind the batch after which the state was taken; a running one ends.

        Raises:
            StateError: the state does not fit this loader; `.key` names the difference.
        """
        reason = "a state was loaded while this loop ran"
        if self._stream is not None:
            self._stream.load_state_dict(state)  # first: a state that is refused changes nothing
            self._stop(reason)
            self._queues = None
            # Workers that are kept between epochs hold the stream as it was; the next iteration starts new ones.
            kept = getattr(self._source, "_iterator", None)
            if kept is not None:
                if hasattr(kept, "_shutdown_workers"):
                    kept._shutdown_workers()
                self._source._iterator = None  # type: ignore[attr-defined]
            return
        if not isinstance(state, dict) or "source" not in state:
            raise StateError("this is no state of a loader around a DataLoader", key="source")
        if state.get("version") != STATE_VERSION:
            found = state.get("version")
            raise StateError(
                f"the state is of version {found}, this bertstream reads version {STATE_VERSION}", key="version"
            )
        self._state_of_source()  # says so where there is none
        self._stop(reason)
        self._own_epoch = state["epoch"]
        self._source_state = None
        self._source.load_state_dict(state["source"])  # type: ignore[attr-defined]

    @property
    def _source_has_state(self) -> bool:
        source = self._source
        if isinstance(source, EmbeddingLoader):
            return source._stream is not None or source._source_has_state
        return hasattr(source, "state_dict") and hasattr(source, "load_state_dict")

    def _state_of_source(self) -> Any:
        if not self._source_has_state:
            raise StateError(
                f"a {type(self._source).__name__} cannot say where it is, so this loader cannot resume: wrap "
                "torchdata's StatefulDataLoader, or read shards with bertstream.stream",
                key="source",
            )
        return self._source.state_dict()  # type: ignore[attr-defined]

    def stats(self) -> dict[str, float]:
        """What passed through since the loader was made.

        `epochs`, `batches`, `texts` and `tokens` were handed out; `cut_texts` of them were truncated, by `cut_words`
        (known where texts are lists of words) and `cut_tokens` in all. `bad_records` and `bad_shards` were passed over,
        as `max_bad_records` allowed, and are named in the log; `left_texts` were not handed out, because another rank
        was through and `uneven="stop"`.
        Seconds: `read_s` waiting for the wrapped loader or the shards, `tokenize_s`, `encode_s` (on CUDA: queueing),
        `room_wait_s` the worker waiting because it was far enough ahead, `consumer_wait_s` the training loop waiting
        for a batch (not measured with `prefetch=0`). `peak_ahead_tokens` is the most that was waiting, encoded, to be
        handed out. `read_s` and the waits are added when an iteration ends. What `EmbeddingCache.stats` says stands
        here under `cache_` names, of all loaders that share the cache.
        """
        stats: dict[str, float] = asdict(self._counts)
        if self._cache is not None:
            stats |= {f"cache_{name}": value for name, value in self._cache.stats().items()}
        return stats

    def close(self) -> None:
        """Stop the worker thread and the processes it reads from; the loader cannot be iterated again.

        May be called from any thread, and more than once.
        """
        self._closed = True
        self._stop("the loader was closed while this loop ran")

    def __enter__(self) -> EmbeddingLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _stop(self, reason: str) -> None:
        iteration = self._running() if self._running is not None else None
        if iteration is not None:
            iteration.end(reason)
        self._running = None

    def _iterate(self, run: _Run) -> Generator[Any, None, None]:
        """One epoch. A generator, so that a loop which is left in any way runs the `finally` at once."""
        before = replace(self._counts)
        state = self._state_of_source if self._stream is None and self._source_has_state else None
        if self._peers is not None:
            self._peers.begin()
        with self._others_told():
            items = _Items(self._start_reading(), state)
        ready = self._encoded(items, run)
        worker: Iterator[_Ready | Skip] = ready
        try:
            # The first batch is read in this thread: a sampler draws its seed from torch's global generator then, and
            # must draw it at the same point of the user's program whatever is prefetched.
            with self._others_told():
                items.read_first()
            if self._prefetch:
                worker = run.worker = Prefetcher(
                    ready,
                    weigh=lambda item: 0 if isinstance(item, Skip) else item.tokens,
                    limit=self._prefetch * self.encoder.max_forward_tokens,
                    stage="encode",
                )
            for item in worker:
                if run.ended_by is not None:
                    return
                self._count_bad(item.report)
                if isinstance(item, Skip):
                    self._lane_ended(item)
                    continue
                batch = self._handed_over(item)
                del item  # its memory is the consumer's now, not ours until the next batch
                yield batch
                del batch
            if run.ended_by is not None:
                return
            self._end_epoch()
            self._report_truncation(before)
        finally:
            run.worker = None
            run.is_over = True
            if isinstance(worker, Prefetcher):
                worker.close()
                self._counts.room_wait_s += worker.put_wait_s
                self._counts.consumer_wait_s += worker.get_wait_s
                self._counts.peak_ahead_tokens = max(self._counts.peak_ahead_tokens, worker.peak_weight)
            ready.close()
            items.close()
            self._counts.read_s += items.wait_s

    @contextmanager
    def _others_told(self) -> Iterator[None]:
        """What fails in here makes the other ranks fail too, and by name."""
        try:
            yield
        except BaseException as error:
            if self._peers is not None:
                with suppress(Exception):  # the store may be gone with the rank that held it
                    self._peers.leave(f"{type(error).__name__}: {error}")
            raise

    def _count_bad(self, report: ReadReport | None) -> None:
        if self._stream is None or report is None:
            return
        bad = self._stream.bad_records
        records, shards = bad.records, len(bad.given_up)
        try:
            bad.add(report)
        finally:
            self._counts.bad_records += bad.records - records
            self._counts.bad_shards += len(bad.given_up) - shards

    def _lane_ended(self, skip: Skip) -> None:
        assert self._stream is not None and skip.lane is not None
        own = None if self._queues is None else self._queues[self._stream.rank]
        if own is not None:
            own.drop(skip.lane)

    def _end_epoch(self) -> None:
        self._own_epoch += 1
        self._source_state = None
        if self._stream is not None:
            self._stream.bad_records.check_some_were_good()
            self._stream.set_epoch(self.epoch + 1)
            self._queues = None
        self._counts.epochs += 1

    def _report_truncation(self, before: _Counts) -> None:
        texts = self._counts.cut_texts - before.cut_texts
        if texts:
            logger.warning(
                "truncation cut %d of %d texts in this epoch, by %d words and %d tokens in all: overflow='windows' "
                "keeps them",
                texts,
                self._counts.texts - before.texts,
                self._counts.cut_words - before.cut_words,
                self._counts.cut_tokens - before.cut_tokens,
            )

    def _start_reading(self) -> Iterator[Any]:
        if self._stream is None:
            iterator = iter(self._source)
        else:
            # Workers and iterators take this over as they start; whoever reads the stream without us never sees it.
            self._stream.worker_items = True
            resuming = self._stream.is_resuming
            queues = self._stream.starting_queues()
            try:
                iterator = iter(self._source)
            finally:
                self._stream.worker_items = False
            self._stream.forget_place()
            if not resuming:
                self._stream.bad_records.reset()
            self._queues = [None if queue is None else LaneQueue(queue) for queue in queues]
            if self._peers is None:  # where the other ranks are is not known
                self._queues = [q if rank == self._stream.rank else None for rank, q in enumerate(self._queues)]
        if iterator is self._source:
            if self._read_once:
                raise ConfigError(
                    f"the wrapped {type(self._source).__name__} can be read only once, and was: wrap something that "
                    "starts anew at each iteration, such as a DataLoader or a list of batches"
                )
            self._read_once = True
        return iterator

    def _encoded(self, items: _Items[Any], run: _Run) -> Generator[_Ready | Skip, None, None]:
        """The encode stage: what the worker thread runs."""
        number = 0
        for item, cursors in self._located(items) if self._peers is None else self._agreed(items, self._peers, run):
            if isinstance(item, Skip):
                yield item
                continue
            try:
                ready = self._encode(item)
            except EncoderError as error:
                raise EncoderError(f"batch {number}: {error}", records=error.records) from error
            ready.source_state, ready.cursors = items.source_state, cursors
            yield ready
            del ready
            number += 1

    def _located(self, items: Iterator[Any]) -> Iterator[tuple[Any, Sequence[Cursor | None]]]:
        """Batches, and `Skip`s of lanes that have just ended, each with the places behind them, by rank."""
        for item in items:
            if isinstance(item, BertstreamError):
                raise item
            cursors: list[Cursor | None] = []
            if self._stream is not None and isinstance(item, TokenBatch):
                cursors = [None] * self._stream.world_size
                cursors[self._stream.rank] = item.cursor
            if not isinstance(item, Skip) or item.lane is not None:
                yield item, cursors

    def _agreed(
        self, items: Iterator[Any], peers: Peers, run: _Run
    ) -> Generator[tuple[Any, Sequence[Cursor | None]], None, None]:
        """As `_located`, a batch on every rank or on none."""
        assert self._stream is not None
        pad = self._stream.uneven == "pad"
        located = self._located(items)
        last: TokenBatch | None = None
        reason = "it stopped iterating"
        try:
            while True:
                batch: TokenBatch | None = None
                for item, _ in located:
                    if isinstance(item, TokenBatch):
                        batch = last = item
                        break
                    yield item, ()
                place = None if batch is None or batch.cursor is None else cursor_to_json(batch.cursor)
                places = peers.exchange(place, lambda: run.is_over, lambda: run.waits_since)
                if places is None:
                    return
                if all(place is None for place in places):
                    reason = ""
                    return
                if not pad and None in places:
                    reason = ""
                    self._counts.left_texts += 0 if batch is None else len(batch)
                    for item, _ in located:
                        if run.is_over:
                            return
                        self._counts.left_texts += len(item) if isinstance(item, TokenBatch) else 0
                    return
                if last is None:  # it went on from a place behind its last batch, or no lane is its own
                    last = self._stream.any_batch()
                    assert last is not None  # another rank has one
                cursors = [None if entry is None else cursor_from_json(entry, self.epoch) for entry in places]
                yield (_marked(last, repeated=batch is None) if pad else last), cursors
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else reason
            raise
        finally:
            if reason:
                with suppress(Exception):  # the store may be gone with the rank that held it
                    peers.leave(reason)

    def _encode(self, batch: Any) -> _Ready:
        texts = self._token_batches(batch)
        started = time.perf_counter()
        embeddings = {}
        for place, tokens in texts.items():
            try:
                with self._side.run():
                    embeddings[place] = self._encode_texts(tokens)
            except BertstreamError:
                raise
            except Exception as error:
                raise EncoderError(f"the encoder failed on {tokens!r}: {type(error).__name__}: {error}") from error
        event = self._side.mark()
        self._counts.encode_s += time.perf_counter() - started
        return _Ready(batch, embeddings, event)

    def _token_batches(self, batch: Any) -> dict[Place | None, TokenBatch]:
        if isinstance(batch, TokenBatch):
            return {None: batch}
        places: tuple[Place | None, ...] = self._places or (None,)
        found = {place: batch if place is None else get_place(batch, place) for place in places}
        started = time.perf_counter()
        out = {
            place: texts if isinstance(texts, TokenBatch) else self._tokenized(texts, place, batch)
            for place, texts in found.items()
        }
        self._counts.tokenize_s += time.perf_counter() - started
        return out

    def _tokenized(self, texts: Any, place: Place | None, batch: Any) -> TokenBatch:
        where = "the batch" if place is None else f"text={place!r}"
        if isinstance(texts, Tensor) and not (isinstance(batch, Mapping) and "attention_mask" in batch):
            raise ConfigError(f"{where} is a tensor: padded ids need their attention_mask beside them, in a dict")
        if isinstance(texts, Tensor):
            return TokenBatch.from_padded(texts, batch["attention_mask"], batch.get("token_type_ids"))
        if isinstance(texts, Mapping) and place is None:
            raise ConfigError(f"a batch is a {type(texts).__name__}: name its text, text= one of {list(texts)}")
        if not isinstance(texts, Sequence) or isinstance(texts, str):
            kind = type(texts).__name__
            raise ConfigError(f"{where} is a {kind}: a batch of texts is a list of strings or of lists of words")
        if any(isinstance(entry, tuple) for entry in texts):
            raise ConfigError(
                f"{where} holds tuples: torch's default collate turns lists of words inside out, so that the first "
                "words of all texts stand together. Give the DataLoader "
                "collate_fn=bertstream.TokenCollate(encoder, text=...), which also takes pairs of texts as tuples"
            )
        return TokenBatch.from_texts(self.encoder.tokenizer(texts))

    def _handed_over(self, item: _Ready) -> Any:
        tensors = [t for e in item.embeddings.values() for t in (e.values, e.cu_seqlens, e.present) if t is not None]
        self._side.hand_over(item.event, tensors)
        self._source_state = item.source_state
        for queue, cursor in zip(self._queues or (), item.cursors, strict=False):
            if queue is not None and cursor is not None:
                queue.hand_out(cursor)
        counts = self._counts
        counts.batches += 1
        for embeddings in item.embeddings.values():
            counts.texts += len(embeddings)
            counts.tokens += embeddings.tokens.num_tokens
            counts.cut_texts += int((embeddings.tokens.cut_tokens > 0).sum())
            counts.cut_words += int(embeddings.tokens.cut_words.sum())
            counts.cut_tokens += int(embeddings.tokens.cut_tokens.sum())
        return self._with_vectors(item.batch, item.embeddings)

    def _with_vectors(self, batch: Any, embeddings: dict[Place | None, Embeddings]) -> Any:
        """The user's batch with vectors where the texts were."""
        vectors: dict[Any, Any] = {
            place: found if self._layout is None else found.as_layout(self._layout)
            for place, found in embeddings.items()
        }
        if isinstance(batch, TokenBatch):
            if not batch.fields:
                return vectors[None]
            vectors = {(self._places or ("text",))[0]: vectors[None]}
            batch = {name: as_tensors(column) for name, column in batch.fields.items()}
        elif self._places is None:
            return vectors[None]
        if self._into is not None:
            vectors = dict(zip(self._into, vectors.values(), strict=True))
            if not isinstance(batch, Mapping):
                raise ConfigError(f"into={self._into!r} needs batches that are dicts; this is a {type(batch).__name__}")
        if isinstance(batch, Mapping) and self._layout == "padded":
            masks = {f"{place}_mask": value[1] for place, value in vectors.items() if isinstance(value, tuple)}
            vectors = {p: value[0] if isinstance(value, tuple) else value for p, value in vectors.items()} | masks
        return put_places(batch, vectors)


def _marked(batch: TokenBatch, *, repeated: bool) -> TokenBatch:
    """The batch with `__repeated__` among its fields; a repeated one reports nothing again."""
    marked = replace(batch, fields=batch.fields | {"__repeated__": repeated})
    if repeated:
        marked.report = marked.cursor = None
    return marked


class _Items(Generic[T]):
    """An iterator that counts its waiting and lets its source go on `close()`.

    The source sits in an attribute, not in a local variable: the frames that an exception's traceback keeps alive would
    otherwise keep a DataLoader's worker processes alive.
    """

    def __init__(self, source: Iterator[T], state: Callable[[], Any] | None) -> None:
        self._source: Iterator[T] | None = source
        self._state = state
        self._first: list[tuple[T, Any]] = []
        self.source_state: Any = None
        """Where the source stood behind the item that came last, if it can say so."""
        self.wait_s = 0.0

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._first:
            item, self.source_state = self._first.pop()
            return item
        if self._source is None:
            raise StopIteration
        started = time.perf_counter()
        try:
            item = next(self._source)
        finally:
            self.wait_s += time.perf_counter() - started
        self.source_state = None if self._state is None else self._state()
        return item

    def read_first(self) -> None:
        """Advance the source once; the item comes with the next `next()`."""
        for item in self:
            self._first.append((item, self.source_state))
            return

    def close(self) -> None:
        """End the iteration, and the source with it."""
        source, self._source = self._source, None
        self._first.clear()
        close = getattr(source, "close", None)
        if close is None and not getattr(source, "_persistent_workers", False):
            # A DataLoader's iterator ends its workers when it is collected, which a kept traceback would put off.
            close = getattr(source, "_shutdown_workers", None)
        if close is not None:
            close()


def _check_encoder(encoder: Any) -> None:
    if isinstance(encoder, (str, os.PathLike)):
        raise ConfigError(f"encoder={encoder!r} is a name: pass bertstream.Encoder.from_pretrained({str(encoder)!r})")
    missing = [name for name in ("encode", "tokenizer", "device", "max_forward_tokens") if not hasattr(encoder, name)]
    if missing:
        kind = type(encoder).__name__
        raise ConfigError(f"encoder is a {kind} without {', '.join(missing)}: pass a bertstream.Encoder")


def _text_stream(loader: Any) -> TextStream | None:
    """The `TextStream` that a loader reads, or is; another EmbeddingLoader minds its own."""
    if isinstance(loader, EmbeddingLoader):
        return None
    dataset = getattr(loader, "dataset", loader)
    return dataset if isinstance(dataset, TextStream) else None


def _refuse_replicated(loader: Any) -> None:
    """With several ranks, refuse a map-style DataLoader whose sampler is one of torch's own that know of no ranks."""
    _, world_size = rank_and_world_size()
    if world_size == 1 or not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    unaware = Sampler.__module__
    batch_sampler = loader.batch_sampler
    sampler = loader.sampler if type(batch_sampler) in (BatchSampler, type(None)) else batch_sampler
    if type(sampler).__module__ == unaware:
        raise ConfigError(
            f"{world_size} ranks would each read all {_size(loader.dataset)} records: give the DataLoader "
            "sampler=torch.utils.data.DistributedSampler(dataset), or pass allow_replicated=True if that is meant"
        )


def _size(dataset: Dataset[Any]) -> str:
    return str(len(dataset)) if hasattr(dataset, "__len__") else "the"
