"""A folder of parts that a job writes one after the other, each exactly once; a killed job can be continued.

It holds finished files only, `part-000000.parquet` and so on, and `_progress.json`, which counts them and holds the
loader's state after the last one. It is replaced atomically after each part, and anything that a killed run wrote after
that is written again. Parquet readers skip names that begin with `_` or a dot.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import ConfigError, StateError
from ..system.distributed import rank_and_world_size
from .writers import whole_or_nothing

_VERSION = 1


def local_folder(out: str | os.PathLike[str]) -> Path:
    """The folder that a user named.

    Raises:
        ConfigError: it is a URL.
    """
    if "://" in os.fspath(out):
        raise ConfigError(f"out={os.fspath(out)!r} is a URL: name a local folder, and copy its parts from there")
    return Path(out).expanduser()


class PartFolder:
    """The folder, as one rank sees it.

    Args:
        path: created if missing.
        settings: common to all parts.
        ending: of the parts' names.
        counted: what is counted, beside `parts`.
        made_by: what made the parts, for messages: the repr of an encoder.
    Attributes:
        path: the same.
        counts: of all finished parts.
        state: the loader's after the last of them.
        done: whether nothing is left to write.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], ending: str, *, counted: Sequence[str], made_by: str
    ) -> None:
        rank, world_size = rank_and_world_size()
        self.path = path
        self._made_by = made_by
        self._rank = f"-{rank:03d}-of-{world_size:03d}" if world_size > 1 else ""
        self._settings = {"version": _VERSION, "ranks": world_size, **settings}
        self._ending = ending
        self.counts = dict.fromkeys(("parts", *counted), 0)
        self.state: dict[str, Any] = {}
        self.done = False

    @contextmanager
    def opened(self, state: dict[str, Any]) -> Iterator[PartFolder]:
        """Lock the folder against other processes; read its progress, or start it with this state.

        Args:
            state: of a loader at its start.
        Raises:
            ConfigError: it holds other files, is no folder, or another process is writing to it.
            StateError: it was started with other settings, or is damaged.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(f"no folder can be made at {self.path}: {error}") from error
        with open(self.path / f".lock{self._rank}", "ab") as lock:
            with suppress(ImportError):
                import fcntl

                try:
                    # lockf, not flock: forked workers, which outlive a killed parent for a moment, would inherit a
                    # flock.
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConfigError(f"{self.path}: another process is writing there") from None
            if not self._progress.exists():
                self._refuse_others()
            elif (saved := self._saved())["done"] or saved["counts"]["parts"]:
                self._refuse_differences(saved)
                self.state, self.done = saved["state"], saved["done"]
                self.counts |= saved["counts"]
            self._tidy()
            if not self.state:  # no part is finished, so nothing is lost by starting from the beginning
                self.write(None, self.counts, state, done=False)
            yield self

    def load_into(self, loading: Callable[[dict[str, Any]], object]) -> None:
        """Let a loader continue after the last part.

        Raises:
            StateError: the folder was started with other shards or settings.
        """
        try:
            loading(self.state)
        except StateError as error:
            other = "other" if error.key in ("shards", "rows") else "another"
            raise StateError(
                f"{self.path} was started with {other} {error.key}: name another folder, or use the shards and "
                "settings that it was started with",
                key=error.key,
            ) from error

    def write(
        self, write_part: Callable[[Path], object] | None, counts: dict[str, int], state: dict[str, Any], *, done: bool
    ) -> None:
        """Write a part, then the progress file that counts it and holds the state after it.

        Args:
            write_part: writes a file of this name; None writes no part.
            counts: of all parts, this one too.
            state: the loader's after it.
            done: whether it is the last one.
        Raises:
            OSError: a file cannot be written; nothing of it is left.
        """
        if write_part is not None:
            whole_or_nothing(self._part(self.counts["parts"]), write_part)
        self.counts = counts | {"parts": self.counts["parts"] + (write_part is not None)}
        self.state, self.done = state, done
        saved = {**self._settings, "made_by": self._made_by, "counts": self.counts, "done": done, "state": state}
        whole_or_nothing(self._progress, lambda path: path.write_text(json.dumps(saved), encoding="utf-8"))

    @property
    def _progress(self) -> Path:
        return self.path / f"_progress{self._rank}.json"

    def _part(self, number: int) -> Path:
        return self.path / f"part{self._rank}-{number:06d}{self._ending}"

    def _saved(self) -> dict[str, Any]:
        try:
            saved: dict[str, Any] = json.loads(self._progress.read_bytes())
            if not {*self._settings, "made_by", "counts", "state", "done"} <= saved.keys():
                raise ValueError("it lacks entries")
        except (ValueError, AttributeError) as error:
            raise StateError(f"{self._progress} is damaged: delete the folder, or name another") from error
        return saved

    def _refuse_differences(self, saved: dict[str, Any]) -> None:
        for name, value in self._settings.items():
            if saved[name] != value:
                there, here = (saved["made_by"], self._made_by) if name == "encoder" else (saved[name], value)
                seen = (
                    f"{name} {there}, and this is {here}" if there != here else f"other weights or settings of {here}"
                )
                raise StateError(
                    f"{self.path} was started with {seen}: name another folder, or use the model and options that it "
                    "was started with",
                    key=name,
                )

    def _refuse_others(self) -> None:
        """Refuse a new folder that holds anything but the files of this run's other ranks."""
        own = rf"\.lock{self._rank}|\.{re.escape(self._progress.name)}\.unfinished"  # left by an early kill
        if self._rank:
            own += rf"|(\.lock|\.?_progress|\.?part)-\d+{re.escape(self._rank[4:])}.*"
        others = sorted(path.name for path in self.path.iterdir() if not re.fullmatch(own, path.name))
        if others:
            raise ConfigError(f"{self.path} holds other files, such as {others[0]!r}: name a new folder")

    def _tidy(self) -> None:
        """Delete the parts that a killed run wrote after its last progress file."""
        finished = {self._part(number).name for number in range(self.counts["parts"])}
        parts = rf"\.?part{self._rank}-\d{{6,}}\.\w+(\.unfinished)?"
        for path in list(self.path.iterdir()):
            if re.fullmatch(parts, path.name) and path.name not in finished:
                path.unlink()
        lost = sorted(name for name in finished if not (self.path / name).exists())
        if lost:
            raise StateError(f"{self.path} lacks {lost[0]}, which was written: delete the folder, or name another")
