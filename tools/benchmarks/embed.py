"""The cost of writing all vectors to files, against encoding alone."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import get_args

import bertstream
from bertstream.jobs.writers import PartFormat

from .common import ratio, read_all, take_turns, texts_of


def embed(arguments: argparse.Namespace) -> dict[str, object]:
    """Token vectors of every text: the stream alone (as in `encode`), and written in each format."""
    texts = texts_of(arguments)
    encoder = bertstream.Encoder.from_pretrained(
        arguments.model, dtype=arguments.dtypes[0], device=arguments.device, overflow="truncate", max_length=512
    )
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "corpus.jsonl"
        shard.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        loader = bertstream.stream(shard, encoder, max_tokens=encoder.calibrate(), shuffle=True)
        contenders = {"stream": partial(read_all, loader)}
        for format in get_args(PartFormat):
            contenders[format] = partial(written, shard, encoder, Path(folder), format)
        for contender in contenders.values():  # the first run imports the writers' packages
            contender()
        seconds = take_turns(contenders, arguments)
        tokens = loader.stats()["tokens"] / (arguments.rounds + 1)
    return {
        "texts": len(texts),
        "tokens": tokens,
        "model": arguments.model,
        "dtype": arguments.dtypes[0],
        "tokens_per_s": {name: round(tokens / statistics.median(times)) for name, times in seconds.items()},
        "of_the_stream": {name: round(ratio(seconds["stream"], times), 3) for name, times in seconds.items()},
        "rounds": arguments.rounds,
    }


def written(shard: Path, encoder: bertstream.Encoder, folder: Path, format: PartFormat) -> None:
    """A whole run, into a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        bertstream.embed(shard, encoder, out, format=format, part_bytes="16MiB", progress=False)
