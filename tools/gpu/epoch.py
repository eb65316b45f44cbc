"""A training loop over a stream with workers: encoding alone, training alone and both, for three kinds of step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from benchmarks.epoch import compare
from torch import nn

import bertstream
from bertstream import Embeddings, Encoder

from .encoders import load
from .part import Emit, Settings
from .timing import synchronize

Step = Callable[[Embeddings], None]


def run(settings: Settings, emit: Emit) -> None:
    """A row for each kind of step, again after each round; the figures are medians over the rounds so far."""
    skip, count, rounds = (1, 3, 1) if settings.tiny else (40, 200, 2)
    batch_size = 4 if settings.tiny else 32
    encoder = load(settings, "bert_base")
    device = encoder.device

    def loader() -> bertstream.EmbeddingLoader:
        reading = bertstream.StreamConfig(lanes=settings.workers)
        return bertstream.stream(
            settings.shards(), encoder, batch_size=batch_size, num_workers=settings.workers, reading=reading
        )

    with loader() as source:
        batches = []
        for batch in source:
            batches.append(batch["text"])
            if len(batches) == skip + count:
                break
    alone = partial(_seconds_in_memory, batches, skip, device)
    launching = Launching(encoder, 8 if settings.tiny else 128)
    width = 64 if settings.tiny else 4096
    trial = Computing(encoder, width)
    encode_s = _seconds_over(loader, skip, count, device, None)
    trial_s = alone(trial)
    widths = {name: 64 * max(1, round(width / 64 * share * encode_s / trial_s)) for name, share in SHARES.items()}
    del trial
    steps: dict[str, Step] = {"launch_bound": launching}
    steps |= {name: Computing(encoder, width) for name, width in widths.items()}
    encode: dict[str, list[float]] = {name: [] for name in steps}
    train: dict[str, list[float]] = {name: [] for name in steps}
    both: dict[str, list[float]] = {name: [] for name in steps}
    alone(launching)  # warms up
    for number in range(1, rounds + 1):
        encode_s = _seconds_over(loader, skip, count, device, None)
        for name, step in steps.items():
            encode[name].append(encode_s)
            train[name].append(alone(step))
            both[name].append(_seconds_over(loader, skip, count, device, step))
            found = compare(encode[name], train[name], both[name])
            per_step = {f"{part}_ms_a_step": 1e3 * found[f"{part}_s"] / count for part in ("encode", "train", "both")}
            ratios = {part: found[part] for part in ("over_max", "over_sum")}
            emit(name, **ratios, **per_step, steps=count, rounds=number, tokens=_tokens(batches[skip:]))


SHARES = {"balanced": 1.0, "saturated": 3.0}
"""How long the steps take that compute, as a multiple of encoding."""


class Launching:
    """A BiLSTM tagger's step: hundreds of small operations, bound by the CPU that launches them.

    Args:
        encoder: whose vectors come.
        size: hidden size. On a CPU the backward of a packed sequence takes the square of its length.
    """

    def __init__(self, encoder: Encoder, size: int) -> None:
        with torch.device(encoder.device):
            self.lstm = nn.LSTM(encoder.embedding_dim, size, batch_first=True, bidirectional=True)
            self.head = nn.Linear(2 * size, 17)
        self.optimizer = torch.optim.Adam([*self.lstm.parameters(), *self.head.parameters()], 1e-3)

    def __call__(self, found: Embeddings) -> None:
        states, _ = self.lstm(found.packed_sequence())
        loss = self.head(states.data).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Computing:
    """A step of two products over all tokens, in float32: few operations that fill the device.

    Args:
        encoder: whose vectors come.
        width: hidden size, in proportion to which the step takes longer.
    """

    def __init__(self, encoder: Encoder, width: int) -> None:
        size = encoder.embedding_dim
        with torch.device(encoder.device):
            self.model = nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, size))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)

    def __call__(self, found: Embeddings) -> None:
        loss = self.model(found.values).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def _tokens(batches: Iterable[Embeddings]) -> int:
    return sum(batch.tokens.num_tokens for batch in batches)


def _seconds_in_memory(batches: list[Embeddings], skip: int, device: torch.device, step: Step) -> float:
    """Seconds of the steps over batches that are in memory, after the first `skip`."""
    for batch in batches[:skip]:
        step(batch)
    synchronize(device)
    started = time.perf_counter()
    for batch in batches[skip:]:
        step(batch)
    synchronize(device)
    return time.perf_counter() - started


def _seconds_over(
    loader: Callable[[], bertstream.EmbeddingLoader], skip: int, count: int, device: torch.device, step: Step | None
) -> float:
    """Seconds of `count` batches of a new epoch, after the first `skip`, in which workers start; None is no step."""
    started = 0.0
    with loader() as source:
        for number, batch in enumerate(source, 1):
            if step is not None:
                step(batch["text"])
            if number == skip:
                synchronize(device)
                started = time.perf_counter()
            elif number == skip + count:
                synchronize(device)
                return time.perf_counter() - started  # leaving the loop ends the workers, which takes a while
    raise RuntimeError(f"the shards have fewer than {skip + count} batches")
