"""A training loop: encoding alone, training alone and both together, for four kinds of step."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import bertstream

from .common import finish, ratio, read_all, take_turns, texts_of


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--batch-size", type=int, default=32)
    command.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))


def epoch(arguments: argparse.Namespace) -> dict[str, object]:
    """Seconds of an epoch: the loader alone, the steps over vectors in memory, the steps over the loader."""
    texts = texts_of(arguments)
    encoder = bertstream.Encoder.from_pretrained(
        arguments.model, dtype=arguments.dtypes[0], device=arguments.device, overflow="truncate"
    )
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "corpus.jsonl"
        shard.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        loader = bertstream.stream(shard, encoder, batch_size=arguments.batch_size)
        batches = list(loader)
        encode_s = timed(partial(read_all, loader), arguments)
        steps = {}
        for name in arguments.steps:
            kind, share = STEPS[name]
            seconds = share * encode_s / len(batches)
            trial = kind(encoder, TRIAL, seconds)
            part = batches[:: max(1, len(batches) // 16)]
            amount = TRIAL * seconds * len(part) / timed(partial(train, part, trial), arguments)
            steps[name] = kind(encoder, max(1, round(amount)), seconds)
        contenders: dict[str, Callable[[], object]] = {}
        loaders = {name: bertstream.stream(shard, encoder, batch_size=arguments.batch_size) for name in steps}
        for name, step in steps.items():
            contenders[f"encode_{name}"] = partial(read_all, loader)  # again for each step: the machine's speed drifts
            contenders[f"train_{name}"] = partial(train, batches, step)
            contenders[f"both_{name}"] = partial(train, loaders[name], step)
        seconds = take_turns(contenders, arguments)
    return {
        "texts": len(texts),
        "batches": len(batches),
        "model": arguments.model,
        "dtype": arguments.dtypes[0],
        "steps": {
            name: compare(*(seconds[f"{part}_{name}"] for part in ("encode", "train", "both")))
            | {"amount": step.amount, "peak_ahead_tokens": loaders[name].stats()["peak_ahead_tokens"]}
            for name, step in steps.items()
        },
        "rounds": arguments.rounds,
    }


def compare(encode: list[float], train: list[float], both: list[float]) -> dict[str, float]:
    """Median seconds, and median ratios of both together to encoding and training alone."""
    pairs = list(zip(encode, train, strict=True))
    hidden = [a + b - c for (a, b), c in zip(pairs, both, strict=True)]
    return {
        "encode_s": round(statistics.median(encode), 3),
        "train_s": round(statistics.median(train), 3),
        "both_s": round(statistics.median(both), 3),
        "over_sum": round(ratio(both, [a + b for a, b in pairs]), 3),
        "over_max": round(ratio(both, [max(pair) for pair in pairs]), 3),
        "overlap_efficiency": round(ratio(hidden, [min(pair) for pair in pairs]), 3),
    }


def train(batches: Iterable[dict[str, bertstream.Embeddings]], step: Callable[[Tensor], None]) -> None:
    """Train for one epoch."""
    for batch in batches:
        step(batch["text"].values)


def timed(run: Callable[[], object], arguments: argparse.Namespace) -> float:
    """Seconds of a second run; the first one warms up."""
    run()
    finish(arguments.device)
    started = time.perf_counter()
    run()
    finish(arguments.device)
    return time.perf_counter() - started


class Sleeping:
    """A step that waits, as for I/O or for an accelerator."""

    def __init__(self, encoder: bertstream.Encoder, amount: int, seconds: float) -> None:
        self.amount = 1
        self.seconds = seconds

    def __call__(self, values: Tensor) -> None:
        time.sleep(self.seconds)


class Launching:
    """A recurrent step of many tiny operations, bound by their launches."""

    def __init__(self, encoder: bertstream.Encoder, amount: int, seconds: float) -> None:
        self.amount = amount
        with torch.device(encoder.device):
            self.cell = nn.GRUCell(encoder.embedding_dim, 16)
        self.optimizer = torch.optim.SGD(self.cell.parameters(), 1e-3)

    def __call__(self, values: Tensor) -> None:
        state = None
        for _ in range(self.amount):
            state = self.cell(values[:4], state)
        self.optimizer.zero_grad()
        state.sum().backward()
        self.optimizer.step()


class Computing:
    """A step of matrix products over all tokens, on all cores of the device."""

    def __init__(self, encoder: bertstream.Encoder, amount: int, seconds: float) -> None:
        self.amount = amount
        size = encoder.embedding_dim
        with torch.device(encoder.device):
            self.model = nn.Sequential(nn.Linear(size, 2 * size), nn.ReLU(), nn.Linear(2 * size, size))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)

    def __call__(self, values: Tensor) -> None:
        for _ in range(self.amount):
            values = self.model(values)
        self.optimizer.zero_grad()
        values.square().mean().backward()
        self.optimizer.step()


TRIAL = 16
"""Amount of work in the trial step, which shows how much a step needs."""

# Name -> the kind of step, and its seconds as a multiple of the encoder's.
STEPS = {
    "sleeping": (Sleeping, 1.0),
    "launch_bound": (Launching, 1.0),
    "balanced": (Computing, 1.0),
    "saturated": (Computing, 3.0),
}
