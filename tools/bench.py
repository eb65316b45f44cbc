"""Measure bertstream beside what people do without it, in one run; prints one JSON line.

    python tools/bench.py encode --data ../shared/data      the stream against the loop that people write
    python tools/bench.py outputs --data ../shared/data     what fewer layers and word vectors cost
    python tools/bench.py cache --data ../shared/data       epochs from the cache, and a tagger's over tensors in memory
    python tools/bench.py stream --data ../shared/data      reading, tokenizing and bucketing, against the tokenizer
    python tools/bench.py mix --data ../shared/data         how well a shuffled stream mixes data sorted by class

The contenders take turns, so that a machine whose speed drifts slows them alike; figures are medians over the rounds,
and ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

import bertstream
from bertstream.testing import FakeEncoder


def read_texts(data: Path, count: int) -> list[str]:
    """Banking queries and web sentences, none twice, in an order mixed by seed 0."""
    texts: dict[str, None] = {}
    for name in ("train", "test"):
        with (data / "banking77" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            texts |= dict.fromkeys(row["text"] for row in csv.DictReader(file))
    for name in ("dev", "test"):
        with (data / "ud_english_ewt" / f"{name}.conllu").open(encoding="utf-8") as file:
            texts |= dict.fromkeys(line[9:].strip() for line in file if line.startswith("# text = "))
    chosen = list(texts)
    np.random.default_rng(0).shuffle(chosen)
    return chosen[:count]


class PlainLoop:
    """What people write: file order, batches of 32, padded, float32."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> list[Tensor]:
        rows: list[Tensor] = []
        for start in range(0, len(texts), 32):
            inputs = self.tokenizer(texts[start : start + 32], padding=True, truncation=True, return_tensors="pt")
            hidden = self.model(**inputs).last_hidden_state
            rows += [text[mask.bool()] for text, mask in zip(hidden, inputs["attention_mask"], strict=True)]
        return rows


class Stream:
    """The same through `bertstream.stream` over a shard on disk: reading and tokenizing counted in."""

    def __init__(self, shard: Path, name: str, dtype: str) -> None:
        encoder = bertstream.Encoder.from_pretrained(name, dtype=dtype, device="cpu", overflow="truncate")
        self.dtype = str(encoder.dtype).removeprefix("torch.")
        self.loader = bertstream.stream(shard, encoder, max_tokens=encoder.max_forward_tokens, shuffle=True)

    def __call__(self, texts: list[str]) -> list[Tensor]:
        rows: list[Tensor | None] = [None] * len(texts)
        for batch in self.loader:
            for index, text in zip(batch["__index__"].tolist(), batch["text"], strict=True):
                rows[index] = text
        return [row for row in rows if row is not None]


