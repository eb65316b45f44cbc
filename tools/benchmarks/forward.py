"""A frozen encoder's forward on a CPU: the model's own modules, one loop over its weights, and blocked weights."""

from __future__ import annotations

import argparse
import copy
import statistics
from functools import partial

import numpy as np

import bertstream
from bertstream.encoding import onednn

from .common import ratio, take_turns
from .launch import batch_of_lengths, calls

NEEDS_TEXTS = False
TOKENS = (128, 2048, 8192)
"""Of one forward, in texts of 8 to 59 tokens."""


def forward(arguments: argparse.Namespace) -> dict[str, object]:
    """`encode` of token batches, one forward each, in each dtype and way; blocked weights are for the largest."""
    found: dict[str, object] = {}
    draw = np.random.default_rng(0)
    for dtype in arguments.dtypes:
        ways = _ways(arguments.model, dtype)
        for tokens in TOKENS:
            lengths = draw.integers(8, 60, tokens // 8)
            batch = batch_of_lengths(lengths[: np.searchsorted(lengths.cumsum(), tokens, "right")].tolist())
            count = max(1, 1024 // tokens)
            turns = {way: partial(calls, encoder, batch, count) for way, encoder in ways.items()}
            for turn in turns.values():
                turn()
            seconds = take_turns(turns, arguments)
            found[f"{dtype} {tokens}"] = {
                "milliseconds": {way: round(statistics.median(s) / count * 1e3, 2) for way, s in seconds.items()},
                "times_packed": {way: round(ratio(seconds["packed"], s), 3) for way, s in seconds.items()},
            }
    return {"forwards": found, "rounds": arguments.rounds}


def _ways(name: str, dtype: str) -> dict[str, bertstream.Encoder]:
    fused = bertstream.Encoder.from_pretrained(name, dtype=dtype, device="cpu", max_forward_tokens=1 << 20)
    packed, blocked = copy.deepcopy(fused), copy.deepcopy(fused)
    packed._fused = None
    ways = {"packed": packed, "fused": fused}
    if onednn.available(fused.dtype):
        assert blocked._fused is not None
        blocked._fused.use_blocked_weights(max(TOKENS))
        ways["blocked"] = blocked
    return ways
