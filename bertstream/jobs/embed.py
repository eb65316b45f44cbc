"""Every text of a corpus encoded once, and the vectors written to files; a run that is killed goes on where it was.

A folder holds finished files only, `part-000000.parquet` and so on, and `_progress.json`, which says how many there are
and where the loader stood behind the last of them. It is replaced behind each part, in one step: what a killed run
wrote later than that is written again. What reads a folder of Parquet passes over names that begin with `_` or a dot.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..caching.cache import EmbeddingCache, as_bytes
from ..embeddings import Embeddings, SupportsCache
from ..errors import ConfigError, StateError
from ..loader import EmbeddingLoader, stream
from ..reading.config import StreamConfig
from ..reading.dataset import Shards
from ..system.distributed import rank_and_world_size
from .writers import Part, PartFormat, check_format, ending_of, whole_or_nothing, write_part

_BATCH_TOKENS = 16384
"""Not the encoder's `max_forward_tokens`: a place in a stream holds for one budget only, and what is fastest differs
from run to run."""

_PART_S = 120.0
"""Seconds after which a part is written, however small: so much work a kill costs at most."""

_VERSION = 1


def embed(
    shards: Shards,
    encoder: SupportsCache,
    out: str | os.PathLike[str],
    *,
    text: str = "text",
    pair: str | None = None,
    format: PartFormat = "parquet",
    part_bytes: int | str = "128MiB",
    num_workers: int = 0,
    cache: EmbeddingCache | None = None,
    reading: StreamConfig | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Write the vectors of all texts of these shards to a folder, with each record's key, shard and index.

    It may be stopped at any time, by SIGKILL too, and called again with the same arguments: it goes on behind the last
    finished part, and every record is written exactly once. Of several ranks each writes its share, and goes on with
    the same number of ranks. Records do not come in the order of the shards, but by length within a window.

    Args:
        shards, text, pair, num_workers, cache, reading: as for `bertstream.stream`.
        encoder: what computes the vectors. Its `output_dtype` is what is written.
        out: a local folder, made where it is missing; empty, or of a run that was stopped.
        format: "parquet", "webdataset" or "safetensors"; see `bertstream.jobs.writers.write_part`.
        part_bytes: of the vectors in a file, and so of those in memory, and a quarter more at most where no text is
            longer than that; a number or a string such as "1GiB". After two minutes a part is written however small.
        progress: whether a bar is shown. Its total is known for Parquet, and for files on disk that are not packed.
    Returns:
        What the folder holds, of this rank: `parts`, `texts`, `tokens`, `rows`, `cut_texts` that truncation cut,
        `bad_records` and `bad_shards` that were passed over; and `texts_before`, those of earlier runs.
    Raises:
        ConfigError: an argument is out of range, a parameter of the encoder requires a gradient, or the folder holds
            something else or is being written to by another process.
        StateError: the folder was begun with other shards, another encoder or other settings.
        ShardError: a shard is missing, or one of its records is broken.
        OSError: the folder cannot be written to.
    """
    check_format(format, encoder.output_dtype)
    largest = as_bytes("part_bytes", part_bytes)
    if largest < 1:
        raise ConfigError(f"part_bytes={part_bytes!r}: write at least 1")
    row_bytes = math.prod(encoder.row_shape) * encoder.output_dtype.itemsize
    if "://" in os.fspath(out):
        raise ConfigError(f"out={os.fspath(out)!r} is a URL: name a local folder, and copy its parts from there")
    fingerprint = encoder.fingerprint()
    if fingerprint is None:
        raise ConfigError("the encoder's parameters require gradients: encoder.requires_grad_(False) freezes them")
    reading = replace(reading or StreamConfig(), uneven="leave")  # a repeated batch would be written twice
    loader = stream(
        shards,
        encoder,
        text=text,
        pair=pair,
        max_tokens=max(1, min(_BATCH_TOKENS, largest // (4 * row_bytes))),
        fields=(),
        num_workers=num_workers,
        cache=cache,
        reading=reading,
    )
    settings = {"format": format, "part_bytes": largest, "encoder": fingerprint.hex()}
    folder_of = _Folder(Path(out), settings, ending_of(format), encoder=repr(encoder))
    with closing(loader), folder_of.opened(loader.state_dict()) as folder:
        before = dict(folder.counts)
        try:
            loader.load_state_dict(folder.state)
        except StateError as error:
            raise StateError(
                f"{folder_of.path} was begun with {'other' if error.key == 'shards' else 'another'} {error.key}: name "
                "another folder, or what it was begun with",
                key=error.key,
            ) from error
        if not folder.done:
            _fill(folder, loader, text, largest, progress=progress)
        return folder.counts | {"texts_before": before["texts"]}


def _fill(folder: _Folder, loader: EmbeddingLoader, text: str, largest: int, *, progress: bool) -> None:
    before = dict(folder.counts)
    started = time.monotonic()
    gathered = _Gathered()

    def write(*, done: bool = False) -> None:
        counts = {name: folder.counts[name] + gathered.counts[name] for name in gathered.counts}
        for name in ("bad_records", "bad_shards"):
            counts[name] = before[name] + int(loader.stats()[name])
        folder.write(gathered.part() if gathered.counts["texts"] else None, counts, loader.state_dict(), done=done)

    # A rate over the whole run: a window's batches are sorted by length, so that the latest few say little.
    total = loader.dataset.count_records() if progress else None
    done = before["texts"] + before["bad_records"]
    with tqdm(desc="embedding", unit=" texts", total=total, initial=done, disable=not progress, smoothing=0) as bar:
        for batch in loader:
            gathered.add(batch, batch[text])
            bar.update(len(batch["__key__"]))
            tokens = folder.counts["tokens"] + gathered.counts["tokens"] - before["tokens"]
            bar.set_postfix_str(f"{tokens / (time.monotonic() - started):,.0f} tokens/s", refresh=False)
            if gathered.num_bytes >= largest or time.monotonic() - gathered.started >= _PART_S:
                write()
                gathered = _Gathered()
        write(done=True)


class _Gathered:
    """What the next part will hold."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.counts = {"texts": 0, "tokens": 0, "rows": 0, "cut_texts": 0}
        self.num_bytes = 0
        self._batches: list[dict[str, Any]] = []
        self._vectors: list[Embeddings] = []

    def add(self, batch: dict[str, Any], vectors: Embeddings) -> None:
        """Take the ids and vectors of a batch."""
        vectors = vectors.to("cpu")
        self._batches.append({name: batch[name] for name in ("__key__", "__shard__", "__index__")})
        self._vectors.append(vectors)
        self.num_bytes += vectors.values.nbytes
        self.counts["texts"] += len(vectors)
        self.counts["tokens"] += vectors.tokens.num_tokens
        self.counts["rows"] += len(vectors.values)
        self.counts["cut_texts"] += int((vectors.tokens.cut_tokens > 0).sum())

    def part(self) -> Part:
        """It all, as a part."""

        def joined(name: str) -> list[str]:
            return [entry for batch in self._batches for entry in batch[name]]

        one_each = self._vectors[0].output == "sentence"
        return Part(
            keys=joined("__key__"),
            shards=joined("__shard__"),
            indices=np.concatenate([batch["__index__"].numpy() for batch in self._batches]),
            lengths=None if one_each else np.concatenate([vectors.lengths.numpy() for vectors in self._vectors]),
            values=torch.cat([vectors.values for vectors in self._vectors]),
        )


class _Folder:
    """The folder, as one rank sees it.

    Args:
        path: made where it is missing.
        settings: what all its parts have in common.
        ending: of their names.
        encoder: how it shows itself, for messages.
    """

    def __init__(self, path: Path, settings: dict[str, Any], ending: str, *, encoder: str) -> None:
        rank, world_size = rank_and_world_size()
        self.path = path
        self._encoder = encoder
        self._rank = f"-{rank:03d}-of-{world_size:03d}" if world_size > 1 else ""
        self._settings = {"version": _VERSION, "ranks": world_size, **settings}
        self._ending = ending
        names = ("parts", "texts", "tokens", "rows", "cut_texts", "bad_records", "bad_shards")
        self.counts = dict.fromkeys(names, 0)
        self.state: dict[str, Any] = {}
        self.done = False

    @contextmanager
    def opened(self, state: dict[str, Any]) -> Iterator[_Folder]:
        """Read how far it is, or begin it with this state; other processes are kept out meanwhile."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(f"no folder can be made at {self.path}: {error}") from error
        with open(self.path / f".lock{self._rank}", "ab") as lock:
            with suppress(ImportError):
                import fcntl

                try:
                    # The process's lock, not the file's: forked workers, which outlive a kill for a moment, would hold
                    # that too.
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConfigError(f"{self.path}: another process is writing vectors there") from None
            if not self._progress.exists():
                self._refuse_others()
            elif (saved := self._saved())["done"] or saved["counts"]["parts"]:
                self._refuse_differences(saved)
                self.state, self.done = saved["state"], saved["done"]
                self.counts |= saved["counts"]
            self._tidy()
            if not self.state:  # nothing was finished before: whatever was begun here, it costs nothing to begin anew
                self.write(None, self.counts, state, done=False)
            yield self

    def write(self, part: Part | None, counts: dict[str, int], state: dict[str, Any], *, done: bool) -> None:
        """Write a part, and then that it is there, and the place behind it."""
        if part is not None:
            write_part(self._part(self.counts["parts"]), part, self._settings["format"])
        self.counts = counts | {"parts": self.counts["parts"] + (part is not None)}
        self.state, self.done = state, done
        saved = {**self._settings, "made_by": self._encoder, "counts": self.counts, "done": done, "state": state}
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
                there, here = (saved["made_by"], self._encoder) if name == "encoder" else (saved[name], value)
                seen = (
                    f"{name} {there}, and this is {here}" if there != here else f"other weights or settings of {here}"
                )
                raise StateError(
                    f"{self.path} was begun with {seen}: name another folder, or the model and options that it was "
                    "begun with",
                    key=name,
                )

    def _refuse_others(self) -> None:
        """A folder that this does not go on with holds nothing but what other ranks of this run have written."""
        own = rf"\.lock{self._rank}|\.{re.escape(self._progress.name)}\.unfinished"  # of a kill in the first moment
        if self._rank:
            own += rf"|(\.lock|\.?_progress|\.?part)-\d+{re.escape(self._rank[4:])}.*"
        others = sorted(path.name for path in self.path.iterdir() if not re.fullmatch(own, path.name))
        if others:
            raise ConfigError(f"{self.path} holds other files, such as {others[0]!r}: name a new folder")

    def _tidy(self) -> None:
        """Delete what a run that was killed wrote behind its last progress."""
        finished = {self._part(number).name for number in range(self.counts["parts"])}
        parts = rf"\.?part{self._rank}-\d{{6,}}\.\w+(\.unfinished)?"
        for path in list(self.path.iterdir()):
            if re.fullmatch(parts, path.name) and path.name not in finished:
                path.unlink()
        lost = sorted(name for name in finished if not (self.path / name).exists())
        if lost:
            raise StateError(f"{self.path} lacks {lost[0]}, which was written: delete the folder, or name another")
