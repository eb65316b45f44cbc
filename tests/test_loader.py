"""`wrap` and `stream` put vectors into the user's batches, and clean up whatever goes wrong."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import textwrap
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from conftest import GRACE_S, running
from fork_server import IN_FULL, RANKS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    default_collate,
)

import bertstream
from bertstream import (
    ConfigError,
    EmbeddingLoader,
    Embeddings,
    Encoder,
    EncoderError,
    LoaderClosedError,
    ShardError,
    StreamConfig,
    TextStream,
    TokenBatch,
    TokenCollate,
    testing,
)
from bertstream.pipeline import progress, step_clock
from bertstream.tokens import Text, TokenizedText

Pair = namedtuple("Pair", ["sentence", "label"])


@dataclass(frozen=True)
class Example:
    sentence: Any
    label: Any


class StrictTokenizer(testing.FakeTokenizer):
    """Names a text of a wrong type, as the real tokenizer does."""

    def __call__(self, texts: Sequence[Text]) -> list[TokenizedText]:
        for i, text in enumerate(texts):
            if not isinstance(text, (str, list)):
                raise EncoderError(f"text {i} is {text!r}", records=(i,))
        return super().__call__(texts)


class FakeEncoder(testing.FakeEncoder):
    """Calls `fail` with each batch before encoding it, and records the names of its threads."""

    def __init__(self, fail: Callable[[TokenBatch], None] = lambda batch: None) -> None:
        super().__init__(hidden_size=3, max_forward_tokens=64)
        self.tokenizer = StrictTokenizer()
        self.fail = fail
        self.threads: set[str] = set()

    def encode(self, batch: TokenBatch) -> Embeddings:
        self.threads.add(threading.current_thread().name)
        self.fail(batch)
        return super().encode(batch)


def word_id(word: str) -> int:
    (token,) = testing.FakeTokenizer()([word])[0].input_ids.tolist()
    return token


def _words(text: Text) -> list[str]:
    return text.split() if isinstance(text, str) else list(text)


def right_rows(texts: list[Text]) -> list[list[list[float]]]:
    return [[[word_id(w), i, len(_words(t))] for i, w in enumerate(_words(t))] for t in texts]


def rows(embeddings: Embeddings) -> list[list[list[float]]]:
    return [text.tolist() for text in embeddings]


def batches(count: int, size: int = 4) -> list[dict[str, Any]]:
    return [{"text": [f"batch {b} " + "word " * (i + b % 5) for i in range(size)], "n": b} for b in range(count)]


class Records(Dataset[Any]):
    """Dicts with a text and its index."""

    def __init__(self, count: int, make: Callable[[int], Any] = lambda i: {"text": f"text {i}", "n": i}) -> None:
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        return self.make(i)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda s, n: {"sentence": s, "label": n}, "sentence"),
        (lambda s, n: (s, n), 0),
        (lambda s, n: (n, s), -1),
        (lambda s, n: [s, n], 0),
        (Pair, "sentence"),
        (Pair, 0),
        (Example, "sentence"),
    ],
)
def test_every_batch_structure_keeps_its_type_and_its_other_fields(make: Any, text: Any) -> None:
    sentences, label = ["one two", "three"], torch.tensor([3, 4])
    batch = make(sentences, label)
    (out,) = bertstream.wrap([batch], FakeEncoder(), text=text)
    assert type(out) is type(batch)
    values = (
        list(out.values()) if isinstance(out, dict) else list(vars(out).values()) if isinstance(out, Example) else out
    )
    found = next(value for value in values if isinstance(value, Embeddings))
    assert rows(found) == right_rows(sentences)
    assert any(value is label for value in values)
    before = batch[text] if isinstance(batch, (dict, list, tuple)) and not isinstance(text, str) else None
    assert before is None or before is sentences, "the user's own batch was changed"


def test_a_bare_list_of_texts_becomes_bare_embeddings() -> None:
    (out,) = bertstream.wrap(DataLoader(["a bb", "ccc"], batch_size=2), FakeEncoder())
    assert rows(out) == right_rows(["a bb", "ccc"])


def test_several_texts_of_a_batch_are_encoded_and_into_keeps_the_originals() -> None:
    batch = {"question": ["a b", "c"], "answer": ["dd", "ee ff"], "id": 7}
    (out,) = bertstream.wrap([batch], FakeEncoder(), text=("question", "answer"))
    assert rows(out["question"]) == right_rows(batch["question"])
    assert rows(out["answer"]) == right_rows(batch["answer"])
    (kept,) = bertstream.wrap([batch], FakeEncoder(), text=("question", "answer"), into=("q", "a"), layout="padded")
    assert kept["question"] == ["a b", "c"] and kept["q"].shape == (2, 2, 3)
    assert kept["a_mask"].tolist() == [[True, False], [True, True]]
    assert set(batch) == {"question", "answer", "id"}


def test_layouts_yield_plain_tensors() -> None:
    batch = {"text": ["a b", "c"]}
    wrap = bertstream.wrap
    (padded,) = wrap([batch], FakeEncoder(), text="text", layout="padded")
    assert padded["text"].shape == (2, 2, 3) and padded["text_mask"].tolist() == [[True, True], [True, False]]
    (nested,) = wrap([batch], FakeEncoder(), text="text", layout="nested")
    assert [part.shape for part in nested["text"].unbind()] == [(2, 3), (1, 3)]
    (packed,) = wrap([batch], FakeEncoder(), text="text", layout="packed_sequence")
    assert packed["text"].batch_sizes.tolist() == [2, 1]
    (flat,) = wrap([batch], FakeEncoder(), text="text", layout="flat")
    assert flat["text"][0].shape == (3, 3) and flat["text"][1].tolist() == [0, 2, 3]
    (pair,) = wrap([(batch["text"], 5)], FakeEncoder(), text=0, layout="padded")
    assert pair[0][0].shape == (2, 2, 3) and pair[0][1].shape == (2, 2) and pair[1] == 5


def test_wrapping_keeps_the_order_and_boundaries_of_a_shuffled_dataloader() -> None:
    def loader() -> DataLoader[Any]:
        torch.manual_seed(5)
        return DataLoader(Records(50), batch_size=7, shuffle=True, drop_last=True)

    right = [(batch["text"], batch["n"].tolist()) for batch in loader()]
    for prefetch in (0, 1, 4):
        wrapped = bertstream.wrap(loader(), FakeEncoder(), text="text", into="vectors", prefetch=prefetch)
        assert len(wrapped) == 7
        assert [(batch["text"], batch["n"].tolist()) for batch in wrapped] == right


def test_a_sampler_draws_its_seed_at_the_same_moment_as_without_wrapping() -> None:
    def program(wrapped: bool) -> list[Any]:
        torch.manual_seed(1)
        loader: Any = DataLoader(Records(20), batch_size=5, shuffle=True)
        loader = bertstream.wrap(loader, FakeEncoder(), text="text", into="v") if wrapped else loader
        out = []
        for _ in range(3):
            for batch in loader:
                out += [batch["n"].tolist(), torch.rand(1).item()]
        return out

    assert program(True) == program(False)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tokenizing_in_the_users_workers_gives_the_same(minilm: Encoder, num_workers: int) -> None:
    data = Records(10, lambda i: {"words": ["word"] * (i % 4 + 1), "tags": list(range(i % 4 + 1)), "n": i})
    collate = TokenCollate(minilm, text="words")
    loader = bertstream.wrap(DataLoader(data, 4, num_workers=num_workers, collate_fn=collate), minilm, text="words")
    seen = []
    for batch in loader:
        texts = [data[i]["words"] for i in batch["n"].tolist()]
        torch.testing.assert_close(batch["words"].values, minilm(texts).values)
        aligned = batch["words"].align(batch["tags"])
        assert aligned.shape == batch["words"].padded()[1].shape
        assert [row[row >= 0].tolist() for row in aligned] == [data[i]["tags"] for i in batch["n"].tolist()]
        seen += batch["n"].tolist()
    assert seen == list(range(10))


def test_wrap_takes_webdatasets_own_pipelines(tmp_path: Path, minilm: Encoder) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for i in range(9):
            tar.write({"__key__": f"{i:03d}", "txt": f"the text of number {i}", "cls": i})
    pipeline = (
        webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode().to_tuple("txt", "cls").batched(4)
    )
    with bertstream.wrap(webdataset.WebLoader(pipeline, batch_size=None, num_workers=1), minilm, text=0) as loader:
        out = list(loader)
    assert [label for _, labels in out for label in np.asarray(labels).tolist()] == list(range(9))
    right = minilm([f"the text of number {i}" for i in range(9)])
    torch.testing.assert_close(torch.cat([e.values for e, _ in out]), right.values, atol=1e-5, rtol=1e-4)


def test_stream_yields_every_record_with_its_own_vectors(tmp_path: Path, minilm: Encoder) -> None:
    texts = [f"text {i} " + "spring " * (i % 13) for i in range(60)] + [""]
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for i, text in enumerate(texts):
            tar.write({"__key__": f"{i:03d}", "txt": text, "cls": i})
    for num_workers, options in ((0, {"batch_size": 8}), (2, {"max_tokens": 64})):
        loader = bertstream.stream(
            tmp_path / "a.tar", minilm, text="txt", into="vectors", shuffle=True, num_workers=num_workers,
            reading=StreamConfig(lanes=3, bucket_size=10), **options,
        )  # fmt: skip
        seen = []
        for batch in loader:
            assert batch["txt"] == [texts[i] for i in batch["cls"].tolist()]
            assert torch.equal(batch["__index__"], batch["cls"]) and set(batch["__shard__"]) == {
                str(tmp_path / "a.tar")
            }
            torch.testing.assert_close(batch["vectors"].values, minilm(batch["txt"]).values, atol=1e-5, rtol=1e-4)
            seen += batch["cls"].tolist()
        assert sorted(seen) == list(range(61)) and loader.epoch == 1


def test_prefetch_and_workers_never_change_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "word " * (i % 17), "id": i}) + "\n" for i in range(300)))

    def order(**options: Any) -> list[list[int]]:
        reading = StreamConfig(lanes=5, bucket_size=16)
        loader = bertstream.stream(path, FakeEncoder(), batch_size=4, shuffle=True, reading=reading, **options)
        return [batch["id"].tolist() for _ in range(2) for batch in loader]

    right = order(prefetch=0)
    assert sorted(i for batch in right for i in batch) == sorted(list(range(300)) * 2)
    assert right[: len(right) // 2] != right[len(right) // 2 :], "the second epoch has another order"
    for options in ({"prefetch": 1}, {"prefetch": 9}, {"num_workers": 1}, {"num_workers": 3, "prefetch": 0}):
        assert order(**options) == right


def test_a_text_stream_in_the_users_own_dataloader_can_be_wrapped(tmp_path: Path, minilm: Encoder) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}", "id": i}) + "\n" for i in range(20)))
    loader = DataLoader(TextStream(path, minilm, batch_size=8, shuffle=True), batch_size=None, num_workers=1)
    wrapped = bertstream.wrap(loader, minilm, text="text")
    orders = [[i for batch in wrapped for i in batch["id"].tolist()] for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20)) and orders[0] != orders[1]


def test_the_vectors_train_a_downstream_layer(minilm: Encoder) -> None:
    loader = bertstream.wrap([(["the river bank", "a bank loan"], torch.tensor([0, 1]))] * 30, minilm, text=0)
    head = nn.Linear(minilm.embedding_dim, 2)
    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    losses = []
    for x, y in loader:
        values, mask = x.padded()
        loss = nn.functional.cross_entropy(head((values * mask[..., None]).sum(1)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 < losses[0]


# --- epochs, ranks and prefetch ---------------------------------------------------------------------------------------


def test_set_epoch_reaches_every_part_of_the_wrapped_loader() -> None:
    sampler = DistributedSampler(Records(8), num_replicas=2, rank=0)
    loader = bertstream.wrap(DataLoader(Records(8), 2, sampler=sampler), FakeEncoder(), text="text", into="v")
    loader.set_epoch(5)
    assert sampler.epoch == 5 == loader.epoch
    list(loader)
    assert loader.epoch == 6 and sampler.epoch == 5, "only set_epoch changes the user's own sampler"
    assert loader.sampler is sampler and isinstance(loader.batch_sampler, BatchSampler)

    class Batches(list[Any]):
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    own = Batches(batches(2))
    bertstream.wrap(own, FakeEncoder(), text="text").set_epoch(3)
    assert own.epoch == 3
    inside = DistributedSampler(Records(8), num_replicas=2, rank=0)
    nested = DataLoader(Records(8), batch_sampler=BatchSampler(inside, 2, False))
    bertstream.wrap(nested, FakeEncoder(), text="text").set_epoch(4)
    assert inside.epoch == 4


@pytest.mark.parametrize("chosen", [3, 7])
def test_set_epoch_within_a_loop_applies_to_the_next_epoch(tmp_path: Path, chosen: int) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 4)
    for loader in (
        bertstream.wrap(batches(3), FakeEncoder(), text="text"),
        bertstream.stream(tmp_path / "a.jsonl", FakeEncoder(), batch_size=2),
    ):
        loader.set_epoch(3)
        for _ in loader:
            loader.set_epoch(chosen)
        assert loader.epoch == {3: 4, 7: 7}[chosen]
        list(loader)
        assert loader.epoch == {3: 5, 7: 8}[chosen]


def test_several_ranks_never_read_the_same_data_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    plain = DataLoader(Records(8), batch_size=2, shuffle=True)
    with pytest.raises(ConfigError, match=r"2 ranks would each read all 8 records.*DistributedSampler\(dataset\)"):
        bertstream.wrap(plain, FakeEncoder(), text="text")
    with pytest.raises(ConfigError, match="DistributedSampler"):
        bertstream.wrap(DataLoader(["a", "b"], batch_size=None), FakeEncoder())
    assert len(list(bertstream.wrap(plain, FakeEncoder(), text="text", allow_replicated=True))) == 4

    class ByRank(BatchSampler):
        """The user's own batch sampler may know its rank."""

    sampled = DataLoader(Records(8), 2, sampler=DistributedSampler(Records(8), num_replicas=2, rank=1))
    own = DataLoader(Records(8), batch_sampler=ByRank(RandomSampler(Records(8)), 2, False))
    for loader in (sampled, own):
        assert bertstream.wrap(loader, FakeEncoder(), text="text") is not None


