"""A stream's batches are those that their own texts would make, whatever else was read and tokenized beside them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bertstream
from bertstream.tokens import TokenBatch

WORDS = ["the", "river", "did", "not", "rise", "unbelievably", "", "."]
KINDS = {
    "strings": lambda words, i: " ".join(words),
    "lists": lambda words, i: words,
    "strings and lists": lambda words, i: words if i % 3 else " ".join(words),
}


@pytest.mark.parametrize("overflow", ["truncate", "windows"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_has_the_arrays_of_its_own_texts(tmp_path: Path, small_folder: str, kind: str, overflow: Any) -> None:
    encoder = bertstream.Encoder.from_pretrained(small_folder, device="cpu", overflow=overflow, max_length=12)
    rng = np.random.default_rng(0)
    texts = [KINDS[kind](rng.choice(WORDS, rng.integers(1, 16)).tolist(), i) for i in range(90)]
    shard = tmp_path / "a.jsonl"
    shard.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    reading = bertstream.StreamConfig(bucket_size=40)
    stream = bertstream.TextStream(shard, encoder, batch_size=2, shuffle=True, keep_text_as="said", reading=reading)
    seen = []
    for batch in stream:
        right = encoder.tokenizer.batch(batch.fields["said"])
        right.drop_idle(("words_cut", "owned"))
        for field in dataclasses.fields(TokenBatch):
            if "axis" in field.metadata and field.name != "hashes":
                found, expected = getattr(batch, field.name), getattr(right, field.name)
                assert np.array_equal(found, expected), field.name
                assert found is None or found.dtype == expected.dtype
        assert [texts[i] for i in batch.fields["id"]] == batch.fields["said"]
        seen += batch.fields["id"].tolist()
    assert sorted(seen) == list(range(len(texts)))
