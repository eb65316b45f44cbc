"""The iterable that a training loop holds: batches come in as text or tokens and go out with embeddings."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, get_args

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

from .caching.cache import EmbeddingCache
from .caching.cached_encoder import CachedEncoder
from .embeddings import Layout, SupportsEncode
from .encoding.encoder import Encoder
from .errors import ConfigError, LoaderClosedError, StateError, check_choice
from .pipeline.clocks import Stage, Stages
from .pipeline.encode import EncodeStage, Ready
from .pipeline.epoch import Iteration, Run
from .pipeline.fields import Place, as_places, check_pair, with_vectors
from .pipeline.groups import Groups, group_tokens
from .pipeline.lockstep import agreed, same_on_every_rank
from .pipeline.plots import plot_step
from .pipeline.source import Entry, Source, in_workers, located
from .pipeline.stats import LOOP, WORK, Stats, bottleneck
from .pipeline.step_clock import StepClock
from .reading.dataset import Shards, StreamConfig, TextStream
from .reading.lanes import LaneQueue
from .reading.state import STATE_VERSION, epoch_of, pack_state
from .reading.window import Skip
from .system.distributed import Peers, can_talk, rank_and_world_size
from .system.process import release_openmp_threads, torch_modes, usable_cores
from .system.threads import Prefetcher
from .tokens import ReadReport, TokenBatch

logger = logging.getLogger(__name__)

_LEFT_WAIT_S = 10.0
"""How long a loop that was left waits for the item that its worker has in progress."""

_PREFETCH = {"cpu": 8}
"""Forwards' worth of tokens that the encoder runs ahead in its thread, else 2. What encoding takes varies from batch to
batch more than what a step takes: with 2 on a CPU, a step that sleeps as long as encoding took 1.25 times as long."""


def wrap(
    loader: Iterable[Any],
    encoder: SupportsEncode,
    *,
    text: Place | Sequence[Place] | None = None,
    pair: Place | None = None,
    into: Place | Sequence[Place] | None = None,
    layout: Layout | None = None,
    prefetch: int | None = None,
    cache: EmbeddingCache | None = None,
    deterministic: bool = False,
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
        pair: the place of the second texts, where those at `text` and these are pairs; they stay in the batch.
        into: where the vectors go instead (a new key of a dict), one for each of `text`; the texts then stay.
        layout: None hands out `Embeddings`; "padded", "nested", "packed_sequence" or "flat" hand out plain tensors. In
            a dict the padded mask stands under the key with `_mask` behind it; elsewhere the place holds
            (values, mask). "flat" is (values, cu_seqlens), and sentence output is one [B, H] in every layout.
        prefetch: how far the encoder runs ahead in its thread, in forwards' worth of tokens
            (`encoder.max_forward_tokens`); one group of batches at least. 0 encodes batch by batch in `next()` itself,
            without a thread. None is 2 for an encoder on CUDA; on a CPU `next()` does the work, for several batches at
            once, until the loop is seen to leave the processor idle (because its step waits for a GPU or for I/O, say),
            and then it is 8: two threads that both compute on all cores are slower than one. In the thread a DataLoader
            without workers is read there too, all but an epoch's first batch: where its dataset is bound to your thread
            (a sqlite connection) or draws from torch's global generator, give it `num_workers=1`, or take 0 here.
        cache: where vectors are kept, so that none is computed twice; what several loaders share.
        deterministic: whether which texts share a forward may depend on nothing but the data. Without it several
            batches that are ready at once are encoded together, more or fewer by the clock, and two runs may differ in
            the last bits. The encoder's `max_forward_tokens` is not measured from then on, nor for other loaders of
            it.
        allow_replicated: accept that every rank reads all of the data (not checked where the dataset is an
            IterableDataset, which shares out its data itself).
    Raises:
        ConfigError: an argument is out of range, or several ranks would each read all of the data.
    """
    if hasattr(loader, "encode"):
        raise ConfigError("an encoder stands where the loader belongs: write wrap(loader, encoder)")
    if not isinstance(loader, Iterable):
        raise ConfigError(f"loader is a {type(loader).__name__}: pass an iterable of batches")
    places, targets = as_places(text), as_places(into, "into")
    check_pair(pair, places)
    if pair is not None and _text_stream(loader) is not None:
        raise ConfigError(f"pair={pair!r} has no effect on a TextStream, which tokenizes: name it there")
    if targets is not None and places is None and _text_stream(loader) is None:
        raise ConfigError(f"into={into!r} has no effect where a batch is bare texts: name their place with text=")
    if targets is not None and len(targets) != len(places or (None,)):
        raise ConfigError(f"into={into!r} for text={text!r}: name one place for each text")
    if not allow_replicated:
        _refuse_replicated(loader)
    return EmbeddingLoader(
        loader,
        encoder,
        text=places,
        pair=pair,
        into=targets,
        layout=layout,
        prefetch=prefetch,
        cache=cache,
        deterministic=deterministic,
    )


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
    prefetch: int | None = None,
    cache: EmbeddingCache | None = None,
    deterministic: bool = False,
    reading: StreamConfig | None = None,
) -> EmbeddingLoader:
    """Read text shards, bucket them by length, and hand out batches with embeddings.

    A batch is a dict: the record's fields, `__key__`, `__shard__` and `__index__`, and the vectors under the text's
    name. Numbers are tensors [B], all else is a list with one entry a text.

    Args:
        shards: paths or URLs of WebDataset tars, jsonl, csv, tsv, txt or Parquet files, all but the last also with
            `.gz` or `.zst`; braces (`train-{000..146}.tar`), globs, or a list of them. Or a dataset of rows: a Hugging
            Face `Dataset` or `IterableDataset`, or a list or map-style dataset of dicts.
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
        deterministic: as for `wrap`.
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
    targets = None if into is None else (into,)
    return EmbeddingLoader(
        in_workers(dataset, num_workers),
        encoder,
        text=(text,),
        into=targets,
        layout=layout,
        prefetch=prefetch,
        cache=cache,
        deterministic=deterministic,
    )


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
    padded_tokens: int = 0
    room_wait_s: float = 0.0
    peak_ahead_tokens: int = 0


class EmbeddingLoader:
    """Batches with embeddings, encoded ahead of the training loop where that pays; made by `wrap` and `stream`.

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
        pair: Place | None = None,
        prefetch: int | None = None,
        cache: EmbeddingCache | None = None,
        deterministic: bool = False,
    ) -> None:
        _check_encoder(encoder)
        if layout is not None:
            check_choice("layout", layout, Layout)
        if prefetch is not None and prefetch < 0:
            raise ConfigError(f"prefetch={prefetch}: write a number of at least 0")
        self._stream = _text_stream(source)
        if self._stream is not None and text is None:
            text = (self._stream.text,)
        self.encoder = encoder
        self._cache = cache
        if cache is not None and not hasattr(cache, "of"):
            raise ConfigError(f"cache={cache!r} is a {type(cache).__name__}: pass a bertstream.EmbeddingCache")
        self._cached: CachedEncoder | None = None if cache is None else cache.of(encoder)
        self._source = source
        self._places = text
        self._into = into
        self._layout = layout
        self._prefetch = prefetch
        self._deterministic = deterministic
        self._counts = _Counts()
        self._stages = Stages()
        self._encoding = EncodeStage(encoder, self._cached, text, self._stages, pair=pair)
        self._own_epoch = 0
        self._closed = False
        self._read_once = False
        self._queues: list[LaneQueue | None] | None = None
        self._peers: Peers | None = None
        self._join_ranks()
        self._source_state: Any = None
        self._running: weakref.ref[Iteration] | None = None

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"epoch {self.epoch}, {self._counts.batches} batches so far"
        return f"EmbeddingLoader({type(self._source).__name__}, {state})"

    def __iter__(self) -> Iterator[Any]:
        """Start an epoch.

        Raises:
            LoaderClosedError: the loader was closed.
            ConfigError: the wrapped iterable can be read only once, and was; or the stream is of another rank.
        """
        if self._closed:
            raise LoaderClosedError("this EmbeddingLoader was closed: make a new one with wrap or stream")
        self._stop("another iteration of this loader began: two loops at once need two loaders")
        self._join_ranks()
        if isinstance(self.encoder, Encoder):
            self.encoder.calibrate()
        run = Run()
        iteration = Iteration(self._iterate(run), run, self._stages)
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

        Within a loop it is the epoch of the loop behind that one. A state that was loaded keeps its place where the
        epoch is its own.
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
        epoch = epoch_of(state, "a loader around a DataLoader", ("source",))
        self._state_of_source()  # says so where there is none
        self._stop(reason)
        self._own_epoch = epoch
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

    def stats(self) -> Stats:
        """What passed through since the loader was made: a dict of numbers, which `print` shows as a table.

        `epochs`, `batches`, `texts` and `tokens` were handed out; `cut_texts` of them were truncated, by `cut_words`
        (known where texts are lists of words) and `cut_tokens` in all. `bad_records` and `bad_shards` were passed over,
        as `max_bad_records` allowed, and are named in the log; `left_texts` were not handed out, because another rank
        was through and `uneven="stop"`: at least so many, they are counted for two seconds. `encoded_tokens` went to
        the encoder in `encode_calls`, `repeated_texts` did not, because the same text was in the same call (a cache
        counts its own), nor did what a cache holds.
        `padding_share` is the part that padding would take, were each batch padded to its longest text.

        Seconds: `read_s` waiting for the wrapped loader, or for the shards, which are tokenized as they are read;
        `tokenize_s` of texts that a wrapped loader gave, `lookup_s` in the cache, `encode_s` (on CUDA: queueing),
        `hand_over_s`, `room_wait_s` the worker waiting because it was far enough ahead (added when an iteration ends),
        `wait_s` the training loop waiting for a batch, `step_s` what it does between two. Where no worker runs ahead,
        all but `step_s` is part of `wait_s`. `texts_per_s` and `tokens_per_s` are over `wait_s` and `step_s`.
        `peak_ahead_tokens` is the most that was waiting, encoded, to be handed out.

        What `EmbeddingCache.stats` says stands here under `cache_` names, of all loaders that share the cache.
        """
        seconds = self._stages.seconds
        stats = Stats(asdict(self._counts) | asdict(self._encoding.counts))
        if self._cached is not None:
            stats |= {name: getattr(self._cached, name) for name in ("encode_calls", "encoded_tokens")}
        padded = stats.pop("padded_tokens")
        stats["padding_share"] = 1 - stats["tokens"] / padded if padded else 0.0
        stats |= {f"{stage}_s": seconds[stage] for stage in get_args(Stage)}
        stats["lookup_s"] = 0.0
        if self._cached is not None:
            # In the middle of a call its computing is counted already, the call itself is not.
            stats["lookup_s"] = max(0.0, seconds["encode"] - self._cached.compute_s)
            stats["encode_s"] = self._cached.compute_s
        loop_s = stats["wait_s"] + stats["step_s"]
        stats["texts_per_s"], stats["tokens_per_s"] = (
            stats[n] / loop_s if loop_s else 0.0 for n in ("texts", "tokens")
        )
        if self._cache is not None:
            stats |= {f"cache_{name}": value for name, value in self._cache.stats().items()}
        return stats

    def bottleneck(self) -> str:
        """One sentence: what the training loop waits for, and what would help."""
        return bottleneck(self.stats())

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Write what each stage did when, for chrome://tracing or ui.perfetto.dev: the last 20,000 spans.

        Stages are "read", "tokenize", "encode" (a cache's look-up included), "hand_over", "wait" and "step", see
        `stats`. `torch.profiler` shows the first four too, as "bertstream.encode" and so on; those of the worker thread
        if it is asked for all threads
        (`experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True)`).
        """
        self._stages.save_trace(path)

    def save_plot(self, path: str | os.PathLike[str]) -> None:
        """Draw where the time of a step goes, since the loader was made: milliseconds a batch of what `stats` counts.

        Above is the training loop, its step and its waiting; below the work on a batch, which the loop waits for. Where
        a worker runs ahead, all of it but "hand_over" is done beside the step, and the loop waits for what is left.

        Args:
            path: of a .png, .svg or .pdf file.
        Raises:
            ConfigError: matplotlib is not installed, or does not know the file's ending.
            OSError: the file cannot be written.
        """
        stats = self.stats()
        a_batch = {stage: 1e3 * stats[f"{stage}_s"] / (stats["batches"] or 1) for stage in LOOP + WORK}
        plot_step(path, loop={stage: a_batch[stage] for stage in LOOP}, work={stage: a_batch[stage] for stage in WORK})

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

    def _iterate(self, run: Run) -> Generator[Any, None, None]:
        """One epoch. A generator, so that a loop which is left in any way runs the `finally` at once."""
        before, epoch = replace(self._counts), self.epoch
        state = self._state_of_source if self._stream is None and self._source_has_state else None
        if self._peers is not None:
            self._peers.begin()
        with self._others_told():
            source = Source(self._start_reading(), state, self._stages)
        self._encoding.begin()
        ready = self._encoded(source, run)
        left = False
        worker: Iterator[Ready | Skip] = ready
        try:
            # The first batch is read in this thread: a sampler draws its seed from torch's global generator then, and
            # must draw it at the same point of the user's program whatever is prefetched.
            with self._others_told():
                source.read_first()
            clock = StepClock(usable_cores())
            on_cpu = self.encoder.device.type == "cpu"
            while True:
                if run.worker is None and self._runs_ahead(clock):
                    worker = run.worker = self._ahead(ready)
                if run.worker is not None and on_cpu:
                    release_openmp_threads()
                item = next(worker, None)
                if item is None or run.ended_by is not None:
                    break
                self._count_bad(item.report if isinstance(item, Skip) else _report(item.entry.item))
                if isinstance(item, Skip):
                    self._lane_ended(item)
                    continue
                with self._stages.run("hand_over", 1):
                    batch = self._handed_over(item)
                del item  # its memory is the consumer's now, not ours until the next batch
                clock.begin()
                yield batch
                clock.end()
                del batch
            if run.ended_by is None:
                self._end_epoch(epoch)
                self._report_truncation(before)
        except GeneratorExit:
            left = True
            raise
        finally:
            run.worker = None
            run.is_over = True
            ended = True
            if isinstance(worker, Prefetcher):
                # What was left may be closed by a garbage collection, anywhere: also within a forward, whose lock the
                # worker waits for. So it is not waited for without an end; it then closes what it reads itself.
                ended = worker.close(_LEFT_WAIT_S if left else None)
                self._counts.room_wait_s += worker.put_wait_s
                self._counts.peak_ahead_tokens = max(self._counts.peak_ahead_tokens, worker.peak_weight)
            if ended:
                ready.close()
                source.close()

    def _runs_ahead(self, clock: StepClock) -> bool:
        if self._prefetch is not None:
            return self._prefetch > 0
        return self.encoder.device.type != "cpu" or clock.leaves_room()

    def _ahead(self, ready: Iterator[Ready | Skip]) -> Prefetcher[Ready | Skip]:
        return Prefetcher(
            _entered(torch_modes(), ready),
            weigh=lambda item: 0 if isinstance(item, Skip) else item.tokens,
            limit=(self._prefetch or _PREFETCH.get(self.encoder.device.type, 2)) * self.encoder.max_forward_tokens,
            stage="encode",
        )

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

    def _join_ranks(self) -> None:
        """Know the other ranks of a stream once they can be talked to: torch.distributed may be initialised late."""
        if self._stream is None:
            return
        rank, world_size = rank_and_world_size()
        if (rank, world_size) != (self._stream.rank, self._stream.world_size):
            raise ConfigError(
                f"the TextStream was made as rank {self._stream.rank} of {self._stream.world_size}, this is rank "
                f"{rank} of {world_size}: make it after torch.distributed is initialised"
            )
        if self._peers is None and self._stream.uneven != "leave" and can_talk():
            self._peers = Peers(self._stream.rank_timeout_s)

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
        # Other ranks do not hear of it, and all have the same state: the lane goes with the next batch behind it.
        if own is not None and self._peers is None:
            own.drop(skip.lane)

    def _end_epoch(self, epoch: int) -> None:
        self._source_state = None
        if self._stream is not None:
            self._stream.bad_records.check_some_were_good()
            self._queues = None
        if self.epoch == epoch:  # else the loop chose another
            self._own_epoch += 1
            if self._stream is not None:
                self._stream.set_epoch(epoch + 1)
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

    def _encoded(self, source: Source[Any], run: Run) -> Generator[Ready | Skip, None, None]:
        """What is read, in step with other ranks, through the encode stage."""
        in_step: Callable[[Groups[Entry]], Generator[list[Entry], None, None]] = iter
        if self._peers is not None and self._stream is not None:
            about = same_on_every_rank(self._stream, self._queues)
            in_step = partial(
                agreed, stream=self._stream, peers=self._peers, run=run, about=about, count_left=self._count_left
            )
        return self._encoding.run(
            located(source, self._stream),
            run,
            limit=1 if self._prefetch == 0 else group_tokens(self.encoder),  # prefetch=0 reads nothing ahead
            by_the_clock=not self._deterministic,
            in_step=in_step,
        )

    def _count_left(self, texts: int) -> None:
        self._counts.left_texts += texts

    def _handed_over(self, item: Ready) -> Any:
        self._encoding.hand_over(item)
        self._source_state = item.entry.source_state
        # One may be empty: behind a `set_epoch` in the loop there are no queues; and where a user's collate_fn
        # made something else of a stream's batch there are no cursors.
        for queue, cursor in zip(self._queues or (), item.entry.cursors, strict=False):
            if queue is not None and cursor is not None:
                queue.hand_out(cursor)
            elif queue is not None and self._peers is not None:  # that rank is through
                queue.end()
        counts = self._counts
        counts.batches += 1
        for tokens in item.batches:
            counts.texts += len(tokens)
            counts.tokens += tokens.num_tokens
            counts.padded_tokens += len(tokens) * int(tokens.lengths.max(initial=0))
            counts.cut_texts += int((tokens.cut_tokens > 0).sum())
            counts.cut_words += int(tokens.cut_words.sum())
            counts.cut_tokens += int(tokens.cut_tokens.sum())
        return with_vectors(item.entry.item, item.embeddings, text=self._places, into=self._into, layout=self._layout)


def _entered(modes: AbstractContextManager[object], batches: Iterator[Ready | Skip]) -> Iterator[Ready | Skip]:
    """The batches, each made within these modes of whatever thread asks for it."""
    with modes:
        yield from batches


def _report(batch: Any) -> ReadReport | None:
    """What reading the batch met."""
    return batch.report if isinstance(batch, TokenBatch) else None


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
