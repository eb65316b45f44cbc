"""Reading, tokenizing and bucketing, against the tokenizer alone."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import bertstream
from bertstream.reading.messages import AHEAD, StreamMessages, WorkersInTurn

from .common import take_turns, texts_about, texts_of


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--words", type=int, help="of a text on average, from the same words (default: as they are)")


def stream(arguments: argparse.Namespace) -> dict[str, object]:
    """Token batches of texts and of ids from workers, read by an idle loop, beside the bare tokenizer on one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = texts_of(arguments)
    if arguments.words is not None:
        texts = texts_about(arguments.words, texts)
    texts *= max(1, 100_000 // len(texts))
    encoder = bertstream.Encoder.from_pretrained(arguments.model, dtype="float32", device="cpu", overflow="truncate")
    tokenizer = AutoTokenizer.from_pretrained(encoder.model.config._name_or_path).backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "corpus.jsonl"
        shard.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        # Eight lanes divide evenly over two workers; by default so little data gets few lanes.
        reading = bertstream.StreamConfig(lanes=8)
        dataset = bertstream.TextStream(shard, encoder, batch_size=64, shuffle=True, reading=reading)
        tokens = sum(batch.num_tokens for batch in dataset)

        def bare() -> None:
            for first in range(0, len(texts), 256):
                tokenizer.encode_batch(texts[first : first + 256])

        bertstream.tokenize(shard, encoder, Path(folder) / "ids", reading=reading, progress=False)
        ids = f"{folder}/ids/*.parquet"
        tokenized = bertstream.TextStream(ids, encoder, text="input_ids", batch_size=64, shuffle=True, reading=reading)

        # As `stream` reads, but with persistent workers, because starting processes is not part of an epoch.
        loaders: dict[str, DataLoader[Any]] = {
            name: DataLoader(
                StreamMessages(read),
                batch_size=None,
                num_workers=workers,
                persistent_workers=True,
                prefetch_factor=AHEAD,
            )
            for name, (read, workers) in {
                "one_worker": (dataset, 1),
                "two_workers": (dataset, 2),
                "one_worker_of_ids": (tokenized, 1),
            }.items()
        }

        busy: dict[str, list[float]] = {name: [] for name in loaders}

        def epoch(name: str) -> None:
            loader = loaders[name]
            own, wall = time.thread_time(), time.perf_counter()
            for _ in WorkersInTurn(iter(loader), loader.num_workers):
                pass
            busy[name].append((time.thread_time() - own) / (time.perf_counter() - wall))

        contenders = {"bare_tokenizer": bare, **{name: partial(epoch, name) for name in loaders}}
        for contender in contenders.values():
            contender()
        seconds = take_turns(contenders, arguments)
        loaders.clear()
    rates = {name: [tokens / second for second in times] for name, times in seconds.items()}
    ratio = [one / bare for one, bare in zip(rates["one_worker"], rates["bare_tokenizer"], strict=True)]
    scaling = [two / one for two, one in zip(rates["two_workers"], rates["one_worker"], strict=True)]
    of_ids = [one / other for one, other in zip(rates["one_worker_of_ids"], rates["one_worker"], strict=True)]
    return {
        "texts": len(texts),
        "tokens": tokens,
        "lanes": dataset.num_lanes,
        "tokens_per_s": {name: round(statistics.median(times)) for name, times in rates.items()},
        "one_worker_times_bare_tokenizer": round(statistics.median(ratio), 2),
        "two_workers_times_one": round(statistics.median(scaling), 2),
        "ids_times_texts": round(statistics.median(of_ids), 2),
        "consumer_busy": {name: round(statistics.median(shares), 2) for name, shares in busy.items()},
        "rounds": arguments.rounds,
    }
