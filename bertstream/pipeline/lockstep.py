"""Ranks in lockstep: the same number of batches on each, whatever each has gathered."""

from __future__ import annotations

import copy
import hashlib
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..errors import ConfigError, ShardError
from ..reading.dataset import TextStream
from ..reading.state import cursor_from_json, cursor_to_json
from ..system.distributed import Peers
from ..tokens import TokenBatch
from .groups import GroupBudget
from .progress import Entry
from .source import EpochStatus

logger = logging.getLogger(__name__)


def in_lockstep(
    groups: Iterator[list[Entry]],
    budget: GroupBudget[Entry],
    stream: TextStream,
    peers: Peers,
    status: EpochStatus,
    count_left: Callable[[int], None],
) -> Generator[list[Entry], None, None]:
    """The groups, each with the same number of batches on every rank.

    Each rank offers what it has gathered; all take as many batches as the smallest offer has, and put the rest back.
    Agree only on batches every rank already holds; otherwise ranks could deadlock in a training collective.

    Args:
        groups: this rank's.
        budget: takes back what is left of a group.
        stream: what they are read from; `uneven` says what happens where a rank has no more.
        peers: the other ranks. If this ends early, whoever ends it tells them.
        status: `is_over` and `waits_since` are asked while waiting for them.
        count_left: called with the texts of each batch that nobody receives because another rank has finished.
    Raises:
        ConfigError: the ranks' settings, shards or states differ.
        ShardError: a rank has no record in the whole epoch. Where its records were all broken or dropped, and `uneven`
            is "pad", it repeats a batch of another rank instead.
    """
    pad, epoch = stream.uneven == "pad", stream.epoch
    last: TokenBatch | None = None
    skipped_some = False
    agreed_on = 0

    def exchange(message: Any) -> list[Any] | None:
        return peers.exchange(message, agreed_on, lambda: status.is_over, lambda: status.waits_since)

    about = _must_be_equal(stream)
    everybody = exchange(about)
    if everybody is None:
        return
    _refuse_differences(about, everybody)
    while True:
        group = next(groups, [])
        if status.is_over:
            return
        skipped_some = skipped_some or any(e.report is not None and (e.report.bad or e.report.dropped) for e in group)
        batches = [entry for entry in group if isinstance(entry.item, TokenBatch)]
        if group and not batches:
            yield group
            continue
        offer = [None if e.item.cursor is None else cursor_to_json(e.item.cursor) for e in batches]
        # None where there is no record because all were broken or dropped.
        offers: list[list[Any] | None] | None = exchange(offer or (None if skipped_some else []))
        if offers is None:
            return
        if not agreed_on and stream.progress.from_the_top and (any(offers) or [] in offers):
            _refuse_ranks_without_data(offers, pad=pad)
        if not (any(offers) if pad else all(offers)):
            status.ranks_have_ended = True
            budget.put_back(group)
            _count_rest(groups, status, count_left)
            return
        count = min(len(offered) for offered in offers if offered)
        has_finished = not batches
        if has_finished:
            if last is None:  # its records were all broken or dropped, or it resumed after its last batch
                if skipped_some and stream.progress.from_the_top:
                    logger.warning(
                        "every record of this rank was broken or dropped: it repeats a batch of another rank"
                    )
                last = stream.any_batch()
                assert last is not None  # another rank has one
            group = batches = [Entry(_copied(last)) for _ in range(count)]
        elif len(batches) > count:
            end = next(i for i, entry in enumerate(group) if entry is batches[count])
            budget.put_back(group[end:])
            del group[end:], batches[count:]
        for step, entry in enumerate(batches):
            cursors = [offered[step] if offered else None for offered in offers]
            entry.cursors = [None if cursor is None else cursor_from_json(cursor, epoch) for cursor in cursors]
            entry.number = agreed_on + step
            if pad:
                entry.item = _marked(entry.item, repeated=has_finished)
                entry.set_texts({None: entry.item})
        if pad and not has_finished:
            last = _copied(batches[-1].item)
        agreed_on += count
        del batches, entry, offer, offers  # their memory is the consumer's from now on
        # The others' batches may be light and a repeated one heavy: one group of it could be of any size.
        yield from [[entry] for entry in group] if has_finished else [group]


_COUNT_REST_S = 2.0
"""How long a rank keeps reading with `uneven="stop"`, to say how many texts nobody received."""


def _count_rest(groups: Iterator[list[Entry]], status: EpochStatus, count_left: Callable[[int], None]) -> None:
    """Count what nobody receives, for a while: the others wait for this rank in the next epoch."""
    until = time.monotonic() + _COUNT_REST_S
    try:
        for group in groups:
            if status.is_over:
                return
            if time.monotonic() > until:
                logger.warning("the rest of the epoch, which no rank receives, is not all read: left_texts is too low")
                return
            count_left(sum(len(entry.item) for entry in group if isinstance(entry.item, TokenBatch)))
    except Exception as error:
        logger.warning("the rest of the epoch, which no rank receives, is broken, and left_texts too low: %s", error)


def _must_be_equal(stream: TextStream) -> dict[str, Any]:
    """What ranks must have in common, or some records would come twice and others never."""
    about = stream.settings | {"epoch": stream.epoch, "uneven": stream.uneven}
    queues = stream.progress.running()
    if queues is None or None in queues:
        return about
    cursors = [[cursor_to_json(cursor) for cursor in queue] for queue in queues if queue is not None]
    return about | {"state": hashlib.sha256(repr(cursors).encode()).hexdigest()[:16]}


def _refuse_differences(own: Mapping[str, Any], everybody: Sequence[Mapping[str, Any]]) -> None:
    for rank, theirs in enumerate(everybody):
        for name in own:
            if name in theirs and theirs[name] != own[name]:
                raise ConfigError(
                    f"rank {rank} streams with {name}={theirs[name]!r}, this rank with {name}={own[name]!r}: give them "
                    "the same shards, settings and state, and they share the records among themselves"
                )


def _refuse_ranks_without_data(offers: Sequence[Sequence[Any] | None], *, pad: bool) -> None:
    without = [rank for rank, offered in enumerate(offers) if offered is not None and not offered]
    if without:
        raise ShardError(
            f"of {len(offers)} ranks, {without} have no record in this epoch: there are fewer records than ranks, or "
            "the only shards of these ranks are empty. Use fewer ranks, or more data"
        )
    broken = [rank for rank, offered in enumerate(offers) if offered is None]
    if broken and not pad:
        raise ShardError(
            f"of {len(offers)} ranks, {broken} have only broken records in this epoch, or keep= and map= drop all of "
            "them, so with uneven='stop' no rank would receive a batch. Repair the shards that the log of these ranks "
            "names, or write StreamConfig(uneven='pad')"
        )


def _copied(batch: TokenBatch) -> TokenBatch:
    """The batch with fields of its own: a loop may change those of a batch in place, `batch["label"] -= 1` say."""
    fields = dict(batch.fields)
    for name, values in fields.items():
        with suppress(Exception):  # an open file, say, stays the same one
            fields[name] = copy.deepcopy(values)
    return replace(batch, fields=fields)


def _marked(batch: TokenBatch, *, repeated: bool) -> TokenBatch:
    """The batch with `__repeated__` among its fields; a repeated one is not counted again."""
    marked = replace(batch, fields=batch.fields | {"__repeated__": repeated})
    if repeated:
        marked.report = marked.cursor = None
    return marked