def test_an_iterator_that_can_be_read_only_once_is_refused_the_second_time() -> None:
    loader = bertstream.wrap(iter(batches(3)), FakeEncoder(), text="text")
    assert len(list(loader)) == 3
    with pytest.raises(ConfigError, match="read only once"):
        list(loader)


def test_the_worker_runs_ahead_by_a_bounded_number_of_tokens() -> None:
    read = 0

    class Counting:
        def __iter__(self) -> Iterator[Any]:
            nonlocal read
            for batch in [{"text": ["word " * 16] * 2}] * 50:
                read += 1
                yield batch

    encoder = FakeEncoder()
    loader = bertstream.wrap(Counting(), encoder, text="text", prefetch=2, deterministic=True)
    iteration = iter(loader)
    next(iteration)
    time.sleep(0.3)
    # 32 tokens a batch, groups of 1, 2, 4 batches, 128 tokens ahead: one received, four waiting, two being encoded.
    assert read == 7
    del iteration
    list(loader)
    # A whole group, 8 forwards of 64 tokens on a CPU, waits while the next is encoded.
    assert loader.stats()["peak_ahead_tokens"] <= 8 * 64
    assert encoder.threads == {"bertstream-encode"}


def test_prefetch_0_works_in_the_callers_thread() -> None:
    encoder = FakeEncoder()
    before = threading.active_count()
    for _ in bertstream.wrap(batches(3), encoder, text="text", prefetch=0):
        assert threading.active_count() == before
    assert encoder.threads == {threading.current_thread().name}


