"""`wrap` and `stream`, and the iterable they return: batches of text or tokens go in, embeddings come out."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from .caching.cache import EmbeddingCache
from .embeddings import Layout, SupportsEncode, SupportsTraining
from .errors import ConfigError, LoaderClosedError, check_at_least, check_choice, shortened
from .pipeline.checks import check_cacheable, check_encoder, check_not_replicated
from .pipeline.clocks import Stage, StageClocks
from .pipeline.encode import BatchEncoder
from .pipeline.epoch import Epoch, Parts
from .pipeline.fields import Field, as_fields, check_pair
from .pipeline.plots import plot_step
from .pipeline.source import OwnLoader, Progress, SourceLoop, StreamLoop, has_state, in_workers, text_stream
from .pipeline.stats import LOOP, WORK, Stats, bottleneck
from .reading.config import StreamConfig
from .reading.dataset import Shards, TextStream
from .system.distributed import Peers, can_talk, rank_and_world_size


def wrap(
    loader: Iterable[Any],
    encoder: SupportsEncode,
    *,
    text: Field | Sequence[Field] | None = None,
    pair: Field | None = None,
    into: Field | Sequence[Field] | None = None,
    layout: Layout | None = None,
    prefetch: int | None = None,
    cache: EmbeddingCache | None = None,
    deterministic: bool = False,
    allow_replicated: bool = False,
) -> EmbeddingLoader:
    """Put embeddings into the batches of a loader you already have.

    All other fields, the order and the batch boundaries stay as they are.

    Args:
        loader: a DataLoader, or any iterable of batches: dicts, tuples, lists, namedtuples or dataclasses that hold
            texts, or bare lists of texts. A text is a string or a list of words. Texts that `TokenCollate` has already
            tokenized are used as they are. Padded `input_ids` [B, T] work in a dict that also holds their
            `attention_mask` (and `token_type_ids`, for pairs).
        encoder: turns the texts into vectors.
        text: the key, position or attribute of the texts, or several; None if a batch is the bare texts.
        pair: the field of the second texts, if they form pairs with those at `text`; they stay in the batch.
        into: where the vectors go instead (a new key of a dict), one for each of `text`; the texts then stay.
        layout: None yields `Embeddings`; "padded", "nested", "packed_sequence" or "flat" yield plain tensors. In a dict
            the padded mask is under the vectors' key plus `_mask`; elsewhere the field holds (values, mask). "flat" is
            (values, cu_seqlens). Sentence output is one tensor [B, H] in every layout.
        prefetch: how far the encoder runs ahead in its thread, in forwards' worth of tokens
            (`encoder.max_forward_tokens`); at least one group of batches. 0 encodes batch by batch in `next()`, without
            a thread. None is 2 for an encoder on CUDA. On a CPU, None encodes in `next()`, several batches in one call,
            until the loop leaves the processor idle (because its step waits for a GPU or for I/O, say), and is 8 from
            then on: two threads that both compute on all cores are slower than one. The thread also reads a DataLoader
            without workers, except for an epoch's first batch: if its dataset is bound to your thread (a sqlite
            connection) or draws from torch's global generator, give it `num_workers=1`, or write 0 here.
        cache: keeps vectors, so that none is computed twice; several loaders may share it.
        deterministic: whether the data alone decides which texts share a forward. If False, batches that are ready at
            the same time are encoded together; how many depends on timing, and two runs may differ in the last bits.
            True also takes the encoder's default forward size instead of a measured one; the encoder stays as it is.
        allow_replicated: accept that every rank reads all of the data (not checked for an IterableDataset, which
            divides its data among ranks itself).
    Raises:
        ConfigError: an argument is out of range, or several ranks would each read all of the data.
    """
    if hasattr(loader, "encode"):
        raise ConfigError("the first argument is an encoder: write wrap(loader, encoder)")
    if not isinstance(loader, Iterable):
        raise ConfigError(f"loader is a {type(loader).__name__}: pass an iterable of batches")
    fields, targets = as_fields(text), as_fields(into, "into")
    check_pair(pair, fields)
    if pair is not None and text_stream(loader) is not None:
        raise ConfigError(f"pair={pair!r} has no effect on a TextStream, which tokenizes: pass it there")
    if targets is not None and fields is None and text_stream(loader) is None:
        raise ConfigError(f"into={into!r} has no effect on batches of bare texts: name the texts' field with text=")
    if targets is not None and len(targets) != len(fields or (None,)):
        raise ConfigError(f"into={into!r} for text={text!r}: name one key for each text")
    if not allow_replicated:
        check_not_replicated(loader)
    return EmbeddingLoader(
        loader,
        encoder,
        text=fields,
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
    """Read text shards, bucket the records by length, and yield batches with embeddings.

    A batch is a dict: the records' fields, `__key__`, `__shard__` and `__index__`, and the vectors under the text's
    name. Numbers are tensors [B]; anything else is a list with one entry per text.

    Args:
        shards: paths or URLs of WebDataset tars, jsonl, csv, tsv, txt or Parquet files, all but Parquet also with
            `.gz` or `.zst`; braces (`train-{000..146}.tar`), globs, or a list of them. Or a dataset of rows: a Hugging
            Face `Dataset` or `IterableDataset`, or a list or map-style dataset of dicts.
        encoder: turns texts into vectors.
        text: the field that holds the text: a member of a tar or a key of its json member, a key of a json line, a
            column; lines of a txt file have the one field "text".
        pair: the field that holds the second text, if a record is a pair of texts; the vectors of both are under
            `text`, with segment ids.
        batch_size: texts in a batch, of about equal length; 32 if neither this nor `max_tokens` is given.
        max_tokens: the most tokens in a batch, with special tokens and without padding. A text that is longer is a
            batch of its own.
        shuffle: whether to shuffle, by seed and epoch; each full iteration advances the epoch.
        seed: of the shuffle.
        fields: which other fields a batch carries: names, or name -> function of the raw value (`{"label": int}`);
            None carries all as they are.
        num_workers: processes that read and tokenize; 0 does both in the thread that encodes. The batches and their
            order do not depend on it.
        into: the key for the vectors; the text then stays under its own.
        layout: as for `wrap`.
        prefetch: as for `wrap`.
        cache: as for `wrap`.
        deterministic: as for `wrap`.
        reading: how shards are read, as in `StreamConfig(bucket_size=4096, lanes=16)`; None is `StreamConfig()`.
    Raises:
        ConfigError: an argument is out of range, or a rank would have no data.
        ShardError: a shard is missing or holds no record.
    """
    check_at_least("num_workers", num_workers, 0)
    if reading is not None and not isinstance(reading, StreamConfig):
        raise ConfigError(f"reading={shortened(reading)}: pass a bertstream.StreamConfig")
    check_encoder(encoder)
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


class EmbeddingLoader(OwnLoader):
    """Yields batches with embeddings, encoded ahead of the training loop where that pays; made by `wrap` and `stream`.

    Iterate it once per epoch. One iteration runs at a time: a new one ends the previous one, whose loop then gets a
    `LoaderClosedError`. Leaving a loop early stops the worker and its processes; so do `close()` and the end of a
    `with` block. Workers of a wrapped DataLoader with `persistent_workers` belong to it and keep running.
    """

    def __init__(
        self,
        source: Iterable[Any],
        encoder: SupportsEncode,
        *,
        text: tuple[Field, ...] | None,
        into: tuple[Field, ...] | None,
        layout: Layout | None,
        pair: Field | None = None,
        prefetch: int | None = None,
        cache: EmbeddingCache | None = None,
        deterministic: bool = False,
    ) -> None:
        check_encoder(encoder)
        if layout is not None:
            check_choice("layout", layout, Layout)
        if prefetch is not None:
            check_at_least("prefetch", prefetch, 0)
        self.encoder = encoder
        self._source = source
        self._stream = text_stream(source)
        if self._stream is not None and text is None:
            text = (self._stream.text,)
        if cache is not None and not isinstance(cache, EmbeddingCache):
            raise ConfigError(f"cache={cache!r} is a {type(cache).__name__}: pass a bertstream.EmbeddingCache")
        self._cache = cache
        self._cached = None if cache is None else cache.of(encoder)
        if self._cached is not None:
            check_cacheable(encoder, self._cached)
        self._stages = StageClocks()
        self._batch_encoder = BatchEncoder(encoder, self._cached, self._stages, deterministic=deterministic)
        self._stream_loop = None if self._stream is None else StreamLoop(source, self._stream)
        self._progress: Progress = SourceLoop(source) if self._stream_loop is None else self._stream_loop
        self._parts = Parts(
            progress=self._progress,
            stream=self._stream,
            encoder=self._batch_encoder,
            tokenizer=encoder.tokenizer,
            text=text,
            pair=pair,
            into=into,
            layout=layout,
            prefetch=prefetch,
            deterministic=deterministic,
            clocks=self._stages,
        )
        self._join_ranks()
        self._closed = False
        self._running: weakref.ref[Epoch] | None = None

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"epoch {self.epoch}, {self._parts.counts.batches} batches so far"
        return f"EmbeddingLoader({type(self._source).__name__}, {state})"

    def __iter__(self) -> Iterator[Any]:
        """Start an epoch.

        Raises:
            LoaderClosedError: the loader was closed.
            ConfigError: the wrapped iterable can be read only once, and was; or the stream belongs to another rank.
        """
        if self._closed:
            raise LoaderClosedError("this EmbeddingLoader was closed: make a new one with wrap or stream")
        self._stop("another iteration of this loader began: for two loops, make two loaders")
        self._join_ranks()
        if isinstance(self.encoder, SupportsTraining) and not self._parts.deterministic:
            self.encoder.calibrate()
        epoch = Epoch(self._parts)
        self._running = weakref.ref(epoch)
        return epoch.batches()

    def __len__(self) -> int:
        """The number of batches in an epoch, if the wrapped loader knows it; TypeError otherwise."""
        if self._stream is not None:
            raise TypeError("the number of a stream's batches is not known before its shards are read")
        return len(self._source)  # type: ignore[arg-type]

    def count_records(self) -> int | None:
        """Records in a stream's epoch, with broken ones, if counting is much faster than reading; else None.

        See `TextStream.count_records`. None for a wrapped DataLoader too.
        """
        return None if self._stream is None else self._stream.count_records()

    @property
    def epoch(self) -> int:
        """The epoch of the next iteration, counted from 0; each full iteration advances it by one.

        A `TextStream` follows it. A wrapped DataLoader's samplers do not: call `set_epoch`, as without bertstream.
        """
        return self._progress.epoch

    @property
    def can_resume(self) -> bool:
        """Whether `state_dict` works: for a stream, and if what is wrapped has a `state_dict` itself."""
        return self._stream is not None or has_state(self._source)

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
        """Choose the next iteration's epoch, and pass it to every part of the wrapped loader that has `set_epoch`.

        During iteration it applies to the next epoch. A loaded state is kept only if its epoch matches.
        """
        self._progress.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch that the loop received, whatever was read ahead: small, plain JSON.

        For a `stream` it holds the lanes' cursors, and loads with any number of workers and ranks and any prefetch. For
        a wrapped DataLoader it holds the DataLoader's own state (torchdata's `StatefulDataLoader` has one).

        Raises:
            StateError: what is wrapped has no `state_dict`.
        """
        return self._progress.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the next iteration after the batch at which the state was taken; end a running one.

        Raises:
            StateError: the state does not fit this loader; `.key` names the difference, and nothing changes.
        """
        load = self._progress.loading(state)
        self._stop("a state was loaded while this loop ran")
        load()

    def stats(self) -> Stats:
        """Counts and seconds since the loader was made: a dict of numbers, which `print` shows as a table.

        The loop received `epochs`, `batches`, `texts` and `tokens`. Of the texts, `cut_texts` were truncated, by
        `cut_words` (known where texts are lists of words) and `cut_tokens` in all. `bad_records` and `bad_shards` were
        skipped, as `max_bad_records` allows; the log names them. `left_texts` reached no loop, because another rank had
        finished and `uneven="stop"`; they are counted for two seconds, so there may be more. `encoded_tokens` went to
        the encoder in `encode_calls`. Not in them are texts found in a cache, and `repeated_texts`, which were in the
        same call already (a cache counts its own). `padding_share` is the share of padding if each batch were padded to
        its longest text. A stream has `workers`, and `lanes` of this rank: no more workers than lanes have work.

        Seconds: `read_s` waiting for the wrapped loader, or for the shards, which are tokenized as they are read;
        `tokenize_s` tokenizing a wrapped loader's texts; `lookup_s` in the cache; `encode_s` encoding (on CUDA:
        queueing); `hand_over_s` putting vectors into batches; `room_wait_s` the worker waiting because it is far enough
        ahead (added when an iteration ends); `wait_s` the training loop waiting for a batch; `step_s` what it does
        between two. Where no worker runs ahead, `wait_s` includes all but `step_s`. `texts_per_s` and `tokens_per_s`
        are over `wait_s` plus `step_s`. `peak_ahead_tokens` is the most tokens that were encoded and not yet received.

        Entries named `cache_` are those of `EmbeddingCache.stats`, and cover all loaders that share the cache.
        """
        seconds = self._stages.seconds
        stats = Stats(asdict(self._parts.counts) | asdict(self._batch_encoder.counts))
        bad = None if self._stream is None else self._stream.progress.bad
        if self._stream is not None:
            own = range(self._stream.rank, self._stream.num_lanes, self._stream.world_size)
            stats["workers"], stats["lanes"] = getattr(self._source, "num_workers", 0), len(own)
        stats["bad_records"], stats["bad_shards"] = (0, 0) if bad is None else (bad.all_records, bad.all_shards)
        if self._cached is not None:
            stats["encode_calls"], stats["encoded_tokens"] = self._cached.encode_calls, self._cached.encoded_tokens
        padded = stats.pop("padded_tokens")
        stats["padding_share"] = 1 - stats["tokens"] / padded if padded else 0.0
        stats |= {f"{stage}_s": seconds[stage] for stage in get_args(Stage)}
        stats["lookup_s"] = 0.0
        if self._cached is not None:
            # During a call, its compute time is counted already and the call itself is not.
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
        """Say in one sentence what the training loop waits for, and what would help."""
        return bottleneck(self.stats())

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Write a trace of the stages, the last 20,000 spans, for chrome://tracing or ui.perfetto.dev.

        The stages are "read", "tokenize", "encode" (with a cache's look-up), "hand_over", "wait" and "step", as in
        `stats`. `torch.profiler` shows the first four too, as "bertstream.encode" and so on, and those of the worker
        thread if it profiles all threads
        (`experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True)`).

        Args:
            path: of a .json file.
        Raises:
            OSError: the file cannot be written.
        """
        self._stages.save_trace(path)

    def save_plot(self, path: str | os.PathLike[str]) -> None:
        """Plot where the time of a step goes: the seconds of `stats` as milliseconds per batch.

        The upper part is the training loop, its step and its waiting. The lower part is the work on a batch, which the
        loop waits for. Where a worker runs ahead, all of it but "hand_over" overlaps the step, and the loop waits for
        the rest.

        Args:
            path: of a .png, .svg or .pdf file.
        Raises:
            ConfigError: matplotlib is not installed, or does not know the file's ending.
            OSError: the file cannot be written.
        """
        stats = self.stats()
        per_batch = {stage: 1e3 * stats[f"{stage}_s"] / (stats["batches"] or 1) for stage in LOOP + WORK}
        loop, work = ({stage: per_batch[stage] for stage in stages} for stages in (LOOP, WORK))
        plot_step(path, loop=loop, work=work)

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
        epoch = self._running() if self._running is not None else None
        if epoch is not None:
            epoch.close(reason)
        self._running = None

    def _join_ranks(self) -> None:
        """Connect to a stream's other ranks once they can be reached: torch.distributed may be initialised late."""
        if self._stream is None or self._stream_loop is None:
            return
        rank, world_size = rank_and_world_size()
        if (rank, world_size) != (self._stream.rank, self._stream.world_size):
            raise ConfigError(
                f"the TextStream was made as rank {self._stream.rank} of {self._stream.world_size}, this is rank "
                f"{rank} of {world_size}: make it after torch.distributed is initialised"
            )
        if self._parts.peers is None and self._stream.uneven != "leave" and can_talk():
            self._parts.peers = Peers(self._stream.rank_timeout_s)
            self._stream_loop.knows_all_ranks = True
