"""This process's rank, and messages between ranks during an epoch.

The only file that reads RANK, WORLD_SIZE and LOCAL_RANK.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ..errors import BertstreamError, ConfigError

_loaders = itertools.count()


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks: torch.distributed's, else RANK and WORLD_SIZE, else (0, 1).

    Raises:
        ConfigError: RANK and WORLD_SIZE contradict each other, only one is set, or one is not a whole number.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and world_size is None:
        return 0, 1
    if rank is None or world_size is None or not rank.isdecimal() or not world_size.isdecimal():
        by_lightning = "; Lightning's own launcher sets one: start with torchrun, or make the loader in setup()"
        raise ConfigError(
            f"RANK={rank!r} with WORLD_SIZE={world_size!r}: set both, as whole numbers, or neither"
            f"{by_lightning * (rank is None)}"
        )
    if int(rank) >= int(world_size):
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={world_size}")
    return int(rank), int(world_size)


def local_rank() -> int | None:
    """LOCAL_RANK, the process's number on its machine; None if it is not set to a whole number."""
    value = os.environ.get("LOCAL_RANK", "")
    return int(value) if value.isdecimal() else None


class Peers:
    """Exchange messages between the ranks of one loader, ahead of the training loop.

    Messages go through the store of `torch.distributed`. A collective could not be interrupted while it waits, would
    not say which rank is missing, and would leave a process group broken. Every rank must create its loaders in the
    same order.

    Args:
        timeout_s: seconds after which a rank that does not answer is given up, see `exchange`.
    Attributes:
        rank: this process's rank.
        world_size: the number of ranks.
    """

    def __init__(self, timeout_s: float) -> None:
        self.rank, self.world_size = rank_and_world_size()
        self._timeout_s = timeout_s
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"bertstream/{next(_loaders)}", store)  # type: ignore[attr-defined]
        self._iteration = -1
        self._step = 0

    def begin(self) -> None:
        """Start an epoch: the next exchange is its first."""
        self._iteration += 1
        self._step = 0

    def exchange(
        self, message: Any, batch: int, is_over: Callable[[], bool], waits_since: Callable[[], float | None]
    ) -> list[Any] | None:
        """Send a message to all ranks, and receive each rank's message of the same exchange, counted from `begin`.

        Args:
            message: any JSON value.
            batch: the number of the next batch, for errors.
            is_over: polled while waiting; True gives up.
            waits_since: the `time.monotonic()` at which the training loop began to wait; None while it computes. Only
                time in which the loop waits counts for the timeout: while it computes, the other ranks may do so too.
        Returns:
            The messages, by rank; None after giving up.
        Raises:
            BertstreamError: a rank left or did not answer in time (the message names it), or the store is gone.
        """
        try:
            return self._exchanged(message, batch, is_over, waits_since)
        except RuntimeError as error:  # torch's stores raise it
            raise BertstreamError(
                f"the store of torch.distributed cannot be reached at batch {batch}: the rank that holds it, usually "
                f"rank 0, has ended. torch said: {error}"
            ) from error

    def _exchanged(
        self, message: Any, batch: int, is_over: Callable[[], bool], waits_since: Callable[[], float | None]
    ) -> list[Any] | None:
        self._store.set(self._key(self._step, self.rank), json.dumps(message))
        keys = [self._key(self._step, rank) for rank in range(self.world_size)]
        started, pause = time.monotonic(), 1e-4
        while not self._store.check(keys):
            if is_over():
                return None
            late = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            for rank in late:
                # Check its answer again: it may have answered in between, and left afterwards.
                if self._store.check([self._key("left", rank)]) and not self._store.check([keys[rank]]):
                    reason = self._store.get(self._key("left", rank)).decode()
                    raise BertstreamError(
                        f"rank {rank} left the epoch: {reason} (the ranks were agreeing on batch {batch}, ahead of "
                        "the loop)"
                    )
            since = waits_since()
            if late and since is not None and time.monotonic() - max(started, since) > self._timeout_s:
                raise BertstreamError(
                    f"rank {', '.join(map(str, late))} did not answer at batch {batch} for {self._timeout_s:g} s: "
                    "it died, hangs, or iterates its loaders in another order than this rank"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        answers = [json.loads(answer) for answer in self._store.multi_get(keys)]
        if self._step:  # a rank that answers now has read all answers of the previous exchange
            self._store.delete_key(self._key(self._step - 1, self.rank))
        self._step += 1
        return answers

    def leave(self, reason: str) -> None:
        """Tell the other ranks that this one sends nothing more in this epoch; they fail with the reason."""
        self._store.set(self._key("left", self.rank), reason)

    def _key(self, step: int | str, rank: int) -> str:
        return f"{self._iteration}/{step}/{rank}"


def can_talk() -> bool:
    """Whether there are several ranks that `torch.distributed` connects."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
