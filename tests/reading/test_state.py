"""How far a stream is: one owner, whoever reads, and states of older versions still resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

import bertstream
from bertstream import Encoder, StateError, StreamConfig
from bertstream.cursors import Cursor, OpenPiece
from bertstream.reading.bad_records import BadRecords
from bertstream.reading.layout import Layout
from bertstream.reading.shards import Piece
from bertstream.reading.state import StreamProgress, cursor_from_json, cursor_to_json
from bertstream.testing import FakeEncoder
from bertstream.tokens import ReadReport

ROOT = Path(__file__).parents[2]
SAVED = json.loads((ROOT / "tests" / "states" / "version-0.1.0.json").read_text())
"""Written by version 0.1.0 (commit f85df61) after the fifth batch: state, and the keys of all that followed."""


def progress(lanes: int = 4, rank: int = 0, world_size: int = 1) -> StreamProgress:
    return StreamProgress(Layout([], lanes, 1), rank, world_size, BadRecords(0))


@pytest.mark.parametrize("name", SAVED)
def test_a_state_of_version_0_1_0_resumes(name: str, minilm: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    saved = SAVED[name]
    encoder: Any = FakeEncoder()
    if "MiniLM" in name:
        if tokenizers.__version__ != "0.23.3":
            pytest.skip("the state knows its tokenizer by what tokenizers 0.23.3 writes of it")
        encoder = Encoder.from_pretrained(
            "all-MiniLM-L6-v2", dtype="float32", device="cpu", output="words", layers=(1,)
        )
    reading = StreamConfig(**saved["reading"])
    with bertstream.stream(saved["shards"], encoder, reading=reading, **saved["options"]) as loader:
        loader.load_state_dict(saved["state"])
        assert loader.state_dict() == saved["state"]
        assert [batch["__key__"] for batch in loader] == saved["rest"]
        assert next(iter(loader))["__key__"] == saved["next_epoch_first"]


CURSORS = st.builds(
    Cursor,
    st.just(3),
    st.integers(0, 9),
    st.integers(0, 9),
    st.lists(st.builds(OpenPiece, st.integers(0, 9), st.integers(0, 99), st.integers(0, 999)), max_size=3).map(tuple),
    st.integers(0, 9),
)


@given(CURSORS)
def test_a_cursor_survives_json(cursor: Cursor) -> None:
    assert cursor_from_json(json.loads(json.dumps(cursor_to_json(cursor))), 3) == cursor


def test_reading_takes_a_loaded_start_once_and_does_not_move_the_loop() -> None:
    tried = progress()
    tried.begin([0])
    tried.advance([Cursor(0, 0, batch=1)])
    state = tried.state_dict({})
    assert [entry[0] for entry in state["queues"][0]] == [1, 2, 3, 0]

    again = progress()
    again.loading(state | {"settings": {"a": 1}}, {"a": 1})()
    again.begin([0])
    assert again.state_dict({})["queues"] == state["queues"]
    assert again.take_start() == again.running()
    assert [cursor.lane for cursor in again.take_start()[0] or ()] == [0, 1, 2, 3], "the next iteration starts over"
    assert again.state_dict({})["queues"] == state["queues"], "nothing was received meanwhile"


def test_a_state_that_is_refused_changes_nothing() -> None:
    tried = progress()
    tried.set_epoch(2)
    before = tried.state_dict({"seed": 1})
    with pytest.raises(StateError, match="seed=2, this stream has seed=1"):
        tried.loading(before | {"settings": {"seed": 2}}, {"seed": 1})
    with pytest.raises(StateError, match="version 7"):
        tried.loading(before | {"version": 7}, {"seed": 1})
    for part, value in (("queues", [[["x"]]]), ("queues", "no"), ("settings", 3), ("bad", [])):
        with pytest.raises(StateError) as caught:
            tried.loading(before | {part: value}, {"seed": 1})
        assert caught.value.key == part
    assert tried.state_dict({"seed": 1}) == before


def test_an_epoch_that_is_chosen_within_the_loop_is_the_next_one() -> None:
    tried = progress()
    tried.begin([0])
    tried.set_epoch(7)
    tried.advance([Cursor(0, 0, batch=1)])
    tried.end_epoch(0)
    assert tried.epoch == 7
    tried.begin([0])
    tried.count(ReadReport(read=1))
    tried.end_epoch(7)
    assert tried.epoch == 8


def test_ranks_that_are_not_known_are_missing_in_the_state() -> None:
    tried = progress(rank=1, world_size=2)
    assert [len(queue or ()) for queue in tried.state_dict({})["queues"]] == [2, 2]
    tried.begin([1])
    assert tried.state_dict({})["queues"][0] is None
    tried.begin(range(2))
    tried.advance([None, Cursor(0, 3, batch=1)])
    queues = tried.running()
    assert queues is not None and queues[0] == [], "a rank without a batch has finished"
    assert [cursor.lane for cursor in queues[1] or ()] == [3]


def test_what_is_skipped_is_counted_by_epoch_and_over_all() -> None:
    tried = StreamProgress(Layout([], 1, 1), 0, 1, BadRecords(5))
    for _ in range(2):
        tried.begin([0])
        tried.count(ReadReport(9, (bertstream.ShardError("bad", path="a"),)))
        tried.count(None)
        tried.end_epoch(tried.epoch)
    assert (tried.bad.read, tried.bad.records, tried.bad.all_records) == (9, 1, 2)


def test_the_counts_of_a_rank_without_a_good_record_are_no_fault_of_an_epoch_that_a_state_continues() -> None:
    saved = progress(lanes=2, world_size=2)
    saved.begin(range(2))
    saved.count(ReadReport(9, dropped=9))
    start = saved.state_dict({"a": 1})
    saved.advance([None, Cursor(0, 1, batch=1)])
    state = saved.state_dict({"a": 1})

    def resumed(state: dict[str, Any]) -> StreamProgress:
        found = StreamProgress(Layout([(Piece("a"), 1)], 2, 1), 0, 1, BadRecords(0))
        found.loading(state, {"a": 1})()
        found.begin([0])
        return found

    resumed(state).end_epoch(0)
    resumed(state | {"queues": [[], []]}).end_epoch(0)
    with pytest.raises(bertstream.ShardError, match="dropped each of the 9 records"):
        resumed(start).end_epoch(0)


def test_a_state_of_another_bucket_size_is_refused_in_the_words_of_the_option() -> None:
    tried = progress()
    state = tried.state_dict({"window": 64})
    with pytest.raises(StateError, match="saved with bucket_size=64, this stream has bucket_size=32") as caught:
        tried.loading(state, {"window": 32})
    assert caught.value.key == "window"
