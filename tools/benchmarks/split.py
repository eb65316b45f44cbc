"""Training the upper layers: from a cached lower half, against the whole forward with frozen lower layers."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import bertstream

from .common import ratio, read_all, take_turns, texts_of


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--at", nargs="+", type=int, default=[4, 5], help="how many layers are frozen")


def split(arguments: argparse.Namespace) -> dict[str, object]:
    """Seconds of an epoch that trains the upper layers, with the lower ones from a warm cache or computed."""
    texts = texts_of(arguments)
    batches = [texts[i : i + 32] for i in range(0, len(texts), 32)]
    settings = {"dtype": arguments.dtypes[0], "device": arguments.device, "overflow": "truncate", "output": "sentence"}
    settings |= {"normalize": False}
    contenders: dict[str, Callable[[], float]] = {}
    losses: dict[str, list[float]] = {}
    for at in arguments.at:
        whole = bertstream.Encoder.from_pretrained(arguments.model, **settings)
        whole.unfreeze(len(whole.parameter_groups(0.0)) - 1 - at)
        embed = bertstream.BertEmbedding(whole)
        lower, upper = bertstream.Encoder.from_pretrained(arguments.model, **settings).split(at)
        cache = bertstream.EmbeddingCache("2GiB")
        loader = bertstream.wrap(batches, lower, cache=cache)
        read_all(loader)  # fills the cache
        trained = [p for p in whole.parameters() if p.requires_grad]
        contenders[f"whole_{at}"] = partial(
            epoch, bertstream.wrap(batches, whole), embed, torch.optim.SGD(trained, 1e-3)
        )
        contenders[f"split_{at}"] = partial(epoch, loader, upper, torch.optim.SGD(upper.parameters(), 1e-3))

    def noted(name: str, contender: Callable[[], float]) -> None:
        losses.setdefault(name, []).append(contender())

    seconds = take_turns({name: partial(noted, name, contender) for name, contender in contenders.items()}, arguments)
    return {
        "texts": len(texts),
        "model": arguments.model,
        "dtype": arguments.dtypes[0],
        "seconds": {name: round(statistics.median(times), 2) for name, times in seconds.items()},
        "times_whole": {at: round(ratio(seconds[f"whole_{at}"], seconds[f"split_{at}"]), 2) for at in arguments.at},
        "losses_of_epochs": {name: [round(loss, 5) for loss in found] for name, found in losses.items()},
        "rounds": arguments.rounds,
    }


def epoch(loader: bertstream.EmbeddingLoader, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Train each vector's mean to be the text's position in the batch; return the mean loss."""
    total = 0.0
    for batch in loader:
        vectors: Tensor = model(batch).vectors.float()
        loss = (vectors.mean(1) - torch.linspace(0, 1, len(vectors), device=vectors.device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)
