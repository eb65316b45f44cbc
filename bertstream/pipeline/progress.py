"""How far the loop over a source is: which batches it received, the state after them, and how a state is loaded."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cursors import Cursor
from ..errors import ConfigError, check_at_least
from ..reading.dataset import StreamItems, TextStream
from ..reading.lane_batches import LaneEnd
from ..reading.messages import StreamLoader, StreamMessages
from ..system.distributed import Peers, can_talk, rank_and_world_size
from ..tokens import ReadReport, TokenBatch
from .fields import Field

logger = logging.getLogger(__name__)

_MOST_HELD = 8
"""How many batches something between the loader and the loop may hold for `state_dict(after=)`: Lightning holds one, a
loop that copies batches to its device ahead of time a few."""


@dataclass
class Entry:
    """What was read, and what is known about it.

    Attributes:
        item: a batch, or the `LaneEnd` of a lane that has just ended.
        cursors: by rank, the cursor of the batch that each yields in this step.
        source_state: the state of the wrapped DataLoader after this batch.
        number: of the batch in this iteration.
        texts: the batch's, as tokens, see `set_texts`; a `LaneEnd` has none.
        weight: tokens in all, at least one for a batch, so that any group is bounded; a `LaneEnd` has none.
    """

    item: Any
    cursors: Sequence[Cursor | None] = ()
    source_state: Any = None
    number: int = 0
    texts: Mapping[Field | None, TokenBatch] = field(default_factory=dict)
    weight: int = 0

    def set_texts(self, texts: Mapping[Field | None, TokenBatch]) -> None:
        """The batch's texts as tokens."""
        self.texts = texts
        self.weight = max(1, sum(batch.num_tokens for batch in texts.values()))

    @property
    def report(self) -> ReadReport | None:
        """What a stream's reading met up to here."""
        return self.item.report if isinstance(self.item, (TokenBatch, LaneEnd)) else None


class OwnLoader:
    """Base of `EmbeddingLoader`: a source that advances its progress itself when another loader wraps it."""

    @property
    def can_resume(self) -> bool:
        """Whether its `state_dict` works."""
        raise NotImplementedError

    def loading(self, state: Any) -> Callable[[], None]:
        """Check a state, StateError if it does not fit, and return what loads it."""
        raise NotImplementedError


def text_stream(loader: Any) -> TextStream | None:
    """The `TextStream` that a loader reads, or is; None for any other, and for a loader that advances it itself."""
    if isinstance(loader, OwnLoader):
        return None
    dataset = getattr(loader, "dataset", loader)
    return dataset if isinstance(dataset, TextStream) else None


def reading_items(loader: Any) -> Any:
    """A loader over a `TextStream`, or the stream, as one of `TextStream.items()`; the original is unchanged."""
    stream = text_stream(loader)
    assert stream is not None
    if loader is stream:
        return StreamItems(stream)
    reader = copy.copy(loader)
    in_messages = isinstance(loader, StreamLoader) and loader.num_workers > 0
    items = StreamMessages(stream) if in_messages else StreamItems(stream)
    # Around `DataLoader.__setattr__`, which refuses another dataset because workers may run already. A copy has none.
    vars(reader).update(dataset=items, _iterator=None)
    return reader


