"""A stream from jsonl shards with workers, against the encoder and the tokenizers, each alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

import bertstream
from bertstream import Embeddings, Encoder, TokenBatch
from bertstream.system.cuda import to_device

from .encoders import batch_of, free_memory, load
from .part import Emit, Settings
from .timing import synchronize, times_of

MAX_TOKENS = 8192
"""Tokens of a batch; the loader encodes several together where that is faster."""

SKIPPED, STOP = 0.05, 0.9
"""Shares of the texts at which timing starts and ends: before, workers start; after, the first of them have no more."""

MOST_S = 10.0
"""Seconds after which timing ends in any case."""


def run(settings: Settings, emit: Emit) -> None:
    """Rows of tokenizers, of an encoder that costs nothing, and of each model's stream."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = []
    for shard in settings.shards():
        with open(shard, encoding="utf-8") as file:
            texts.append([json.loads(line)["text"] for line in file])
    count = sum(map(len, texts))
    tokenizers = tokenizers_rate(settings, texts, 50 if settings.tiny else 6000)  # forks, so before CUDA is in use
    emit("tokenizers", tokens_per_s=round(tokenizers), processes=settings.workers)
    bert = load(settings, "bert_base")
    free = stream_rate(settings, FreeEncoder(bert), count)
    emit("free encoder", **free)
    for model in ("bert_base", "minilm"):
        encoder = bert if model == "bert_base" else load(settings, model)
        forward = forward_rate(settings, encoder, texts[0])
        found = stream_rate(settings, encoder, count)
        rate = found["tokens_per_s"]
        emit(
            model,
            **found,
            forward_tokens_per_s=round(forward),
            max_forward_tokens=encoder.max_forward_tokens,
            over_lesser=rate / min(forward, tokenizers),
            over_free_encoder=rate / free["tokens_per_s"],
        )
        del encoder
        bert = None
        free_memory()


class FreeEncoder:
    """Costs nothing: its vectors are memory that nothing was written to."""

    def __init__(self, encoder: Encoder) -> None:
        self.tokenizer = encoder.tokenizer
        self.device = encoder.device
        self.max_forward_tokens = 32768
        self.embedding_dim = 8

    def encode(self, batch: TokenBatch) -> Embeddings:
        """[N, 8] float32."""
        return Embeddings(
            values=torch.empty(batch.num_tokens, self.embedding_dim, device=self.device),
            cu_seqlens=to_device(batch.cu_seqlens, self.device),
            lengths=torch.from_numpy(batch.lengths.astype(np.int64)),
            tokens=batch,
            output="tokens",
        )


def stream_rate(settings: Settings, encoder: Any, count: int) -> dict[str, float]:
    """Tokens per second of a stream whose batches are dropped, and the shares of the loader's stages."""
    # As many lanes as workers, so that each has as much to do; fewer texts than these would get fewer lanes.
    reading = bertstream.StreamConfig(lanes=settings.workers)
    with bertstream.stream(
        settings.shards(),
        encoder,
        max_tokens=64 if settings.tiny else MAX_TOKENS,
        shuffle=True,
        num_workers=settings.workers,
        reading=reading,
    ) as loader:
        tokens, seconds = timed_part(loader, count, encoder.device)
        stats = loader.stats()
    total = stats["wait_s"] + stats["step_s"]
    stages = {f"{stage}_share": stats[f"{stage}_s"] / total for stage in ("read", "encode", "hand_over", "room_wait")}
    return {"tokens_per_s": round(tokens / seconds), "tokens": tokens, "seconds": seconds} | stages


def timed_part(loader: Iterable[dict[str, Embeddings]], count: int, device: torch.device) -> tuple[int, float]:
    """Tokens and seconds between two shares of `count` texts."""
    texts, tokens, started = 0, 0, None
    for batch in loader:
        found = batch["text"]
        texts += len(found)
        if started is not None:
            tokens += found.tokens.num_tokens
            if texts >= STOP * count or time.perf_counter() - started > MOST_S:
                synchronize(device)
                return tokens, time.perf_counter() - started  # leaving the loop ends the workers, which takes a while
        elif texts >= SKIPPED * count:
            synchronize(device)
            started = time.perf_counter()
    raise RuntimeError(f"the stream ended after {texts} of {count} texts, before {STOP:.0%} of them")


def forward_rate(settings: Settings, encoder: Encoder, texts: list[str]) -> float:
    """Tokens per second of the encoder alone, over token batches, in forwards of the size that `calibrate` finds."""
    encoder.calibrate()
    batch = batch_of(encoder, texts, 256 if settings.tiny else 131072)
    times = times_of(lambda: encoder.encode(batch), settings.device, repeats=2 if settings.tiny else 12)
    return 1e3 * batch.num_tokens / times.back_to_back_ms


def tokenizers_rate(settings: Settings, texts: list[list[str]], most: int) -> float:
    """Tokens per second of bare tokenizers, one in each of as many processes as the stream has workers.

    Args:
        settings: of the check.
        texts: of each process.
        most: texts that each of them tokenizes.
    """
    tokenizer = Tokenizer.from_file(os.path.join(settings.model_folder("bert_base"), "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(512)
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(settings.workers)
    answers = context.SimpleQueue()

    def tokenize(own: list[str]) -> None:
        tokenizer.encode_batch(own[:20])
        begin.wait()
        started = time.perf_counter()
        tokens = 0
        for first in range(0, len(own), 256):
            tokens += sum(len(encoding) for encoding in tokenizer.encode_batch(own[first : first + 256]))
        answers.put((tokens, time.perf_counter() - started))

    processes = [context.Process(target=tokenize, args=(own[:most],)) for own in texts]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(tokens / seconds for tokens, seconds in found)
