"""Epochs of N steps continue where the last one stopped, over passes of the data, and resume anywhere."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fork_server import RANKS
from hypothesis import given, settings
from hypothesis import strategies as st

import bertstream
from bertstream import ConfigError, EmbeddingLoader, LoaderClosedError, ShardError, StateError, StreamConfig
from bertstream.testing import FakeEncoder, assert_resumes_exactly, write_shards

TEXTS = [f"{'word ' * (i * 7 % 13)}{i}" for i in range(50)]

Make = Callable[..., EmbeddingLoader]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_shards(tmp_path_factory.mktemp("shards"), TEXTS, shards=3)


@pytest.fixture(scope="module")
def make(shards: list[str]) -> Make:
    """A pass has some 13 batches."""

    def make(steps: int | None = 6, **options: Any) -> EmbeddingLoader:
        reading = StreamConfig(lanes=2, bucket_size=16, open_shards=1)
        given: dict[str, Any] = {"batch_size": 4, "shuffle": True, "reading": reading} | options
        return bertstream.stream(shards, FakeEncoder(), steps_per_epoch=steps, **given)

    return make


def ids(batches: Any) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


@pytest.fixture(scope="module")
def passes(make: Make) -> list[list[list[int]]]:
    """The batches of a loader without steps, pass by pass."""
    with make(None) as loader:
        return [ids(loader) for _ in range(16)]


@pytest.fixture(scope="module")
def whole(passes: list[list[list[int]]]) -> list[list[int]]:
    """The same, one pass after the other."""
    return [batch for one in passes for batch in one]


@given(steps=st.integers(1, 30), left=st.lists(st.integers(1, 30), max_size=4))
@settings(max_examples=20)
def test_epochs_of_any_number_of_steps_are_the_passes_one_after_the_other(
    make: Make, whole: list[list[int]], steps: int, left: list[int]
) -> None:
    """Some loops are left early: the next one continues after the batch received last."""
    received: list[list[int]] = []
    with make(steps) as loader:
        assert len(loader) == steps
        for epoch, count in enumerate([*left, steps, steps]):
            assert loader.epoch == epoch
            for number, batch in enumerate(loader, 1):
                received.append(batch["id"].tolist())
                if number == count:
                    break
            assert received == whole[: len(received)]
        stats = loader.stats()
    assert stats["epochs"] == 2 + sum(count >= steps for count in left)
    assert stats["batches"] == len(received)


@pytest.mark.parametrize(("num_workers", "prefetch"), [(0, None), (0, 2), (2, 0)])
def test_a_state_within_any_step_resumes_exactly(make: Make, num_workers: int, prefetch: int | None) -> None:
    """Also where an epoch or a pass ends; the second epoch of nine steps has the end of a pass in it."""
    cuts = None if not num_workers else (0, 5, 9)
    options = {"num_workers": num_workers, "prefetch": prefetch}
    assert_resumes_exactly(lambda: make(9, **options), cuts=cuts, resume_with=lambda: make(9))


def test_a_mixture_in_steps_resumes_exactly(shards: list[str]) -> None:
    def make() -> EmbeddingLoader:
        mixture = bertstream.Mixture([(shards[0], 2), (shards[1:], 1)], stopping="all")
        return bertstream.stream(mixture, FakeEncoder(), batch_size=4, shuffle=True, steps_per_epoch=9)

    assert_resumes_exactly(make, cuts=(0, 4, 9))


def test_a_state_resumes_in_any_epoch_and_pass(make: Make, whole: list[list[int]]) -> None:
    steps = 5
    with make(steps) as loader:
        states = [json.loads(json.dumps(state)) for _ in range(8) for state in (loader.state_dict() for _ in loader)]
    assert [state["steps"] for state in states] == [
        {"epoch": epoch, "step": step} for epoch in range(8) for step in range(1, steps + 1)
    ]
    for done, state in enumerate(states[:-steps], 1):
        with make(steps) as loader:
            loader.load_state_dict(state)
            assert loader.epoch == (done - 1) // steps and loader.passes == state["epoch"]
            found = ids(loader)
            assert len(found) == -done % steps
            assert found + ids(loader) == whole[done:][: len(found) + steps]


def test_the_state_after_an_earlier_batch_is_known_across_the_end_of_a_pass(make: Make) -> None:
    with make(30) as loader:
        states: list[Any] = []
        for number, _ in enumerate(loader):
            states.append(loader.state_dict())
            for held in range(min(number, 8)):
                assert loader.state_dict(after=number + 1 - held) == states[-1 - held]
    with make(4) as loader:
        next(iter(loader))
        list(loader)
        for _ in loader:
            assert loader.state_dict(after=1) == loader.state_dict() != loader.state_dict(after=0)
            break


def test_a_state_of_another_number_of_steps_keeps_the_place_and_the_step(make: Make, whole: list[list[int]]) -> None:
    with make(6) as loader:
        assert len(ids(loader)) == 6
        for number, _ in enumerate(loader, 1):
            if number == 4:
                state = loader.state_dict()
                break
    for steps, rest in ((9, 5), (4, 0), (2, 0), (6, 2)):
        with make(steps) as loader:
            loader.load_state_dict(state)
            found = ids(loader)
            assert (len(found), loader.epoch) == (rest, 2)
            assert found + ids(loader) == whole[10:][: rest + steps]


def test_a_state_with_steps_and_one_without_keep_the_place(make: Make, passes: list[list[list[int]]]) -> None:
    with make(6) as loader:
        list(loader)
        for _ in loader:
            state = loader.state_dict()
            break
    with make(None) as loader:
        loader.load_state_dict(state)
        assert loader.epoch == 0
        assert ids(loader) == passes[0][7:]
        for _ in loader:
            state = loader.state_dict()
            break
    assert "steps" not in state
    with make(6) as loader:
        loader.load_state_dict(state)
        assert (loader.epoch, loader.passes) == (1, 1)
        assert ids(loader) == passes[1][1:7]


@pytest.mark.parametrize("steps", [3, {"epoch": 1}, {"epoch": 1, "step": -1}, {"epoch": True, "step": 1}, None])
def test_a_state_with_damaged_steps_is_refused_and_changes_nothing(make: Make, steps: Any) -> None:
    with make() as loader:
        list(loader)
        state = loader.state_dict()
        with pytest.raises(StateError, match="the state has steps=") as caught:
            loader.load_state_dict(state | {"steps": steps})
        assert caught.value.key == "steps" and loader.state_dict() == state


def test_to_set_the_current_or_the_next_epoch_changes_nothing(make: Make, whole: list[list[int]]) -> None:
    with make(6) as loader:
        for epoch in range(3):
            loader.set_epoch(epoch)
            loader.set_epoch(epoch)
            taken = iter(loader)  # as a trainer does that knows the length: it never asks for the end
            assert [next(taken)["id"].tolist() for _ in range(6)] == whole[6 * epoch :][:6]
            if epoch == 1:
                del taken
        loader.set_epoch(3)
        assert ids(loader) == whole[18:24] and loader.epoch == 4


def test_another_number_for_an_epoch_leaves_the_place(make: Make, whole: list[list[int]]) -> None:
    with make(6) as loader:
        list(loader)
        loader.set_epoch(7)
        assert (loader.epoch, loader.passes) == (7, 0)
        for _ in loader:
            loader.set_epoch(2)
            assert loader.epoch == 2 and loader.state_dict()["steps"] == {"epoch": 7, "step": 1}
            break
        assert loader.epoch == 2
        assert ids(loader) == whole[7:13]
        state = loader.state_dict() | {"steps": {"epoch": 3, "step": 4}}
        loader.load_state_dict(state)
        loader.set_epoch(3)
        assert ids(loader) == whole[13:15]
        loader.load_state_dict(state)
        loader.set_epoch(4)
        assert ids(loader) == whole[13:19]
        with pytest.raises(ConfigError, match="epoch=-1"):
            loader.set_epoch(-1)


def test_an_iterator_that_is_never_used_changes_nothing(make: Make, whole: list[list[int]]) -> None:
    with make(6) as loader:
        iter(loader)
        assert ids(loader) == whole[:6]
        unused = iter(loader)
        assert ids(loader) == whole[6:12]
        with pytest.raises(LoaderClosedError, match="another iteration"):
            next(unused)


def test_a_new_loop_ends_the_one_before_unless_that_has_all_of_its_steps(make: Make, whole: list[list[int]]) -> None:
    with make(6) as loader:
        first = iter(loader)
        assert [next(first)["id"].tolist() for _ in range(2)] == whole[:2]
        second = iter(loader)
        assert [next(second)["id"].tolist() for _ in range(6)] == whole[2:8]
        third = iter(loader)
        assert next(third)["id"].tolist() == whole[8]
        with pytest.raises(LoaderClosedError, match="another iteration"):
            next(first)
        with pytest.raises(StopIteration):
            next(second)
        assert len(ids(third)) == 5
        assert loader.epoch == 3


# What runs


def processes() -> set[int]:
    return {process.pid or 0 for process in multiprocessing.active_children()}


def encode_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "encode" in thread.name}


def none_are_left(found: Callable[[], set[Any]]) -> bool:
    until = time.monotonic() + 5
    while found() and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    return not found()


@pytest.mark.parametrize("ending", ["exhausted", "taken"])
def test_workers_and_the_thread_run_on_from_one_epoch_to_the_next_and_end_with_the_loader(
    tmp_path: Path, ending: str
) -> None:
    shards = write_shards(tmp_path, ["a word " * 20] * 600)
    reading = StreamConfig(lanes=2, bucket_size=16)
    loader = bertstream.stream(
        shards, FakeEncoder(), batch_size=4, num_workers=2, prefetch=1, steps_per_epoch=3, reading=reading
    )
    seen = []
    for _ in range(3):
        if ending == "taken":
            taken: Iterator[Any] = iter(loader)
            for _ in range(3):
                next(taken)
            del taken
        else:
            list(loader)
        seen.append((processes(), encode_threads()))
    assert len(seen[0][0]) == 2 and len(seen[0][1]) == 1 and seen[0] == seen[1] == seen[2]
    del seen
    del loader  # nobody closes it
    assert none_are_left(processes) and none_are_left(encode_threads)


@pytest.mark.parametrize("how", ["break", "error", "close", "load"])
def test_leaving_a_loop_early_ends_workers_and_the_thread(make: Make, how: str) -> None:
    loader = make(3, num_workers=1, prefetch=2)
    list(loader)
    state = loader.state_dict()
    running = iter(loader)
    next(running)
    assert processes() and encode_threads()
    if how == "break":
        del running
    elif how == "error":
        with pytest.raises(ZeroDivisionError):
            for _ in loader:
                raise ZeroDivisionError
    elif how == "close":
        loader.close()
    else:
        loader.load_state_dict(state)
    if how in ("close", "load"):
        reason = "the loader was closed" if how == "close" else "a state was loaded"
        with pytest.raises(LoaderClosedError, match=reason):
            next(running)
    assert none_are_left(processes) and none_are_left(encode_threads)
    if how == "close":
        with pytest.raises(LoaderClosedError, match="was closed: make a new one"):
            iter(loader)
    else:
        assert len(list(loader)) == 3
    loader.close()
    assert none_are_left(processes)


def test_a_loader_that_is_closed_between_two_loops_leaves_nothing_running(make: Make) -> None:
    loader = make(3, num_workers=1, prefetch=2)
    list(loader)
    unused = iter(loader)
    loader.close()
    assert none_are_left(processes) and none_are_left(encode_threads)
    with pytest.raises(LoaderClosedError, match="was closed"):
        next(unused)


def test_what_a_loop_does_between_two_epochs_is_no_step(make: Make) -> None:
    with make(3) as loader:
        for _ in range(2):
            list(loader)
            time.sleep(0.3)
        list(loader)
        assert loader.stats()["step_s"] < 0.25


def test_an_error_within_a_pass_leaves_the_place(tmp_path: Path) -> None:
    path = Path(write_shards(tmp_path, TEXTS[:12])[0])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:8], "no json\n", *lines[8:]]))
    reading = StreamConfig(bucket_size=4)
    with bertstream.stream(path, FakeEncoder(), batch_size=4, steps_per_epoch=5, reading=reading) as loader:
        for _ in range(2):
            with pytest.raises(ShardError, match="not JSON"):
                list(loader)
        assert loader.stats()["texts"] == 8 and loader.state_dict()["steps"] == {"epoch": 1, "step": 0}


@pytest.mark.parametrize("world_size", [1, 2])
def test_data_without_a_batch_is_an_error_and_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    shards = write_shards(tmp_path, TEXTS)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    with (
        bertstream.stream(shards, FakeEncoder(), steps_per_epoch=5, keep=lambda record: False) as loader,
        pytest.raises(ShardError, match="no batch, so steps_per_epoch=5" if world_size > 1 else "keep=.* dropped each"),
    ):
        list(loader)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "9"])
def test_a_bad_number_of_steps_is_refused_with_the_value_seen(make: Make, steps: Any) -> None:
    with pytest.raises(ConfigError, match=f"steps_per_epoch={steps!r}: write a whole number of at least 1"):
        make(steps)


def test_states_and_stats_without_steps_have_no_entry_of_them(make: Make) -> None:
    with make(None) as loader:
        list(loader)
        assert "steps" not in loader.state_dict() and "passes" not in loader.stats()
        assert loader.passes == loader.epoch == 1


# A shuffled epoch that starts over


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "starts over" in record.getMessage()]


def test_a_shuffled_epoch_that_starts_over_after_being_left_is_named_once(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with make(None) as loader:
        for _ in range(3):
            for _ in loader:
                break
    assert len(warned(caplog)) == 1
    assert "epoch 0 starts over" in warned(caplog)[0] and "steps_per_epoch=" in warned(caplog)[0]


@pytest.mark.parametrize("way", ["whole", "set_epoch", "state", "steps", "in order", "unused"])
def test_a_loop_that_does_not_start_over_is_not_warned_about(
    make: Make, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    caplog.set_level(logging.INFO)
    with make(3 if way == "steps" else None, shuffle=way != "in order") as loader:
        for epoch in range(2):
            if way == "set_epoch":
                loader.set_epoch(epoch)
            for _ in loader if way != "unused" else [iter(loader)]:
                state = loader.state_dict()
                if way != "whole":
                    break
            if way == "state":
                loader.load_state_dict(state)
    assert warned(caplog) == []


# Ranks


RANK = """
import json, sys
import torch.distributed as dist
import bertstream
from bertstream.testing import FakeEncoder

