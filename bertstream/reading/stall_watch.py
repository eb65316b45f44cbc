"""Warnings about reads that stall: a thread names each read of a URL or pipe that has waited too long."""

from __future__ import annotations

import logging
import os
import threading
import time

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 1.0


class Watch:
    """Watch the reads of one open shard; put `with watch:` around each read that may have to wait.

    A warning names a read that takes longer than `limit_s`, and again each time its wait has doubled. Reads of one
    shard must not overlap. A watch that is open during a fork watches nothing in the child.

    Args:
        name: the shard, for the warning.
        limit_s: seconds a read may take before a warning; None never warns.
    """

    def __init__(self, name: str, limit_s: float | None) -> None:
        self._name = name
        self._limit_s = limit_s or 0.0
        self._since: float | None = None
        self._warn_after_s = self._limit_s
        if limit_s is not None:
            _watches.add(self)

    def __enter__(self) -> None:
        self._warn_after_s = self._limit_s
        self._since = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._since = None

    def close(self) -> None:
        """Stop watching; the thread ends with the last watch."""
        _watches.remove(self)

    @property
    def pause_s(self) -> float:
        """Seconds until the next `look`."""
        return min(self._limit_s / 4, _LONGEST_PAUSE_S)

    def look(self) -> None:
        """Warn if the current read has taken too long."""
        since = self._since  # read once: the reading thread may change it at any time
        if since is not None and (waited_s := time.monotonic() - since) >= self._warn_after_s:
            self._warn_after_s = 2 * waited_s
            logger.warning("%s: one read has been waiting for %.1f s", self._name, waited_s)


class _Watches:
    """All open watches of this process, and the thread that checks them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: set[Watch] = set()
        self._running = False

    def add(self, watch: Watch) -> None:
        with self._changed:
            self._open.add(watch)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="bertstream-stall-watch", daemon=True).start()

    def remove(self, watch: Watch) -> None:
        with self._changed:
            self._open.discard(watch)
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while self._open:
                for watch in self._open:
                    watch.look()
                self._changed.wait(min(watch.pause_s for watch in self._open))
            self._running = False


_watches = _Watches()


def _forget() -> None:
    """A forked child has none of its parent's threads, and the lock may be held by one of them."""
    global _watches
    _watches = _Watches()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
