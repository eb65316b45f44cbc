"""Shared by the benchmarks: texts, timing, and the machine's properties."""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

import bertstream


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of every benchmark."""
    command.add_argument("--data", type=Path, help="folder with banking77/ and ud_english_ewt/")
    command.add_argument("--corpus", type=Path, help="other texts: jsonl with a key 'text', or txt; see corpus.py")
    command.add_argument("--texts", type=int, default=3000, help="how many of them")
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--model", default="all-MiniLM-L6-v2", help="a name or a folder")
    command.add_argument("--device", default="cpu")
    command.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])


def texts_of(arguments: argparse.Namespace) -> list[str]:
    """The first texts of the corpus, or of the data if no corpus is named."""
    return read_corpus(arguments.corpus or arguments.data)[: arguments.texts]


def read_corpus(path: Path) -> list[str]:
    """The texts of a file, in its order, or of a data folder, shuffled.

    Args:
        path: jsonl with a key "text"; csv, whose columns are joined, numbers left out; any other file has a text a
            line. Or a folder with banking77/ and ud_english_ewt/.
    """
    if path.is_dir():
        return read_texts(path, sys.maxsize)
    with path.open(encoding="utf-8", newline="" if path.suffix == ".csv" else None) as file:
        if path.suffix == ".jsonl":
            return [json.loads(line)["text"] for line in file]
        if path.suffix == ".csv":
            return [" ".join(cell for cell in row if not cell.isdigit()) for row in csv.reader(file)]
        return [line.rstrip("\n") for line in file]


def texts_about(words: int, texts: list[str]) -> list[str]:
    """The same words, one after the other, cut into texts of half to one and a half times this many."""
    rest = " ".join(texts).split()
    lengths = np.random.default_rng(0).integers(words // 2 + 1, words + words // 2 + 1, len(rest))
    ends = np.cumsum(lengths)
    starts = (ends - lengths)[ends <= len(rest)].tolist()
    return [" ".join(rest[start : start + length]) for start, length in zip(starts, lengths.tolist(), strict=False)]


def short_texts(arguments: argparse.Namespace) -> list[str]:
    """Banking queries (about 12 words each), each once; or the shorter half of a corpus's texts."""
    if arguments.data is None:
        return sorted(texts_of(arguments), key=len)[: arguments.texts // 2]
    with (arguments.data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        texts = list(dict.fromkeys(row["text"] for row in csv.DictReader(file)))
    np.random.default_rng(0).shuffle(texts)
    return texts[: arguments.texts]


def read_texts(data: Path, count: int) -> list[str]:
    """Banking queries and web sentences, each once, shuffled with seed 0."""
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


def read_all(loader: Iterable[object]) -> None:
    """Iterate one epoch without a training step."""
    for _ in loader:
        pass


def encode_all(encoder: bertstream.Encoder, batches: Iterable[list[str] | bertstream.TokenBatch]) -> None:
    """Encode every batch and drop its vectors."""
    for batch in batches:
        encoder.encode(batch)


def worst_error(found: list[Tensor], right: list[Tensor]) -> float:
    """The relative L2 error of the worst text."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, right, strict=True))


def finish(device: str) -> None:
    """Wait for the work queued on the device, so that a timing includes it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(contenders: dict[str, Callable[[], object]], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Time each contender in each round, in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender()
            finish(arguments.device)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(top: list[float], bottom: list[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(top, bottom, strict=True))


def useful_flops(config: transformers.PretrainedConfig, lengths: Iterable[int]) -> int:
    """Operations of the model's layers for texts of these lengths, without padding; 4h in the middle (SPEED.md)."""
    h = config.hidden_size
    return config.num_hidden_layers * sum(length * (24 * h * h + 4 * length * h) for length in lengths)


class Products:
    """Matrix products of a feed-forward layer's shapes, (N, h) x (h, 4h) and back: the machine's speed limit."""

    def __init__(self, dtype: torch.dtype, device: str, hidden: int = 384) -> None:
        rows = 2048 if torch.device(device).type == "cpu" else 16384
        with torch.device(device):
            self.up = torch.nn.Linear(hidden, 4 * hidden, dtype=dtype)
            self.down = torch.nn.Linear(4 * hidden, hidden, dtype=dtype)
            self.rows = torch.randn(rows, hidden, dtype=dtype)
        self.device = device
        self.flops = 16 * rows * hidden * hidden

    @torch.no_grad()
    def once(self) -> float:
        """Seconds of one product up and one down."""
        started = time.perf_counter()
        self.down(self.up(self.rows))
        finish(self.device)
        return time.perf_counter() - started

    def rate(self) -> float:
        """GFLOP/s: the median of 20 runs, after 5 that warm up."""
        return self.flops / statistics.median([self.once() for _ in range(25)][5:]) / 1e9


def matmul_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """GFLOP/s of MiniLM's feed-forward products, (2048, 384) x (384, 1536) and back on a CPU: median of 20."""
    return Products(dtype, device).rate()


def machine(device: str = "cpu") -> dict[str, object]:
    """The machine that the figures were measured on."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "avx512_bf16": "avx512_bf16" in flags,
        "amx": "amx_bf16" in flags,
        "matmul_gflops": {
            str(d).removeprefix("torch."): round(matmul_rate(d, device)) for d in (torch.float32, torch.bfloat16)
        },
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