def worst_error(found: list[Tensor], right: list[Tensor]) -> float:
    """The relative L2 error of the worst text."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, right, strict=True))


def encode(arguments: argparse.Namespace) -> dict[str, object]:
    """Token vectors of every text: the plain loop against the stream, in each dtype."""
    texts = read_texts(arguments.data, arguments.texts)
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "corpus.jsonl"
        shard.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        streams = {f"stream_{dtype}": Stream(shard, arguments.model, dtype) for dtype in arguments.dtypes}
        chosen = Stream(shard, arguments.model, "auto").dtype
        plain = PlainLoop(next(iter(streams.values())).loader.encoder.model.config._name_or_path)
        contenders: dict[str, Callable[[list[str]], list[Tensor]]] = {"plain": plain, **streams}
        right = plain(texts)
        tokens = sum(len(row) for row in right)
        errors = {name: worst_error(stream(texts), right) for name, stream in streams.items()}
        seconds = take_turns({name: partial(contender, texts) for name, contender in contenders.items()}, arguments)
    lengths = [len(row) for row in right]
    return {
        "texts": len(texts),
        "tokens": tokens,
        "tokens_quantiles_0_50_90_100": np.quantile(lengths, [0, 0.5, 0.9, 1]).tolist(),
        "sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16],
        "model": arguments.model,
        "auto_dtype": chosen,
        "tokens_per_s": {name: round(tokens / statistics.median(times)) for name, times in seconds.items()},
        "times_plain": {
            name: round(statistics.median(p / t for p, t in zip(seconds["plain"], seconds[name], strict=True)), 2)
            for name in streams
        },
        "worst_text_relative_l2_error": {name: float(f"{error:.1e}") for name, error in errors.items()},
        "rounds": arguments.rounds,
    }


def outputs(arguments: argparse.Namespace) -> dict[str, object]:
    """The encoder alone, on token batches: the last layer, layer 2, and words, all packed."""
    texts = read_texts(arguments.data, arguments.texts)
    options = {"tokens_last": {}, "tokens_layer_2": {"layers": (2,)}, "words_last": {"output": "words"}}
    contenders = {}
    for name, option in options.items():
        encoder = bertstream.Encoder.from_pretrained(
            arguments.model, dtype=arguments.dtypes[0], device="cpu", overflow="truncate", **option
        )
        # Lists of words for all, so that each encodes the same tokens.
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


def stream(arguments: argparse.Namespace) -> dict[str, object]:
    """Token batches out of worker processes with an idle consumer, against the bare tokenizer on one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = read_texts(arguments.data, arguments.texts) * (300_000 // arguments.texts)
    encoder = bertstream.Encoder.from_pretrained(arguments.model, dtype="float32", device="cpu", overflow="truncate")
    tokenizer = AutoTokenizer.from_pretrained(encoder.model.config._name_or_path).backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "corpus.jsonl"
        shard.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        dataset = bertstream.TextStream(shard, encoder, batch_size=64, shuffle=True)
        tokens = sum(batch.num_tokens for batch in dataset)

        def bare() -> None:
            for first in range(0, len(texts), 256):
                tokenizer.encode_batch(texts[first : first + 256])

        # Workers that are kept: what a process costs to start is not what an epoch costs.
        loaders = {
            workers: DataLoader(
                dataset, batch_size=None, num_workers=workers, persistent_workers=True, prefetch_factor=8
            )
            for workers in (1, 2)
        }

        def epoch(workers: int) -> None:
            for _ in loaders[workers]:
                pass

        contenders = {"bare_tokenizer": bare, "one_worker": partial(epoch, 1), "two_workers": partial(epoch, 2)}
        for contender in contenders.values():
            contender()
        seconds = take_turns(contenders, arguments)
        loaders.clear()
    rates = {name: [tokens / second for second in times] for name, times in seconds.items()}
    ratio = [one / bare for one, bare in zip(rates["one_worker"], rates["bare_tokenizer"], strict=True)]
    scaling = [two / one for two, one in zip(rates["two_workers"], rates["one_worker"], strict=True)]
    return {
        "texts": len(texts),
        "tokens": tokens,
        "lanes": dataset.num_lanes,
        "tokens_per_s": {name: round(statistics.median(times)) for name, times in rates.items()},
        "one_worker_times_bare_tokenizer": round(statistics.median(ratio), 2),
        "two_workers_times_one": round(statistics.median(scaling), 2),
        "rounds": arguments.rounds,
    }


def mix(arguments: argparse.Namespace) -> dict[str, object]:
    """Different classes in a batch of 32, of banking77's 77, which its file holds sorted."""
    with (arguments.data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["category"] for row in rows})
    labels = np.array([names.index(row["category"]) for row in rows])
    mixed = np.random.default_rng(0).permutation(labels)
    classes = {"file_order": classes_in_batches(labels), "all_mixed": classes_in_batches(mixed)}
    shard = arguments.data / "banking77" / "train.csv"
    for open_shards in (1, 4, 16, 64):
        reading = bertstream.StreamConfig(open_shards=open_shards)
        dataset = bertstream.TextStream(shard, FakeEncoder(), batch_size=32, shuffle=True, reading=reading)
        counts = [len(set(batch.fields["category"])) for batch in dataset if len(batch) == 32]
        classes[f"stream_open_shards_{open_shards}"] = statistics.mean(counts)
    return {"records": len(rows), "classes_in_a_batch": {name: round(count, 1) for name, count in classes.items()}}


def classes_in_batches(labels: npt.NDArray[np.int64]) -> float:
    """The mean number of different labels in batches of 32, in this order."""
    return statistics.mean(len(set(labels[i : i + 32].tolist())) for i in range(0, len(labels) - 31, 32))


def cache(arguments: argparse.Namespace) -> dict[str, object]:
    """A first epoch with the cache on against one without, epochs from memory and from disk, and a BiLSTM's epochs."""
    texts = read_texts(arguments.data, arguments.texts)
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "corpus.jsonl"
        shard.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        encoder = bertstream.Encoder.from_pretrained(
            arguments.model, dtype=arguments.dtypes[0], device="cpu", overflow="truncate"
        )
        encoder.fingerprint()  # once a process, not once an epoch
        stream = partial(bertstream.stream, shard, encoder, batch_size=32, shuffle=True)
        vectors = torch.cat([rows for batch in stream() for rows in batch["text"]])
        seconds: dict[str, list[float]] = {}

        def timed(name: str, epoch: Callable[[], object]) -> None:
            started = time.perf_counter()
            epoch()
            seconds.setdefault(name, []).append(time.perf_counter() - started)

        plain, stats = stream(), {}
        ram = RamLoader(plain)
        tagger = Tagger(vectors.shape[1])
        timed("warm-up", lambda: read_all(plain))
        for number in range(arguments.rounds):
            at = Path(folder) / f"cache-{number}"
            with bertstream.EmbeddingCache("1GiB", at, "2GiB", dtype=arguments.storage) as both:
                loader = stream(cache=both)
                first_two = [("no_cache", plain), ("first_epoch", loader)]
                for name, one in first_two if number % 2 else first_two[::-1]:
                    timed(name, partial(read_all, one))
                both.flush()
                timed("from_memory", partial(read_all, loader))
                timed("ram_tensors", partial(read_all, ram))
                timed("tagger_from_memory", partial(tagger.train, loader))
                timed("tagger_ram_tensors", partial(tagger.train, ram))
                stats = loader.stats()
            with bertstream.EmbeddingCache(0, at, "2GiB", dtype=arguments.storage) as disk:
                timed("from_disk", partial(read_all, stream(cache=disk)))
                misses = disk.stats()["misses"]

    def ratio(top: str, bottom: str) -> float:
        return round(statistics.median(a / b for a, b in zip(seconds[top], seconds[bottom], strict=True)), 3)

    return {
        "texts": len(texts),
        "tokens": len(vectors),
        "model": arguments.model,
        "dtype": arguments.dtypes[0],
        "storage": arguments.storage,
        "tokens_per_s": {name: round(len(vectors) / statistics.median(times)) for name, times in seconds.items()},
        "first_epoch_over_no_cache": ratio("first_epoch", "no_cache"),
        "first_epoch_over_from_memory": ratio("first_epoch", "from_memory"),
        "first_epoch_over_from_disk": ratio("first_epoch", "from_disk"),
        "tagger_from_memory_over_ram_tensors": ratio("tagger_from_memory", "tagger_ram_tensors"),
        "not_on_disk": misses,
        "cache_stats": {name: round(value, 3) for name, value in stats.items() if name.startswith("cache_")},
        "rounds": arguments.rounds,
    }


