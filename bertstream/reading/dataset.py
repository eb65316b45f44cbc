"""Raw text shards in, token batches of about equal lengths out, in an order that any worker count repeats."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

from torch.utils.data import IterableDataset, get_worker_info

from ..cursors import Cursor
from ..errors import BertstreamError, ConfigError, StateError, check_at_least, check_flag
from ..system.distributed import can_talk, rank_and_world_size
from ..system.process import collect_garbage_rarely, exit_with_parent
from ..tokens import SupportsTokenize, TokenBatch
from .bad_records import BadRecords
from .config import StreamConfig
from .counts import RecordCounts
from .functions import Keep, Map, check_can_be_sent
from .lane_batches import LaneBatches, LaneEnd
from .layout import Layout, lay_out, lay_out_mixture, mixes_little
from .mixture import Mixture, open_sources
from .options import RESERVED, SOURCE, Fields, ReadOptions
from .records import begins_with_ids
from .shards import Piece
from .state import Queues, StreamProgress, layout_ranks_of
from .stream_settings import StreamSettings

logger = logging.getLogger(__name__)

Shards: TypeAlias = Any  # paths and URLs, str or PathLike, one or several; or a dataset of rows; or a `Mixture`
StreamItem: TypeAlias = TokenBatch | LaneEnd | BertstreamError
Start: TypeAlias = list[Cursor | None]
"""The cursors from which one process reads its lanes in turn; None for a lane that it only pads its rounds with."""


class HasTokenizer(Protocol):
    """What a stream needs of an encoder."""

    @property
    def tokenizer(self) -> SupportsTokenize: ...


class TextStream(IterableDataset[TokenBatch]):
    """A torch dataset of `TokenBatch`es, tokenized wherever it is iterated; it never touches an accelerator.

    Use it through `bertstream.stream`, or in a `DataLoader(text_stream, batch_size=None)` of your own.

    The shards are dealt to lanes, and the lanes to ranks. Each lane fills a bucket of records, sorts it by length, cuts
    it into batches and shuffles them; the lanes take turns, one batch each. What comes out depends on the shards, the
    seed, the epoch and the number of ranks, never on the number of workers.

    Args:
        shards: paths or URLs, with braces and globs, or a list of them, or a dataset of rows, or a `Mixture`; see
            `bertstream.stream`.
        encoder: anything with the tokenizer to use; the model itself is neither kept nor sent to workers.
        text: the field that holds the text: a string, a list of words, or a list of token ids.
        pair: the field that holds the second text, where a record is a pair of texts.
        batch_size: texts in a batch; 32 if neither this nor `max_tokens` is given.
        max_tokens: real tokens in a batch at most, special tokens included and padding not. A longer text is a batch of
            its own.
        drop_last: whether the last texts of each lane are dropped, and counted, where they are fewer than a batch.
        shuffle: shuffles shards, and batches within a bucket, by seed and epoch. Without it the order is fixed.
        seed: of the shuffle.
        fields: which other fields a batch carries: names, or name -> function of the raw value, or labels that become
            numbers, as for `stream`; "__none__" leaves out `__key__` and its like; None carries all.
        keep: whether a record, a dict of all its fields, is read; called in the workers, as `map` is.
        map: the record to read instead of one that is kept, or None to drop it.
        keep_text_as: the field under which the raw text stays in the batch; None drops it.
        reading: how shards are read.
    Raises:
        ConfigError: an argument is out of range, or a rank would have no data.
        ShardError: a shard is missing or holds no record.
    """

    def __init__(
        self,
        shards: Shards,
        encoder: HasTokenizer,
        *,
        text: str = "text",
        pair: str | None = None,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        drop_last: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        fields: Fields = None,
        keep: Keep | None = None,
        map: Map | None = None,
        keep_text_as: str | None = None,
        reading: StreamConfig | None = None,
    ) -> None:
        super().__init__()
        if batch_size is not None and max_tokens is not None:
            raise ConfigError(f"batch_size={batch_size} and max_tokens={max_tokens}: give one of the two")
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value is not None:
                check_at_least(name, value, 1)
        if drop_last and max_tokens is not None:
            raise ConfigError(
                f"drop_last={drop_last} with max_tokens={max_tokens}: such batches have no fixed number of texts, of "
                "which the last could have too few: leave it out, or write batch_size="
            )
        check_flag("drop_last", drop_last)
        check_flag("shuffle", shuffle)
        check_at_least("seed", seed, 0)
        self.shuffle = shuffle
        self._reading = reading = reading or StreamConfig()
        self.mixture = shards if isinstance(shards, Mixture) else None
        options = ReadOptions(
            text=text,
            pair=pair,
            fields=fields,
            keep=keep,
            map=map,
            access=reading,
            reserved=RESERVED if self.mixture is None else (*RESERVED, SOURCE),
            tokenizer=getattr(encoder.tokenizer, "ids_identity", None),
        )
        self._sources = open_sources(shards, reading)
        rows = None if self.mixture is not None else self._sources[0][1]
        self._options = replace(options, rows=rows)
        self.text = text
        self.uneven, self.rank_timeout_s = reading.uneven, reading.rank_timeout_s
        self.shards = [name for names, _ in self._sources for name in names]
        if repeated := [path for names, _ in self._sources for path, times in Counter(names).items() if times > 1]:
            logger.warning(
                "%d shards are named more than once and are read as many times: %s", len(repeated), repeated[0]
            )
        self.rank, self.world_size = rank_and_world_size()
        self._layout = layout = self._laid_out_for(self.world_size)
        self.num_lanes, self.open_shards = layout.lanes, layout.open_shards
        files = [path for names, rows in self._sources if rows is None for path in names]
        if shuffle and (little := mixes_little(layout, files, reading)):
            logger.warning("%s", little)
        if refusal := layout.refusal(self.world_size, is_rows=rows is not None):
            # With "leave" no rank waits for another or repeats its batches.
            if self.uneven != "leave" or self.world_size > layout.lanes:
                raise ConfigError(refusal)
            logger.warning("some ranks have no data: %s", refusal)
        if not getattr(encoder.tokenizer, "takes_texts", True) and not all(
            begins_with_ids(names[0], replace(options, rows=rows)) for names, rows in self._sources
        ):
            raise ConfigError(
                f"text={text!r}: the encoder has no tokenizer and takes ids alone; make it with its model's tokenizer, "
                "Encoder(model, tokenizer), or name a field of ids, such as 'input_ids'"
            )
        self._batches = LaneBatches(
            tokenizer=encoder.tokenizer,
            options=self._options,
            reading=reading,
            batch_size=32 if batch_size is None and max_tokens is None else batch_size,
            max_tokens=max_tokens,
            drop_last=drop_last,
            shuffle_seed=seed if shuffle else None,
            num_lanes=self.num_lanes,
            open_shards=self.open_shards,
            keep_text_as=keep_text_as,
            mixing=None if self.mixture is None else self.mixture.mixing(options, self._sources),
        )
        self._settings = StreamSettings(self._sources, self.mixture, self._batches, shuffle=shuffle, seed=seed)
        given = {"keep=": keep is not None, "map=": map is not None, "drop_last": drop_last}
        bad = BadRecords(reading.max_bad_records, tuple(name for name, is_given in given.items() if is_given))
        self.progress = StreamProgress(layout, self.rank, self.world_size, bad)
        self._loaded_in_worker = False
        self._counts = RecordCounts()

    def __repr__(self) -> str:
        cut = self._batches
        size = f"max_tokens={cut.max_tokens}" if cut.max_tokens else f"batch_size={cut.batch_size}"
        return (
            f"TextStream({len(self.shards)} shards, text={self.text!r}, {size}, shuffle={self.shuffle}, "
            f"epoch={self.epoch}, rank {self.rank} of {self.world_size})"
        )

    @property
    def settings(self) -> dict[str, Any]:
        """All that the batches and their order depend on, except the epoch; a state of another stream differs in it."""
        return self._settings.within(self.progress.layout)

    @property
    def ranks(self) -> range:
        """All ranks."""
        return range(self.world_size)

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration reads, counted from 0."""
        return self.progress.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; it reaches worker processes that are already running.

        Cursors that were loaded are kept if the epoch is theirs.
        """
        self.progress.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The place after the batch that this process received last, as JSON; `EmbeddingLoader` has its own.

        `StatefulDataLoader` asks for it in each of its workers, and it serves loops without workers.
        """
        worker = get_worker_info()
        state = self.progress.state_dict(self.settings)
        return state | {"worker": None if worker is None else [worker.id, worker.num_workers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue from a state. The number of workers or ranks may have changed.

        Raises:
            StateError: the state is of another version or of a stream with other settings, lacks the lanes of other
                ranks, or was taken in a worker of a `StatefulDataLoader` and is not loaded there.
        """
        self.loading(state)()

    def loading(self, state: Any) -> Callable[[], None]:
        """Check a state as `load_state_dict` does, and return what loads it."""
        worker = get_worker_info()
        here = None if worker is None else [worker.id, worker.num_workers]
        there = state.get("worker") if isinstance(state, dict) else None
        if there != here:
            raise StateError(
                f"the state was taken in DataLoader worker {there} and is loaded in {here} (id, of how many): a "
                "StatefulDataLoader loads a state with the number of workers that it had",
                key="worker",
            )
        ranks = layout_ranks_of(state)
        layout = self._layout if ranks == self._layout.ranks else self._laid_out_for(ranks)
        settings, state = self._settings.completed(layout, state)
        load = self.progress.loading(state, settings, None if layout is self._layout else layout)

        def load_here() -> None:
            load()
            if layout is not self._layout:
                self._say_if_without_data()
            self._loaded_in_worker = worker is not None

        return load_here

    def count_records(self) -> int | None:
        """Records of an epoch, broken ones included, where counting is much faster than reading; else None.

        That is for one rank, and Parquet shards, uncompressed files on a local disk, or rows that have a length;
        without `keep=` and `map=`, which may drop any number; not for a mixture.
        """
        unknown = self.mixture is not None or self._options.keep is not None or self._options.map is not None
        if self.world_size > 1 or unknown:
            return None
        return self._counts.records(self.shards, self._options)

    def count_batches(self) -> int:
        """Batches of the epoch on this rank, with those that it repeats while others have more; nothing is parsed.

        Shuffled pieces are dealt to other lanes in each epoch, so another epoch may have a few more or fewer.

        Raises:
            TypeError: records cannot be counted fast, or batches have no fixed number of texts; it says which.
        """
        layout = self.progress.layout
        lanes = [Cursor(self.epoch, lane) for lane in range(layout.lanes)]
        return self._count(layout, [lanes[rank :: self.world_size] for rank in self.ranks])

    def count_batches_left(self) -> int | None:
        """Those that the next iteration has; None where nobody has asked for the number of all."""
        return self._count(self.progress.next_layout, self.progress.start()) if self._counts.were_asked else None

    def _count(self, layout: Layout, queues: Queues) -> int:
        if self.uneven == "leave" or not can_talk():
            queues = [queues[self.rank]]
        dealt = self._dealt(layout, self.epoch)
        counts = self._counts.batches(self._lane_batches(layout), layout, dealt, queues)
        return min(counts) if self.uneven == "stop" else max(counts)

    def any_batch(self) -> TokenBatch | None:
        """Some batch of the epoch: what a rank without one of its own yields beside the others'."""
        layout = self.progress.layout
        for lane, pieces in enumerate(self._dealt(layout, self.epoch)):
            for item in self._lane_batches(layout).read(pieces, Cursor(self.epoch, lane)):
                if isinstance(item, TokenBatch):
                    return item
        return None

    def __iter__(self) -> Iterator[TokenBatch]:
        self.progress.begin([self.rank])
        layout, start = self.progress.next_layout, self._start_here()
        self.progress.keep(cursor for cursor in start if cursor is not None)
        return self._received(self._read(layout, start, self.epoch))

    def items(self) -> Iterator[StreamItem]:
        """Batches, and a `LaneEnd` for each turn of a lane without one; in a worker, errors as items too.

        For a reader that receives the items of all workers: it drops the `LaneEnd`s, raises the errors, and advances
        `progress`, which stays as it is here.
        """
        layout, start = self.progress.next_layout, self._start_here()
        return self._as_items(self._read(layout, start, self.epoch))

    def _received(self, items: Iterator[TokenBatch | LaneEnd]) -> Iterator[TokenBatch]:
        """For a loop over the stream itself: batches alone, and progress in this process."""
        for item in items:
            self.progress.count(item.report)
            if isinstance(item, TokenBatch):
                self.progress.advance(self.on_this_rank(item.cursor))
                yield item
        self.progress.end_reading()

    def on_this_rank(self, cursor: Cursor | None) -> list[Cursor | None]:
        """A batch's cursor in a list by rank; of the other ranks nothing is known."""
        cursors: list[Cursor | None] = [None] * self.world_size
        cursors[self.rank] = cursor
        return cursors

    @staticmethod
    def _as_items(items: Iterator[TokenBatch | LaneEnd]) -> Iterator[StreamItem]:
        try:
            yield from items
        except BertstreamError as error:
            if get_worker_info() is None:
                raise
            yield error  # torch would rebuild it without its fields

    def _start_here(self) -> Start:
        """This process's share of the rank's lanes: all of them, or a worker's."""
        worker = get_worker_info()
        queue = self.progress.take_start()[self.rank]
        assert queue is not None
        start: Start = [*queue]
        if worker is None:
            return start
        exit_with_parent()
        collect_garbage_rarely()
        if not self._loaded_in_worker:  # else it is this worker's share already
            # Dealt by position and padded to whole rounds, torch's round robin over workers gives the queue's order.
            start += [None] * (-len(queue) % worker.num_workers)
            start = start[worker.id :: worker.num_workers]
        self._loaded_in_worker = False
        return start

    def _read(self, layout: Layout, start: Start, epoch: int) -> Generator[TokenBatch | LaneEnd, None, None]:
        """The lanes' batches in turn."""
        pieces, batches = self._dealt(layout, epoch), self._lane_batches(layout)
        lanes = [None if cursor is None else batches.read(pieces[cursor.lane], cursor) for cursor in start]
        try:
            while any(lane is not None for lane in lanes):
                for i, lane in enumerate(lanes):
                    item = LaneEnd() if lane is None else next(lane)
                    if isinstance(item, LaneEnd):
                        lanes[i] = None
                    yield item
        finally:  # an error of one lane keeps the others alive in its traceback, with their files
            for lane in lanes:
                if lane is not None:
                    lane.close()

    def _laid_out_for(self, ranks: int) -> Layout:
        if self.mixture is not None:
            return lay_out_mixture(self._sources, self._reading, shuffle=self.shuffle, ranks=ranks)
        return lay_out(self.shards, self._options.rows, self._reading, shuffle=self.shuffle, ranks=ranks)

    def _say_if_without_data(self) -> None:
        """After a state of another layout was loaded: it may leave this rank nothing to read in its epoch."""
        queue, pieces = self.progress.start()[self.rank], self._dealt(self.progress.layout, self.epoch)
        if not any(pieces[cursor.lane] for cursor in queue or ()):
            logger.warning(
                "rank %d of %d has no data in the rest of epoch %d: the state's epoch was laid out for fewer ranks; "
                "from the next epoch on it has its own",
                self.rank,
                self.world_size,
                self.epoch,
            )

    def idle_workers(self, num_workers: int) -> str | None:
        """What to write instead of a number of workers of which some have nothing to read; None where all have."""
        busy = sum(map(bool, self._dealt(self._layout, 0)[self.rank :: self.world_size]))
        layout, by_user = self._layout, self._reading.lanes is not None
        return layout.idle_workers(num_workers, busy, self.rank, self.world_size, lanes_by_user=by_user)

    def check_can_be_sent(self, *, failed: bool) -> None:
        """Refuse the user's functions, tokenizer or rows if they cannot be sent to workers that are not forked.

        Args:
            failed: whether sending was tried, and failed.
        Raises:
            ConfigError: with the name of one that cannot be sent.
        """
        tokenizer = {"the encoder's tokenizer, or its word_splitter=,": self._batches.tokenizer}
        rows = {name: rows for (name, *_), rows in self._sources}
        check_can_be_sent(self._options.functions | tokenizer | rows, failed=failed)

    def _dealt(self, layout: Layout, epoch: int) -> list[list[Piece]]:
        return layout.deal(self._batches.shuffle_seed, epoch)

    def _lane_batches(self, layout: Layout) -> LaneBatches:
        return replace(self._batches, num_lanes=layout.lanes, open_shards=layout.open_shards)


class StreamItems(IterableDataset[StreamItem]):
    """A `TextStream` for the DataLoader of a reader that minds its progress itself: yields `TextStream.items()`."""

    def __init__(self, stream: TextStream) -> None:
        super().__init__()
        self._stream = stream

    def __iter__(self) -> Iterator[StreamItem]:
        return self._stream.items()
