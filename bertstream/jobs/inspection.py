"""What a corpus means for an encoder, before anything is trained: lengths, batches, padding, time and room."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ..caching.codec import Codec, Storage
from ..caching.memory import ROW_INDEX_BYTES, TEXT_BYTES
from ..encoding.encoder import Encoder
from ..encoding.tokenizer import TextTokenizer
from ..errors import shortened
from ..pipeline.groups import GroupBudget, gather, group_tokens
from ..reading.config import StreamConfig
from ..reading.dataset import Shards, TextStream
from ..reading.files import shard_size
from ..reading.options import ReadOptions
from ..reading.records import read_records
from ..reading.rows import is_rows, split_rows
from ..reading.shards import Piece
from ..tokens import TokenBatch, text_bytes

Numbers: TypeAlias = npt.NDArray[Any]

_SAMPLED_BATCHES, _TIMED_S = 256, 3.0
"""Batches drawn from all of the corpus, and the seconds within which as many of them as fit are encoded."""


@dataclass(frozen=True)
class Spread:
    """How numbers are spread: the smallest, the middle one, and so on."""

    least: int
    median: int
    p90: int
    p99: int
    most: int

    @classmethod
    def of(cls, numbers: npt.NDArray[Any]) -> Spread:
        """Of one number at least."""
        return cls(*np.quantile(numbers, [0, 0.5, 0.9, 0.99, 1], method="lower").tolist())


@dataclass(frozen=True)
class Inspection:
    """What `inspect_shards` found.

    Attributes:
        shards: how many.
        shard_bytes: of all of them, as they are stored; 0 where that is not known.
        fields: name -> an example of each field of the first record, the text's too.
        texts: records, without the broken ones.
        repeated_texts: those that are the same as one before.
        bad_records: broken records and texts that were passed over.
        tokens: of all texts, special tokens included, those behind the longest that the model takes too.
        lengths: tokens of a text.
        length_edges: [n + 1] bins of lengths; bin i holds lengths from edge i to edge i + 1, excluded.
        length_counts: [n] texts in each bin.
        max_length: tokens that the model takes.
        long_texts: those that are longer.
        cut_tokens: what is behind that length, and lost by overflow="truncate".
        batches: how many batches the stream makes.
        batch_texts: texts in a batch.
        batch_tokens: tokens in a batch.
        padding_in_order: padding as a share of what a padded model would compute, texts in the shards' order, as many
            in each batch.
        padding_bucketed: the same in these batches. Packed, as bertstream runs most models, there is none.
        batching: how this encoder runs: "packed", "padded" or "grouped", and why.
        tokens_per_s: of the encoder alone, measured on batches of this corpus; 0 where it was not measured.
        encode_s: what an epoch without a cache then takes at least.
        cache_bytes: storage -> bytes of a cache that holds all of it.
    """

    shards: int
    shard_bytes: int
    fields: dict[str, str]
    texts: int
    repeated_texts: int
    bad_records: int
    tokens: int
    lengths: Spread
    length_edges: list[int]
    length_counts: list[int]
    max_length: int
    long_texts: int
    cut_tokens: int
    batches: int
    batch_texts: Spread
    batch_tokens: Spread
    padding_in_order: float
    padding_bucketed: float
    batching: str
    tokens_per_s: float
    encode_s: float
    cache_bytes: dict[str, int]


def inspect_shards(
    shards: Shards,
    encoder: Encoder,
    *,
    text: str = "text",
    pair: str | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    reading: StreamConfig | None = None,
    timed_s: float = _TIMED_S,
    progress: bool = True,
) -> Inspection:
    """Read and tokenize all texts of these shards once, and encode a few seconds' worth of them.

    Args:
        shards, text, pair, batch_size, max_tokens, reading: as for `bertstream.stream`.
        encoder: whose tokens, limits, speed and rows are told. Texts that are too long are counted, whatever its
            `overflow`; with "windows" the repeated tokens count as well.
        timed_s: seconds of encoding, about; 0 measures nothing.
        progress: whether a bar is shown.
    Raises:
        ConfigError: an argument is out of range.
        ShardError: a shard is missing, or one of its records is broken.
    """
    reading = replace(reading or StreamConfig(), uneven="leave")
    tokenizer = _counting(encoder.tokenizer)
    stream = TextStream(
        shards,
        SimpleNamespace(tokenizer=tokenizer),  # of an encoder it takes no more
        text=text,
        pair=pair,
        batch_size=batch_size,
        max_tokens=max_tokens,
        fields=(),
        reading=reading,
    )
    options = ReadOptions(text=text, pair=pair, access=reading, rows=shards if is_rows(shards) else None)
    with closing(read_records(_first_piece(shards, stream.shards), options)) as records:
        example = next(records)
    found = _Found(encoder, stream.shards)
    total = stream.count_records() if progress else None
    with tqdm(desc="reading", unit=" texts", total=total, disable=not progress) as bar:
        for batch in stream:
            found.add(batch)
            bar.update(len(batch))
    lengths = np.concatenate(found.lengths)
    fitting = np.minimum(lengths, tokenizer.max_length)
    sizes = np.array([len(part) for part in found.lengths])
    once = np.unique(np.concatenate(found.hashes), return_index=True)[1]
    rows = int(np.concatenate(found.rows)[once].sum())
    edges = _edges(int(lengths.min()), int(lengths.max()), tokenizer.max_length)
    # File order is what a plain DataLoader without shuffling gives; a shuffled one pads about as much.
    in_order = fitting[np.lexsort((np.concatenate(found.indices), np.concatenate(found.shards)))]
    tokens_per_s = _measured(encoder, found.sample, timed_s) if timed_s else 0.0
    return Inspection(
        shards=len(stream.shards),
        shard_bytes=0 if is_rows(shards) else sum(shard_size(path, reading) for path in stream.shards),
        fields={text: shortened(example.text)} | {name: shortened(value) for name, value in example.fields.items()},
        texts=len(lengths),
        repeated_texts=len(lengths) - len(once),
        bad_records=stream.progress.bad.records,
        tokens=int(lengths.sum()),
        lengths=Spread.of(lengths),
        length_edges=edges,
        length_counts=np.histogram(lengths, edges)[0].tolist(),
        max_length=tokenizer.max_length,
        long_texts=int((lengths > fitting).sum()),
        cut_tokens=int((lengths - fitting).sum()),
        batches=len(sizes),
        batch_texts=Spread.of(sizes),
        batch_tokens=Spread.of(np.array(found.batch_tokens)),
        padding_in_order=_padding(in_order, np.full(-(-len(lengths) // round(sizes.mean())), round(sizes.mean()))),
        padding_bucketed=_padding(fitting, sizes),
        batching=f"{encoder.batching.way}: {encoder.batching.reason}",
        tokens_per_s=tokens_per_s,
        encode_s=sum(found.batch_tokens) / tokens_per_s if tokens_per_s else 0.0,
        cache_bytes={
            storage: rows * (Codec(storage, encoder.row_shape, encoder.output_dtype).row_bytes + ROW_INDEX_BYTES)
            + len(once) * TEXT_BYTES
            for storage in get_args(Storage)
        },
    )


_EDGES = [0, 5, *(1 + size * 2**power // 2 for power in range(2, 40) for size in (3, 4))]
"""Bins of lengths: 0 to 4 tokens, 5 and 6, 7 and 8, 9 to 12, 13 to 16, and so on, twice for each doubling."""


def _edges(least: int, most: int, limit: int) -> list[int]:
    """Those of `_EDGES` that hold all lengths, and one more behind what the model takes."""
    edges = [edge for edge, after in pairwise(_EDGES) if after > least and edge <= most]
    edges.append(next(edge for edge in _EDGES if edge > most))
    return sorted({*edges, limit + 1}) if edges[0] <= limit < most else edges


class _Found:
    """What is kept of each batch while all are read."""

    def __init__(self, encoder: Encoder, shards: Sequence[str]) -> None:
        self.lengths: list[Numbers] = []
        self.rows: list[Numbers] = []
        self.hashes: list[Numbers] = []
        self.shards: list[Numbers] = []
        self.indices: list[Numbers] = []
        self.batch_tokens: list[int] = []
        self.sample: list[TokenBatch] = []
        self._encoder = encoder
        self._numbers = {shard: number for number, shard in enumerate(shards)}
        self._random = random.Random(0)

    def add(self, batch: TokenBatch) -> None:
        """Take a batch; of all of them the sample keeps as many as it may, each with the same chance."""
        self.lengths.append(batch.lengths + batch.cut_tokens)
        self.rows.append(self._encoder.row_counts(batch))
        self.hashes.append(np.fromiter(map(hash, text_bytes(batch)), np.int64, len(batch)))
        shards = [self._numbers.setdefault(shard, len(self._numbers)) for shard in batch.fields["__shard__"]]
        self.shards.append(np.array(shards))
        self.indices.append(batch.fields["__index__"])
        self.batch_tokens.append(batch.num_tokens)
        place = len(self.lengths) - 1
        if place >= _SAMPLED_BATCHES:
            place = self._random.randrange(len(self.lengths))
        self.sample[place : place + 1] = [batch] if place < _SAMPLED_BATCHES else []


def _counting(tokenizer: TextTokenizer) -> TextTokenizer:
    """The tokenizer, counting what is too long instead of refusing it."""
    counting = copy.copy(tokenizer)
    if counting.overflow == "error":
        counting.overflow = "truncate"
    return counting


def _first_piece(shards: Shards, paths: Sequence[str]) -> Piece:
    return split_rows(shards, 1)[0][0] if is_rows(shards) else Piece(paths[0])


def _padding(lengths: Numbers, sizes: Numbers) -> float:
    """What share of all places is padding, where batches of so many texts are filled up to their longest."""
    starts = np.cumsum(sizes) - sizes
    starts = starts[starts < len(lengths)]
    places = np.maximum.reduceat(lengths, starts) * np.diff(starts, append=len(lengths))
    return 1 - float(lengths.sum()) / float(max(1, places.sum()))


def _measured(encoder: Encoder, sample: list[TokenBatch], seconds: float) -> float:
    """Tokens a second, of batches that are gathered and encoded together as a loader does it."""
    encoder.calibrate()
    random.Random(0).shuffle(sample)
    limit = group_tokens(encoder.max_forward_tokens, encoder.device)
    budget = GroupBudget[TokenBatch](lambda batch: batch.num_tokens, limit=limit, by_the_clock=True)
    encoder.encode(sample[0]).values.cpu()  # the first forward is slower than others
    tokens, took = 0, 0.0
    for group in gather(iter(sample), budget):
        started = time.perf_counter()
        encoded = encoder.encode(TokenBatch.concat(group)).tokens.num_tokens
        if encoder.device.type == "cuda":
            torch.cuda.synchronize(encoder.device)
        group_s = time.perf_counter() - started
        budget.encoded(encoded, group_s)
        tokens, took = tokens + encoded, took + group_s
        if took >= seconds:
            break
    return tokens / took
