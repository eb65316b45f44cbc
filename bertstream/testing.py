"""Helpers for your own tests: shards, an encoder without a model, and a check that resuming is exact.

Example:
    from bertstream.testing import assert_resumes_exactly


    def test_my_pipeline_resumes() -> None:
        assert_resumes_exactly(lambda: bertstream.stream("shards/*.tar", encoder, text="txt", shuffle=True))
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .embeddings import Embeddings
from .errors import check_at_least
from .pipeline.embedding_loader import EmbeddingLoader
from .tokens import Int32Array, Text, TokenBatch, TokenizedText


class FakeTokenizer:
    """Tokens are words and single other characters; ids are the same in every process; no special tokens."""

    identity = ("FakeTokenizer",)

    def __call__(self, texts: Sequence[Text]) -> list[TokenizedText]:
        """Tokenize strings, lists of words, or pairs of either."""
        return [self._one(text) for text in texts]

    def _one(self, text: Text) -> TokenizedText:
        in_words = isinstance(text, list) or (isinstance(text, tuple) and isinstance(text[0], list))
        parts: list[Any] = list(text) if isinstance(text, tuple) else [text]
        words = [word for part in parts for word in (part if isinstance(part, list) else [part])]
        ids = [[1 + zlib.crc32(piece.encode()) % 30_000 for piece in re.findall(r"\w+|\S", word)] for word in words]
        out = TokenizedText(np.array([i for word in ids for i in word], np.int32))
        if in_words:
            out.word_ids = np.repeat(np.arange(len(ids)), [len(word) for word in ids]).astype(np.int32)
            out.num_words = len(ids)
        return out


class FakeEncoder:
    """An `Encoder` without a model: vectors are a function of tokens and their indices, and take no time to compute.

    Row k of a text is [id, k, tokens of the text, 0, ...].

    Args:
        hidden_size: H, at least 3.
        max_forward_tokens: the unit in which a loader measures how far it runs ahead.
    Raises:
        ConfigError: `hidden_size` is below 3.
    """

    def __init__(self, hidden_size: int = 4, max_forward_tokens: int = 2048) -> None:
        check_at_least("hidden_size", hidden_size, 3)
        self.tokenizer = FakeTokenizer()
        self.device = torch.device("cpu")
        self.max_forward_tokens = max_forward_tokens
        self.embedding_dim = hidden_size

    def encode(self, batch: TokenBatch) -> Embeddings:
        """Encode to [N, H] float32 rows on the CPU, one for each token."""
        lengths: Int32Array = batch.lengths
        values = np.zeros((batch.num_tokens, self.embedding_dim), np.float32)
        values[:, 0] = batch.input_ids
        values[:, 1] = np.arange(batch.num_tokens) - np.repeat(batch.cu_seqlens[:-1], lengths)
        values[:, 2] = np.repeat(lengths, lengths)
        return Embeddings(
            values=torch.from_numpy(values),
            cu_seqlens=torch.from_numpy(batch.cu_seqlens),
            lengths=torch.from_numpy(lengths.astype(np.int64)),
            tokens=batch,
            output="tokens",
            word_ids=batch.word_ids,
        )


def write_shards(folder: str | os.PathLike[str], texts: Sequence[Any], *, shards: int = 1) -> list[str]:
    """Write texts as jsonl shards of about equal size, each text with its index as "id".

    Args:
        folder: created if it does not exist.
        texts: strings, or lists of words.
        shards: how many files.
    Returns:
        The paths. A record is {"text": ..., "id": ...}.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, indices in enumerate(np.array_split(np.arange(len(texts)), shards)):
        path = folder / f"{number:06d}.jsonl"
        lines = [json.dumps({"text": texts[i], "id": int(i)}) for i in indices]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        paths.append(str(path))
    return paths


