"""A loader in a Trainer of Lightning or Hugging Face, which counts epochs, and holds batches, in its own way.

They hand neither themselves nor their loop to a loader, so nothing but their frames among its callers tells of them.
Lightning holds one batch ahead of its loop where a loader has no length; both take the length that they find at first
for that of all epochs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

from ..errors import StateError
from ..reading.state import STATE_VERSION

logger = logging.getLogger(__name__)

_PACKAGES = ("lightning.pytorch.", "pytorch_lightning.")
_TRAINER = "transformers.trainer"
_ITS_LOADER = ".utilities.combined_loader"
"""The module that iterates loaders and asks for their states, and calls no hook: between it and a loader there may be a
user's wrapper, while a user's own loop in a hook is called by other modules."""

REBUILT = (
    "this loader cannot be rebuilt from its dataset, as accelerate's skip_first_batches and a resuming Trainer try: "
    "the batches would have no vectors. Add bertstream.integrations.transformers.LoaderState() to its callbacks; "
    "with Accelerate call accelerator.register_for_checkpointing(loader), and in your own loop load_state_dict"
)
_IN_LIGHTNING = (
    "Lightning asked the loader itself for this state, which cannot know that Lightning holds a batch ahead: "
    "add bertstream.integrations.lightning.LoaderState(loader) to the Trainer's callbacks, also when it saves"
)
_HELD_BY_LIGHTNING = (
    "Lightning takes the batches, and holds one that its loop does not have yet: its checkpoints keep the state of the "
    "loader if bertstream.integrations.lightning.LoaderState(loader) is among the Trainer's callbacks; elsewhere write "
    "state_dict(after=n) for a loop that has n batches of this iteration"
)


class SeenTrainer:
    """What a loader knows of the Trainer that takes its batches, if one does.

    Attributes:
        epochs_before: how many of the loader's epochs it does not count.
        has_resumed: whether it loaded a state from which no iteration has begun yet.
    """

    def __init__(self) -> None:
        self.epochs_before = 0
        self.has_resumed = False
        self._held_epoch: int | None = None  # of whose batches Lightning holds one
        self._may_warn = True  # that checkpoints cannot resume

    def expect_callback(self) -> None:
        """A callback of ours keeps the state in its checkpoints."""
        self._may_warn = False

    def begins(self, epoch: int, *, holds_a_batch: bool) -> None:
        """An iteration begins: whether Lightning will hold a batch of this epoch."""
        self._held_epoch = epoch if holds_a_batch else None

    def check_holds_none(self, epoch: int) -> None:
        """Refuse the state of a loop that has one batch less than the loader has yielded.

        Args:
            epoch: of the loader, now.
        Raises:
            StateError: Lightning holds a batch.
        """
        if self._held_epoch is not None and (epoch == self._held_epoch or within_lightning()):
            raise StateError(_HELD_BY_LIGHTNING, key="after")

    def unusable_state(self) -> dict[str, Any]:
        """What Lightning keeps beside the callback's state. An error would end runs that nobody resumes."""
        if self._may_warn:
            logger.warning("no run can resume from this checkpoint: %s", _IN_LIGHTNING)
            self._may_warn = False
        return {"version": STATE_VERSION, "unusable": _IN_LIGHTNING}

    def brings_unusable(self, state: object) -> bool:
        """Whether this is an `unusable_state`, which comes after the one that the callback has loaded.

        Raises:
            StateError: it is one, and no callback has loaded another.
        """
        if not (isinstance(state, dict) and "unusable" in state):
            return False
        if not self.has_resumed:
            raise StateError(state["unusable"], key="unusable")
        return True

    def loaded(self, epoch: int, trainer_epoch: int | None) -> None:
        """A state of this epoch was loaded; `trainer_epoch` as for `EmbeddingLoader.load_state_dict`."""
        self._held_epoch = None
        self.has_resumed = trainer_epoch is not None
        self.epochs_before = 0 if trainer_epoch is None else epoch - trainer_epoch


def asked_by_lightning() -> bool:
    """Whether the caller's caller serves Lightning: the last of its frames is one of `_ITS_LOADER`.

    A loader that another of our loaders wraps serves that one, which knows its batches.
    """
    for module in _callers(2):
        if module.startswith(_PACKAGES):
            return module.endswith(_ITS_LOADER)
        if module.startswith("bertstream."):
            return False
    return False


def within_lightning() -> bool:
    """Whether this is called within a method of Lightning's Trainer, such as `fit`."""
    return any(module.startswith(_PACKAGES) for module in _callers(1))


def within_trainer() -> bool:
    """Whether this is called within a method of either Trainer."""
    return any(module.startswith((*_PACKAGES, _TRAINER)) for module in _callers(1))


def _callers(skipped: int) -> Iterator[str]:
    """The modules of the frames that called, without the `skipped` nearest ones."""
    if not any(name in sys.modules for name in ("lightning.pytorch", "pytorch_lightning", _TRAINER)):
        return
    frame = sys._getframe(skipped + 1)
    while frame is not None:
        yield str(frame.f_globals.get("__name__"))
        frame = frame.f_back  # type: ignore[assignment]
