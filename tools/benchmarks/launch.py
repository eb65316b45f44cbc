"""What a forward costs beside its arithmetic: a model so small that little else is left."""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel

import bertstream
from bertstream.tokens import TokenBatch, cumulate

from .common import ratio, take_turns
from .models import write_bert

NEEDS_TEXTS = False
CALLS = 20
"""Calls timed together."""

SHAPES = {"1 text of 4": [4], "64 texts of 4": [4] * 64, "64 texts of 4 to 67": list(range(4, 68))}
"""Lengths of the texts of one call, in tokens."""


def launch(arguments: argparse.Namespace) -> dict[str, object]:
    """`encode` of token batches by a BERT of 12 layers and hidden size 32, fused and packed; one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            name = write_bert(Path(folder) / "bert", "tiny")
            fused = bertstream.Encoder.from_pretrained(name, dtype=arguments.dtypes[0], device=arguments.device)
        torch.manual_seed(0)
        config = BertConfig(hidden_size=32, num_hidden_layers=12, num_attention_heads=2, intermediate_size=128)
        model = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
        fused = bertstream.Encoder(
            model, fused._pretrained_tokenizer, dtype=arguments.dtypes[0], device=arguments.device
        )
        packed = copy.deepcopy(fused)
        packed._fused = None
        batches = {shape: batch_of_lengths(lengths) for shape, lengths in SHAPES.items()}
        turns = {
            f"{way} {shape}": partial(calls, encoder, batch, CALLS)
            for shape, batch in batches.items()
            for way, encoder in (("fused", fused), ("packed", packed))
        }
        for turn in turns.values():
            turn()
        seconds = take_turns(turns, arguments)
    finally:
        torch.set_num_threads(threads)
    return {
        "way": fused.batching.way,
        "milliseconds": {name: round(statistics.median(times) / CALLS * 1e3, 3) for name, times in seconds.items()},
        "fused_over_packed": {
            shape: round(ratio(seconds[f"fused {shape}"], seconds[f"packed {shape}"]), 3) for shape in SHAPES
        },
        "rounds": arguments.rounds,
    }


def batch_of_lengths(lengths: list[int]) -> TokenBatch:
    """Texts of these lengths, of any words."""
    array = np.array(lengths, np.int32)
    ids = (np.arange(array.sum(), dtype=np.int32) % 1000) + 1000
    nothing = np.zeros(len(array), np.int32)
    return TokenBatch(ids, cumulate(array), None, None, None, nothing, nothing)


def calls(encoder: bertstream.Encoder, batch: TokenBatch, count: int) -> None:
    """Encode the batch `count` times."""
    for _ in range(count):
        encoder.encode(batch)