def assert_resumes_exactly(
    make_loader: Callable[[], EmbeddingLoader],
    *,
    cuts: Sequence[int] | None = None,
    resume_with: Callable[[], EmbeddingLoader] | None = None,
) -> None:
    """Assert that a loader resumes exactly from its state, after any number of batches of an epoch.

    For each cut, a new loader yields that many batches. Its state goes through JSON into another new loader, which must
    yield the rest of the uninterrupted epoch, equal batch by batch and value by value, and then the whole next epoch.
    The state must be unchanged right after loading, and the resumed loader must resume a second time, one batch later.
    Each cut reads about three epochs, so all cuts of an epoch of N batches read about 3 N: take few records, or `cuts`.

    Vectors are compared to the last bit, which a loader promises with `deterministic=True, prefetch=0` alone.

    Args:
        make_loader: makes a new loader, as a restarted program would.
        cuts: after how many batches to take the state; None is before the first and after every one.
        resume_with: makes the loader that resumes, with another number of workers, say; None is `make_loader`.
    Raises:
        AssertionError: a batch differs; the message says which, in what field, and for numbers by how much.
    """
    with closing(make_loader()) as loader:
        whole = [_plain(batch) for batch in loader]
        following = [_plain(batch) for batch in loader]
    for cut in range(len(whole) + 1) if cuts is None else cuts:
        with closing(make_loader()) as loader:
            iteration = iter(loader) if cut else None
            for number in range(cut):
                assert iteration is not None
                _assert_same(_plain(next(iteration)), whole[number], f"batch {number} of another run")
            state = json.loads(json.dumps(loader.state_dict()))
        with closing((resume_with or make_loader)()) as loader:
            loader.load_state_dict(state)
            assert json.loads(json.dumps(loader.state_dict())) == state, f"cut {cut}: loading changes the state"
            second = None
            if whole[cut:]:
                again = iter(loader)
                _assert_same(_plain(next(again)), whole[cut], f"batch 0 after {cut} batches")
                second = json.loads(json.dumps(loader.state_dict()))
            loader.load_state_dict(state)
            _assert_rest(loader, whole[cut:], f"after {cut} batches")
            _assert_rest(loader, following, f"in the epoch after a resume after {cut} batches")
            if second is not None:
                loader.load_state_dict(second)
                _assert_rest(loader, whole[cut + 1 :], f"of a second resume after {cut + 1} batches")


def _assert_rest(loader: EmbeddingLoader, right: list[Any], where: str) -> None:
    found: Iterator[Any] = iter(loader)
    for number, batch in enumerate(right):
        _assert_same(_plain(next(found, None)), batch, f"batch {number} {where}")
    assert next(found, None) is None, f"{where}: more batches than in the uninterrupted epoch"


def _assert_same(found: Any, right: Any, where: str) -> None:
    assert found == right, f"{where}: {_difference(found, right)}"


def _difference(found: Any, right: Any, place: str = "batch") -> str:
    """Where two plain values first differ, and how."""
    if isinstance(found, dict) and isinstance(right, dict) and found.keys() == right.keys():
        name = next(name for name in found if found[name] != right[name])
        return _difference(found[name], right[name], f"{place}[{name!r}]")
    if isinstance(found, list) and isinstance(right, list) and len(found) == len(right):
        with suppress(ValueError):  # lists of unequal lengths
            numbers, others = np.array(found), np.array(right)
            if numbers.dtype.kind in "biuf" and others.dtype.kind in "biuf" and numbers.shape == others.shape:
                return f"{place} differs by up to {np.abs(numbers.astype(float) - others.astype(float)).max():g}"
        index = next(i for i, (one, other) in enumerate(zip(found, right, strict=True)) if one != other)
        return _difference(found[index], right[index], f"{place}[{index}]")
    return f"{place} is {str(found)[:200]}, in an uninterrupted epoch it is {str(right)[:200]}"


def _plain(batch: Any) -> Any:
    """A batch as plain values, which `==` compares."""
    if isinstance(batch, Embeddings):
        return {"lengths": batch.lengths.tolist(), "values": batch.values.tolist()}
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, np.ndarray):
        return batch.tolist()
    if isinstance(batch, Mapping):
        return {name: _plain(value) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [_plain(value) for value in batch]
    return batch