options = json.loads(sys.argv[1])
rank = options["rank"]
dist.init_process_group("gloo", init_method=f"file://{options['store']}", rank=rank, world_size=2)
reading = bertstream.StreamConfig(lanes=4, bucket_size=16, open_shards=1, uneven=options["uneven"], rank_timeout_s=20)
loader = bertstream.stream(
    options["shards"], FakeEncoder(), batch_size=4, shuffle=True, steps_per_epoch=7, reading=reading,
    num_workers=options["num_workers"], prefetch=options["prefetch"],
)
if options["state"]:
    loader.load_state_dict(options["state"])
counts, seen, states = [], [], []
for epoch in range(options["epochs"]):
    loader.set_epoch(loader.epoch)
    counts.append(0)
    for batch in loader:
        counts[-1] += 1
        seen.append([] if batch.get("__repeated__") else batch["id"].tolist())
        states.append(loader.state_dict())
print(json.dumps({"counts": counts, "seen": seen, "states": states, "passes": loader.passes}))
loader.close()
dist.destroy_process_group()
"""


def on_two_ranks(tmp_path: Path, shards: list[str], **options: Any) -> list[Any]:
    given = {"store": str(tmp_path / f"store-{time.monotonic_ns()}"), "shards": shards, "state": None}
    ranks = [RANKS.start(RANK, json.dumps(given | options | {"rank": rank})) for rank in range(2)]
    return [json.loads(rank.finish()[0]) for rank in ranks]


@pytest.mark.parametrize(("uneven", "num_workers", "prefetch"), [("pad", 0, 2), ("stop", 2, 0)])
def test_all_ranks_make_all_steps_and_resume_exactly(
    shards: list[str], tmp_path: Path, uneven: str, num_workers: int, prefetch: int
) -> None:
    options = {"uneven": uneven, "num_workers": num_workers, "prefetch": prefetch}
    whole = on_two_ranks(tmp_path, shards, epochs=4, **options)
    for rank in whole:
        assert rank["counts"] == [7] * 4 and rank["passes"] >= 2
    for done in (9, 14):
        rest = on_two_ranks(tmp_path, shards, epochs=2, state=whole[0]["states"][done - 1], **options)
        for rank, resumed in zip(whole, rest, strict=True):
            assert resumed["counts"] == [-done % 7, 7]
            assert resumed["seen"] == rank["seen"][done:][: len(resumed["seen"])]
        states = [[[state["queues"], state["steps"]] for state in rank["states"]] for rank in (*whole, *rest)]
        assert states[2] == states[3] == states[0][done:][: len(states[2])]
