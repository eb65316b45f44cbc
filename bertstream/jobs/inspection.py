"""Inspect a corpus for an encoder before training: lengths, batches, padding, time and cache size."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ..caching.codec import Codec, Storage
from ..caching.memory import ROW_INDEX_BYTES, TEXT_BYTES
from ..cursors import Cursor
from ..encoding.encoder import Encoder
from ..encoding.tokenizer import TextTokenizer
from ..errors import shortened
from ..pipeline.groups import GroupBudget, gather, group_tokens
from ..reading.config import StreamConfig
from ..reading.dataset import Shards, TextStream
from ..reading.files import shard_size
from ..reading.lanes import LaneReader
from ..reading.mixture import refuse_mixture
from ..reading.options import ReadOptions
from ..reading.rows import find_rows, split_rows
from ..reading.shards import Piece
from ..repeats import text_bytes
from ..tokens import TokenBatch, TokenizedText

Numbers: TypeAlias = npt.NDArray[Any]

_SAMPLED_BATCHES, _TIMED_S = 256, 3.0
"""Batches drawn at random from the whole corpus, and the seconds for which they are encoded."""


@dataclass(frozen=True)
class Spread:
    """Quantiles of some numbers: the smallest, the median, and so on."""

    least: int
    median: int
    p90: int
    p99: int
    most: int

    @classmethod
    def of(cls, numbers: npt.NDArray[Any]) -> Spread:
        """Compute them; `numbers` is not empty."""
        return cls(*np.quantile(numbers, [0, 0.5, 0.9, 0.99, 1], method="lower").tolist())


@dataclass(frozen=True)
class Inspection:
    """What `inspect_shards` found.

    Attributes:
        shards: number of shards.
        shard_bytes: their size as stored; 0 if it is not known.
        fields: name -> its value in the first record, shortened; the text included.
        texts: good records.
        repeated_texts: texts equal to an earlier one.
        bad_records: broken records and texts that were skipped.
        bad_shards: shards that were given up; their texts are not counted.
        tokens: of all texts, before truncation, special tokens included.
        lengths: tokens of a text.
        length_edges: [n + 1] bins of lengths; bin i holds lengths from edge i up to, not including, edge i + 1.
        length_counts: [n] texts in each bin.
        max_length: tokens of the longest text that the model takes.
        long_texts: texts longer than that.
        cut_tokens: tokens beyond that length, which overflow="truncate" loses.
        batches: number of batches the stream makes.
        batch_texts: texts in a batch.
        batch_tokens: tokens in a batch.
        padding_in_order: padding as a share of all positions of padded batches: texts in the shards' order, batches of
            the stream's mean size.
        padding_bucketed: the same for the stream's batches. Packed, as bertstream runs most models, there is none.
        batching: how this encoder runs: "fused", "packed", "padded" or "grouped", and why.
        tokens_per_s: of the encoder alone, measured on batches of this corpus; 0 if it was not measured.
        encode_s: the least that an epoch without a cache takes at this rate.
        cache_bytes: storage -> bytes of a cache that holds the whole corpus.
    """

    shards: int
    shard_bytes: int
    fields: dict[str, str]
    texts: int
    repeated_texts: int
    bad_records: int
    bad_shards: int
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
    """Read and tokenize all texts of these shards once, and encode some of them for a few seconds.

    Args:
        shards, text, pair, batch_size, max_tokens, reading: as for `bertstream.stream`; no `Mixture`.
        encoder: gives tokens, limits, speed and row sizes. Texts that are too long are counted, whatever its
            `overflow`; with "windows" the repeated tokens count as well.
        timed_s: approximate seconds of encoding; 0 measures nothing.
        progress: whether to show a bar.
    Raises:
        ConfigError: an argument is out of range.
        ShardError: a shard is missing, or one of its records is broken.
    """
    refuse_mixture(shards, "inspect_shards")
    reading = replace(reading or StreamConfig(), uneven="leave")
    tokenizer = _counting(encoder.tokenizer)
    stream = TextStream(
        shards,
        _TokenizerOnly(tokenizer),
        text=text,
        pair=pair,
        batch_size=batch_size,
        max_tokens=max_tokens,
        fields=(),
        reading=reading,
    )
    dataset = find_rows(shards)
    options = ReadOptions(text=text, pair=pair, access=reading, rows=dataset)
    found = _Found(encoder, stream.shards)
    total = stream.count_records() if progress else None
    with tqdm(desc="reading", unit=" texts", total=total, disable=not progress) as bar:
        for batch in stream:
            found.add(batch)
            bar.update(len(batch))
    pieces = split_rows(dataset, 1) if dataset is not None else [(Piece(path), 0) for path in stream.shards]
    first = LaneReader(
        [piece for piece, _ in pieces], options, Cursor(0, 0), open_shards=1, tolerant=reading.max_bad_records > 0
    )
    with closing(first):
        [example] = first.read_columns(1).records()  # an epoch without a good record is an error
    shown = example.text.input_ids.tolist() if isinstance(example.text, TokenizedText) else example.text
    lengths = np.concatenate(found.lengths)
    fitting = np.minimum(lengths, tokenizer.max_length)
    sizes = np.array([len(part) for part in found.lengths])
    once = np.unique(np.concatenate(found.hashes), return_index=True)[1]
    rows = int(np.concatenate(found.rows)[once].sum())
    edges = _edges(int(lengths.min()), int(lengths.max()), tokenizer.max_length)
    # The order of a plain DataLoader without shuffling; a shuffled one pads about as much.
    in_order = fitting[np.lexsort((np.concatenate(found.indices), np.concatenate(found.shards)))]
    tokens_per_s = _measured(encoder, found.sample, timed_s) if timed_s else 0.0
    return Inspection(
        shards=len(stream.shards),
        shard_bytes=0 if dataset is not None else sum(shard_size(path, reading) for path in stream.shards),
        fields={text: shortened(shown)} | {name: shortened(value) for name, value in example.fields.items()},
        texts=len(lengths),
        repeated_texts=len(lengths) - len(once),
        bad_records=stream.progress.bad.records,
        bad_shards=len(stream.progress.bad.given_up),
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
    """The part of `_EDGES` that holds all lengths, and an edge at the model's limit."""
    edges = [edge for edge, after in pairwise(_EDGES) if after > least and edge <= most]
    edges.append(next(edge for edge in _EDGES if edge > most))
    return sorted({*edges, limit + 1}) if edges[0] <= limit < most else edges


