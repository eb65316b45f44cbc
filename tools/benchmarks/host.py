"""What a loader costs the main thread: an epoch from worker processes through an encoder that costs nothing."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

import numpy as np
import torch

import bertstream
from bertstream.testing import write_shards

from .common import texts_about, texts_of

SETTINGS: dict[str, dict[str, int]] = {
    "batch_size=64": {"batch_size": 64},
    "max_tokens=8192": {"max_tokens": 8192},
}
HIDDEN = 8


class FreeEncoder:
    """Gives vectors that nobody computed, to see what all else costs.

    Args:
        encoder: whose tokenizer it has.
    """

    def __init__(self, encoder: bertstream.Encoder) -> None:
        self.tokenizer = encoder.tokenizer
        self.device = torch.device("cpu")
        self.max_forward_tokens = 32_768

    def encode(self, batch: bertstream.TokenBatch) -> bertstream.Embeddings:
        """[N, 8] of whatever is in memory."""
        return bertstream.Embeddings(
            values=torch.empty(batch.num_tokens, HIDDEN),
            cu_seqlens=torch.from_numpy(batch.cu_seqlens),
            lengths=torch.from_numpy(batch.lengths.astype(np.int64)),
            tokens=batch,
            output="tokens",
        )


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--words", type=int, default=43, help="of a text on average; 43 make about 54 tokens")
    command.add_argument("--tokens", type=int, default=2_000_000, help="of an epoch, about")
    command.add_argument("--num-workers", type=int, default=2)


def host(arguments: argparse.Namespace) -> dict[str, object]:
    """Seconds of the main thread's own time for a million tokens, from the first batch of an epoch to its end."""
    threads = torch.get_num_threads()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    try:
        encoder = bertstream.Encoder.from_pretrained(
            arguments.model, dtype="float32", device="cpu", overflow="truncate"
        )
        free = FreeEncoder(encoder)
        texts = texts_about(arguments.words, texts_of(arguments))
        tokens = encoder.tokenizer.batch(texts).num_tokens
        texts = [f"{text} {copy}" for copy in range(max(1, arguments.tokens // tokens)) for text in texts]
        seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
        with tempfile.TemporaryDirectory() as folder:
            shards = write_shards(folder, texts, shards=8)
            for name, sizes in list(SETTINGS.items()) * arguments.rounds:
                with bertstream.stream(
                    shards, free, shuffle=True, num_workers=arguments.num_workers, **sizes
                ) as loader:
                    seconds[name].append(_own_time(loader))
                    stats = loader.stats()
    finally:
        torch.set_num_threads(threads)
    return {
        "texts": int(stats["texts"]),
        "tokens_a_text": round(stats["tokens"] / stats["texts"], 1),
        "main_thread_s_a_million_tokens": {name: round(statistics.median(s), 4) for name, s in seconds.items()},
        "all": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
        "workers": arguments.num_workers,
        "rounds": arguments.rounds,
    }


def _own_time(loader: bertstream.EmbeddingLoader) -> float:
    tokens = 0
    started = None
    for batch in loader:
        if started is None:  # starting the processes is no part of it
            started = time.thread_time()
            continue
        tokens += batch["text"].tokens.num_tokens
    assert started is not None
    return (time.thread_time() - started) / tokens * 1e6