# --- several batches in a call, with and without a thread -------------------------------------------------------------


class Machine:
    """Four cores; their clocks advance only in `spend`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall_s = self.cpu_s = 50.0
        clocks = SimpleNamespace(
            perf_counter=lambda: self.wall_s, process_time=lambda: self.cpu_s, monotonic=time.monotonic
        )
        monkeypatch.setattr(step_clock, "time", clocks)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4), raising=False)

    def spend(self, seconds: float, busy_cores: float) -> None:
        self.wall_s += seconds
        self.cpu_s += seconds * busy_cores


@pytest.mark.parametrize(
    ("step_s", "busy_cores", "threads"),
    [
        (1.0, 4.0, {"MainThread"}),
        (0.001, 0.0, {"MainThread"}),
        (0.2, 0.0, {"MainThread", "bertstream-encode"}),
    ],
)
def test_on_a_cpu_a_thread_starts_once_the_loop_leaves_cores_idle(
    monkeypatch: pytest.MonkeyPatch, step_s: float, busy_cores: float, threads: set[str]
) -> None:
    machine, encoder = Machine(monkeypatch), FakeEncoder(lambda batch: machine.spend(0.1, 4.0))
    loader = bertstream.wrap(batches(40), encoder, text="text")
    out = []
    for batch in loader:
        out.append(batch["n"])
        machine.spend(step_s, busy_cores)
    assert out == list(range(40)) and encoder.threads == threads
    encoder.threads.clear()
    iteration = iter(loader)  # each epoch is measured again
    next(iteration)
    assert encoder.threads == {"MainThread"}


def test_a_thread_starts_for_a_loop_that_really_sleeps() -> None:
    encoder = FakeEncoder(lambda batch: time.sleep(0.05))
    for _ in bertstream.wrap(batches(40), encoder, text="text"):
        time.sleep(0.02)
    assert encoder.threads == {"MainThread", "bertstream-encode"}


def test_deterministic_groups_depend_only_on_the_data(minilm: Encoder, sentences: list[str]) -> None:
    data = [sentences[i : i + 3] for i in range(0, 60, 3)]

    def run(delays: Sequence[float], prefetch: int | None) -> tuple[list[Tensor], dict[str, float]]:
        def source() -> Iterator[list[str]]:
            for texts, delay in zip(data, delays, strict=True):
                time.sleep(delay)
                yield texts

        loader = bertstream.wrap(source(), minilm, prefetch=prefetch, deterministic=True)
        return [batch.values for batch in loader], loader.stats()

    right, stats = run([0.0] * 20, None)
    assert stats["encode_calls"] <= 8, "nothing was encoded together"
    for delays, prefetch in (([0.0, 0.05] * 10, None), ([0.03, 0.0, 0.0, 0.0] * 5, 2)):
        found, again = run(delays, prefetch)
        assert all(map(torch.equal, found, right)) and again["encode_calls"] == stats["encode_calls"]


def test_a_group_does_not_wait_for_a_slow_source() -> None:
    def source() -> Iterator[Any]:
        for batch in batches(10):
            time.sleep(0.02)
            yield batch

    loader = bertstream.wrap(source(), FakeEncoder(), text="text", prefetch=0)
    list(loader)
    assert loader.stats()["encode_calls"] == 10


def test_repeated_texts_are_encoded_once_and_counted() -> None:
    encoded: list[int] = []
    loader = bertstream.wrap(
        [["a bb", "ccc"], ["ccc", "a bb", "ccc"], ["dddd"]],
        FakeEncoder(lambda batch: encoded.append(batch.num_tokens)),
        prefetch=0,
        deterministic=True,
    )
    out = [rows(batch) for batch in loader]
    assert out == [right_rows(texts) for texts in (["a bb", "ccc"], ["ccc", "a bb", "ccc"], ["dddd"])]
    stats = loader.stats()
    # The first batch is a group of its own; the second has "ccc" twice; the third is in its group, or alone.
    assert stats["repeated_texts"] == 1 and stats["tokens"] == 8
    assert stats["encode_calls"] == len(encoded) and stats["encoded_tokens"] == sum(encoded) == 7


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_failing_text_fails_alone_and_is_named_by_batch_and_index(prefetch: int) -> None:
    """Whatever its group holds, the loop receives all batches before it."""

    def fail(batch: TokenBatch) -> None:
        bad = [i for i, ids in enumerate(np.split(batch.input_ids, batch.cu_seqlens[1:-1])) if word_id("odd") in ids]
        if bad:
            raise EncoderError(f"text {bad[0]} is odd", records=bad)

    data = [["a"], ["a", "bb"], ["ccc", "ccc", "a", "odd", "odd"], ["d"]]
    loader = bertstream.wrap(data, FakeEncoder(fail), prefetch=prefetch, deterministic=True)
    seen = []
    with pytest.raises(EncoderError, match="^batch 2: text 3 is odd") as caught:
        for batch in loader:
            seen.append(rows(batch))
    assert seen == [right_rows(texts) for texts in data[:2]] and caught.value.records == (3, 4)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("deterministic", [False, True])
def test_batches_that_ranks_agreed_on_are_encoded_before_more_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prefetch: int, deterministic: bool
) -> None:
    """A rank that reads on while it holds an agreed batch could deadlock with ranks that wait for its step."""
    encoded: list[int] = []
    agreed: list[int] = []

    class OtherRank:
        """A second rank that offers at most five of the same batches."""

        def __init__(self, timeout_s: float) -> None: ...

        def begin(self) -> None: ...

        def exchange(self, offer: Any, batch: int, is_over: Any, waits_since: Any) -> list[Any]:
            if isinstance(offer, dict):  # the settings, which must be equal
                return [offer, offer]
            assert sum(encoded) == sum(agreed) == batch, "asked before all agreed batches were encoded"
            agreed.append(min(5, len(offer)))
            return [offer, offer[:5]]

        def leave(self, reason: str) -> None: ...

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(progress, "can_talk", lambda: True)
    monkeypatch.setattr(progress, "Peers", OtherRank)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "word " * i}) + "\n" for i in range(60)))
    loader = bertstream.stream(
        path, FakeEncoder(lambda batch: encoded.append(len(batch))), batch_size=1, prefetch=prefetch,
        deterministic=deterministic, reading=StreamConfig(lanes=4, bucket_size=16),
    )  # fmt: skip
    batches = list(loader)
    assert len(batches) == sum(agreed) >= 25 and agreed[-1] == 0
    if prefetch == 0:
        assert set(agreed[:-1]) == {1}, "a batch was read ahead"
    elif deterministic:
        assert max(agreed) == 5 and len(agreed) < len(batches) / 2


# --- one iteration at a time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_new_iteration_ends_the_previous_one(prefetch: int) -> None:
    loader = bertstream.wrap(batches(50), FakeEncoder(), text="text", prefetch=prefetch)
    first = iter(loader)
    next(first)
    assert len(list(loader)) == 50
    with pytest.raises(LoaderClosedError, match="another iteration"):
        next(first)


def test_leaving_a_loop_does_not_wait_for_a_whole_group() -> None:
    def slow() -> Iterator[Any]:
        for batch in batches(200):
            time.sleep(0.02)
            yield batch

    loader = bertstream.wrap(slow(), FakeEncoder(), text="text", prefetch=2, deterministic=True)
    for number, _ in enumerate(loader):
        if number == 40:  # the next group has 64 batches
            break
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 0.5


def test_a_finished_iteration_stays_finished_when_the_next_begins() -> None:
    loader = bertstream.wrap(batches(2), FakeEncoder(), text="text")
    first = iter(loader)
    assert len(list(first)) == 2
    assert len(list(loader)) == 2
    assert next(first, None) is None


@pytest.mark.parametrize("prefetch", [0, 2])
def test_close_from_another_thread_raises_in_a_waiting_loop(prefetch: int) -> None:
    waiting, resume = threading.Event(), threading.Event()

    def wait(batch: TokenBatch) -> None:
        waiting.set()
        resume.wait(10)

    loader = bertstream.wrap(batches(5), FakeEncoder(wait), text="text", prefetch=prefetch)

    def close() -> None:
        waiting.wait(10)
        threading.Timer(0.1, resume.set).start()
        loader.close()

    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(LoaderClosedError, match="while this loop ran"):
        for _ in loader:
            time.sleep(0.3)
    closer.join()


@pytest.mark.parametrize("prefetch", [0, 8])
def test_a_loop_that_asks_during_close_in_another_thread_gets_the_reason(prefetch: int) -> None:
    closing, resume = threading.Event(), threading.Event()

    class Slow(list[Any]):
        def __iter__(self) -> Any:
            return SlowToClose(super().__iter__())

    class SlowToClose:
        def __init__(self, items: Iterator[Any]) -> None:
            self.items = items

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            return next(self.items)

        def close(self) -> None:
            closing.set()
            resume.wait(10)

    loader = bertstream.wrap(Slow(batches(50)), FakeEncoder(), text="text", prefetch=prefetch)
    running = iter(loader)
    next(running)
    closer = threading.Thread(target=loader.close)
    closer.start()
    assert closing.wait(10)
    with pytest.raises(LoaderClosedError, match="while this loop ran"):
        next(running)
    resume.set()
    closer.join()


def test_leaving_a_loop_waits_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage collection may end it within a forward that holds the lock the worker waits for."""
    monkeypatch.setattr("bertstream.pipeline.epoch._LEFT_WAIT_S", 0.1)
    waiting, resume = threading.Event(), threading.Event()

    def wait(batch: TokenBatch) -> None:
        if batch.num_tokens > 2:
            waiting.set()
            resume.wait(10)

    closed: list[int] = []

    def source() -> Iterator[Any]:
        try:
            yield from ({"text": ["a " * n]} for n in (2, 2, 40, 40))
        finally:
            closed.append(1)

    class Source:
        def __iter__(self) -> Iterator[Any]:
            return source()

    loader = bertstream.wrap(Source(), FakeEncoder(wait), text="text", prefetch=1, deterministic=True)
    running = iter(loader)
    next(running)
    assert waiting.wait(10)
    del running
    assert not resume.is_set()
    resume.set()
    until = time.monotonic() + 10
    while time.monotonic() < until and not closed:
        time.sleep(0.01)
    assert closed, "the worker ends by itself and closes its source"