class Progress(ABC):
    """How far the loop over a source is; its state is the place after the batch that the loop received last.

    The places after the few batches before it are kept too, for what reads ahead of the loop: see `state_dict`.

    Attributes:
        resumes: the next iteration continues from a state that was loaded.
        round: what one reading of the source is called, for messages.
    """

    round = "epoch"

    def __init__(self) -> None:
        self.resumes = False
        self._received = 0
        self._places: deque[Any] = deque(maxlen=_MOST_HELD + 1)

    @property
    @abstractmethod
    def epoch(self) -> int:
        """The epoch that the next iteration reads."""

    @abstractmethod
    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration reads."""

    def join_ranks(self) -> Peers | None:
        """Connect to the other ranks, where there are any that end together; None where not, or where that was done."""
        return None

    def await_iteration(self) -> None:
        """An iteration was asked for, which has yet to `begin`: none of its batches was received."""
        self._received = 0
        self._places.clear()

    def begin(self) -> Iterable[Any]:
        """Start an epoch where the progress is; returns what to iterate."""
        reader = self._begin()
        self.await_iteration()
        self._places.append(self._place())
        return reader

    def check_can_be_sent(self, *, failed: bool) -> None:
        """ConfigError if workers that are not forked cannot be sent what a stream is made of; see `TextStream`."""
        return

    @abstractmethod
    def begun(self, iterator: Iterator[Any]) -> None:
        """The iteration has started."""

    @abstractmethod
    def state_of_source(self) -> Any:
        """The `Entry.source_state` of the item that was read last."""

    @abstractmethod
    def count(self, report: ReadReport | None) -> None:
        """Count what reading met."""

    def received(self, entry: Entry) -> None:
        """The loop now has this batch, or has passed this `LaneEnd`."""
        self._advance(entry)
        if not isinstance(entry.item, LaneEnd):
            self._received += 1
            self._places.append(self._place())

    @property
    def has_all(self) -> bool:
        """Whether the loop is known to have all batches of the iteration, although it has not asked for its end."""
        return False

    @abstractmethod
    def end_epoch(self, epoch: int) -> None:
        """The loop has received all of the epoch."""

    def state_dict(self, after: int | None = None) -> dict[str, Any]:
        """See `EmbeddingLoader.state_dict`."""
        held = 0
        if after is not None:
            check_at_least("after", after, 0)
            held = self._received - after
        if held == 0:
            return self._state_now()
        if not 0 < held < len(self._places):
            raise ConfigError(
                f"after={after}: this iteration has yielded {self._received} batches, and the states after the last "
                f"{_MOST_HELD + 1} of them are kept"
            )
        return self._state_at(self._places[-1 - held])

    def check_can_resume(self) -> None:
        """StateError if there is no state."""
        return

    @abstractmethod
    def loading(self, state: Any) -> Callable[[], None]:
        """Check a state, StateError if it does not fit, and return what loads it."""

    @abstractmethod
    def _begin(self) -> Iterable[Any]:
        """`begin`, without the count."""

    @abstractmethod
    def _advance(self, entry: Entry) -> None:
        """`received`, without the count."""

    @abstractmethod
    def _place(self) -> Any:
        """The place now, as `_state_at` takes it: made for each batch, so it has to cost little."""

    @abstractmethod
    def _state_at(self, place: Any) -> dict[str, Any]:
        """The state at a place of this iteration."""

    @abstractmethod
    def _state_now(self) -> dict[str, Any]:
        """The state now; between two iterations that of the next one's start."""


