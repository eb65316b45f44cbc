"""Several sources mixed by weight, in the place of shards: `Mixture`, and how a lane draws from its sources.

Rules:
    * Each lane has a share of every source, and draws record by record: next comes the source that is furthest below
      its weight, by the counts of records that the lane has drawn so far. Nothing is random, so the counts are all that
      a state needs. Within a source, the lane reads one record of each of its open pieces in turn.
    * A source with fewer pieces than there are lanes is shared out record by record, up to 64 MiB as stored; above,
      there are as many lanes as it has pieces.
    * "first": a lane ends when a source that is due has no record left in it. No record comes twice; what the lane's
      other sources still hold is not read in this epoch.
    * "all": such a source starts over, with its pieces in another order if the stream shuffles, until the lane has read
      its share of every source once. No record is left out.
    * Lanes do not know of each other, so each ends for itself, and so do ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heapreplace
from numbers import Real
from typing import Any, Literal, TypeAlias

import numpy as np

from ..cursors import Cursor, SourcePlace
from ..errors import ConfigError, ShardError, check_choice, shortened
from .access import Access
from .lanes import LaneReader
from .options import SOURCE, ReadOptions
from .record_columns import Gathering, RecordColumns
from .rows import find_rows, name_of_rows
from .shards import Piece, expand_shards

Stopping: TypeAlias = Literal["first", "all"]


class Mixture:
    """Several sources in the place of shards, mixed record by record in proportion to their weights.

    Batches have a field `__source__`, the number of each record's source, and `stats()` counts the texts of each as
    `source_0_texts` and so on. Sources may be of different formats; the text is in a field of the same name.

    Each of the stream's lanes has a share of every source and mixes it by itself, so the proportions hold in every
    bucket (whose batches are sorted by length, and may hold one source alone where lengths differ), and to within a
    record a source over all lanes together. A source of fewer records than there are lanes is
    refused, or is an error of the first lane that has none of it.

    Args:
        sources: pairs of shards and weight: shards as for `bertstream.stream`, or a dataset of rows; weights are
            positive numbers, and count in relation to their sum.
        stopping: when an epoch ends. "first": a lane ends once a source that is due has no record left in it. No record
            comes twice, and what the other sources still hold is not read. `stats()` says how many texts of each came;
            how many a source holds, `bertstream.stream(source, encoder).count_records()` says where counting is fast.
            "all": a source that has no record left starts over, in another order if the stream shuffles, until every
            record of every source came at least once.
    Attributes:
        sources: the shards of each source, as they were given.
        weights: of each source.
        stopping: as given.
    Raises:
        ConfigError: there is no source, one is no pair or itself a mixture, a weight is no positive number, or
            `stopping` is neither of the two.

    Example:
        shards = bertstream.Mixture([("wiki-*.tar", 3), ("reviews.jsonl", 1)], stopping="all")
        loader = bertstream.stream(shards, encoder)
    """

    def __init__(self, sources: Iterable[tuple[Any, float]], *, stopping: Stopping = "first") -> None:
        check_choice("stopping", stopping, Stopping)
        if isinstance(sources, str) or not isinstance(sources, Iterable) or not (pairs := list(sources)):
            raise ConfigError(
                f"sources is {shortened(sources)}: pass pairs of shards and weight, such as "
                "[('a-*.tar', 3), ('b.jsonl', 1)]"
            )
        for number, pair in enumerate(pairs):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ConfigError(f"source {number} is {shortened(pair)}: write a pair of shards and weight")
            shards, weight = pair
            if isinstance(shards, Mixture):
                raise ConfigError(f"source {number} is a Mixture itself: name its sources here, with their weights")
            if not isinstance(weight, Real) or isinstance(weight, bool) or not 0 < weight < math.inf:
                raise ConfigError(f"source {number} has the weight {shortened(weight)}: write a number above 0")
        self.sources: tuple[Any, ...] = tuple(shards for shards, _ in pairs)
        self.weights = tuple(float(weight) for _, weight in pairs)
        self.stopping: Stopping = stopping

    def mixing(self, options: ReadOptions, opened: Sequence[tuple[list[str], Any]]) -> Mixing:
        """How lanes read it.

        Args:
            options: of all sources.
            opened: of `open_sources`.
        """
        return Mixing(tuple(replace(options, rows=rows) for _, rows in opened), self.weights, self.stopping)

    def __repr__(self) -> str:
        return f"Mixture({len(self.sources)} sources, weights={list(self.weights)}, stopping={self.stopping!r})"


def refuse_mixture(shards: Any, job: str) -> None:
    """Refuse a mixture where every record is wanted exactly once.

    Args:
        shards: what the user gave.
        job: the function, for the message.
    Raises:
        ConfigError: they are a mixture.
    """
    if isinstance(shards, Mixture):
        raise ConfigError(
            f"{job} reads every record once, and a Mixture leaves out or repeats some: call it for each of its "
            "`sources` instead"
        )


def open_sources(shards: Any, access: Access) -> list[tuple[list[str], Any]]:
    """The sources of a stream: of each its paths and None, or its name and its dataset of rows.

    Args:
        shards: as for `bertstream.stream`; anything but a mixture is one source.
        access: how shards are opened.
    Raises:
        ConfigError, ShardError: as `find_rows` and `expand_shards`; of a mixture, with the source's number.
    """
    if not isinstance(shards, Mixture):
        return [_opened(shards, access)]
    opened = []
    for number, source in enumerate(shards.sources):
        try:
            opened.append(_opened(source, access))
        except ConfigError as error:
            raise ConfigError(f"source {number} of the mixture: {error}") from error
    return opened


def _opened(shards: Any, access: Access) -> tuple[list[str], Any]:
    rows = find_rows(shards)
    return (expand_shards(shards, access), None) if rows is None else ([name_of_rows(rows)], rows)


@dataclass(frozen=True)
class Mixing:
    """How the lanes of a stream mix.

    Attributes:
        options: of each source, how it is read.
        weights, stopping: of the `Mixture`.
    """

    options: tuple[ReadOptions, ...]
    weights: tuple[float, ...]
    stopping: Stopping


@dataclass
class _Source:
    """A source as a lane reads it.

    Attributes:
        number: of the source.
        reader: of the pass that is running.
        drawn: records taken, over all passes.
        passes: how often the lane has read all of its share.
        fresh: whether this pass has given no record yet.
    """

    number: int
    reader: LaneReader
    drawn: int
    passes: int
    fresh: bool


class MixtureReader:
    """The records of a lane of a mixture from a cursor on; the counterpart of `LaneReader`, with its methods.

    Args:
        pieces: the lane's, of all sources.
        mixing: how they are mixed.
        start: the cursor; its batch is ignored.
        shuffle_seed: of the order of a source that starts over; None keeps the order.
        num_lanes: of the stream. Each lane is at another point of the turns, so that the weights hold over all lanes
            together, where each would round in the same way.
        open_shards: how many pieces of each source are open at a time.
        tolerant: as for `LaneReader`.
    Attributes:
        may_skip, dropped: as of `LaneReader`.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        mixing: Mixing,
        start: Cursor,
        *,
        shuffle_seed: int | None,
        num_lanes: int,
        open_shards: int,
        tolerant: bool,
    ) -> None:
        self.may_skip = math.inf
        self.dropped = 0
        self._mixing = mixing
        self._lane = start
        self._pieces = [[p for p in pieces if p.source == number] for number in range(len(mixing.weights))]
        self._shuffle_seed = shuffle_seed
        self._open_shards = open_shards
        self._tolerant = tolerant
        self._bad: list[ShardError] = []
        self._phase = (start.lane + 0.5) / num_lanes
        places = start.sources or (SourcePlace(),) * len(mixing.weights)
        self._sources = [
            _Source(number, self._reader(number, place), place.drawn, place.passes, fresh=not place.drawn)
            for number, place in enumerate(places)
        ]
        # The smallest first: by how many records of a source were drawn in relation to its weight.
        self._turns = [(self._turn(source), source.number) for source in self._sources]
        heapify(self._turns)

    def read_columns(self, count: int) -> RecordColumns:
        """The next good records: this many, or as many as come before the lane ends or too much was skipped.

        Raises:
            ShardError: a record or shard is broken, or the lane has no record of a source; unless `tolerant`.
        """
        records = Gathering()
        numbers: list[int] = []  # of the records' sources
        places: list[list[int]] = [[] for _ in self._sources]  # of the records that each source has not given yet
        ready = [0] * len(self._sources)  # how many more each can give
        while len(numbers) < count and self._turns and self.may_skip >= 0:
            number = self._turns[0][1]
            source = self._sources[number]
            if not ready[number]:
                source.reader.give(places[number], records)
                places[number] = []
                ready[number] = self._ready(source)
                if not ready[number]:
                    continue
            ready[number] -= 1
            places[number].append(len(numbers))
            numbers.append(number)
            source.drawn += 1
            heapreplace(self._turns, (self._turn(source), number))
        for source in self._sources:
            source.reader.give(places[source.number], records)
        columns = records.columns()
        return replace(columns, fields=columns.fields | {SOURCE: np.array(numbers, np.int64)})

    def _ready(self, source: _Source) -> int:
        """How many records the source that is due can give; with 0, the turns have changed, or too much was skipped."""
        reader = source.reader
        reader.may_skip, dropped = self.may_skip, reader.dropped
        ready = reader.ready()
        self.may_skip = reader.may_skip
        self.dropped += reader.dropped - dropped
        if ready:
            source.fresh = False
        elif self.may_skip >= 0:
            self._exhausted(source)
        return ready

    def cursor(self, lane: Cursor) -> Cursor:
        """After the last record read, where a bucket of this lane and epoch would start."""
        places = []
        for source in self._sources:
            at = source.reader.cursor(lane)
            places.append(SourcePlace(source.drawn, source.passes, at.next_piece, at.open))
        return replace(lane, sources=tuple(places), batch=0)

    def take_bad(self) -> tuple[ShardError, ...]:
        """The broken records and shards skipped since the last call."""
        bad = list(self._bad)
        self._bad.clear()
        for source in self._sources:
            bad += source.reader.take_bad()
        return tuple(bad)

    def close(self) -> None:
        """Close all files."""
        for source in self._sources:
            source.reader.close()

    def _turn(self, source: _Source) -> float:
        return (source.drawn + self._phase) / self._mixing.weights[source.number]

    def _reader(self, number: int, place: SourcePlace) -> LaneReader:
        pieces, options, lane = self._pieces[number], self._mixing.options[number], self._lane
        if place.passes and self._shuffle_seed is not None:
            seed = (self._shuffle_seed, lane.epoch, lane.lane, number, place.passes)
            pieces = [pieces[i] for i in np.random.default_rng(seed).permutation(len(pieces))]
        if options.rows is not None:
            options = replace(options, epoch=lane.epoch + place.passes)
        start = replace(lane, next_piece=place.next_piece, open=place.open)
        return LaneReader(pieces, options, start, open_shards=self._open_shards, tolerant=self._tolerant)

    def _exhausted(self, source: _Source) -> None:
        """The source that is due has no record left: the lane ends, or reads on without it, or it starts over."""
        if source.fresh:
            self._has_none_of(source)
            heappop(self._turns)
        if self._mixing.stopping == "first" or not self._waits_for_others(source):
            self._turns.clear()
        elif not source.fresh:
            self._bad += source.reader.take_bad()
            source.passes += 1
            source.fresh = True
            source.reader = self._reader(source.number, SourcePlace(passes=source.passes))

    def _waits_for_others(self, source: _Source) -> bool:
        """Whether there is another source of which the lane has not read all."""
        return any(number != source.number and not self._sources[number].passes for _, number in self._turns)

    def _has_none_of(self, source: _Source) -> None:
        pieces = self._pieces[source.number]
        name = f", {pieces[0].path}," if pieces else ""
        error = ShardError(
            f"source {source.number} of the mixture{name} has no good record for lane {self._lane.lane}: it has fewer "
            "records than there are lanes, or all are broken or filtered out: write reading=StreamConfig(lanes=) with "
            "a smaller number, or leave the source out",
            path=pieces[0].path if pieces else None,
        )
        if not self._tolerant:
            raise error
        error.records = 0  # those that were broken are counted already
        self._bad.append(error)
