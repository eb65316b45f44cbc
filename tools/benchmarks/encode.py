"""Token vectors of the same texts, by bertstream and by other libraries."""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, pipeline

import bertstream

from .common import Products, ratio, take_turns, texts_of, useful_flops, worst_error

BATCH = 32
"""Texts in a batch of the other libraries, as in their documentation."""


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--without", nargs="+", default=[], help="contenders to leave out, by name prefix")
    command.add_argument("--compiled", action="store_true", help="also run the encoder's model under torch.compile")


def encode(arguments: argparse.Namespace) -> dict[str, object]:
    """Token vectors of every text: all contenders on the same texts, reading and tokenizing included."""
    texts = texts_of(arguments)
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "corpus.jsonl"
        shard.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        contenders, absent = line_up(arguments, shard)
        right = contenders["plain"](texts)
        lengths = [len(row) for row in right]
        errors = {}
        for name, contender in contenders.items():
            if name == "flair":
                errors[name] = contender.error(texts, right)
            elif name != "plain":
                errors[name] = worst_error(contender(texts), right)
        config = contenders["plain"].model.config
        products = {d: Products(getattr(torch, d), arguments.device, config.hidden_size) for d in arguments.dtypes}
        rates: dict[str, list[float]] = {dtype: [] for dtype in arguments.dtypes}
        turns: dict[str, Callable[[], object]] = {}
        for name, contender in contenders.items():
            turns[name] = partial(contender, texts)
            dtype = dtype_of(name)
            if name.startswith(("bertstream", "stream")):  # measured next to it, because the machine's speed drifts
                turns[f"product {name}"] = lambda dtype=dtype: rates[dtype].append(products[dtype].rate())
        seconds = take_turns(turns, arguments)
        auto = bertstream.Encoder.from_pretrained(arguments.model, device=arguments.device).dtype
    tokens = sum(lengths)
    gflops = {dtype: statistics.median(found) for dtype, found in rates.items() if found}
    useful = useful_flops(config, lengths) / 1e9
    own = [name for name in contenders if name.startswith(("bertstream", "stream"))]
    return {
        "texts": len(texts),
        "tokens": tokens,
        "tokens_quantiles_0_50_90_100": np.quantile(lengths, [0, 0.5, 0.9, 1]).tolist(),
        "sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16],
        "model": arguments.model,
        "auto_dtype": str(auto).removeprefix("torch."),
        "absent": absent,
        "tokens_per_s": {name: round(tokens / statistics.median(seconds[name])) for name in contenders},
        "times": {
            name: {other: round(ratio(seconds[other], seconds[name]), 2) for other in contenders if other not in own}
            for name in own
        },
        "worst_text_relative_l2_error": {name: float(f"{error:.1e}") for name, error in errors.items()},
        "product_gflops": {dtype: round(rate, 1) for dtype, rate in gflops.items()},
        "share_of_product": {
            name: round(useful / statistics.median(seconds[name]) / gflops[dtype_of(name)], 3) for name in own
        },
        "rounds": arguments.rounds,
    }


def dtype_of(name: str) -> str:
    """The dtype of a contender's forward, by its name."""
    return name.rpartition("_")[2]


def line_up(arguments: argparse.Namespace, shard: Path) -> tuple[dict[str, Callable[[list[str]], list[Tensor]]], dict]:
    """The contenders by name, and the reason why each other one is absent."""
    makers: dict[str, Callable[[], Callable[[list[str]], list[Tensor]]]] = {}
    model, device = arguments.model, arguments.device
    own = {dtype: Own(model, dtype, device) for dtype in arguments.dtypes}
    folder = next(iter(own.values())).encoder.model.config._name_or_path
    makers["plain"] = partial(PlainLoop, folder, device)
    makers["pipeline"] = partial(Pipeline, folder, device)
    makers["flair"] = partial(Flair, folder, device)
    for dtype in arguments.dtypes:
        makers[f"sentence_transformers_{dtype}"] = partial(SentenceTransformers, folder, dtype, device)
    for dtype in arguments.dtypes:
        makers[f"bertstream_{dtype}"] = lambda dtype=dtype: own[dtype]
        if arguments.compiled:
            makers[f"bertstream_compiled_{dtype}"] = partial(Own, model, dtype, device, compiled=True)
        makers[f"stream_{dtype}"] = partial(Stream, shard, model, dtype, device)
    contenders, absent = {}, {}
    for name, make in makers.items():
        if name != "plain" and name.startswith(tuple(arguments.without)):
            continue
        try:
            contenders[name] = make()
        except ImportError as error:
            absent[name] = str(error)
    return contenders, absent


