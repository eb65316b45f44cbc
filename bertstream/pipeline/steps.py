"""Epochs of N steps over passes of a stream, each of which continues where the last one stopped."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import LoaderClosedError, ShardError, StateError, check_at_least, shortened
from ..reading.dataset import TextStream
from ..reading.lane_batches import LaneEnd
from .epoch import ANOTHER_BEGAN, Epoch, Epochs, Parts
from .progress import Entry, ProgressInStream


class ProgressInSteps(ProgressInStream):
    """Progress over a `TextStream` that counts epochs of N steps apart from its passes over the data.

    Args:
        loader: the stream, or a DataLoader over it.
        stream: the stream, whose epochs are the passes.
        steps: of an epoch.
    Attributes:
        step: how many batches of the epoch the loop has received; 0 between two epochs.
        finished: how many epochs the loop has received whole.
    """

    round = "pass over the data"

    def __init__(self, loader: Any, stream: TextStream, steps: int) -> None:
        check_at_least("steps_per_epoch", steps, 1)
        super().__init__(loader, stream)
        self.steps = steps
        self.step = 0
        self.finished = 0
        self._next = 0
        self._running: int | None = None
        self._pass_is_empty = True

    @property
    def epoch(self) -> int:
        """The epoch of the next iteration; within a loop that of the loop, unless it has chosen another."""
        return self._next

    def set_epoch(self, epoch: int) -> None:
        """Choose the next iteration's number, not where it begins to read. Another one makes a whole epoch of it."""
        check_at_least("epoch", epoch, 0)
        if epoch != self._next and self._running is None:
            self.step = 0
        self._next = epoch

    def begin_steps(self, *, within_pass: bool) -> int:
        """An epoch begins: how many steps it has, all or those that a loaded state has left.

        Args:
            within_pass: whether a pass is running.
        """
        self.await_iteration()
        self._running = self._next
        if within_pass:
            self._places.append(self._place())
        return max(0, self.steps - self.step)

    def end_steps(self, *, whole: bool) -> None:
        """The loop has ended. After a batch its epoch has too, unless the loop has chosen the next one already.

        Args:
            whole: whether it took all steps.
        """
        if self._running is not None and (whole or self._received):
            self.finished += whole
            if self._next == self._running:
                self._next += 1
            self.step = 0
        self._running = None

    def begin(self) -> Iterable[Any]:
        """What to iterate for a pass, which starts where the last one was left."""
        self._stream.progress.continue_here()
        reader = self._begin()
        self._pass_is_empty = True
        if not self._places:
            self._places.append(self._place())
        return reader

    @property
    def has_all(self) -> bool:
        """Of a pass nobody asks for the length."""
        return False

    def end_epoch(self, epoch: int) -> None:
        """A pass has ended: move to the next one.

        Raises:
            ShardError: none of its records was good, on any rank, or it had no batch.
        """
        progress = self._stream.progress
        progress.end_epoch(progress.epoch, received=not self._pass_is_empty)
        if self._pass_is_empty and progress.from_the_top:
            raise ShardError(
                f"a pass over the data has no batch, so steps_per_epoch={self.steps} would be waited for in vain"
            )

    def loading(self, state: Any) -> Callable[[], None]:
        """See `EmbeddingLoader.load_state_dict`. A state without steps begins an epoch with its pass's number."""
        load = super().loading(state)
        epoch, step = _epoch_and_step(state)

        def load_here() -> None:
            load()
            self._next, self.step, self._running = epoch, step, None

        return load_here

    def _say_if_it_starts_over(self) -> None:
        """It never does."""

    def _advance(self, entry: Entry) -> None:
        super()._advance(entry)
        if not isinstance(entry.item, LaneEnd):
            self.step += 1
            self._pass_is_empty = False

    def _place(self) -> Any:
        return super()._place(), self._settings, self._steps_now()

    def _state_at(self, place: Any) -> dict[str, Any]:
        in_pass, settings, steps = place
        return self._stream.progress.state_dict(settings, in_pass) | {"steps": steps}

    def _state_now(self) -> dict[str, Any]:
        return super()._state_now() | {"steps": self._steps_now()}

    def _steps_now(self) -> dict[str, int]:
        return {"epoch": self._next if self._running is None else self._running, "step": self.step}