class RamLoader:
    """The same vectors and batches, kept as one tensor in memory and gathered batch by batch: the least there is."""

    def __init__(self, loader: bertstream.EmbeddingLoader) -> None:
        batches = [batch["text"] for batch in loader]
        self.rows = torch.cat([batch.values for batch in batches])
        starts = np.cumsum([0, *(len(batch.values) for batch in batches)])
        self.batches = [(torch.arange(starts[i], starts[i + 1]), batch) for i, batch in enumerate(batches)]

    def __iter__(self) -> Iterator[dict[str, bertstream.Embeddings]]:
        for rows, batch in self.batches:
            yield {"text": dataclasses.replace(batch, values=self.rows.index_select(0, rows))}


class Tagger:
    """The BiLSTM of examples/tag_words.py, on a tag for each token that its id draws."""

    def __init__(self, size: int) -> None:
        torch.manual_seed(0)
        self.lstm = torch.nn.LSTM(size, 128, batch_first=True, bidirectional=True)
        self.head = torch.nn.Linear(256, 17)
        self.optimizer = torch.optim.Adam([*self.lstm.parameters(), *self.head.parameters()], 2e-3)

    def train(self, loader: Iterable[dict[str, bertstream.Embeddings]]) -> None:
        for batch in loader:
            found = batch["text"]
            states, _ = self.lstm(found.packed_sequence())
            scores = self.head(torch.nn.utils.rnn.pad_packed_sequence(states, batch_first=True)[0])
            tags = dataclasses.replace(found, values=torch.from_numpy(found.tokens.input_ids % 17).long()[:, None])
            padded, mask = tags.padded()
            loss = torch.nn.functional.cross_entropy(scores[mask], padded[mask].flatten())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def read_all(loader: Iterable[object]) -> None:
    """An epoch of the loader alone."""
    for _ in loader:
        pass


def encode_all(encoder: bertstream.Encoder, batches: list[bertstream.TokenBatch]) -> None:
    """Every batch, its vectors dropped."""
    for batch in batches:
        encoder.encode(batch)


def take_turns(contenders: dict[str, Callable[[], object]], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "avx512_bf16": "avx512_bf16" in flags,
        "amx": "amx_bf16" in flags,
        "matmul_gflops": {
            str(d).removeprefix("torch."): round(matmul_rate(d)) for d in (torch.float32, torch.bfloat16)
        },
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of MiniLM's feed-forward products, (2048, 384) x (384, 1536) and back: median of 20."""
    up, down = torch.nn.Linear(384, 1536, dtype=dtype), torch.nn.Linear(1536, 384, dtype=dtype)
    rows, times = torch.randn(2048, 384, dtype=dtype), []
    with torch.no_grad():
        for _ in range(25):
            started = time.perf_counter()
            down(up(rows))
            times.append(time.perf_counter() - started)
    return 4 * 2048 * 384 * 1536 / statistics.median(times[5:]) / 1e9


def main() -> int:
    """Run one benchmark and print its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for benchmark in (encode, outputs, stream, mix, cache):
        command = commands.add_parser(benchmark.__name__, help=benchmark.__doc__)
        command.set_defaults(run=benchmark)
        command.add_argument("--data", type=Path, required=True, help="folder with banking77/ and ud_english_ewt/")
        command.add_argument("--texts", type=int, default=3000)
        command.add_argument("--rounds", type=int, default=5)
        command.add_argument("--model", default="all-MiniLM-L6-v2")
        command.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
        command.add_argument("--storage", default="auto", help="how the cache stores rows: auto, bfloat16, int8")
    arguments = parser.parse_args()
    print(json.dumps({"benchmark": arguments.benchmark} | arguments.run(arguments) | {"machine": machine()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
