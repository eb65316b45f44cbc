"""Ranks in step: as many batches on each, whatever each has gathered."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..errors import ConfigError
from ..reading.dataset import TextStream
from ..reading.lanes import LaneQueue
from ..reading.state import cursor_from_json, cursor_to_json
from ..system.distributed import Peers
from ..tokens import TokenBatch
from .epoch import Run
from .groups import Groups
from .source import Entry

logger = logging.getLogger(__name__)


def agreed(
    groups: Groups[Entry],
    stream: TextStream,
    peers: Peers,
    run: Run,
    about: Mapping[str, Any],
    count_left: Callable[[int], None],
) -> Generator[list[Entry], None, None]:
    """The groups, each with as many batches on every rank.

    A rank offers what it has gathered, and all take as many batches as the smallest offer has; the others' come again
    in their next group. So no batch that was agreed on waits for a rank to read on: that one's loop may wait for the
    step that this batch is for.

    Args:
        groups: this rank's, of what `located` gives.
        stream: what they are read from; `uneven` says what happens where a rank has no more.
        peers: the other ranks.
        run: whether the iteration is over is asked while waiting for them.
        about: what must be the same on every rank.
        count_left: told the texts of each batch that is not handed out because another rank is through.
    Raises:
        ConfigError: it is not.
    """
    pad, epoch = stream.uneven == "pad", stream.epoch
    last: TokenBatch | None = None
    agreed_on = 0
    reason = "it stopped iterating"
    gathered = iter(groups)

    def exchange(message: Any) -> list[Any] | None:
        return peers.exchange(message, agreed_on, lambda: run.is_over, lambda: run.waits_since)

    try:
        everybody = exchange(dict(about))
        if everybody is None:
            return
        _refuse_differences(about, everybody)
        while True:
            group = next(gathered, [])
            if run.is_over:
                return
            batches = [entry for entry in group if isinstance(entry.item, TokenBatch)]
            if group and not batches:
                yield group
                continue
            offer = [None if e.item.cursor is None else cursor_to_json(e.item.cursor) for e in batches]
            offers: list[list[Any]] | None = exchange(offer)
            if offers is None:
                return
            if not (any(offers) if pad else all(offers)):
                reason = ""
                groups.put_back(group)
                _count_rest(gathered, run, count_left)
                return
            count = min(len(offered) for offered in offers if offered)
            is_through = not batches
            if is_through:
                if last is None:  # it went on from a place behind its last batch, or no lane is its own
                    last = stream.any_batch()
                    assert last is not None  # another rank has one
                group = batches = [Entry(last) for _ in range(count)]
            elif len(batches) > count:
                end = next(place for place, entry in enumerate(group) if entry is batches[count])
                groups.put_back(group[end:])
                del group[end:], batches[count:]
            for step, entry in enumerate(batches):
                places = [offered[step] if offered else None for offered in offers]
                entry.cursors = [None if place is None else cursor_from_json(place, epoch) for place in places]
                entry.number = agreed_on + step
                last = entry.item
                if pad:
                    entry.item = _marked(last, repeated=is_through)
                    entry.texts = {None: entry.item}
            agreed_on += count
            del batches, entry, offer, offers  # their memory is the consumer's from now on
            # The others' batches may be light and one that is repeated heavy: together they could be of any size.
            yield from [[entry] for entry in group] if is_through else [group]
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else reason
        raise
    finally:
        if reason:
            with suppress(Exception):  # the store may be gone with the rank that held it
                peers.leave(reason)


_COUNT_REST_S = 2.0
"""How long a rank reads on where `uneven="stop"`, to say how many texts nobody got."""


def _count_rest(gathered: Iterator[list[Entry]], run: Run, count_left: Callable[[int], None]) -> None:
    """Count what nobody gets, for a while: the others, who are in the next epoch, wait for this rank there."""
    until = time.monotonic() + _COUNT_REST_S
    try:
        for group in gathered:
            if run.is_over:
                return
            if time.monotonic() > until:
                logger.warning("the rest of the epoch, which no rank gets, is not all read: left_texts is too low")
                return
            count_left(sum(len(entry.item) for entry in group if isinstance(entry.item, TokenBatch)))
    except Exception as error:
        logger.warning("the rest of the epoch, which no rank gets, is broken, and left_texts too low: %s", error)


def same_on_every_rank(stream: TextStream, queues: Sequence[LaneQueue | None] | None) -> dict[str, Any]:
    """What the ranks of a stream must have in common, or some records would come twice and others never."""
    about = stream.settings | {"epoch": stream.epoch, "uneven": stream.uneven}
    if queues is None or None in queues:
        return about
    places = [[cursor_to_json(cursor) for cursor in queue.cursors] for queue in queues if queue is not None]
    return about | {"state": hashlib.sha256(repr(places).encode()).hexdigest()[:16]}


def _refuse_differences(own: Mapping[str, Any], everybody: Sequence[Mapping[str, Any]]) -> None:
    for rank, theirs in enumerate(everybody):
        for name in own:
            if name in theirs and theirs[name] != own[name]:
                raise ConfigError(
                    f"rank {rank} streams with {name}={theirs[name]!r}, this rank with {name}={own[name]!r}: give them "
                    "the same shards, settings and state, and they deal the records among themselves"
                )


def _marked(batch: TokenBatch, *, repeated: bool) -> TokenBatch:
    """The batch with `__repeated__` among its fields; a repeated one reports nothing again."""
    marked = replace(batch, fields=batch.fields | {"__repeated__": repeated})
    if repeated:
        marked.report = marked.cursor = None
    return marked
