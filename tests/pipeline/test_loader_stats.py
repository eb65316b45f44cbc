"""A loader's numbers are those of what it did, and its last iteration is judged alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import bertstream
from bertstream import ConfigError, Encoder
from bertstream.pipeline.stats import LOOP, WORK
from bertstream.testing import FakeEncoder, write_shards

BATCHES = [{"text": ["a b", "c"]} for _ in range(20)]


def cells(table: str) -> dict[str, list[str]]:
    """The first word of each line of a table -> the other words."""
    return {words[0]: words[1:] for words in map(str.split, table.splitlines())}


def test_a_loaders_table_shows_every_number_that_is_not_zero(minilm: bertstream.Encoder) -> None:
    cache = bertstream.EmbeddingCache("1MiB")
    loader = bertstream.wrap(BATCHES, minilm, text="text", cache=cache)
    fresh = cells(str(loader.stats()))
    assert fresh["cache_misses"] == ["0"] and "cache_memory_texts" not in fresh
    assert "and" not in cells(str(bertstream.wrap(BATCHES, minilm, text="text").stats()))
    list(loader)
    stats = loader.stats()
    table = cells(str(stats))
    for name, value in stats.items():
        stage = name.removesuffix("_s")
        shown = table.get(stage if stage in (*LOOP, *WORK) else name)
        assert (shown is not None) or not value, f"{name} is {value} and not in the table"
    assert table["batches"] == ["20"] and table["cache_memory_hits"] == [str(stats["cache_memory_hits"])]
    assert table["encode"][0] == f"{stats['encode_s']:.3f}"


def test_tensorboard_takes_every_number_unchanged(tmp_path: Path, minilm: bertstream.Encoder) -> None:
    with bertstream.EmbeddingCache("1MiB", disk=tmp_path / "cache", disk_limit="10MiB") as cache:
        loader = bertstream.wrap(BATCHES, minilm, text="text", cache=cache)
        with SummaryWriter(tmp_path / "runs") as writer:
            for _ in loader:
                stats = loader.stats()
                for name, value in stats.items():
                    writer.add_scalar(f"bertstream/{name}", value, stats["batches"])
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert set(events.Tags()["scalars"]) == {f"bertstream/{name}" for name in stats}
    for name, value in stats.items():
        written = events.Scalars(f"bertstream/{name}")
        assert [event.step for event in written] == list(range(1, len(BATCHES) + 1))
        assert written[-1].value == pytest.approx(value)


def test_a_loader_names_what_it_waits_for() -> None:
    class Slow(FakeEncoder):
        def encode(self, batch: Any) -> Any:
            time.sleep(0.005)
            return super().encode(batch)

    def slowly() -> Any:
        for batch in BATCHES:
            time.sleep(0.005)
            yield batch

    loader = bertstream.wrap(BATCHES, Slow(), text="text", prefetch=0)
    assert loader.bottleneck() == "No batch was received yet."
    list(loader)
    assert loader.bottleneck().startswith("Encoding is the bottleneck")
    reading = bertstream.wrap(slowly(), FakeEncoder(), text="text", prefetch=0)
    list(reading)
    assert reading.bottleneck().startswith("Reading is the bottleneck")
    training = bertstream.wrap(BATCHES[:3], FakeEncoder(), text="text", prefetch=0)
    for _ in training:
        time.sleep(0.1)
    assert training.bottleneck().startswith("The training step")


def test_a_loader_judges_its_last_iteration_alone() -> None:
    loader = bertstream.wrap(BATCHES[:3], FakeEncoder(), text="text", prefetch=0)
    for _ in loader:
        time.sleep(0.5)
    assert loader.bottleneck().startswith("The training step")
    list(loader)
    judged = loader._stats._since.stats(loader.stats())
    assert judged["batches"] == 3 and judged["step_s"] < 1.5 <= loader.stats()["step_s"]
    iter(loader)
    assert loader.bottleneck() == "No batch was received yet."


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streams_loader_counts_its_workers_and_lanes(tmp_path: Path, workers: int) -> None:
    shards = write_shards(tmp_path, ["a b", "c"] * 4)
    reading = bertstream.StreamConfig(lanes=3)
    with bertstream.stream(shards, FakeEncoder(), num_workers=workers, reading=reading) as loader:
        assert (loader.stats()["workers"], loader.stats()["lanes"]) == (workers, 3)
    with bertstream.wrap(BATCHES, FakeEncoder(), text="text") as loader:
        assert "lanes" not in loader.stats()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streams_loader_shows_the_share_of_words_that_its_workers_knew(
    tmp_path: Path, minilm: bertstream.Encoder, workers: int
) -> None:
    shards = write_shards(tmp_path, ["the bank"] * 1200)
    reading = bertstream.StreamConfig(lanes=2, bucket_size=600)
    with bertstream.stream(shards, minilm, num_workers=workers, reading=reading) as loader:
        assert loader.stats()["known_words_share"] == 0
        for _ in loader:
            pass
        assert 0.5 < loader.stats()["known_words_share"] < 1 or workers == 0  # in this process others learnt them
        assert loader.stats()["known_words_share"] <= 1


def test_a_wrapped_loader_shows_the_share_of_known_words_since_it_was_made(minilm: bertstream.Encoder) -> None:
    minilm(["the bank"])
    with bertstream.wrap([["the bank"], ["the bank"]], minilm) as loader:
        assert loader.stats()["known_words_share"] == 0
        for _ in loader:
            pass
        assert loader.stats()["known_words_share"] == 1


def test_stats_count_what_the_loop_received(minilm_folder: str) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, dtype="float32", overflow="truncate", max_length=8)
    loader = bertstream.wrap([["short", "many " * 20], ["three short words"]], encoder)
    list(loader)
    stats = loader.stats()
    assert (stats["epochs"], stats["batches"], stats["texts"], stats["tokens"]) == (1, 2, 3, 3 + 8 + 5)
    assert (stats["cut_texts"], stats["cut_tokens"]) == (1, 14)
    assert stats["encode_s"] > 0 and stats["wait_s"] > 0


def test_the_plot_of_a_step_shows_milliseconds_per_batch(tmp_path: Path) -> None:
    loader = bertstream.wrap(BATCHES, FakeEncoder(), text="text")
    loader.save_plot(tmp_path / "nothing.svg")
    for _ in loader:
        pass
    loader.save_plot(tmp_path / "step.svg")
    stats = loader.stats()
    shown = (tmp_path / "step.svg").read_text("utf-8")
    for stage in ("step", "wait", "read", "tokenize", "lookup", "encode", "hand_over"):
        assert f"<!-- {stage.replace('_', ' ')} -->" in shown
        assert f"<!-- {1e3 * stats[f'{stage}_s'] / 20:,.2f} ms, " in shown
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        loader.save_plot(tmp_path / "step.foo")