def test_the_users_dataset_runs_in_the_grad_mode_of_the_loop() -> None:
    def modes() -> list[bool]:
        asked = DataLoader(Records(6, lambda i: {"text": "a", "grad": torch.is_grad_enabled()}), 2)
        found = bertstream.wrap(asked, FakeEncoder(), text="text", prefetch=8)
        return [grad for batch in found for grad in batch["grad"].tolist()]

    assert modes() == [True] * 6
    with torch.no_grad():
        assert modes() == [False] * 6


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_token_collate_within_the_users_own_collate_names_the_text(
    minilm: Encoder, num_workers: int
) -> None:
    tokens = TokenCollate(minilm)
    data = [{"q": "a", "candidates": ["b", "c"]}] * 3 + [{"q": "a", "candidates": [None, "c"]}]
    collate = partial(flat, tokens) if num_workers else partial(flat, minilm.tokenizer.batch)
    loader = bertstream.wrap(DataLoader(data, 2, collate_fn=collate, num_workers=num_workers), minilm, text=("q", "c"))
    with pytest.raises(EncoderError, match=r"text 2 is None \(NoneType\)"):
        list(loader)


def flat(tokens: Callable[[list[Any]], Any], rows: list[Any]) -> dict[str, Any]:
    return {"q": tokens([row["q"] for row in rows]), "c": tokens([c for row in rows for c in row["candidates"]])}


