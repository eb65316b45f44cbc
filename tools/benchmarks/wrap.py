"""Small batches of short texts: through `wrap`, which encodes several together, and one by one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import bertstream

from .common import encode_all, ratio, read_all, short_texts, take_turns

SIZES = (8, 32, 128)


def wrap(arguments: argparse.Namespace) -> dict[str, object]:
    """Batches of 8, 32 and 128 texts, tokenizing included on both sides."""
    texts = short_texts(arguments)
    encoder = bertstream.Encoder.from_pretrained(
        arguments.model, dtype=arguments.dtypes[0], device=arguments.device, overflow="truncate"
    )
    contenders: dict[str, Callable[[], object]] = {}
    loaders = {}
    for size in SIZES:
        batches = [texts[i : i + size] for i in range(0, len(texts), size)]
        loaders[size] = bertstream.wrap(batches, encoder)
        contenders[f"together_{size}"] = partial(read_all, loaders[size])
        contenders[f"one_by_one_{size}"] = partial(encode_all, encoder, batches)
    for contender in contenders.values():
        contender()
    seconds = take_turns(contenders, arguments)
    stats = {size: loader.stats() for size, loader in loaders.items()}
    tokens = int(stats[SIZES[0]]["tokens"] / stats[SIZES[0]]["epochs"])
    return {
        "texts": len(texts),
        "tokens": tokens,
        "model": arguments.model,
        "dtype": arguments.dtypes[0],
        "tokens_per_s": {name: round(tokens / ratio(times, [1.0] * len(times))) for name, times in seconds.items()},
        "together_times_one_by_one": {
            str(size): round(ratio(seconds[f"one_by_one_{size}"], seconds[f"together_{size}"]), 2) for size in SIZES
        },
        "tokens_a_batch": {str(size): round(found["tokens"] / found["batches"]) for size, found in stats.items()},
        "tokens_encoded_together": {
            str(size): round(found["encoded_tokens"] / found["encode_calls"]) for size, found in stats.items()
        },
        "rounds": arguments.rounds,
    }
