"""Raw text shards -> token batches of about equal lengths, in an order that any worker count repeats."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .bucket import cut_window, make_batch
from .distributed import rank_and_world_size
from .errors import BertstreamError, ConfigError, EncoderError, ShardError
from .files import Access
from .shards import Piece, ReadOptions, expand_shards, read_records, shard_size, split_shard
from .types import Cursor, Record, SupportsEncode, TokenBatch, TokenizedText

logger = logging.getLogger(__name__)

# Texts handed to the tokenizer at once: enough for its own threads, little enough to keep a first batch quick.
_TOKENIZE_CHUNK = 256
_MOST_LANES = 32
# About a window of records in a tar, where each takes 2 KiB at least; tokenizing as much text takes two seconds.
_LANE_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig(Access):
    """How shards are read; the defaults suit most corpora.

    Attributes:
        window: records that are held, sorted by length and cut into batches at once, for each lane. Larger means less
            difference of lengths within a batch, better mixing, and more memory.
        lanes: how many independent streams share out the shards; None is one for every 4 MiB of data, 32 at most.
            The order of batches depends on it, not on the number of workers. It bounds the number of ranks.
        allow_pipe: whether `pipe:command` may be read, which runs the command in a shell.
        storage_options: handed to fsspec for URLs.
        shard_cache: a folder into which each remote shard is downloaded once, and read from there; None reads remotely.
            It is not bounded, and a copy is not renewed when its origin changes: delete it. Workers and ranks may share
            it. Fewer remote shards than lanes are downloaded at once, to be cut into pieces.
        stall_warning_s: seconds after which a read of a URL or pipe that is still waiting is named in the log; None is
            never.
    Raises:
        ConfigError: a value of a wrong type or out of range.
    """

    window: int = 2048
    lanes: int | None = None

    def __post_init__(self) -> None:
        Access.__post_init__(self)
        for name in ("window", "lanes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: write a number of at least 1")


@dataclass(frozen=True)
class Skip:
    """What a worker yields in place of a batch for a lane that is exhausted, so that workers keep in step."""


StreamItem: TypeAlias = TokenBatch | Skip | BertstreamError


class TextStream(IterableDataset[TokenBatch]):
    """A torch dataset of `TokenBatch`es, tokenized wherever it is iterated; it never touches an accelerator.

    Use it through `bertstream.stream`, or in a `DataLoader(text_stream, batch_size=None)` of your own.

    The rank's share of the shards is dealt to lanes. Each lane fills a window of records, sorts it by length, cuts it
    into batches and shuffles them; the lanes then take turns, a batch each. What comes out depends on the shards, the
    seed, the epoch and the number of ranks, never on the number of workers.

    Args:
        shards: paths or URLs, with braces and globs, or a list of them; see `bertstream.stream`.
        encoder: the encoder whose tokenizer is used; the model itself is neither kept nor sent to workers.
        text: the field that holds the text, a string or a list of words.
        batch_size: texts in a batch; 32 if neither this nor `max_tokens` is given.
        max_tokens: real tokens in a batch at most, special tokens counted and padding not. A text that is longer is a
            batch of its own.
        shuffle: shuffles shards, and batches within a window, by seed and epoch. Without it the order is fixed.
        seed: of the shuffle.
        fields: which other fields a batch carries: names, or name -> function of the raw value; None carries all.
        keep_text_as: the field under which the raw text stays in the batch; None drops it.
        reading: how shards are read.
    Raises:
        ConfigError: an argument is out of range, or there are more ranks than lanes.
        ShardError: a shard is missing or holds no record.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        encoder: SupportsEncode,
        *,
        text: str = "text",
        batch_size: int | None = None,
        max_tokens: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        fields: Mapping[str, Callable[[Any], Any]] | Sequence[str] | None = None,
        keep_text_as: str | None = None,
        reading: StreamConfig | None = None,
    ) -> None:
        super().__init__()
        if batch_size is not None and max_tokens is not None:
            raise ConfigError(f"batch_size={batch_size} and max_tokens={max_tokens}: give one of the two")
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: write a number of at least 1")
        if seed < 0:
            raise ConfigError(f"seed={seed}: write a number of at least 0")
        self._batch_size = 32 if batch_size is None and max_tokens is None else batch_size
        self._max_tokens = max_tokens
        self._shuffle = shuffle
        self._seed = seed
        self._keep_text_as = keep_text_as
        self._reading = reading = reading or StreamConfig()
        self._options = ReadOptions(text=text, fields=fields, access=reading)
        self.text = text
        self._tokenizer = encoder.tokenizer
        self.shards = expand_shards(shards, reading)
        self._pieces, self.num_lanes = self._share_out()
        self.rank, self.world_size = rank_and_world_size()
        if self.world_size > self.num_lanes:
            raise ConfigError(
                f"{self.world_size} ranks cannot share {self.num_lanes} lanes: set StreamConfig(lanes=) to at least "
                f"{self.world_size}, and give as many shards where they are compressed or remote"
            )
        # Shared memory, because a plain attribute does not reach workers that are kept between epochs.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.worker_items = False
        """Whether workers yield `Skip`s and errors as items, as `EmbeddingLoader` asks; plain loops see neither."""

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration reads, counted from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; it reaches worker processes that are already running."""
        if epoch < 0:
            raise ConfigError(f"epoch={epoch}: write a number of at least 0")
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[TokenBatch]:
        items = self._items()
        if self.worker_items:
            return items  # type: ignore[return-value]  # EmbeddingLoader knows what it asked for
        return (item for item in items if isinstance(item, TokenBatch))

    def _items(self) -> Iterator[StreamItem]:
        worker = get_worker_info()
        num_workers, worker_id = (1, 0) if worker is None else (worker.num_workers, worker.id)
        epoch = self.epoch
        lanes = self._lanes(epoch)
        queue = [Cursor(epoch, lane) for lane in range(self.rank, self.num_lanes, self.world_size)]
        # Dealt by position and padded to whole rounds, torch's round robin over workers gives the queue's own order.
        rounds = -(-len(queue) // num_workers)
        places = [p if p < len(queue) else None for p in range(worker_id, rounds * num_workers, num_workers)]
        live = [None if p is None else self._lane(lanes[queue[p].lane], queue[p]) for p in places]
        try:
            while any(lane is not None for lane in live):
                for i, lane in enumerate(live):
                    batch = next(lane, None) if lane is not None else None
                    if batch is None:
                        live[i] = None
                        yield Skip()
                    else:
                        yield batch
        except BertstreamError as error:
            if not (self.worker_items and worker is not None):
                raise
            yield error  # torch would rebuild it without its fields

    def _share_out(self) -> tuple[list[tuple[Piece, int]], int]:
        """The shards as pieces with their sizes in bytes, and the number of lanes."""
        most = self._reading.lanes or _MOST_LANES
        if len(self.shards) >= most:
            # Enough for a shard or more a lane. Asking a server for thousands of sizes would take longer than it helps.
            return [(Piece(path), 1 if "://" in path else self._size(path)) for path in self.shards], most
        sizes = [self._size(path) for path in self.shards]
        lanes = self._reading.lanes or min(most, max(1, sum(sizes) // _LANE_BYTES))
        pieces: list[tuple[Piece, int]] = []
        for path, size in zip(self.shards, sizes, strict=True):
            parts = max(1, round(lanes * size / sum(sizes))) if len(self.shards) < lanes and size else 1
            split = split_shard(path, parts, self._reading)
            if len(split) < parts:
                logger.info("%s feeds %d lanes where %d are its share: it cannot be split", path, len(split), parts)
            pieces += [(piece, size // len(split)) for piece in split]
        return pieces, lanes

    def _size(self, path: str) -> int:
        return shard_size(path, self._reading)

    def _lanes(self, epoch: int) -> list[list[Piece]]:
        """Deal the epoch's pieces to the lanes, each to the one with the fewest bytes so far."""
        order = range(len(self._pieces))
        if self._shuffle:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._pieces)).tolist()
        lanes: list[list[Piece]] = [[] for _ in range(self.num_lanes)]
        loads = [0] * self.num_lanes
        for i in order:
            piece, size = self._pieces[i]
            lane = loads.index(min(loads))
            lanes[lane].append(piece)
            loads[lane] += max(1, size)
        return lanes

    def _lane(self, pieces: list[Piece], start: Cursor) -> Iterator[TokenBatch]:
        """A lane's batches from a cursor on."""
        records = self._records(pieces, start)
        try:
            while True:
                size = self._reading.window
                if (start.piece, start.record) == (0, 0):
                    # Lanes would all fill their first window at once, and again in step; this staggers them.
                    size = max(1, size * (start.lane + 1) // self.num_lanes)
                window = list(islice(records, size))
                if not window:
                    return
                last, record = window[-1]
                after = replace(start, piece=last, record=record.index - pieces[last].start + 1, batch=0)
                yield from self._window([record for _, record in window], start, after)
                start = after
        finally:
            records.close()

    def _window(self, records: list[Record], start: Cursor, after: Cursor) -> Iterator[TokenBatch]:
        texts = list(self._tokenized(records))
        lengths = np.array([len(text.input_ids) for text in texts])
        key = (self._seed, start.epoch, start.lane, start.piece, start.record)
        shuffle = np.random.default_rng(key) if self._shuffle else None
        batches = cut_window(lengths, batch_size=self._batch_size, max_tokens=self._max_tokens, shuffle=shuffle)
        for number, places in enumerate(batches):
            if number < start.batch:
                continue
            batch = make_batch(
                [records[i] for i in places], [texts[i] for i in places], keep_text_as=self._keep_text_as
            )
            batch.cursor = after if number + 1 == len(batches) else replace(start, batch=number + 1)
            yield batch

    def _tokenized(self, records: list[Record]) -> Iterable[TokenizedText]:
        for first in range(0, len(records), _TOKENIZE_CHUNK):
            chunk = records[first : first + _TOKENIZE_CHUNK]
            try:
                yield from self._tokenizer([record.text for record in chunk])
            except EncoderError as error:
                if not error.records:
                    raise
                at = chunk[error.records[0]]
                raise ShardError(
                    f"{at.shard}, record {at.index}, field {self._options.text!r}: {error}",
                    path=at.shard,
                    index=at.index,
                    field=self._options.text,
                ) from error

    def _records(self, pieces: list[Piece], start: Cursor) -> Generator[tuple[int, Record], None, None]:
        for number in range(start.piece, len(pieces)):
            skip = start.record if number == start.piece else 0
            for record in read_records(pieces[number], self._options, skip=skip):
                yield number, record