def test_a_closed_loader_refuses_iteration() -> None:
    with bertstream.wrap(batches(3), FakeEncoder(), text="text") as loader:
        iteration = iter(loader)
        next(iteration)
    assert "closed" in repr(loader)
    with pytest.raises(LoaderClosedError):
        iter(loader)
    with pytest.raises(LoaderClosedError):
        next(iteration)
    loader.close()


def test_truncation_is_reported_once_an_epoch(minilm_folder: str, caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, dtype="float32", overflow="truncate", max_length=8)
    loader = bertstream.wrap([["many " * 20], ["more " * 30]], encoder)
    list(loader)
    (record,) = [r for r in caplog.records if "truncation cut" in r.getMessage()]
    assert "2 of 2 texts" in record.getMessage() and "38 tokens" in record.getMessage()


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(0, 12), prefetch=st.sampled_from([0, 1, 5]), way=st.sampled_from(["break", "raise", "close"]))
def test_leaving_a_loop_anywhere_leaves_nothing_running_and_the_next_loop_works(
    stop: int, prefetch: int, way: str
) -> None:
    before = running()
    closed = []

    class Source:
        def __iter__(self) -> Iterator[Any]:
            try:
                yield from batches(12)
            finally:
                closed.append(True)

    loader = bertstream.wrap(Source(), FakeEncoder(), text="text", prefetch=prefetch)
    try:
        for number, _ in enumerate(loader):
            if number == stop and way == "break":
                break
            if number == stop and way == "raise":
                raise ZeroDivisionError
            if number == stop:
                loader.close()
    except (ZeroDivisionError, LoaderClosedError):
        pass
    assert running() == before and closed == [True]
    if way != "close" or stop >= 12:
        assert len(list(loader)) == 12


