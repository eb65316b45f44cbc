"""Epochs from the cache, and a tagger's over tensors in memory."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

import bertstream

from .common import read_all, texts_of


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--storage", default="auto", help="how the cache stores rows: auto, bfloat16, int8")


def cache(arguments: argparse.Namespace) -> dict[str, object]:
    """A first epoch with a cache and one without, epochs from memory and from disk, and a BiLSTM's epochs."""
    texts = texts_of(arguments)
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "corpus.jsonl"
        shard.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        encoder = bertstream.Encoder.from_pretrained(
            arguments.model, dtype=arguments.dtypes[0], device=arguments.device, overflow="truncate"
        )
        encoder.fingerprint()  # computed once a process, so not part of any epoch
        stream = partial(bertstream.stream, shard, encoder, batch_size=32, shuffle=True)
        vectors = torch.cat([rows for batch in stream() for rows in batch["text"]])
        seconds: dict[str, list[float]] = {}

        def timed(name: str, epoch: Callable[[], object]) -> None:
            started = time.perf_counter()
            epoch()
            seconds.setdefault(name, []).append(time.perf_counter() - started)

        plain, stats = stream(), {}
        ram = RamLoader(plain)
        tagger = Tagger(vectors.shape[1])
        timed("warm-up", lambda: read_all(plain))
        for number in range(arguments.rounds):
            at = Path(folder) / f"cache-{number}"
            with bertstream.EmbeddingCache("1GiB", at, "2GiB", dtype=arguments.storage) as both:
                loader = stream(cache=both)
                first_two = [("no_cache", plain), ("first_epoch", loader)]
                for name, one in first_two if number % 2 else first_two[::-1]:
                    timed(name, partial(read_all, one))
                both.flush()
                timed("from_memory", partial(read_all, loader))
                timed("ram_tensors", partial(read_all, ram))
                timed("tagger_from_memory", partial(tagger.train, loader))
                timed("tagger_ram_tensors", partial(tagger.train, ram))
                stats = loader.stats()
            with bertstream.EmbeddingCache(0, at, "2GiB", dtype=arguments.storage) as disk:
                timed("from_disk", partial(read_all, stream(cache=disk)))
                misses = disk.stats()["misses"]

    def ratio(top: str, bottom: str) -> float:
        return round(statistics.median(a / b for a, b in zip(seconds[top], seconds[bottom], strict=True)), 3)

    return {
        "texts": len(texts),
        "tokens": len(vectors),
        "model": arguments.model,
        "dtype": arguments.dtypes[0],
        "storage": arguments.storage,
        "tokens_per_s": {name: round(len(vectors) / statistics.median(times)) for name, times in seconds.items()},
        "first_epoch_over_no_cache": ratio("first_epoch", "no_cache"),
        "first_epoch_over_from_memory": ratio("first_epoch", "from_memory"),
        "first_epoch_over_from_disk": ratio("first_epoch", "from_disk"),
        "tagger_from_memory_over_ram_tensors": ratio("tagger_from_memory", "tagger_ram_tensors"),
        "not_on_disk": misses,
        "cache_stats": {name: round(value, 3) for name, value in stats.items() if name.startswith("cache_")},
        "rounds": arguments.rounds,
    }


class RamLoader:
    """The same vectors and batches, gathered from one tensor in memory: the fastest possible cache."""

    def __init__(self, loader: bertstream.EmbeddingLoader) -> None:
        batches = [batch["text"] for batch in loader]
        self.rows = torch.cat([batch.values for batch in batches])
        starts = np.cumsum([0, *(len(batch.values) for batch in batches)])
        self.batches = [(torch.arange(starts[i], starts[i + 1]), batch) for i, batch in enumerate(batches)]

    def __iter__(self) -> Iterator[dict[str, bertstream.Embeddings]]:
        for rows, batch in self.batches:
            yield {"text": dataclasses.replace(batch, values=self.rows.index_select(0, rows))}


class Tagger:
    """The BiLSTM of examples/tag_words.py; a token's tag is computed from its id."""

    def __init__(self, size: int) -> None:
        torch.manual_seed(0)
        self.lstm = torch.nn.LSTM(size, 128, batch_first=True, bidirectional=True)
        self.head = torch.nn.Linear(256, 17)
        self.optimizer = torch.optim.Adam([*self.lstm.parameters(), *self.head.parameters()], 2e-3)

    def train(self, loader: Iterable[dict[str, bertstream.Embeddings]]) -> None:
        for batch in loader:
            found = batch["text"]
            states, _ = self.lstm(found.packed_sequence())
            scores = self.head(torch.nn.utils.rnn.pad_packed_sequence(states, batch_first=True)[0])
            tags = dataclasses.replace(found, values=torch.from_numpy(found.tokens.input_ids % 17).long()[:, None])
            padded, mask = tags.padded()
            loss = torch.nn.functional.cross_entropy(scores[mask], padded[mask].flatten())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
