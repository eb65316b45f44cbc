"""All texts in one call, tokenizing included, against sentence-transformers in the same dtype."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from benchmarks.common import ratio

from .encoders import free_memory, load
from .part import Emit, Settings
from .timing import synchronize

try:
    from sentence_transformers import SentenceTransformer
except ImportError:
    SentenceTransformer = None

BATCH = 256
"""Texts in a batch of sentence-transformers, which pads them; its default of 32 leaves a large device idle."""

KINDS = {"tokens": "token_embeddings", "sentence": "sentence_embedding"}
"""The outputs, and what sentence-transformers calls them."""


def run(settings: Settings, emit: Emit) -> None:
    """A row for each model and output; or one that says that the package is missing."""
    if SentenceTransformer is None:
        emit("skipped", why="sentence-transformers is not installed")
        return
    texts = settings.texts()[: 20 if settings.tiny else 3000]
    for model in ("bert_base", "minilm"):
        other = SentenceTransformer(
            settings.model_folder(model), device=settings.device, model_kwargs={"dtype": torch.bfloat16}
        )
        other.max_seq_length = 512
        for output, value in KINDS.items():
            encoder = load(settings, model, output=output)
            encoder.calibrate()
            tokens = encoder.tokenizer.batch(texts).num_tokens
            contenders: dict[str, Callable[[], object]] = {
                "own": lambda encoder=encoder: encoder.encode(texts),
                "other": lambda other=other, value=value: other.encode(
                    texts, batch_size=BATCH, output_value=value, convert_to_numpy=False, show_progress_bar=False
                ),
            }
            seconds: dict[str, list[float]] = {name: [] for name in contenders}
            for _ in range(1 if settings.tiny else 4):
                for name, contender in contenders.items():
                    started = time.perf_counter()
                    contender()
                    synchronize(settings.device)
                    seconds[name].append(time.perf_counter() - started)
            own, others = (times[1:] or times for times in seconds.values())  # the first warms up
            emit(
                f"{model} {output}",
                tokens_per_s=round(tokens / min(own)),
                sentence_transformers_tokens_per_s=round(tokens / min(others)),
                times=ratio(others, own),
                texts=len(texts),
                tokens=tokens,
            )
        del other, encoder, contenders
        free_memory()