@dataclass(frozen=True)
class _TokenizerOnly:
    """Takes the place of an encoder where only its tokenizer is needed (`HasTokenizer`)."""

    tokenizer: TextTokenizer


class _Found:
    """What is kept of each batch while the corpus is read."""

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
        """Count a batch; the sample keeps each batch with equal probability (reservoir sampling)."""
        self.lengths.append(batch.lengths + batch.cut_tokens)
        self.rows.append(self._encoder.row_counts(batch))
        self.hashes.append(np.fromiter(map(hash, text_bytes(batch)), np.int64, len(batch)))
        shards = [self._numbers.setdefault(shard, len(self._numbers)) for shard in batch.fields["__shard__"]]
        self.shards.append(np.array(shards))
        self.indices.append(batch.fields["__index__"])
        self.batch_tokens.append(batch.num_tokens)
        slot = len(self.lengths) - 1
        if slot >= _SAMPLED_BATCHES:
            slot = self._random.randrange(len(self.lengths))
        if slot < _SAMPLED_BATCHES:
            self.sample[slot : slot + 1] = [batch]


def _counting(tokenizer: TextTokenizer) -> TextTokenizer:
    """A copy of the tokenizer that counts tokens beyond the limit instead of raising."""
    counting = copy.copy(tokenizer)
    if counting.overflow == "error":
        counting.overflow = "truncate"
    return counting


def _padding(lengths: Numbers, sizes: Numbers) -> float:
    """The share of padding if batches of these sizes are padded to their longest text."""
    starts = np.cumsum(sizes) - sizes
    starts = starts[starts < len(lengths)]
    positions = np.maximum.reduceat(lengths, starts) * np.diff(starts, append=len(lengths))
    return 1 - float(lengths.sum()) / float(max(1, positions.sum()))


def _measured(encoder: Encoder, sample: list[TokenBatch], seconds: float) -> float:
    """Tokens per second for batches gathered into groups as a loader does."""
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
