"""A state of another stream says in words what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bertstream
from bertstream import StateError, StreamConfig
from bertstream.testing import FakeEncoder, FakeTokenizer, write_shards


def test_a_state_of_other_data_says_in_words_what_differs(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [f"text {i}" for i in range(8)], shards=2)

    def stream(encoder: Any = None, **options: Any) -> Any:
        return bertstream.stream(paths, encoder or FakeEncoder(), **options)

    state = stream().state_dict()
    with pytest.raises(StateError, match="saved with seed=0 and batch_size=32, this stream has seed=1 and batch"):
        stream(seed=1, batch_size=8).load_state_dict(state)
    with pytest.raises(StateError, match=r"lanes=1, .* lanes=2 \(without .* decide\): make the stream"):
        stream(reading=StreamConfig(lanes=2)).load_state_dict(state)
    with pytest.raises(StateError, match="saved with max_bad_records=0, this stream has max_bad_records above 0: make"):
        stream(reading=StreamConfig(max_bad_records=3)).load_state_dict(state)

    class Another(FakeTokenizer):
        identity = ("Another",)

    encoder = FakeEncoder()
    encoder.tokenizer = Another()
    with pytest.raises(StateError, match="saved with a tokenizer of other settings or another vocabulary than this"):
        stream(encoder).load_state_dict(state)
    with pytest.raises(StateError, match="shuffle=False, this stream has shuffle=True; with a tokenizer") as caught:
        stream(encoder, shuffle=True).load_state_dict(state)
    assert caught.value.key == "shuffle"

    Path(paths[1]).write_text('{"text": "changed"}\n')
    with pytest.raises(StateError, match="over other data: as many shards, 2, but of other names, sizes") as caught:
        stream().load_state_dict(state)
    assert caught.value.key == "shards" and "digest of these alone" in str(caught.value)
