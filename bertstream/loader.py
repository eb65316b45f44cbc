"""The iterable that a training loop holds: batches come in as text or tokens and go out with embeddings."""

from __future__ import annotations

import inspect
import logging
import os
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

from .cache import EmbeddingCache
from .collate import Place, as_places, as_tensors, get_place, put_places
from .cuda import SideStream
from .dataset import Skip, StreamConfig, TextStream
from .distributed import rank_and_world_size
from .errors import BertstreamError, ConfigError, EncoderError, LoaderClosedError, check_choice
from .prefetch import Prefetcher
from .types import Embeddings, Layout, SupportsEncode, TokenBatch

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    encoder: SupportsEncode,
    *,
    text: str = "text",
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
            (`train-{000..146}.tar`), globs, or a list of them.
        encoder: what turns texts into vectors.
        text: the field that holds the text: a member of a tar or a key of its json member, a key of a json line, a
            column; lines of a txt file have the one field "text".
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
        batch_size=batch_size,
        max_tokens=max_tokens,
        shuffle=shuffle,
        seed=seed,
        fields=fields,
        keep_text_as=text if into is not None else None,
        reading=reading,
    )
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
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
    read_s: float = 0.0
    tokenize_s: float = 0.0
    encode_s: float = 0.0
    room_wait_s: float = 0.0
    consumer_wait_s: float = 0.0
    peak_ahead_tokens: int = 0


@dataclass
class _Run:
    """What an iteration and whoever ends it both know of it."""

    worker: Prefetcher[_Ready] | None = None
    ended_by: str | None = None


class _Iteration(Iterator[Any]):
    """What a training loop iterates. Dropping it ends the worker: it holds the only reference to the generator."""

    def __init__(self, batches: Generator[Any, None, None], run: _Run) -> None:
        self._batches = batches
        self._run = run

    def __next__(self) -> Any:
        for batch in self._batches:
            return batch
        if self._run.ended_by is not None:
            raise LoaderClosedError(self._run.ended_by)
        raise StopIteration

    def end(self, reason: str) -> None:
        """Stop the worker, from whatever thread; the next `next()` says why."""
        if inspect.getgeneratorstate(self._batches) == inspect.GEN_CLOSED:
            return
        self._run.ended_by = reason
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
    tokens: int = field(init=False)

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
        """Choose the next iteration's epoch, and hand it to every part of the wrapped loader that has `set_epoch`."""
        if epoch < 0:
            raise ConfigError(f"epoch={epoch}: write a number of at least 0")
        self._own_epoch = epoch
        parts: list[Any] = [self._source]
        parts += [getattr(self._source, name, None) for name in ("batch_sampler", "sampler", "dataset")]
        parts.append(getattr(parts[1], "sampler", None))
        for part in {id(part): part for part in parts}.values():
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)

    def stats(self) -> dict[str, float]:
        """What passed through since the loader was made.

        `epochs`, `batches`, `texts` and `tokens` were handed out; `cut_texts` of them were truncated, by `cut_words`
        (known where texts are lists of words) and `cut_tokens` in all.
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
        items = _Items(self._start_reading())
        ready = self._encoded(items)
        worker: Iterator[_Ready] = ready
        try:
            # The first batch is read in this thread: a sampler draws its seed from torch's global generator then, and
            # must draw it at the same point of the user's program whatever is prefetched.
            items.read_first()
            if self._prefetch:
                worker = run.worker = Prefetcher(
                    ready,
                    weigh=lambda item: item.tokens,
                    limit=self._prefetch * self.encoder.max_forward_tokens,
                    stage="encode",
                )
            for item in worker:
                if run.ended_by is not None:
                    return
                yield self._handed_over(item)
                del item  # its memory is the consumer's now, not ours until the next batch
            if run.ended_by is not None:
                return
            if self._stream is not None:
                self._stream.set_epoch(self.epoch + 1)
            self._own_epoch += 1
            self._counts.epochs += 1
            self._report_truncation(before)
        finally:
            run.worker = None
            if isinstance(worker, Prefetcher):
                worker.close()
                self._counts.room_wait_s += worker.put_wait_s
                self._counts.consumer_wait_s += worker.get_wait_s
                self._counts.peak_ahead_tokens = max(self._counts.peak_ahead_tokens, worker.peak_weight)
            ready.close()
            items.close()
            self._counts.read_s += items.wait_s

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
            try:
                iterator = iter(self._source)
            finally:
                self._stream.worker_items = False
        if iterator is self._source:
            if self._read_once:
                raise ConfigError(
                    f"the wrapped {type(self._source).__name__} can be read only once, and was: wrap something that "
                    "starts anew at each iteration, such as a DataLoader or a list of batches"
                )
            self._read_once = True
        return iterator

    def _encoded(self, items: Iterator[Any]) -> Generator[_Ready, None, None]:
        """The encode stage: what the worker thread runs."""
        number = 0
        for item in items:
            if isinstance(item, BertstreamError):
                raise item
            if isinstance(item, Skip):
                continue
            try:
                yield self._encode(item)
            except EncoderError as error:
                raise EncoderError(f"batch {number}: {error}", records=error.records) from error
            number += 1

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
        if isinstance(texts, Tensor) and isinstance(batch, Mapping) and "attention_mask" in batch:
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


class _Items(Generic[T]):
    """An iterator that counts its waiting and lets its source go on `close()`.

    The source sits in an attribute, not in a local variable: the frames that an exception's traceback keeps alive would
    otherwise keep a DataLoader's worker processes alive.
    """

    def __init__(self, source: Iterator[T]) -> None:
        self._source: Iterator[T] | None = source
        self._first: list[T] = []
        self.wait_s = 0.0

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._first:
            return self._first.pop()
        if self._source is None:
            raise StopIteration
        started = time.perf_counter()
        try:
            return next(self._source)
        finally:
            self.wait_s += time.perf_counter() - started

    def read_first(self) -> None:
        """Advance the source once; the item comes with the next `next()`."""
        for item in self:
            self._first.append(item)
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
    missing = [name for name in ("encode", "tokenizer", "device", "max_forward_tokens") if not hasattr(encoder, name)]
    if missing:
        kind = type(encoder).__name__
        raise ConfigError(f"encoder is a {kind} without {', '.join(missing)}: pass a bertstream.Encoder")


def _text_stream(loader: Any) -> TextStream | None:
    """The `TextStream` that a loader reads, or is."""
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