class PlainLoop:
    """The usual loop: file order, batches of 32, padded, float32."""

    def __init__(self, folder: str, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().to(device)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> list[Tensor]:
        rows: list[Tensor] = []
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            inputs = self.tokenizer(batch, padding=True, truncation=True, max_length=512, return_tensors="pt")
            inputs = inputs.to(self.model.device)
            hidden = self.model(**inputs).last_hidden_state
            rows += [text[mask.bool()] for text, mask in zip(hidden, inputs["attention_mask"], strict=True)]
        return rows


class Pipeline:
    """transformers' feature-extraction pipeline; it returns padding too, which is cut off here."""

    def __init__(self, folder: str, device: str) -> None:
        self.pipe = pipeline("feature-extraction", folder, dtype=torch.float32, device=device)

    def __call__(self, texts: list[str]) -> list[Tensor]:
        cut = {"truncation": True, "max_length": 512}
        found = self.pipe(texts, batch_size=BATCH, return_tensors=True, tokenize_kwargs=cut)
        lengths = [len(ids) for ids in self.pipe.tokenizer(texts, **cut)["input_ids"]]
        return [rows[0, :length] for rows, length in zip(found, lengths, strict=True)]


class SentenceTransformers:
    """sentence-transformers' token embeddings: sorted by length, padded."""

    def __init__(self, folder: str, dtype: str, device: str) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(folder, device=device, model_kwargs={"dtype": getattr(torch, dtype)})
        self.model.max_seq_length = 512

    def __call__(self, texts: list[str]) -> list[Tensor]:
        found = self.model.encode(texts, batch_size=BATCH, output_value="token_embeddings", show_progress_bar=False)
        return [rows.float() for rows in found]


class Flair:
    """flair's word vectors (it has no token vectors): texts split at blanks, the mean of each word's tokens."""

    def __init__(self, folder: str, device: str) -> None:
        import flair
        from flair.embeddings import TransformerWordEmbeddings

        flair.device = torch.device(device)
        self.folder, self.device = folder, device
        self.model = TransformerWordEmbeddings(folder, layers="-1", subtoken_pooling="mean", fine_tune=False)

    def __call__(self, texts: list[str]) -> list[Tensor]:
        from flair.data import Sentence

        rows = []
        for start in range(0, len(texts), BATCH):
            sentences = [Sentence(text.split()) for text in texts[start : start + BATCH]]
            self.model.embed(sentences)
            rows += [torch.stack([word.get_embedding() for word in sentence]) for sentence in sentences]
        return rows

    def error(self, texts: list[str], right: list[Tensor]) -> float:
        """The relative L2 error of the worst text, against word vectors in float32."""
        encoder = bertstream.Encoder.from_pretrained(
            self.folder, dtype="float32", device=self.device, output="words", overflow="truncate"
        )
        return worst_error(self(texts), list(encoder.encode([text.split() for text in texts])))


class Own:
    """All texts in one call of the encoder."""

    def __init__(self, name: str, dtype: str, device: str, *, compiled: bool = False) -> None:
        self.encoder = bertstream.Encoder.from_pretrained(
            name, dtype=dtype, device=device, overflow="truncate", max_length=512
        )
        if compiled:
            self.encoder.model.compile(dynamic=True)
        self.encoder.calibrate()

    def __call__(self, texts: list[str]) -> list[Tensor]:
        return list(self.encoder.encode(texts))


class Stream:
    """All texts through `bertstream.stream` over a shard on disk, reading included."""

    def __init__(self, shard: Path, name: str, dtype: str, device: str) -> None:
        encoder = bertstream.Encoder.from_pretrained(
            name, dtype=dtype, device=device, overflow="truncate", max_length=512
        )
        self.loader = bertstream.stream(shard, encoder, max_tokens=encoder.max_forward_tokens, shuffle=True)

    def __call__(self, texts: list[str]) -> list[Tensor]:
        rows: list[Tensor | None] = [None] * len(texts)
        for batch in self.loader:
            for index, text in zip(batch["__index__"].tolist(), batch["text"], strict=True):
                rows[index] = text
        return [row for row in rows if row is not None]
