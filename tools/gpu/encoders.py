"""Encoders and token batches that several parts use."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, BertModel  # noqa: F401 - loading needs them, and imports are not on a part's time

from bertstream import Encoder, TokenBatch
from bertstream.tokens import cumulate

from .part import Settings

ONE_FORWARD = 1 << 20
"""As `max_forward_tokens`: whatever the batch, it is one forward."""


def load(settings: Settings, name: str, dtype: str = "bfloat16", **options: Any) -> Encoder:
    """The encoder "bert_base" or "minilm"."""
    options |= {"dtype": dtype, "device": settings.device, "overflow": "truncate", "max_length": 512}
    return Encoder.from_pretrained(settings.model_folder(name), **options)


def encoder_without_fused(encoder: Encoder) -> Encoder:
    """The same encoder, from now on by the plain packed way."""
    if hasattr(encoder, "_fused"):
        encoder._fused = None
    return encoder


def batch_of(encoder: Encoder, texts: Sequence[str], tokens: int) -> TokenBatch:
    """The first texts that have at most so many tokens together; texts repeat if there are too few."""
    found: list[TokenBatch] = []
    missing = tokens
    while missing > 0:  # a text has about 4 characters a token, and tokenizing all of them may take long
        for start in range(0, len(texts), 1000):
            found.append(encoder.tokenizer.batch(texts[start : start + 1000]))
            missing -= found[-1].num_tokens
            if missing <= 0:
                break
    return first_texts(TokenBatch.concat(found), tokens)


def first_texts(batch: TokenBatch, tokens: int) -> TokenBatch:
    """The first texts that have at most so many tokens together, at least one."""
    fitting = int(np.searchsorted(batch.cu_seqlens[1:], tokens, "right"))
    return batch.pick(np.arange(max(1, fitting)))


def batch_of_lengths(encoder: Encoder, lengths: Sequence[int]) -> TokenBatch:
    """Texts of so many tokens each, of random ids."""
    sizes: npt.NDArray[np.int32] = np.array(lengths, np.int32)
    ids = np.random.default_rng(0).integers(1000, 2000, int(sizes.sum())).astype(np.int32)
    nothing = np.zeros(len(sizes), np.int32)
    return TokenBatch(ids, cumulate(sizes), None, None, None, nothing, nothing)


def free_memory() -> None:
    """Return what dropped encoders held on the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
