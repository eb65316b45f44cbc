"""How far the loop over a stream is: the lanes' cursors and the counts of what was skipped, as JSON and back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

from ..cursors import Cursor, OpenPiece, SourcePlace
from ..errors import ShardError, StateError, check_at_least, described, shortened
from ..tokens import ReadReport
from .bad_records import BadRecords
from .lanes import LaneQueue
from .layout import Layout
from .saved_settings import difference

logger = logging.getLogger(__name__)

STATE_VERSION = 1

Queues = list[list[Cursor] | None]
"""For each rank its lanes' cursors, the next one first; None for a rank whose lanes are not known here."""

Place = tuple[int, Queues, dict[str, Any], int]
"""The epoch, the cursors, the counts of what was skipped, and the ranks of the layout."""


class StreamProgress:
    """The one owner of how far a stream is: epoch, cursors of all ranks, and what was skipped.

    Only the receiver of batches advances it: a loop over the `TextStream` itself, or the `EmbeddingLoader` that reads
    ahead of its loop. Reading, here or in workers, just asks where to start.

    Args:
        layout: of the stream; that of a loaded state may differ, and is used to the end of its epoch.
        rank: this process's.
        world_size: how many ranks share the lanes.
        bad: the stream's count of broken records.
    Attributes:
        word_count: how many words were looked up in word caches, over all epochs of this process, and how many found.
    """

    def __init__(self, layout: Layout, rank: int, world_size: int, bad: BadRecords) -> None:
        self.bad = bad
        self.word_count = (0, 0)
        self._layout = layout
        self._rank = rank
        self._world_size = world_size
        # Shared memory, because a plain attribute does not reach workers that are kept between epochs.
        self._epoch = torch.zeros(1, dtype=torch.int64, device="cpu").share_memory_()
        self._loaded: tuple[int, Queues, Layout] | None = None
        self._running: list[LaneQueue | None] | None = None
        self._running_layout = layout
        self.from_the_top = True
        """Whether the iteration that is running began at the start of its epoch, not from a state."""
        self._after_a_batch = False  # it began from a state after a batch, which some rank received

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration reads, counted from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the next iteration's epoch, in running workers too; cursors are kept only if the epoch is theirs."""
        check_at_least("epoch", epoch, 0)
        if epoch != self.epoch:
            self._loaded = self._running = None
        self._epoch.fill_(epoch)

    @property
    def layout(self) -> Layout:
        """That of the iteration that is running; where none is, of the next one."""
        return self.next_layout if self._running is None else self._running_layout

    @property
    def next_layout(self) -> Layout:
        """That of the next iteration."""
        return self._layout if (loaded := self._loaded_here()) is None else loaded[2]

    def start(self) -> Queues:
        """Where the next iteration starts, for each rank."""
        if (loaded := self._loaded_here()) is not None:
            return loaded[1]
        return [
            [Cursor(self.epoch, lane) for lane in range(self._layout.lanes)[rank :: self._world_size]]
            for rank in range(self._world_size)
        ]

    def _loaded_here(self) -> tuple[int, Queues, Layout] | None:
        return self._loaded if self._loaded is not None and self._loaded[0] == self.epoch else None

    def take_start(self) -> Queues:
        """`start`, once: later iterations begin their epoch from the top again."""
        start, self._loaded = self.start(), None
        return start

    def continue_here(self) -> None:
        """The next iteration continues after the batch received last, if one was left before its end."""
        if (queues := self.running()) is not None:
            self._loaded, self._running = (self.epoch, queues, self._running_layout), None

    def begin(self, ranks: Iterable[int]) -> None:
        """An iteration begins from `start`, which its reader has yet to take.

        Args:
            ranks: whose cursors will be known.
        """
        if self._loaded is None:
            self.bad.reset()
        known = {*ranks}
        loaded = self._loaded_here()
        if loaded is None:
            self._layout = self._layout.with_present_files()
        self._running_layout, self.from_the_top = self.next_layout, loaded is None
        self._after_a_batch = loaded is not None and _have_moved(loaded[1])
        self._running = [
            LaneQueue(queue) if queue is not None and rank in known else None for rank, queue in enumerate(self.start())
        ]

    def running(self) -> Queues | None:
        """For each rank its cursors in the iteration that is running; None where none is."""
        if self._running is None:
            return None
        return [None if queue is None else queue.cursors for queue in self._running]

    def count(self, report: ReadReport | None) -> None:
        """Count what reading met; ShardError beyond the limit."""
        if report is not None:
            asked, found = report.words
            self.word_count = (self.word_count[0] + asked, self.word_count[1] + found)
            self.bad.add(report)

    def advance(self, cursors: Sequence[Cursor | None]) -> None:
        """A batch was received.

        Args:
            cursors: by rank, its batch's; None for a rank that has finished. Empty where a user's collate_fn made
                something else of the batch.
        """
        # Nothing is running after a `set_epoch` within the loop.
        for queue, cursor in zip(self._running or (), cursors, strict=False):
            if queue is not None and cursor is not None:
                queue.advance(cursor)
            elif queue is not None:
                queue.clear()

    def keep(self, cursors: Iterable[Cursor]) -> None:
        """Of this rank's lanes, this process reads only these: a worker's share."""
        assert self._running is not None
        self._running[self._rank] = LaneQueue(cursors)

    def end_lane(self, lane: int) -> None:
        """A lane of this rank is exhausted."""
        own = None if self._running is None else self._running[self._rank]
        if own is not None:
            own.drop(lane)

    def end_reading(self) -> None:
        """All that this rank reads of the epoch was received. Does not move to the next epoch: see `set_epoch`."""
        self.advance([None] * self._world_size)
        self._check_some_were_good()

    def end_epoch(self, epoch: int, *, received: bool = False) -> None:
        """All of the epoch was received; the next one follows, unless the loop has chosen another already.

        Args:
            epoch: that has ended.
            received: whether the loop got a batch, be it another rank's.
        Raises:
            ShardError: every record was skipped, here and on the ranks that share batches; or there was none.
        """
        if not received:
            self._check_some_were_good()
        self._running = None
        if self.epoch == epoch:
            self.set_epoch(epoch + 1)

    def _check_some_were_good(self) -> None:
        if self._after_a_batch:  # the counts may be those of another rank, which had none
            return
        self.bad.check_some_were_good()
        # A worker of the user's own DataLoader, and one of several ranks, may have no record where others have some.
        alone = self._world_size == 1 and get_worker_info() is None
        if self._running is None or self.bad.read > self.bad.records + self.bad.dropped:
            return
        path = self._running_layout.pieces[0][0].path
        problem = f"{path}: no record in the whole epoch: did a filter drop every row?"
        if self.bad.dropped:
            droppers = " or ".join(self.bad.droppers)
            problem = f"{droppers} dropped each of the {self.bad.dropped} records that were read in the epoch"
            if self.bad.droppers != ("drop_last",):
                problem += "; a function without a return drops all"
        if alone:
            raise ShardError(problem, path=path)
        if self.bad.dropped:
            logger.warning("%s", problem)

    def place(self) -> Place:
        """Where the loop is now, which `state_dict` turns into JSON."""
        queues = self.running() or self.start()
        return self.epoch, queues, self.bad.to_json(), self.layout.ranks

    def state_dict(self, settings: dict[str, Any], place: Place | None = None) -> dict[str, Any]:
        """The place after the batch received last, as plain JSON.

        Args:
            settings: what the order of batches depends on.
            place: another one, of this iteration; None is the one now.
        """
        epoch, queues, bad, ranks = self.place() if place is None else place
        return {
            "version": STATE_VERSION,
            "settings": settings,
            "epoch": epoch,
            "queues": [None if queue is None else [cursor_to_json(cursor) for cursor in queue] for queue in queues],
            "bad": bad,
            **({"layout_ranks": ranks} if ranks > 1 else {}),
        }

    def loading(self, state: Any, settings: dict[str, Any], layout: Layout | None = None) -> Callable[[], None]:
        """Check a state, and return what makes the next iteration continue from it.

        Args:
            state: whatever was loaded.
            settings: of this stream in that layout.
            layout: the one for as many ranks as `layout_ranks_of` says; None is the present one.
        Raises:
            StateError: the state is none, of another version or of a stream with other settings, or it lacks the lanes
                of other ranks.
        """
        parts = {"settings": dict, "queues": list, "bad": dict}
        epoch = epoch_of(state, "a stream", [*parts])
        for part, kind in parts.items():
            if not state[part] or not isinstance(state[part], kind):
                raise StateError(f"this is no state of a stream: its {part!r} is {shortened(state[part])}", key=part)
        if differs := difference(state["settings"], settings):
            key, what = differs
            raise StateError(
                f"the state was saved {what}: make the stream as it was, or start an epoch without the state", key=key
            )
        try:
            queues = [
                None if queue is None else [cursor_from_json(entry, epoch) for entry in queue]
                for queue in state["queues"]
            ]
        except (TypeError, ValueError) as error:
            raise StateError(f"the state's queues are damaged: {described(error)}", key="queues") from error
        start = _deal(queues, self._rank, self._world_size)

        def load() -> None:
            self._loaded, self._running = (epoch, start, layout or self._layout), None
            self.bad.load(state["bad"])
            self._epoch.fill_(epoch)

        return load


