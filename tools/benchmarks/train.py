"""A training epoch with BERT inside the model: packed against padded."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import bertstream

from .common import ratio, take_turns, texts_of


def train(arguments: argparse.Namespace) -> dict[str, object]:
    """Seconds of an epoch of forward, backward and step over all layers, on the same texts."""
    texts = texts_of(arguments)
    settings = {"dtype": arguments.dtypes[0], "device": arguments.device, "overflow": "truncate"}
    encoder = bertstream.Encoder.from_pretrained(arguments.model, **settings).unfreeze()
    name = encoder.model.config._name_or_path
    batches = [texts[i : i + 32] for i in range(0, len(texts), 32)]
    by_length = sorted(texts, key=len)
    sorted_batches = [by_length[i : i + 32] for i in range(0, len(texts), 32)]
    embed = bertstream.BertEmbedding(encoder)
    optimizer = torch.optim.SGD(encoder.parameter_groups(1e-6))
    padded = Padded(name, encoder.dtype)
    padded_optimizer = torch.optim.SGD(padded.parameters(), 1e-6)

    def rows(batch: list[str]) -> Tensor:
        return embed(batch).values

    contenders: dict[str, Callable[[], object]] = {
        "padded": partial(epoch, batches, padded, padded_optimizer),
        "padded_sorted": partial(epoch, sorted_batches, padded, padded_optimizer),
        "packed": partial(epoch, batches, rows, optimizer),
    }
    first = texts[:64]
    right, found = padded(first).detach(), embed(first).values.detach()
    seconds = take_turns(contenders, arguments)
    return {
        "texts": len(texts),
        "model": arguments.model,
        "dtype": arguments.dtypes[0],
        "seconds": {name: round(statistics.median(times), 2) for name, times in seconds.items()},
        "packed_times_padded": round(ratio(seconds["padded"], seconds["packed"]), 2),
        "packed_times_padded_sorted": round(ratio(seconds["padded_sorted"], seconds["packed"]), 2),
        "relative_l2_error": float(f"{float((right - found).norm() / right.norm()):.1e}"),
        "rounds": arguments.rounds,
    }


class Padded(nn.Module):
    """The usual training: batches padded to their longest text; returns the rows of real tokens."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModel.from_pretrained(name, dtype=dtype, add_pooling_layer=False).eval()

    def forward(self, texts: list[str]) -> Tensor:
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return self.model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]


def epoch(batches: Iterable[list[str]], model: Callable[[list[str]], Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Forward, backward and an optimizer step on each batch."""
    for batch in batches:
        loss = model(batch).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
