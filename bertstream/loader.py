"""The iterable that a training loop holds: batches come in as text or tokens and go out with embeddings."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

from .caching.cache import EmbeddingCache
from .caching.cached_encoder import CachedEncoder
from .embeddings import Layout, SupportsEncode, SupportsTraining
from .errors import ConfigError, LoaderClosedError, check_at_least, check_choice
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
    fields, targets = as_fields(text), as_fields(into, "into")
    check_pair(pair, fields)
    if pair is not None and text_stream(loader) is not None:
        raise ConfigError(f"pair={pair!r} has no effect on a TextStream, which tokenizes: name it there")
    if targets is not None and fields is None and text_stream(loader) is None:
        raise ConfigError(f"into={into!r} has no effect where a batch is bare texts: name their place with text=")
    if targets is not None and len(targets) != len(fields or (None,)):
        raise ConfigError(f"into={into!r} for text={text!r}: name one place for each text")
    if not allow_replicated:
        _refuse_replicated(loader)
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
    check_at_least("num_workers", num_workers, 0)
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


class EmbeddingLoader(OwnLoader):
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
        text: tuple[Field, ...] | None,
        into: tuple[Field, ...] | None,
        layout: Layout | None,
        pair: Field | None = None,
        prefetch: int | None = None,
        cache: EmbeddingCache | None = None,
        deterministic: bool = False,
    ) -> None:
        _check_encoder(encoder)
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
            _check_cacheable(encoder, self._cached)
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
            ConfigError: the wrapped iterable can be read only once, and was; or the stream is of another rank.
        """
        if self._closed:
            raise LoaderClosedError("this EmbeddingLoader was closed: make a new one with wrap or stream")
        self._stop("another iteration of this loader began: two loops at once need two loaders")
        self._join_ranks()
        if isinstance(self.encoder, SupportsTraining) and not self._parts.deterministic:
            self.encoder.calibrate()
        epoch = Epoch(self._parts)
        self._running = weakref.ref(epoch)
        return epoch.batches()

    def __len__(self) -> int:
        """Batches of an epoch, where the wrapped loader knows it; TypeError otherwise."""
        if self._stream is not None:
            raise TypeError("the number of a stream's batches is not known before its shards were read")
        return len(self._source)  # type: ignore[arg-type]

    def count_records(self) -> int | None:
        """Records of a stream's epoch, broken ones included, where counting is much faster than reading; else None.

        See `TextStream.count_records`. None for a wrapped DataLoader too: it knows its own data.
        """
        return None if self._stream is None else self._stream.count_records()

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration is, counted from 0; each full iteration advances it by one.

        A `TextStream` follows it. The samplers of a wrapped DataLoader do not: as without bertstream, call `set_epoch`.
        """
        return self._progress.epoch

    @property
    def can_resume(self) -> bool:
        """Whether `state_dict` works: for a stream, and around what has a state of its own."""
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
        """The place after the batch that the loop received last, whatever was read ahead; small, and plain JSON.

        For a `stream` it says where each lane continues; it loads with any number of workers, prefetch and ranks. For a
        wrapped DataLoader it is the DataLoader's own (torchdata's `StatefulDataLoader` has one).

        Raises:
            StateError: what is wrapped has no `state_dict`, so it cannot say where it is.
        """
        return self._progress.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue after the batch at which the state was taken; a running one ends.

        Raises:
            StateError: the state does not fit this loader; `.key` names the difference. Nothing has changed then.
        """
        load = self._progress.loading(state)
        self._stop("a state was loaded while this loop ran")
        load()

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
        stats = Stats(asdict(self._parts.counts) | asdict(self._batch_encoder.counts))
        bad = None if self._stream is None else self._stream.progress.bad
        stats["bad_records"], stats["bad_shards"] = (0, 0) if bad is None else (bad.all_records, bad.all_shards)
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

        StageClocks are "read", "tokenize", "encode" (a cache's look-up included), "hand_over", "wait" and "step", see
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
        epoch = self._running() if self._running is not None else None
        if epoch is not None:
            epoch.close("it stopped iterating", closed_by=reason)
        self._running = None

    def _join_ranks(self) -> None:
        """Know the other ranks of a stream once they can be reached: torch.distributed may be initialised late."""
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


def _check_encoder(encoder: Any) -> None:
    if isinstance(encoder, (str, os.PathLike)):
        raise ConfigError(f"encoder={encoder!r} is a name: pass bertstream.Encoder.from_pretrained({str(encoder)!r})")
    missing = [name for name in ("encode", "tokenizer", "device", "max_forward_tokens") if not hasattr(encoder, name)]
    if missing:
        kind = type(encoder).__name__
        raise ConfigError(f"encoder is a {kind} without {', '.join(missing)}: pass a bertstream.Encoder")


def _check_cacheable(encoder: SupportsEncode, cached: CachedEncoder) -> None:
    """Refuse an encoder whose weights may change although nobody unfroze it: its cache would be off, in silence."""
    if isinstance(encoder, SupportsTraining) and not encoder.trainable and cached.prefix() is None:
        raise ConfigError(
            "cache= has no effect: parameters of the encoder require gradients, as those of a model of your own do. "
            "Call encoder.freeze() first; encoder.unfreeze() may come later"
        )


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
