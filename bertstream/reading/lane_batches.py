"""One lane: read records, tokenize them, sort a bucket of them by length, cut it into batches."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..cursors import Cursor
from ..errors import BertstreamError, EncoderError, ShardError
from ..tokens import Indices, Int32Array, ReadReport, SupportsTokenize, TokenBatch
from .batch_fields import fields_of
from .bucket import cut_bucket
from .bucket_records import TokenizedRecords, kinds_of
from .config import StreamConfig
from .lanes import LaneReader
from .mixture import Mixing, MixtureReader
from .options import ReadOptions
from .record_columns import RecordColumns
from .shards import Piece
from .token_ids import tokens_of

# Texts per call of the tokenizer: enough to use its threads, few enough that the first batch comes soon.
_TOKENIZE_CHUNK = 256

# Of each open shard in a chunk, at least: taking some of the rows of a column costs as much for one as for many.
_ROWS_AT_A_TIME = 16


@dataclass(frozen=True, slots=True)
class LaneEnd:
    """What a stream's workers yield in place of a batch for a lane without one, so that they stay in step.

    Attributes:
        lane: the lane that has just ended; None for one that ended before, or never existed.
        report: what reading met after the lane's last batch.
    """

    lane: int | None = None
    report: ReadReport | None = None


@dataclass(frozen=True, kw_only=True)
class LaneBatches:
    """Makes the batches of a lane: a pure function of these settings, the lane's pieces and a cursor.

    Attributes:
        tokenizer: texts to ids.
        options: what is taken from each record.
        reading: bucket size and tolerance.
        batch_size, max_tokens: one of the two says where a bucket is cut; see `cut_bucket`.
        drop_last: whether every batch has `batch_size` texts. Buckets then hold whole batches, so that only the last
            records of a lane are dropped, fewer than a batch.
        shuffle_seed: None does not shuffle.
        num_lanes: of the stream.
        open_shards: pieces that a lane reads in turn.
        keep_text_as: the field under which the raw text stays in the batch; None drops it.
        mixing: how the sources of a mixture are mixed; None for a stream of one source.
    """

    tokenizer: SupportsTokenize
    options: ReadOptions
    reading: StreamConfig
    batch_size: int | None
    max_tokens: int | None
    shuffle_seed: int | None
    num_lanes: int
    open_shards: int
    keep_text_as: str | None
    mixing: Mixing | None = None
    drop_last: bool = False

    def count(self, records: int, start: Cursor) -> int:
        """How many batches of `batch_size` texts `read` makes from a cursor on, if no record is broken or dropped.

        Args:
            records: of the lane that come after the cursor.
            start: the cursor.
        """
        assert self.batch_size is not None
        first, later = self._bucket_sizes(start)
        full, last = divmod(max(0, records - first), later)
        batches = self._batches_in(min(first, records)) + full * self._batches_in(later) + self._batches_in(last)
        return batches - start.batch

    def _batches_in(self, records: int) -> int:
        """Of one bucket with this many records."""
        assert self.batch_size is not None
        return records // self.batch_size if self.drop_last else -(-records // self.batch_size)

    def _bucket_sizes(self, start: Cursor) -> tuple[int, int]:
        """How many records the bucket at a cursor holds when full, and each after it."""
        first = later = self.reading.bucket_size
        if not (start.next_piece or start.open or start.sources):
            # The first bucket of each lane has another size, or all lanes would refill in the same moment.
            first = max(1, later * (start.lane + 1) // self.num_lanes)
        if self.drop_last and self.batch_size is not None:
            first, later = (max(size - size % self.batch_size, self.batch_size) for size in (first, later))
        return first, later

    def read(self, pieces: Sequence[Piece], start: Cursor) -> Generator[TokenBatch | LaneEnd, None, None]:
        """A lane's batches from a cursor on, and finally a `LaneEnd` with the report that no batch could carry.

        While the batches of one bucket are yielded, the next is read and tokenized bit by bit: lanes take turns, and a
        whole bucket at a time would hold up all of them.

        Args:
            pieces: the lane's in this epoch, in order.
            start: where to begin.
        """
        reader = self._reader(pieces, start)
        size, later_size = self._bucket_sizes(start)
        bucket = _Bucket(start, size)
        if not start.batch:  # as for `read` below
            reader.may_skip = self._may_skip
        read = dropped = 0  # since the last batch, like `bad`
        bad: list[ShardError] = []
        words = np.zeros(2, np.int64)
        try:
            self._fill(bucket, reader, size)
            while True:
                if bucket.error is not None:
                    raise bucket.error
                if not bucket.start.batch:  # otherwise its report was counted before the state was saved
                    read += bucket.read + bucket.dropped + sum(error.records or 0 for error in bucket.skipped)
                    dropped += bucket.dropped
                    bad += bucket.skipped + bucket.refused
                words += bucket.words
                # Above the limit nobody receives the bucket, which is not whole.
                if not bucket.read or reader.may_skip < 0:
                    yield LaneEnd(start.lane, ReadReport(read, tuple(bad), _pair(words), dropped))
                    return
                following = _Bucket(bucket.end, later_size)
                reader.may_skip = self._may_skip
                records = TokenizedRecords.concat(bucket.records)
                bucket.records.clear()
                surplus = len(records) % self.batch_size if self.drop_last and self.batch_size is not None else 0
                if not bucket.start.batch:
                    dropped += surplus
                # The last ones that were read, not the longest: those would always be the same.
                batches = self._cut(records.tokens.lengths[: len(records) - surplus], bucket.start)
                for number, batch in enumerate(self._batches_of(bucket, records, batches), 1 + bucket.start.batch):
                    batch.report = ReadReport(read, tuple(bad), _pair(words), dropped) if read else None
                    if read:
                        words[:] = 0
                    read, dropped, bad = 0, 0, []
                    yield batch
                    due = following.size * number // len(batches)
                    if due - following.read >= self._chunk:
                        self._fill(following, reader, due)
                self._fill(following, reader, following.size)
                bucket = following
        finally:
            reader.close()

    def _reader(self, pieces: Sequence[Piece], start: Cursor) -> LaneReader | MixtureReader:
        open_shards, tolerant = self.open_shards, self._tolerant
        if self.mixing is not None:
            return MixtureReader(
                pieces,
                self.mixing,
                start,
                shuffle_seed=self.shuffle_seed,
                num_lanes=self.num_lanes,
                open_shards=open_shards,
                tolerant=tolerant,
            )
        options = self.options if self.options.rows is None else replace(self.options, epoch=start.epoch)
        return LaneReader(pieces, options, start, open_shards=open_shards, tolerant=tolerant)

    @property
    def _chunk(self) -> int:
        """Records that are read and tokenized at a time."""
        return max(_TOKENIZE_CHUNK, _ROWS_AT_A_TIME * self.open_shards)

    @property
    def _tolerant(self) -> bool:
        return self.reading.max_bad_records > 0

    @property
    def _may_skip(self) -> float:
        """The most broken records of a bucket with which the epoch may go on, whatever else was read."""
        limit = self.reading.max_bad_records
        return limit if limit >= 1 else math.inf

    def _fill(self, bucket: _Bucket, reader: LaneReader | MixtureReader, count: int) -> None:
        """Read and tokenize until the bucket has `count` records; an error is kept until the bucket's turn."""
        try:
            while (missing := count - self._held(bucket)) > 0 and not bucket.at_end and bucket.error is None:
                dropped, counted = reader.dropped, self._word_count
                records = reader.read_columns(min(self._chunk, missing))
                bucket.at_end = not len(records)
                bucket.read += len(records)
                bucket.end = reader.cursor(bucket.start)
                bucket.skipped += reader.take_bad()
                bucket.dropped += reader.dropped - dropped
                tokenized, refused = self._tokenized(records)
                bucket.records += tokenized
                bucket.refused += refused
                reader.may_skip -= len(refused)
                bucket.words += self._word_count - counted
        except BertstreamError as error:
            bucket.error = error

    def _held(self, bucket: _Bucket) -> int:
        """How many records count for a bucket's size: with `drop_last` not those that the tokenizer refused."""
        return sum(map(len, bucket.records)) if self.drop_last else bucket.read

    @property
    def _word_count(self) -> Indices:
        return np.array(getattr(self.tokenizer, "word_count", (0, 0)))

    def _cut(self, lengths: Int32Array, start: Cursor) -> list[Indices]:
        shuffle = None
        if self.shuffle_seed is not None:
            # Without byte offsets: the order is the same whether or not a shard can be sought.
            opened = [number for piece in start.open for number in (piece.piece, piece.records)]
            opened += [place.drawn for place in start.sources]
            shuffle = np.random.default_rng((self.shuffle_seed, start.epoch, start.lane, start.next_piece, *opened))
        return cut_bucket(lengths, batch_size=self.batch_size, max_tokens=self.max_tokens, shuffle=shuffle)

    def _batches_of(self, bucket: _Bucket, records: TokenizedRecords, batches: list[Indices]) -> Iterator[TokenBatch]:
        for number, chosen in enumerate(batches, 1):
            if number <= bucket.start.batch:
                continue
            batch = records.batch(chosen, keep_text_as=self.keep_text_as)
            batch.cursor = bucket.end if number == len(batches) else replace(bucket.start, batch=number)
            yield batch

    def _tokenized(self, records: RecordColumns) -> tuple[list[TokenizedRecords], list[ShardError]]:
        """The records with their tokens, none if none are left, and the errors of those that the tokenizer refused."""
        refused: list[ShardError] = []
        while len(records):
            fields = fields_of(records, keep_text_as=self.keep_text_as, with_place=self.options.with_place)
            try:
                tokens = tokens_of(self.tokenizer, records.texts)
                return [TokenizedRecords(tokens, fields, kinds_of(records.texts, tokens))], refused
            except EncoderError as error:
                if not error.records:
                    raise
                at = error.records[0]
                shard, index, field = records.shards[at], int(records.indices[at]), self.options.text
                refusal = ShardError(
                    f"{shard}, record {index}, field {field!r}: {error}", path=shard, index=index, field=field
                )
                if not self._tolerant:
                    raise refusal from error
                refused.append(refusal)
                records = records.pick(np.delete(np.arange(len(records)), at))
        return [], refused


def _pair(words: Indices) -> tuple[int, int]:
    return int(words[0]), int(words[1])


class _Bucket:
    """Records of a lane that are sorted and cut together, as far as they have been read.

    Args:
        start: the lane's cursor before it.
        size: how many records it holds when full.
    """

    def __init__(self, start: Cursor, size: int) -> None:
        self.start = start
        self.size = size
        self.end = start
        """The lane's cursor after it."""
        self.read = self.dropped = 0
        self.at_end = False
        self.records: list[TokenizedRecords] = []
        self.words = np.zeros(2, np.int64)
        """Looked up and found in the word cache, as in `ReadReport`."""
        self.skipped: list[ShardError] = []
        self.refused: list[ShardError] = []
        self.error: BertstreamError | None = None