def _epoch_and_step(state: dict[str, Any]) -> tuple[int, int]:
    """The epoch and step in a state of a stream.

    Raises:
        StateError: they are no numbers.
    """
    steps = state.get("steps", {"epoch": state["epoch"], "step": 0})
    epoch, step = (steps.get("epoch"), steps.get("step")) if isinstance(steps, dict) else (None, None)
    if not (type(epoch) is type(step) is int and epoch >= 0 and step >= 0):
        raise StateError(
            f"the state has steps={shortened(steps)}, where an epoch and a step from 0 belong", key="steps"
        )
    return epoch, step


@dataclass
class _Loop:
    """One iteration of the loader.

    Attributes:
        left: steps that it has yet to take; None before it has asked for its first, and after an error.
        closed_by: why the loader ended it; None where it ended by itself.
    """

    left: int | None = None
    closed_by: str | None = None


class StepEpochs(Epochs):
    """The epochs of a loader, each of N batches from passes over its stream; a pass runs on from one to the next.

    A loop that is left before its last step ends the pass, and with it the worker and its processes: the next pass
    continues after the last batch that was received. The loader alone keeps a pass alive between two loops.

    Args:
        parts: what the passes share.
        progress: their progress.
    """

    def __init__(self, parts: Parts, progress: ProgressInSteps) -> None:
        super().__init__(parts)
        self._progress = progress
        self._loop = _Loop(left=0)
        self._pass: Epoch | None = None
        self._batches: Generator[Any, None, None] | None = None

    def begin(self) -> Generator[Any, None, None]:
        """The batches of the next epoch, or of what a loaded state has left of one."""
        self._loop = _Loop()
        return self._take(self._loop)

    def counts(self) -> dict[str, int]:
        """Epochs of N steps, and passes over the data: what an epoch is to `Parts.counts`."""
        return {"epochs": self._progress.finished, "passes": self._parts.counts.epochs}

    def make_way(self) -> None:
        """End a loop that has not taken all of its steps; else leave the pass running."""
        if self._loop.left == 0:
            self._end(self._loop)
        else:
            self.stop(ANOTHER_BEGAN)

    def stop(self, reason: str) -> None:
        """End the pass, in any thread: a loop that has steps left gets a `LoaderClosedError` with this reason."""
        loop, running = self._loop, self._pass
        if loop.left != 0:
            loop.closed_by = loop.closed_by or reason
        if running is not None:
            running.close(reason)
        self._pass = self._batches = None
        self._end(loop)

    def _take(self, loop: _Loop) -> Generator[Any, None, None]:
        try:
            try:
                if loop.closed_by is None:
                    loop.left = self._progress.begin_steps(within_pass=self._batches is not None)
                while loop.left and loop.closed_by is None:
                    batch = next(self._batches_of_pass(), None)
                    if batch is None:
                        self._pass = self._batches = None
                        continue
                    loop.left -= 1
                    yield batch
                    del batch
            except (Exception, KeyboardInterrupt):
                loop.left = None  # also where Ctrl-C strikes just before the last batch is yielded
                raise
            finally:
                self._end(loop)
        finally:
            self._end(loop)  # again: Ctrl-C may have struck in the first
        if loop.closed_by is not None:
            raise LoaderClosedError(loop.closed_by)

    def _batches_of_pass(self) -> Generator[Any, None, None]:
        if self._batches is None:
            self._pass = Epoch(self._parts)
            self._batches = self._pass.batches()
        return self._batches

    def _end(self, loop: _Loop) -> None:
        """End the loop's epoch, and the pass unless all steps were taken; what was interrupted, the next call does."""
        if loop is not self._loop:
            return  # another one has begun
        if (loop.left != 0 or loop.closed_by is not None) and self._batches is not None:
            self._batches.close()
            self._pass = self._batches = None
        elif self._pass is not None:
            self._pass.end_step()
        self._progress.end_steps(whole=loop.left == 0)
