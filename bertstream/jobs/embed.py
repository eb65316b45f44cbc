"""Encode every text of a corpus once and write the vectors to files; a killed run can be continued.

The folder holds finished files only, `part-000000.parquet` and so on, and `_progress.json`, which counts them and holds
the loader's state after the last one. It is replaced atomically after each part, and anything that a killed run wrote
after that is written again. Parquet readers skip names that begin with `_` or a dot.
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
from ..errors import ConfigError, StateError, check_at_least
from ..loader import stream
from ..pipeline.embedding_loader import EmbeddingLoader
from ..reading.config import StreamConfig
from ..reading.dataset import Shards
from ..reading.mixture import refuse_mixture
from ..system.distributed import rank_and_world_size
from .writers import Part, PartFormat, check_format, ending_of, whole_or_nothing, write_part

_BATCH_TOKENS = 16384
"""A state fits one budget only, so not the encoder's `max_forward_tokens`, which differs from run to run."""

_PART_S = 120.0
"""Seconds after which a part is written, however small; a kill loses at most this much work."""

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

    You can stop it at any time, even by SIGKILL, and call it again with the same arguments: it continues after the last
    finished part, and every record is written exactly once. With several ranks, each writes its share; continue with
    the same number of ranks. Records are not in the order of the shards: each bucket is sorted by length.

    Args:
        shards, text, pair, num_workers, cache, reading: as for `bertstream.stream`; no `Mixture`.
        encoder: computes the vectors, which are written in its `output_dtype`.
        out: a local folder, created if missing; empty, or of a run that was stopped.
        format: "parquet", "webdataset" or "safetensors"; see `bertstream.jobs.writers.write_part`.
        part_bytes: bytes of vectors in a file, and so in memory; a number or a string such as "1GiB". A file may exceed
            it by a quarter, or more where a single text does. After two minutes a part is written however small.
        progress: whether to show a bar; its total is known for Parquet and for uncompressed files on disk.
    Returns:
        Counts of this rank's share in the folder: `parts`, `texts`, `tokens`, `rows`, `cut_texts` that were truncated,
        `bad_records` and `bad_shards` that were skipped; and `texts_before`, the texts of earlier runs.
    Raises:
        ConfigError: an argument is out of range, a parameter of the encoder requires gradients, the folder holds other
            files, or another process is writing to it.
        StateError: the folder was started with other shards, another encoder or other settings.
        ShardError: a shard is missing, or one of its records is broken.
        OSError: the folder cannot be written to.
    """
    refuse_mixture(shards, "embed")
    check_format(format, encoder.output_dtype)
    largest = as_bytes("part_bytes", part_bytes)
    check_at_least("part_bytes", largest, 1)
    row_bytes = math.prod(encoder.row_shape) * encoder.output_dtype.itemsize
    if "://" in os.fspath(out):
        raise ConfigError(f"out={os.fspath(out)!r} is a URL: name a local folder, and copy its parts from there")
    fingerprint = encoder.fingerprint()
    if fingerprint is None:
        raise ConfigError("parameters of the encoder require gradients: call encoder.freeze() first")
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
    folder_of = _Folder(Path(out).expanduser(), settings, ending_of(format), encoder=repr(encoder))
    with closing(loader), folder_of.opened(loader.state_dict()) as folder:
        before = dict(folder.counts)
        try:
            loader.load_state_dict(folder.state)
        except StateError as error:
            raise StateError(
                f"{folder_of.path} was started with {'other' if error.key == 'shards' else 'another'} {error.key}: "
                "name another folder, or use the shards and settings that it was started with",
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

    total = loader.count_records() if progress else None
    done = before["texts"] + before["bad_records"]
    # smoothing=0 is the mean rate of the run: batches are sorted by length within a bucket, so recent ones say little.
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
    """The batches of the next part."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.counts = {"texts": 0, "tokens": 0, "rows": 0, "cut_texts": 0}
        self.num_bytes = 0
        self._batches: list[dict[str, Any]] = []
        self._vectors: list[Embeddings] = []

    def add(self, batch: dict[str, Any], vectors: Embeddings) -> None:
        """Keep a batch's record ids and vectors."""
        vectors = vectors.to("cpu")
        self._batches.append({name: batch[name] for name in ("__key__", "__shard__", "__index__")})
        self._vectors.append(vectors)
        self.num_bytes += vectors.values.nbytes
        self.counts["texts"] += len(vectors)
        self.counts["tokens"] += vectors.tokens.num_tokens
        self.counts["rows"] += len(vectors.values)
        self.counts["cut_texts"] += int((vectors.tokens.cut_tokens > 0).sum())

    def part(self) -> Part:
        """Join all batches into a part."""

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
        path: created if missing.
        settings: common to all parts.
        ending: of the parts' names.
        encoder: its repr, for messages.
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
        """Lock the folder against other processes; read its progress, or start it with this state."""
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
                    raise ConfigError(f"{self.path}: another process is writing vectors there") from None
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

    def write(self, part: Part | None, counts: dict[str, int], state: dict[str, Any], *, done: bool) -> None:
        """Write a part, then the progress file that counts it and holds the state after it."""
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
