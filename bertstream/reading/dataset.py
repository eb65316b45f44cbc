"""Raw text shards -> token batches of about equal lengths, in an order that any worker count repeats."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..embeddings import SupportsEncode
from ..errors import BertstreamError, ConfigError, EncoderError, ShardError, StateError, check_choice
from ..system.distributed import rank_and_world_size
from ..system.process import collect_garbage_rarely, exit_with_parent
from ..tokens import Cursor, Indices, ReadReport, Record, TokenBatch, TokenizedText
from .access import Access
from .bad_records import BadRecords
from .bucket import cut_window, make_batch
from .files import shard_size
from .lanes import LaneQueue, LaneReader
from .options import ReadOptions
from .pieces import count_records, split_shard
from .rows import is_rows, split_rows
from .shards import Piece, expand_shards
from .state import deal, pack_state, unpack_state
from .window import Skip, Window

logger = logging.getLogger(__name__)

# Texts handed to the tokenizer at once: enough for its own threads, little enough to keep a first batch quick.
_TOKENIZE_CHUNK = 256
_MOST_LANES = 32
# About a window of records in a tar, where each takes 2 KiB at least; tokenizing as much text takes two seconds.
_LANE_BYTES = 4 << 20
_OPEN_SHARDS, _OPEN_IN_ALL = 4, 64
_ROW_BYTES = 256  # of a dataset that does not say how large its rows are

Uneven: TypeAlias = Literal["pad", "stop", "leave"]
Shards: TypeAlias = Any  # paths and URLs, str or PathLike, one or several; or a dataset of rows


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig(Access):
    """How shards are read; the defaults suit most corpora.

    Attributes:
        window: records that are held, sorted by length and cut into batches at once, for each lane. Larger means less
            difference of lengths within a batch, better mixing, and more memory.
        lanes: how many independent streams share out the shards; None is one for every 4 MiB of data, 32 at most.
            The order of batches depends on it, not on the number of workers. It bounds the number of ranks.
        open_shards: how many shards, or parts of one, each lane reads at once, a record of each in turn. More mixes
            data that is sorted better, and opens more files. None is 64 in all lanes of a shuffled stream, 4 in each at
            least; 1 for one that is not shuffled.
        max_bad_records: how many broken records and shards an epoch may pass over, over all workers of a rank: a
            number, or a fraction below 1 of the records read, judged once 1,000 were read. 0 raises at the first. Each
            is counted, and named in the log.
        uneven: what ranks whose shards give unequal numbers of batches do, so that none waits for good in a collective
            of the training step. "pad": those that are through repeat their last batch, marked by `__repeated__`, until
            all are. "stop": all end where the first does; `left_texts` counts what was left. "leave": each ends as it
            ends. It takes effect where `torch.distributed` is initialised.
        rank_timeout_s: seconds after which a rank that gave no sign is given up by the others, with an error. It gives
            one when it has read what is encoded together next.
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
    open_shards: int | None = None
    max_bad_records: float = 0
    uneven: Uneven = "pad"
    rank_timeout_s: float = 600

    def __post_init__(self) -> None:
        Access.__post_init__(self)
        if self.max_bad_records < 0 or (self.max_bad_records > 1 and self.max_bad_records % 1):
            raise ConfigError(f"max_bad_records={self.max_bad_records}: write a whole number, or a fraction below 1")
        check_choice("uneven", self.uneven, Uneven)
        if not self.rank_timeout_s > 0:
            raise ConfigError(f"rank_timeout_s={self.rank_timeout_s}: write a number above 0")
        for name in ("window", "lanes", "open_shards"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: write a number of at least 1")


StreamItem: TypeAlias = TokenBatch | Skip | BertstreamError


class TextStream(IterableDataset[TokenBatch]):
    """A torch dataset of `TokenBatch`es, tokenized wherever it is iterated; it never touches an accelerator.

    Use it through `bertstream.stream`, or in a `DataLoader(text_stream, batch_size=None)` of your own.

    The rank's share of the shards is dealt to lanes. Each lane fills a window of records, sorts it by length, cuts it
    into batches and shuffles them; the lanes then take turns, a batch each. What comes out depends on the shards, the
    seed, the epoch and the number of ranks, never on the number of workers.

    Args:
        shards: paths or URLs, with braces and globs, or a list of them, or a dataset of rows; see `bertstream.stream`.
        encoder: the encoder whose tokenizer is used; the model itself is neither kept nor sent to workers.
        text: the field that holds the text, a string or a list of words.
        pair: the field that holds the second text, where a record is a pair of texts.
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
        keep_text_as: str | None = None,
        reading: StreamConfig | None = None,
    ) -> None:
        super().__init__()
        if batch_size is not None and max_tokens is not None:
            raise ConfigError(f"batch_size={batch_size} and max_tokens={max_tokens}: give one of the two")
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}={value!r}: write a whole number of at least 1")
        if not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seed={seed!r}: write a whole number of at least 0")
        self._batch_size = 32 if batch_size is None and max_tokens is None else batch_size
        self._max_tokens = max_tokens
        self._shuffle = shuffle
        self._seed = seed
        self._keep_text_as = keep_text_as
        self._reading = reading = reading or StreamConfig()
        rows = shards if is_rows(shards) else None
        self._options = ReadOptions(text=text, pair=pair, fields=fields, access=reading, rows=rows)
        self.text = text
        self._tokenizer = encoder.tokenizer
        self.bad_records = BadRecords(reading.max_bad_records)
        self.uneven, self.rank_timeout_s = reading.uneven, reading.rank_timeout_s
        self.shards = [type(rows).__name__] if rows is not None else expand_shards(shards, reading)
        if repeated := [path for path, times in Counter(self.shards).items() if times > 1]:
            logger.warning(
                "%d shards are named more than once and are read as many times: %s", len(repeated), repeated[0]
            )
        self._pieces, self.num_lanes, self.open_shards = self._share_out()
        self.rank, self.world_size = rank_and_world_size()
        if self.world_size > self.num_lanes:
            raise ConfigError(
                f"{self.world_size} ranks cannot share {self.num_lanes} lane{'s' * (self.num_lanes > 1)}: write "
                f"reading=StreamConfig(lanes={self.world_size}) or more, and give as many shards where they are "
                "compressed or remote"
            )
        # Shared memory, because a plain attribute does not reach workers that are kept between epochs.
        self._epoch = torch.zeros(1, dtype=torch.int64, device="cpu").share_memory_()
        self._queue: LaneQueue | None = None
        self._resume: list[list[Cursor] | None] | None = None
        self._resume_epoch = 0
        self._resume_in_worker = False
        self.worker_items = False
        """Whether workers yield `Skip`s and errors as items, as `EmbeddingLoader` asks; plain loops see neither."""

    def __repr__(self) -> str:
        size = f"max_tokens={self._max_tokens}" if self._max_tokens else f"batch_size={self._batch_size}"
        return (
            f"TextStream({len(self.shards)} shards, text={self.text!r}, {size}, shuffle={self._shuffle}, "
            f"epoch={self.epoch}, rank {self.rank} of {self.world_size})"
        )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the batches and their order depend on, beside the epoch: a state of another stream is known by it."""
        # Names and sizes: a corpus that was moved to another folder is the same.
        shards = [(re.split(r"[/\\]", piece.path)[-1], piece.start, piece.stop, size) for piece, size in self._pieces]
        parts = {"tokenizer": getattr(self._tokenizer, "identity", None), "shards": shards}
        digests = {name: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for name, value in parts.items()}
        digests["shards"] = f"{len({piece.path for piece, _ in self._pieces})} by the digest {digests['shards']}"
        return {
            "shuffle": self._shuffle,  # first what others follow from
            "seed": self._seed,
            "lanes": self.num_lanes,
            "open_shards": self.open_shards,
            "window": self._reading.window,
            "batch_size": self._batch_size,
            "max_tokens": self._max_tokens,
            "text": list(self._options.texts),
            "passes_over_bad_records": self._reading.max_bad_records > 0,
            **digests,
        }

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration reads, counted from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; it reaches worker processes that are already running.

        A place that was loaded stays where the epoch is its own.
        """
        if epoch < 0:
            raise ConfigError(f"epoch={epoch}: write a number of at least 0")
        if epoch != self.epoch:
            self._resume = self._queue = None
        self._epoch.fill_(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The place behind the batch that this process took last, as JSON; `EmbeddingLoader` has a state of its own.

        It is what `StatefulDataLoader` asks for in each of its workers, and serves loops without workers.
        """
        worker = get_worker_info()
        queues = self.starting_queues()
        if self._queue is not None:
            queues = [None] * self.world_size
            queues[self.rank] = self._queue.cursors
        state = pack_state(self.settings, self.epoch, queues, self.bad_records)
        return state | {"worker": None if worker is None else [worker.id, worker.num_workers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on from a place. The number of workers or ranks may be another than it was.

        Raises:
            StateError: the state is of another version or of a stream with other settings, misses the lanes of other
                ranks, or was taken in a worker of a `StatefulDataLoader` and is not loaded there.
        """
        worker = get_worker_info()
        here = None if worker is None else [worker.id, worker.num_workers]
        there = state.get("worker") if isinstance(state, dict) else None
        if there != here:
            raise StateError(
                f"the state was taken in DataLoader worker {there} and is loaded in {here} (id, of how many): a "
                "StatefulDataLoader loads a state with the number of workers that it had",
                key="worker",
            )
        epoch, queues, counts = unpack_state(state, self.settings)
        self._resume, self._resume_epoch = deal(queues, self.rank, self.world_size), epoch
        self.bad_records.load(counts)
        self._epoch.fill_(epoch)
        self._resume_in_worker = worker is not None
        self._queue = None

    def starting_queues(self) -> list[list[Cursor] | None]:
        """For each rank its lanes with the places from which the next iteration goes on, the next one first.

        None for a rank whose lanes the state that was loaded did not hold.
        """
        if self._resume is not None and self._resume_epoch == self.epoch:
            return self._resume
        lanes = range(self.num_lanes)
        return [
            [Cursor(self.epoch, lane) for lane in lanes[rank :: self.world_size]] for rank in range(self.world_size)
        ]

    @property
    def is_resuming(self) -> bool:
        """Whether the next iteration goes on from a place that was loaded."""
        return self._resume is not None

    def forget_place(self) -> None:
        """Let iterations begin their epoch anew again: the place that was loaded has been taken over by one."""
        self._resume = None

    def count_records(self) -> int | None:
        """Records of an epoch, broken ones included, where counting is much faster than reading; else None.

        So it is for one rank with shards in Parquet, or on disk and not packed; and for rows that have a length.
        """
        if self.world_size > 1:
            return None
        if (rows := self._options.rows) is not None:
            return len(rows) if hasattr(rows, "__len__") else None
        total = 0
        for path in self.shards:
            count = count_records(path, self._options)
            if count is None:
                return None
            total += count
        return total

    def any_batch(self) -> TokenBatch | None:
        """A batch of the epoch, whichever: what a rank that has none of its own hands out beside the others'."""
        for lane, pieces in enumerate(self._lanes(self.epoch)):
            for item in self._lane(pieces, Cursor(self.epoch, lane)):
                if isinstance(item, TokenBatch):
                    return item
        return None

    def __iter__(self) -> Iterator[TokenBatch]:
        worker = get_worker_info()
        num_workers, worker_id = (1, 0) if worker is None else (worker.num_workers, worker.id)
        if worker is not None:
            exit_with_parent()
            collect_garbage_rarely()
        queue = self.starting_queues()[self.rank]
        assert queue is not None
        if not (self.is_resuming or self.worker_items):  # else EmbeddingLoader counts
            self.bad_records.reset()
        self.forget_place()
        places: list[Cursor | None] = [*queue]
        if not self._resume_in_worker:
            # Dealt by position and padded to whole rounds, torch's round robin over workers gives the queue's order.
            places += [None] * (-len(queue) % num_workers)
            places = places[worker_id::num_workers]
        self._resume_in_worker = False
        self._queue = LaneQueue(cursor for cursor in places if cursor is not None)
        items = self._items(places, self.epoch, self._queue)
        if self.worker_items:
            return items  # type: ignore[return-value]  # EmbeddingLoader knows what it asked for
        return self._batches(items)

    def _batches(self, items: Iterator[StreamItem]) -> Iterator[TokenBatch]:
        """For whoever reads the stream without us: batches alone, with broken records counted in this process."""
        for item in items:
            if isinstance(item, (TokenBatch, Skip)) and item.report is not None:
                self.bad_records.add(item.report)
            if isinstance(item, TokenBatch):
                yield item
        self.bad_records.check_some_were_good()

    def _items(self, places: list[Cursor | None], epoch: int, queue: LaneQueue) -> Iterator[StreamItem]:
        """Batches of the lanes at these places in turn, and `Skip`s from lanes that have no more."""
        pieces = self._lanes(epoch)
        lanes = [None if cursor is None else self._lane(pieces[cursor.lane], cursor) for cursor in places]
        try:
            while any(lane is not None for lane in lanes):
                for i, lane in enumerate(lanes):
                    item = Skip() if lane is None else next(lane)
                    if isinstance(item, Skip):
                        lanes[i] = None
                    else:
                        assert item.cursor is not None
                        queue.hand_out(item.cursor)
                    yield item
        except BertstreamError as error:
            if not self.worker_items or get_worker_info() is None:
                raise
            yield error  # torch would rebuild it without its fields
        queue.end()

    def _share_out(self) -> tuple[list[tuple[Piece, int]], int, int]:
        """The shards as pieces with their sizes in bytes, the number of lanes, and how many pieces each has open."""
        most = self._reading.lanes or _MOST_LANES
        open_shards = self._reading.open_shards or (_OPEN_SHARDS if self._shuffle else 1)
        if (rows := self._options.rows) is not None:
            some = len(rows) * _ROW_BYTES // _LANE_BYTES if hasattr(rows, "__len__") else rows.num_shards
            lanes = self._reading.lanes or min(most, max(1, some))
            if self._shuffle and self._reading.open_shards is None:
                open_shards = max(open_shards, _OPEN_IN_ALL // lanes)
            return split_rows(rows, lanes * open_shards), lanes, open_shards
        if len(self.shards) >= most * open_shards:
            # Enough for each lane. Asking a server for thousands of sizes would take longer than it helps.
            return [(Piece(path), 1 if "://" in path else self._size(path)) for path in self.shards], most, open_shards
        sizes = [self._size(path) for path in self.shards]
        total = sum(sizes)
        lanes = self._reading.lanes or min(most, max(1, total // _LANE_BYTES))
        if self._shuffle and self._reading.open_shards is None:
            open_shards = max(open_shards, _OPEN_IN_ALL // lanes)
        wanted = lanes * open_shards
        pieces: list[tuple[Piece, int]] = []
        for path, size in zip(self.shards, sizes, strict=True):
            parts = max(1, round(wanted * size / total)) if len(self.shards) < wanted and size else 1
            split = split_shard(path, parts, self._reading)
            if len(split) < parts:
                logger.info("%s is read in %d pieces where %d are its share: not cut further", path, len(split), parts)
            pieces += [(piece, size // len(split)) for piece in split]
        return pieces, lanes, open_shards

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

    def _lane(self, pieces: list[Piece], start: Cursor) -> Generator[TokenBatch | Skip, None, None]:
        """A lane's batches from a place on, and at last a `Skip` with the report of what no batch could carry.

        A window is read and tokenized while the batches of the one before it are handed out: in one go it would hold up
        all lanes, whose batches come in turns.
        """
        tolerant = self._reading.max_bad_records > 0
        reader = LaneReader(pieces, self._options, start, open_shards=self.open_shards, tolerant=tolerant)
        size = self._reading.window
        if not (start.next_piece or start.open):
            # Lanes would all need a whole window for their first batch; this staggers them.
            size = max(1, size * (start.lane + 1) // self.num_lanes)
        window = Window(start, size)
        self._fill(window, reader, size)
        read = 0  # since the last batch, as is `bad`
        bad: list[ShardError] = []
        try:
            while True:
                if window.error is not None:
                    raise window.error
                if not window.start.batch:  # else what the window met was reported before the place was saved
                    read += window.read + sum(not error.gives_up_shard for error in window.passed_over)
                    bad += window.passed_over + window.refused
                if not window.read:
                    yield Skip(start.lane, ReadReport(read, tuple(bad)))
                    return
                following = Window(window.end, self._reading.window)
                batches = self._cut(window)
                for number, batch in enumerate(self._batches_of(window, batches), 1 + window.start.batch):
                    batch.report = ReadReport(read, tuple(bad)) if read else None
                    read, bad = 0, []
                    yield batch
                    due = following.size * number // len(batches)
                    if due - following.read >= _TOKENIZE_CHUNK:
                        self._fill(following, reader, due)
                self._fill(following, reader, following.size)
                window = following
        finally:
            reader.close()

    def _fill(self, window: Window, reader: LaneReader, count: int) -> None:
        """Read and tokenize a window up to so many records in all; an error is kept for the window's turn."""
        tolerant = self._reading.max_bad_records > 0
        try:
            while window.read < count and not window.at_end and window.error is None:
                chunk = list(islice(iter(reader.read, None), min(_TOKENIZE_CHUNK, count - window.read)))
                window.at_end = not chunk
                window.read += len(chunk)
                window.end = reader.place(window.start)
                window.passed_over += reader.take_bad()
                records, texts, refused = self._tokenized(chunk, tolerant)
                window.records += records
                window.texts += texts
                window.refused += refused
        except BertstreamError as error:
            window.error = error

    def _cut(self, window: Window) -> list[Indices]:
        lengths = np.array([len(text.input_ids) for text in window.texts])
        start = window.start
        # Not the bytes: the order is the same whether or not a place can be sought.
        places = [number for place in start.open for number in (place.piece, place.records)]
        key = (self._seed, start.epoch, start.lane, start.next_piece, *places)
        shuffle = np.random.default_rng(key) if self._shuffle else None
        return cut_window(lengths, batch_size=self._batch_size, max_tokens=self._max_tokens, shuffle=shuffle)

    def _batches_of(self, window: Window, batches: list[Indices]) -> Iterator[TokenBatch]:
        for number, chosen in enumerate(batches, 1):
            if number <= window.start.batch:
                continue
            places = chosen.tolist()
            records, texts = ([column[i] for i in places] for column in (window.records, window.texts))
            batch = make_batch(records, texts, keep_text_as=self._keep_text_as)
            batch.cursor = window.end if number == len(batches) else replace(window.start, batch=number)
            yield batch

    def _tokenized(
        self, records: list[Record], tolerant: bool
    ) -> tuple[list[Record], list[TokenizedText], list[ShardError]]:
        """The records with their tokens; and the errors of those that were passed over, if that is allowed."""
        refused: list[ShardError] = []
        while records:
            try:
                return records, self._tokenizer([record.text for record in records]), refused
            except EncoderError as error:
                if not error.records:
                    raise
                at = records[error.records[0]]
                refusal = ShardError(
                    f"{at.shard}, record {at.index}, field {self.text!r}: {error}",
                    path=at.shard,
                    index=at.index,
                    field=self.text,
                )
                if not tolerant:
                    raise refusal from error
                refused.append(refusal)
                records = [record for record in records if record is not at]
        return [], [], refused
