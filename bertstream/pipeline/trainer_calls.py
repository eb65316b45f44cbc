"""Whether a Trainer of Lightning or Hugging Face calls, which nothing but its frames among the callers tells.

They hand neither themselves nor their loop to a loader. Lightning holds one batch ahead of its loop where a loader has
no length; both take the length that they find at first for that of all epochs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

_PACKAGES = ("lightning.pytorch.", "pytorch_lightning.")
_TRAINER = "transformers.trainer"
_ITS_LOADER = ".utilities.combined_loader"
"""The module that iterates loaders and asks for their states, and calls no hook: between it and a loader there may be a
user's wrapper, while a user's own loop in a hook is called by other modules."""


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