@pytest.mark.parametrize("through", ["wrap", "stream"])
def test_leaving_a_loop_ends_worker_processes_and_closes_files(tmp_path: Path, through: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(600)))
    fds = Path("/proc/self/fd")

    def loop() -> None:
        if through == "wrap":
            data = DataLoader(Records(500), 2, num_workers=2)
            loader = bertstream.wrap(data, FakeEncoder(), text="text", prefetch=2)
        else:
            loader = bertstream.stream(path, FakeEncoder(), batch_size=2, num_workers=2, prefetch=2)
        for _ in range(2):
            for _ in loader:
                break
        assert len(list(loader)) > 100

    loop()
    before = len(list(fds.iterdir())) if fds.exists() else 0
    shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    loop()
    deadline = time.monotonic() + GRACE_S
    while fds.exists() and len(list(fds.iterdir())) > before and time.monotonic() < deadline:
        gc.collect()  # a process that has just ended keeps a file until it is collected
        time.sleep(0.02)
    assert not fds.exists() or len(list(fds.iterdir())) <= before
    assert not shared or set(os.listdir("/dev/shm")) <= shared


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_kept_traceback_keeps_no_worker_process_alive(prefetch: int) -> None:
    def fail(batch: TokenBatch) -> None:
        raise EncoderError("no")

    data = DataLoader(Records(500), 2, num_workers=2)
    loader = bertstream.wrap(data, FakeEncoder(fail), text="text", prefetch=prefetch)
    before = running()
    with pytest.raises(EncoderError) as caught:
        list(loader)
    deadline = time.monotonic() + 1  # a queue's feeder thread ends just after its process
    while running() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running() <= before and caught.tb is not None


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 20), st.floats(0, 0.1), st.sampled_from([1, 2, 8]), st.booleans())
def test_close_takes_no_longer_than_the_forward_in_progress(
    taken: int, later_s: float, prefetch: int, through_stream: bool
) -> None:
    """Plus at most a second, whether the loop is waiting for a batch or working on one."""
    forward_s = 0.05

    def slow(batch: TokenBatch) -> None:
        time.sleep(forward_s)

    texts = [f"text {i}" for i in range(400)]
    if through_stream:
        loader = bertstream.stream(
            [{"text": text} for text in texts], FakeEncoder(slow), batch_size=4, prefetch=prefetch
        )
    else:
        chunks = [texts[i : i + 4] for i in range(0, 400, 4)]
        loader = bertstream.wrap(chunks, FakeEncoder(slow), prefetch=prefetch)
    iteration = iter(loader)
    for _ in range(taken):
        next(iteration)
    time.sleep(later_s)
    started = time.perf_counter()
    loader.close()
    assert time.perf_counter() - started <= forward_s + 1.0


def test_close_waits_for_the_forward_in_progress() -> None:
    finished = []

    def slow(batch: TokenBatch) -> None:
        time.sleep(0.3)
        finished.append(True)

    loader = bertstream.wrap(batches(9), FakeEncoder(slow), text="text", prefetch=2)
    iteration = iter(loader)
    next(iteration)
    loader.close()
    done = len(finished)
    time.sleep(0.4)
    assert len(finished) == done, "a forward still ran after close()"


SCRIPT = """
    import os, signal, sys, time, threading
    # A shell that runs the tests in the background may ignore SIGINT, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import bertstream
    from bertstream.testing import FakeEncoder
    from torch.utils.data import DataLoader, Dataset

    class Records(Dataset):
        def __len__(self):
            return 10**6

        def __getitem__(self, i):
            return {{"text": f"text {{i}}", "n": i}}

    loader = bertstream.wrap(DataLoader(Records(), 2, num_workers=2), FakeEncoder(), text="text", prefetch=2)
    {body}
"""


def program(body: str) -> str:
    return textwrap.dedent(SCRIPT).format(body=body)