def layout_ranks_of(state: Any) -> int:
    """For how many ranks a state's epoch was laid out: 1 where the layout does not depend on it, or before it did.

    Raises:
        StateError: the entry is no such number.
    """
    ranks = state.get("layout_ranks", 1) if isinstance(state, dict) else 1
    if type(ranks) is not int or ranks < 1:
        raise StateError(
            f"the state has layout_ranks={shortened(ranks)}, where a number from 1 belongs", key="layout_ranks"
        )
    return ranks


def epoch_of(state: Any, owner: str, parts: Sequence[str]) -> int:
    """The epoch of a state, after a check that it is one.

    Args:
        state: whatever was loaded.
        owner: what it should belong to, for the message.
        parts: what it must have besides its version and epoch.
    Raises:
        StateError: it is no state, or of another version.
    """
    for part in ("version", "epoch", *parts):
        if not isinstance(state, dict) or part not in state:
            kind = f"it has no {part!r}" if isinstance(state, dict) else type(state).__name__
            raise StateError(f"this is no state of {owner}: {kind}", key=part)
        if part == "version" and state[part] != STATE_VERSION:
            raise StateError(
                f"the state is of version {state[part]}, this bertstream reads version {STATE_VERSION}", key="version"
            )
    epoch = state["epoch"]
    if type(epoch) is not int or epoch < 0:
        raise StateError(f"the state has epoch={shortened(epoch)}, where a number from 0 belongs", key="epoch")
    return epoch


