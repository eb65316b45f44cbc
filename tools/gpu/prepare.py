"""The texts, shards and models that the other parts use, and the machine's properties."""

from __future__ import annotations

import json
import os
import platform
import random
import re
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from benchmarks.common import read_corpus
from benchmarks.models import write_bert

import bertstream
from bertstream.testing import write_shards

from .part import Emit, Settings

TEXTS = 20_000
LANE_BYTES = 4 << 20
"""A stream has one lane for so many bytes of shards."""


def run(settings: Settings, emit: Emit) -> None:
    """Rows of the machine and of the texts."""
    on_cuda = torch.device(settings.device).type == "cuda"
    if on_cuda and not torch.cuda.is_available():
        raise SystemExit(f"--device {settings.device}: torch {torch.__version__} sees no CUDA device here")
    emit(
        "machine",
        device=torch.cuda.get_device_name(settings.device) if on_cuda else "cpu",
        cores=len(os.sched_getaffinity(0)),
        workers=settings.workers,
        bertstream=bertstream.__version__,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        transformers=transformers.__version__,
        python=platform.python_version(),
    )
    texts = manual() if settings.data is None else read_corpus(Path(settings.data))
    texts = list(dict.fromkeys(filter(None, texts)))
    random.Random(0).shuffle(texts)
    texts = texts[: 120 if settings.tiny else TEXTS]
    folder = Path(settings.folder)
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    lines = sharded(texts, 1 if settings.tiny else settings.workers * LANE_BYTES)
    write_shards(folder / "shards", lines, shards=settings.workers)
    emit("texts", count=len(texts), in_shards=len(lines), shards=settings.workers)
    tokenizer = settings.model
    for name in ("bert_base", "minilm"):
        if name == "bert_base" or settings.model is None:
            size = "tiny" if settings.tiny else name
            # One tokenizer for both: making one takes seconds.
            tokenizer = write_bert(folder / name, size, tokenizer=tokenizer, texts=texts[:4000])
            emit(name, size=size, random_weights=True)


def manual() -> list[str]:
    """Sentences of Python's manual, then runs of two, of three and so on, up to 1,200 characters."""
    paragraphs = [part.strip() for topic in sorted(topics) for part in topics[topic].split("\n\n")]
    sentences = [part for paragraph in paragraphs for part in re.split(r"(?<=\.)\s+", paragraph) if len(part) > 20]
    runs = (" ".join(sentences[i : i + n]) for n in range(1, 12) for i in range(len(sentences) - n))
    return [text for text in runs if len(text) < 1200]


def sharded(texts: list[str], least: int) -> list[str]:
    """All texts at least once, as often as it takes for `least` bytes of shards.

    Each repeat ends in its own number: equal texts of one call are encoded only once.
    """
    found = list(texts)
    size = sum(len(text.encode()) for text in texts)
    for number in range(1, -(-least // size)):
        found += [f"{text} {number}" for text in texts]
    return found