def test_ctrl_c_ends_the_loop_and_the_next_iteration_works() -> None:
    body = """
try:
    for number, batch in enumerate(loader):
        if number == 3:
            print("ready", flush=True)
except KeyboardInterrupt:
    import multiprocessing
    end = time.monotonic() + 10
    while (multiprocessing.active_children() or threading.active_count() > 1) and time.monotonic() < end:
        time.sleep(0.05)
    print(len(multiprocessing.active_children()), threading.active_count(), flush=True)
    for batch in loader:
        print("again", flush=True)
        break
"""
    process = RANKS.start(program(body))
    deadline = time.monotonic() + 60
    while not (process.out.exists() and process.out.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    out, err, _ = process.finish()
    assert out == "ready\n0 1\nagain\n", err


@pytest.mark.slow
def test_a_program_may_exit_during_an_iteration() -> None:
    body = "iteration = iter(loader); next(iteration); print('done')"
    out, err, status = RANKS.start(IN_FULL + program(body)).finish()
    assert (out, status) == ("done\n", 0), err


# --- errors -----------------------------------------------------------------------------------------------------------


class TheirError(Exception):
    """The user's own exception class, which torch cannot rebuild from one argument."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code


@settings(max_examples=30)
@given(at=st.integers(0, 9), prefetch=st.sampled_from([0, 1, 4]), stage=st.sampled_from(["read", "text", "encode"]))
def test_an_error_at_any_stage_and_batch_is_raised_once_after_the_batches_before_it(
    at: int, prefetch: int, stage: str
) -> None:
    error = TheirError(7, "theirs")

    class Source:
        def __iter__(self) -> Iterator[Any]:
            for number, batch in enumerate(batches(10)):
                if number == at and stage == "read":
                    raise error
                odd = {"text": {"text": [3]}, "encode": {"text": ["odd"]}}
                yield odd[stage] if number == at and stage in odd else batch

    def fail(batch: TokenBatch) -> None:
        if word_id("odd") in batch.input_ids:  # whatever its group holds
            raise MemoryError("no memory left")

    loader = bertstream.wrap(Source(), FakeEncoder(fail), text="text", prefetch=prefetch)
    seen = 0
    with pytest.raises((TheirError, EncoderError)) as caught:
        for _ in loader:
            seen += 1
    assert seen == at
    if stage == "read":
        assert caught.value is error
    elif stage == "text":
        assert caught.value.records == (0,) and f"batch {at}" in str(caught.value)
    else:
        assert f"batch {at}" in str(caught.value) and "no memory left" in str(caught.value)
        assert isinstance(caught.value.__cause__.__cause__, MemoryError)


def test_a_users_exception_from_a_worker_process_is_as_torch_rebuilds_it() -> None:
    def fail(i: int) -> Any:
        if i == 5:
            raise KeyError("theirs")
        return {"text": "a", "n": i}

    loader = bertstream.wrap(DataLoader(Records(8, fail), 2, num_workers=1), FakeEncoder(), text="text")
    seen = []
    with pytest.raises(KeyError, match="theirs"):
        for batch in loader:
            seen += batch["n"].tolist()
    assert seen == [0, 1, 2, 3]
    assert not multiprocessing.active_children(), "the kept traceback keeps a worker alive"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bertstream_errors_from_worker_processes_keep_their_fields(
    tmp_path: Path, minilm: Encoder, num_workers: int
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"txt": "no such field"}\n')
    with pytest.raises(ShardError, match=r"a\.jsonl, record 1, field 'text'") as caught:
        list(bertstream.stream(path, minilm, num_workers=num_workers))
    assert (caught.value.path, caught.value.index, caught.value.field) == (str(path), 1, "text")
    data = Records(4, lambda i: {"text": "word " * (600 if i == 3 else 1)})
    loader = DataLoader(data, 2, num_workers=num_workers, collate_fn=TokenCollate(minilm, text="text"))
    with pytest.raises(EncoderError, match="field 'text': text 1 has 602 tokens") as failed:
        list(bertstream.wrap(loader, minilm, text="text"))
    assert failed.value.records == (1,)


def test_word_lists_that_default_collate_transposed_are_refused_with_the_way_out() -> None:
    data = Records(4, lambda i: {"words": ["a", "b", "c"]})
    with pytest.raises(ConfigError, match=r"TokenCollate\(encoder, text=\.\.\.\).*TokenCollate\(encoder\)\(texts\)"):
        list(bertstream.wrap(DataLoader(data, 2), FakeEncoder(), text="words"))


@pytest.mark.parametrize(
    ("batch", "text", "seen"),
    [
        ({"sentence": ["a"]}, "text", r"text='text' names nothing in a dict with the keys \['sentence'\]"),
        ({"sentence": ["a"]}, None, r"name its texts with text=, one of \['sentence'\]"),
        ((["a"], 1), 5, "text=5 names nothing in a tuple of length 2"),
        (default_collate([("a", 0), ("b", 1)]), None, "the batch is a list of length 2, one .* with text=0"),
        ({"text": "a single record"}, "text", "text='text' is a str"),
        ({"text": torch.zeros(2)}, "text", "text='text' is a tensor: padded ids need their attention_mask"),
        ({"text": None}, "text", "text='text' is a NoneType"),
    ],
)
def test_a_batch_without_the_text_is_refused_with_the_fields_it_has(batch: Any, text: Any, seen: str) -> None:
    with pytest.raises(ConfigError, match=seen):
        list(bertstream.wrap([batch], FakeEncoder(), text=text))


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"layout": "ragged"}, "layout='ragged'"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"text": ()}, r"text=\(\)"),
        ({"text": ("a", "b"), "into": "c"}, "into='c'"),
        ({"loader": 5}, "loader is an int"),
        ({"pair": "text"}, "pair='text' is also the field of the first text"),
        ({"text": ("a", "b"), "pair": "c"}, r"pair='c' for text=\('a', 'b'\): name the one field"),
        ({"text": None, "pair": "b"}, "pair='b' for text=None: name the one field"),
        ({"loader": FakeEncoder(), "encoder": batches(1)}, r"write wrap\(loader, encoder\)"),
        ({"cache": "1GiB"}, "cache='1GiB' is a str: pass a bertstream.EmbeddingCache"),
        ({"encoder": object()}, "encoder is an object without encode"),
        ({"deterministic": "no"}, "deterministic='no': write True or False"),
        ({"allow_replicated": "no"}, "allow_replicated='no': write True or False"),
    ],
)
def test_a_bad_argument_of_wrap_is_refused_with_the_value_seen(options: dict[str, Any], seen: str) -> None:
    arguments = {"loader": batches(1), "encoder": FakeEncoder(), "text": "text"} | options
    with pytest.raises(ConfigError, match=seen):
        bertstream.wrap(**arguments)


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"num_workers": -1}, "num_workers=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"shuffle": "yes"}, "shuffle='yes': write True or False"),
        ({"shuffle": 1000}, "shuffle=1000: write True or False"),
        ({"drop_last": "no"}, "drop_last='no': write True or False"),
        ({"reading": {"lanes": 2}}, r"reading=\{'lanes': 2\}: pass a bertstream.StreamConfig"),
    ],
)
def test_a_bad_argument_of_stream_is_refused_before_any_file_is_opened(options: dict[str, Any], seen: str) -> None:
    with pytest.raises(ConfigError, match=seen):
        bertstream.stream("does/not/exist.tar", FakeEncoder(), **options)


@pytest.mark.parametrize(
    ("batch", "seen"),
    [
        ({"a": ["x"]}, "pair='b' names nothing in a dict"),
        ({"a": ["x", "y"], "b": ["z"]}, "text='a' holds 2 texts, pair='b' 1"),
        ({"a": ["x"], "b": "z"}, "pair='b' is a str"),
        ({"a": [("the", "of")], "b": [("bank", "the")]}, "text='a' holds tuples"),
        ({"a": TokenBatch.from_texts(FakeEncoder().tokenizer(["x"])), "b": ["z"]}, "text='a' is tokenized already"),
    ],
)
def test_fields_that_form_no_pairs_are_refused(batch: Any, seen: str) -> None:
    with pytest.raises(ConfigError, match=seen):
        list(bertstream.wrap([batch], FakeEncoder(), text="a", pair="b"))


def test_into_needs_dicts_and_negative_epochs_are_refused() -> None:
    loader = bertstream.wrap([(["a"],)], FakeEncoder(), text=0, into="v")
    with pytest.raises(ConfigError, match="dicts"):
        list(loader)
    with pytest.raises(ConfigError, match="epoch=-1"):
        loader.set_epoch(-1)


def test_a_loader_has_a_length_if_the_wrapped_loader_has_one() -> None:
    assert len(bertstream.wrap(batches(3), FakeEncoder(), text="text")) == 3

    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([])

    with pytest.raises(TypeError):
        len(bertstream.wrap(DataLoader(Endless()), FakeEncoder(), text="text"))


def test_two_loaders_share_one_encoder(minilm: Encoder, sentences: list[str]) -> None:
    train = bertstream.wrap([sentences[i : i + 3] for i in range(0, 30, 3)], minilm)
    valid = bertstream.wrap([sentences[i : i + 2] for i in range(0, 20, 2)], minilm)
    for i, (a, b) in enumerate(zip(train, valid, strict=True)):
        torch.testing.assert_close(a.values, minilm(sentences[3 * i : 3 * i + 3]).values)
        torch.testing.assert_close(b.values, minilm(sentences[2 * i : 2 * i + 2]).values)
    assert isinstance(train, EmbeddingLoader) and isinstance(a.values, Tensor)


def test_a_wrapped_text_stream_has_its_own_order_epoch_and_name(tmp_path: Path) -> None:
    for number in range(4):
        lines = [json.dumps({"body": f"{'word ' * (i % 7)}{number} {i}"}) for i in range(50)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    options: dict[str, Any] = {"text": "body", "batch_size": 4, "shuffle": True, "reading": StreamConfig(lanes=3)}

    def order(loader: EmbeddingLoader) -> list[Any]:
        return [list(zip(batch["__shard__"], batch["__index__"].tolist(), strict=True)) for batch in loader]

    streamed = bertstream.stream(f"{tmp_path}/*.jsonl", FakeEncoder(), **options)
    epochs = [order(streamed), order(streamed)]
    assert epochs[0] != epochs[1] and streamed.epoch == 2
    for workers in (0, 2):
        dataset = TextStream(f"{tmp_path}/*.jsonl", FakeEncoder(), **options)
        bare = DataLoader(dataset, batch_size=None, num_workers=workers)
        loader = bertstream.wrap(bare, FakeEncoder(), into="vectors")
        dataset.set_epoch(1)
        assert loader.epoch == 1
        assert order(loader) == epochs[1]
        assert all(isinstance(batch, TokenBatch) for batch in bare)
    dataset = TextStream(f"{tmp_path}/*.jsonl", FakeEncoder(), **options)
    batch = next(iter(bertstream.wrap(DataLoader(dataset, batch_size=None), FakeEncoder())))
    assert isinstance(batch["body"], Embeddings)


def test_into_is_refused_for_bare_texts() -> None:
    with pytest.raises(ConfigError, match="bare texts"):
        bertstream.wrap([["a text"]], FakeEncoder(), into="vectors")


def test_a_loader_may_wrap_another(tmp_path: Path) -> None:
    source = [{"p": ["one", "two words"], "h": ["three", "four"]}]
    inner = bertstream.wrap(source, FakeEncoder(), text="p")
    (batch,) = bertstream.wrap(inner, FakeEncoder(), text="h")
    assert isinstance(batch["p"], Embeddings) and isinstance(batch["h"], Embeddings)


def test_a_models_name_is_refused_with_the_call_that_loads_it() -> None:
    with pytest.raises(ConfigError, match=r"from_pretrained\('bert-base-uncased'\)"):
        bertstream.wrap([["a"]], "bert-base-uncased")  # type: ignore[arg-type]


def test_a_pair_may_come_from_two_fields(tmp_path: Path, minilm: Encoder) -> None:
    pairs = [("a premise", "its hypothesis"), ("one", "two")]
    right = minilm(pairs)
    rows = [{"premise": first, "hypothesis": second, "label": i} for i, (first, second) in enumerate(pairs)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    streamed = bertstream.stream(path, minilm, text="premise", pair="hypothesis", reading=StreamConfig(bucket_size=2))
    collate = TokenCollate(minilm, text="premise", pair="hypothesis")
    wrapped = bertstream.wrap(DataLoader(rows, 2, collate_fn=collate), minilm, text="premise")
    for loader in (streamed, wrapped):
        (batch,) = loader
        assert torch.equal(batch["premise"].values, right.values) and batch["label"].tolist() == [0, 1]
    assert list(bertstream.stream(path, minilm, text="premise", pair="hypothesis", fields=["label"]))
    with pytest.raises(ShardError, match="'answer'"):
        list(bertstream.stream(path, minilm, text="premise", pair="answer"))
    for bad in ("premise", ""):
        with pytest.raises(ConfigError, match="pair names the field"):
            bertstream.stream(path, minilm, text="premise", pair=bad)
    (whole,) = bertstream.wrap(DataLoader(rows, 2), minilm, text="premise", pair="hypothesis")  # type: ignore[arg-type]
    assert whole["premise"].values.equal(right.values) and whole["hypothesis"] == ["its hypothesis", "two"]
    (whole,) = bertstream.wrap(DataLoader(pairs, 2), minilm, text=0, pair=1)  # type: ignore[arg-type]
    assert whole[0].values.equal(right.values)
    with pytest.raises(ConfigError, match="pair='hypothesis'"):
        TokenCollate(minilm, pair="hypothesis")
