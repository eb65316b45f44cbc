"""Small threads that look after a process: which read has been waiting for long, and whether its parent still lives."""

from __future__ import annotations

import logging
import os
import threading
import time

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 1.0


class Watch:
    """One open source of bytes. `with watch:` stands around each read that may have to wait.

    A read that takes longer than `limit_s` is named in a warning, and again whenever its time has doubled. Reads of one
    source never overlap. A watch that is open in a process when it forks watches nothing in the child.

    Args:
        name: the shard, as the warning names it.
        limit_s: seconds after which a read is named; None is never.
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
        """Watch no more; the thread ends with the last watch."""
        _watches.remove(self)

    @property
    def pause_s(self) -> float:
        """Seconds until it should be looked at again."""
        return min(self._limit_s / 4, _LONGEST_PAUSE_S)

    def look(self) -> None:
        """Warn if the read has taken too long."""
        since = self._since  # once: the reading thread changes it at any time
        if since is not None and (waited_s := time.monotonic() - since) >= self._warn_after_s:
            self._warn_after_s = 2 * waited_s
            logger.warning("%s: one read has been waiting for %.1f s", self._name, waited_s)


class _Watches:
    """All watches of this process, and the thread that looks at them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: set[Watch] = set()
        self._running = False

    def add(self, watch: Watch) -> None:
        with self._changed:
            self._open.add(watch)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="bertstream-watchdog", daemon=True).start()

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
    """A forked child has none of its parent's threads, and the lock may have been held by one of them."""
    global _watches
    _watches = _Watches()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
