"""The cost of fewer layers and of word vectors."""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import bertstream

from .common import encode_all, take_turns, texts_of


def outputs(arguments: argparse.Namespace) -> dict[str, object]:
    """The encoder alone, on token batches: the last layer, layer 2, and words, all packed."""
    texts = texts_of(arguments)
    options = {"tokens_last": {}, "tokens_layer_2": {"layers": (2,)}, "words_last": {"output": "words"}}
    contenders = {}
    for name, option in options.items():
        encoder = bertstream.Encoder.from_pretrained(
            arguments.model, dtype=arguments.dtypes[0], device=arguments.device, overflow="truncate", **option
        )
        # Lists of words for all three, so that each encodes the same tokens.
        batches = [encoder.tokenizer.batch([t.split() for t in texts[i : i + 128]]) for i in range(0, len(texts), 128)]
        contenders[name] = partial(encode_all, encoder, batches)
        contenders[name]()
    seconds = take_turns(contenders, arguments)
    pairs = {name: list(zip(seconds["tokens_last"], times, strict=True)) for name, times in seconds.items()}
    return {
        "texts": len(texts),
        "tokens": sum(batch.num_tokens for batch in batches),
        "model": arguments.model,
        "dtype": arguments.dtypes[0],
        "tokens_last_times_layer_2": round(statistics.median(p / t for p, t in pairs["tokens_layer_2"]), 2),
        "words_over_tokens": round(statistics.median(t / p for p, t in pairs["words_last"]), 3),
        "rounds": arguments.rounds,
    }
