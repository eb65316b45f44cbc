"""The store looks rows up in memory, then on disk, and counts what it finds."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bertstream import ConfigError
from bertstream.caching.store import DiskJudge, RowStore

ROW = 8


@contextmanager
def opened(folder: Path | None = None, memory: int = 1 << 20) -> Iterator[RowStore]:
    store = RowStore(
        memory_bytes=memory,
        device=torch.device("cpu"),
        folder=None if folder is None else str(folder),
        folder_bytes=16 << 20,
        read_only=False,
    )
    try:
        yield store
    finally:
        store.close()


def key(text: int) -> bytes:
    return b"prefix.." + text.to_bytes(16, "big")


def keys(*texts: int) -> list[bytes]:
    return [key(text) for text in texts]


def rows(*texts: int) -> Tensor:
    """As many rows per text as its number says, filled with it."""
    return torch.cat([torch.full((text, ROW), text, dtype=torch.uint8) for text in texts])


def add(store: RowStore, *texts: int) -> None:
    computed = store.compute(lambda: rows(*texts), hold_writes=False)
    store.add(keys(*texts), np.array(texts), computed, wait=True)


def test_lookup_finds_texts_in_memory_and_on_disk_and_names_the_missing_ones(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        add(store, 1, 2)
    with opened(tmp_path) as store:
        add(store, 3)
        found, missing = store.lookup(keys(1, 3, 4, 2), np.array([1, 3, 4, 2]), ROW, repeats=5)
        (in_memory, memory_rows), (on_disk, disk_rows) = found
        assert in_memory.tolist() == [1] and memory_rows.equal(rows(3))
        assert on_disk.tolist() == [0, 3] and disk_rows.equal(rows(1, 2))
        assert missing.tolist() == [2]
        stats = store.stats()
        assert (stats["memory_hits"], stats["disk_hits"], stats["misses"], stats["repeats"]) == (1, 2, 1, 5)
        # Rows that were read from disk are in memory now.
        assert store.gather(keys(2, 1, 3, 1), ROW) is not None
        assert store.stats()["memory_hits"] == 1 + 3 and store.stats()["repeats"] == 5 + 1


def test_gather_returns_nothing_and_counts_nothing_if_a_text_is_missing() -> None:
    with opened() as store:
        add(store, 1)
        assert store.gather(keys(1, 2), ROW) is None
        assert store.stats()["memory_hits"] == store.stats()["misses"] == 0


@pytest.mark.parametrize("disk", [False, True])
def test_missing_keys_and_drop_ask_the_disk_or_memory_without_one(tmp_path: Path, disk: bool) -> None:
    with opened(tmp_path if disk else None) as store:
        assert store.has_disk == disk
        add(store, 1, 2)
        assert store.missing(keys(2, 3, 1)) == [1]
        store.flush()
        assert sorted(store.keys_with_prefix(b"prefix..")) == keys(1, 2)
        assert list(store.keys_with_prefix(b"another.")) == []
        assert store.drop(b"prefix..") == 2 and store.missing(keys(1, 2)) == [0, 1]


def test_rows_of_another_size_are_refused() -> None:
    with opened() as store:
        store.reserve(ROW)
        for ask in (store.reserve, lambda size: store.gather([], size)):
            with pytest.raises(ConfigError, match=r"rows of 8 bytes.*have 9.*of its own"):
                ask(ROW + 1)


def test_texts_encoded_without_a_lookup_are_first_only_once() -> None:
    with opened() as store:
        assert [store.count_off(3) for _ in range(3)] == [True, False, False]
        assert store.stats()["off"] == 9


def test_a_closed_store_finds_and_keeps_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        add(store, 1)
        store.close()
        add(store, 2)
        found, missing = store.lookup(keys(1, 2), np.array([1, 2]), ROW)
        assert missing.tolist() == [0, 1] and sum(len(indices) for indices, _ in found) == 0
        assert not copy.deepcopy(store).has_disk


def test_threads_get_whole_rows_while_others_are_added_and_evicted() -> None:
    texts = range(1, 40)
    wrong: list[int] = []

    def run(store: RowStore, seed: int) -> None:
        draw = np.random.default_rng(seed)
        for _ in range(200):
            wanted = draw.choice(texts, 4, replace=False)
            found, missing = store.lookup(keys(*wanted.tolist()), wanted, ROW)
            wrong.extend(i for indices, got in found for i in indices if not got.equal(rows(*wanted[indices].tolist())))
            if len(missing):
                add(store, *wanted[missing].tolist())

    with opened(memory=8000) as store:
        threads = [threading.Thread(target=run, args=(store, seed)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == [] and store.stats()["memory_evictions"] > 0


def test_the_judge_skips_a_slow_disk_and_measures_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertstream.caching.store._JUDGED_ROWS", 10)
    monkeypatch.setattr("bertstream.caching.store._ASIDE_LOOKUPS", 2)
    judge = DiskJudge()
    judge.read(10, 2.0)
    assert judge.may_read()  # nothing was computed yet
    judge.computed(10, 1.0)
    assert [judge.may_read() for _ in range(4)] == [False, False, False, True]
    judge.read(10, 1.0)
    judge.computed(10, 2.0)
    assert judge.may_read() and (judge.read_s, judge.compute_s) == (3.0, 3.0)