def _have_moved(queues: Queues) -> bool:
    """Whether a batch was received before these cursors; no lane is left after the last one."""
    cursors = [cursor for queue in queues for cursor in queue or ()]
    return not cursors or any(cursor != Cursor(cursor.epoch, cursor.lane) for cursor in cursors)


def _deal(queues: Queues, rank: int, world_size: int) -> Queues:
    """The lanes of each rank: unchanged for the same number of ranks, else all of them dealt again.

    Raises:
        StateError: the state lacks lanes that `rank` needs.
    """
    if len(queues) == world_size and queues[rank] is not None:
        return list(queues)
    known = [queue for queue in queues if queue is not None]
    if len(known) < len(queues):
        missing = [other for other, queue in enumerate(queues) if queue is None]
        raise StateError(
            f"the state was saved by one of {len(queues)} ranks and lacks the lanes of ranks {missing}: save each "
            "rank's, load it on as many ranks, or initialise torch.distributed before the loader is iterated",
            key="queues",
        )
    longest = max(map(len, known))
    turns = [queue[turn] for turn in range(longest) for queue in known if turn < len(queue)]
    return [turns[other::world_size] for other in range(world_size)]


def cursor_to_json(cursor: Cursor) -> list[Any]:
    """A lane's cursor as JSON holds it; the epoch is said once for all."""
    entry = [cursor.lane, cursor.next_piece, [list(piece) for piece in cursor.open], cursor.batch]
    if cursor.sources:  # of a mixture only
        entry.append([[*place[:-1], [list(piece) for piece in place.open]] for place in cursor.sources])
    return entry


def cursor_from_json(entry: list[Any], epoch: int) -> Cursor:
    """The cursor that `cursor_to_json` was given."""
    lane, next_piece, pieces, batch, *mixed = entry
    sources = [
        SourcePlace(drawn, passes, following, _opened(opened))
        for drawn, passes, following, opened in (mixed[0] if mixed else ())
    ]
    return Cursor(epoch, lane, next_piece, _opened(pieces), batch, tuple(sources))


def _opened(pieces: list[list[int]]) -> tuple[OpenPiece, ...]:
    return tuple(OpenPiece(*piece) for piece in pieces)
