"""How far the loop over a source that is no stream is: the source's own state, where it has one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import ConfigError, StateError, check_at_least, kind_of
from ..reading.state import STATE_VERSION, epoch_of
from ..tokens import ReadReport
from .progress import Entry, OwnLoader, Progress


class ProgressInSource(Progress):
    """Progress over any other source: the source's own state, where it has one.

    Args:
        source: a DataLoader, or any iterable of batches.
    """

    def __init__(self, source: Iterable[Any]) -> None:
        super().__init__()
        self._source: Any = source
        self._state: Any = None
        self._was_read = False
        self._has_state = has_state(source)
        self._epoch = 0

    @property
    def epoch(self) -> int:
        """Counted here: a source has none."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the next iteration's epoch, also in every part of the source that has `set_epoch`."""
        check_at_least("epoch", epoch, 0)
        if epoch != self._epoch:
            self._state, self.resumes = None, False
        self._epoch = epoch
        parts: list[Any] = [self._source]
        parts += [getattr(self._source, name, None) for name in ("batch_sampler", "sampler", "dataset")]
        parts.append(getattr(parts[1], "sampler", None))
        for part in {id(part): part for part in parts}.values():
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)

    def begun(self, iterator: Iterator[Any]) -> None:
        """Remember a source that can be read only once.

        Raises:
            ConfigError: it was read before.
        """
        if iterator is self._source:
            if self._was_read:
                raise ConfigError(
                    f"the wrapped {type(self._source).__name__} can be read only once, and was: wrap something that "
                    "starts again at each iteration, such as a DataLoader or a list of batches"
                )
            self._was_read = True

    def state_of_source(self) -> Any:
        """The source's state now; None where it has none."""
        return self._source.state_dict() if self._has_state else None

    def count(self, report: ReadReport | None) -> None:
        """Nothing: only streams report."""

    def end_epoch(self, epoch: int) -> None:
        """Count the epoch, unless the loop has chosen another already."""
        self._state = None
        if self._epoch == epoch:
            self._epoch += 1

    def loading(self, state: Any) -> Callable[[], None]:
        """See `EmbeddingLoader.load_state_dict`."""
        epoch = epoch_of(state, "a loader around a DataLoader", ("source",))
        self.check_can_resume()
        if isinstance(self._source, OwnLoader):
            self._source.loading(state["source"])

        def load() -> None:
            # The source gets it when it is iterated, so another epoch may still be chosen, which starts from its top.
            self._epoch, self._state, self.resumes = epoch, state["source"], True
            self.await_iteration()

        return load

    def _begin(self) -> Iterable[Any]:
        """The source."""
        if self.resumes:
            self._source.load_state_dict(self._state)
            self.resumes = False
        return self._source  # type: ignore[no-any-return]

    def _advance(self, entry: Entry) -> None:
        """Remember the source's state after this batch."""
        self._state = entry.source_state

    def _place(self) -> Any:
        return self._epoch, self._state

    def _state_at(self, place: Any) -> dict[str, Any]:
        self.check_can_resume()
        epoch, state = place
        if state is None:
            raise StateError(
                f"{kind_of(self._source)} that has yielded a batch does not know the state before it: save "
                "after the first batch",
                key="source",
            )
        return {"version": STATE_VERSION, "epoch": epoch, "source": state}

    def _state_now(self) -> dict[str, Any]:
        self.check_can_resume()
        return self._state_at((self._epoch, self._source.state_dict() if self._state is None else self._state))

    def check_can_resume(self) -> None:
        """StateError if the source has no state."""
        if not self._has_state:
            raise StateError(
                f"{kind_of(self._source)} cannot say where it is, so this loader cannot resume: wrap "
                "torchdata's StatefulDataLoader, or read shards with bertstream.stream",
                key="source",
            )


def has_state(source: Any) -> bool:
    """Whether a source can say where it is."""
    if isinstance(source, OwnLoader):
        return source.can_resume
    return hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