class ProgressInStream(Progress):
    """Progress over a `TextStream`, alone or in somebody's DataLoader.

    Args:
        loader: the stream, or a DataLoader over it.
        stream: the stream, whose own progress is advanced here.
    """

    def __init__(self, loader: Any, stream: TextStream) -> None:
        super().__init__()
        self._reader = reading_items(loader)
        self._stream = stream
        self._knows_all_ranks = False
        self._settings: dict[str, Any] = {}  # of the iteration
        self._to_come: int | None = None  # its batches, if somebody knows the length
        self._unfinished: int | None = None  # the epoch of the last batch, unless the loop has received all of it
        self._said_it_starts_over = False
        if (idle := stream.idle_workers(getattr(loader, "num_workers", 0))) is not None:
            logger.warning("%s", idle)

    @property
    def epoch(self) -> int:
        """The stream's."""
        return self._stream.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the next iteration's epoch."""
        self.resumes, self._unfinished = self.resumes and epoch == self.epoch, None
        self._stream.set_epoch(epoch)

    def join_ranks(self) -> Peers | None:
        """Connect to the stream's other ranks; from then on entries carry the cursors of all ranks.

        Raises:
            ConfigError: the stream was made as another rank.
        """
        stream = self._stream
        rank, world_size = rank_and_world_size()
        if (rank, world_size) != (stream.rank, stream.world_size):
            raise ConfigError(
                f"the TextStream was made as rank {stream.rank} of {stream.world_size}, this is rank {rank} of "
                f"{world_size}: make it after torch.distributed is initialised"
            )
        if self._knows_all_ranks or stream.uneven == "leave" or not can_talk():
            return None
        self._knows_all_ranks = True  # so every rank's state names all lanes
        return Peers(stream.rank_timeout_s)

    def check_can_be_sent(self, *, failed: bool) -> None:
        """See `TextStream.check_can_be_sent`."""
        self._stream.check_can_be_sent(failed=failed)

    def begun(self, iterator: Iterator[Any]) -> None:
        """Workers have taken the start with them: here the next iteration is not to find it."""
        self._stream.progress.take_start()

    def state_of_source(self) -> Any:
        """None: the batches carry cursors."""
        return None

    def count(self, report: ReadReport | None) -> None:
        """Count what was skipped; ShardError beyond the limit."""
        self._stream.progress.count(report)

    @property
    def has_all(self) -> bool:
        """Known once somebody has asked for the length: trainers take that many batches, and never ask for the end."""
        return self._to_come is not None and self._received >= self._to_come

    def end_epoch(self, epoch: int) -> None:
        """Move to the next epoch; ShardError if none of this one's records was good, on any rank."""
        self._stream.progress.end_epoch(epoch, received=self._received > 0)
        self._unfinished = None

    def loading(self, state: Any) -> Callable[[], None]:
        """See `EmbeddingLoader.load_state_dict`."""
        load = self._stream.loading(state)

        def load_here() -> None:
            load()
            self.resumes, self._unfinished = True, None
            self.await_iteration()
            # Workers that are kept between epochs hold the stream as it was; the next iteration starts new ones.
            kept = getattr(self._reader, "_iterator", None)
            if kept is not None:
                if hasattr(kept, "_shutdown_workers"):
                    kept._shutdown_workers()
                self._reader._iterator = None

        return load_here

    def _begin(self) -> Iterable[Any]:
        """What yields the stream's items, here or in workers."""
        self.resumes = False
        self._say_if_it_starts_over()
        self._to_come = self._stream.count_batches_left()
        self._stream.progress.begin(self._stream.ranks if self._knows_all_ranks else [self._stream.rank])
        self._settings = self._stream.settings
        return self._reader  # type: ignore[no-any-return]

    def _advance(self, entry: Entry) -> None:
        """Advance by a batch, or drop a lane that has ended."""
        if not isinstance(entry.item, LaneEnd):
            self._stream.progress.advance(entry.cursors)
            self._unfinished = self.epoch
        elif not self._knows_all_ranks and entry.item.lane is not None:
            # With the cursors of all ranks every rank has the same state, and `LaneEnd`s are not exchanged: there the
            # next batch drops the lanes ahead of its own.
            self._stream.progress.end_lane(entry.item.lane)

    def _place(self) -> Any:
        return self._stream.progress.place()

    def _state_at(self, place: Any) -> dict[str, Any]:
        return self._stream.progress.state_dict(self._settings, place)

    def _state_now(self) -> dict[str, Any]:
        return self._stream.progress.state_dict(self._stream.settings)

    def _say_if_it_starts_over(self) -> None:
        """Of an order that was chosen to be another each time, a loop that is left sees the same part each time."""
        if self._unfinished == self.epoch and self._stream.shuffle and not self._said_it_starts_over:
            self._said_it_starts_over = True
            logger.warning(
                "epoch %d starts over after its loop was left: it yields the same batches in the same order. Write "
                "steps_per_epoch= for epochs that continue where the last one stopped, or load the state, or call "
                "set_epoch",
                self.epoch,
            )
