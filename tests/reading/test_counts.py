"""A stream knows how many batches it has, whatever the lanes, buckets and ranks, or says why it does not."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fork_server import RANKS
from hypothesis import given, settings
from hypothesis import strategies as st

import bertstream
from bertstream import ConfigError, EmbeddingLoader, EncoderError, ShardError, StateError, StreamConfig, TextStream
from bertstream.reading import counts
from bertstream.testing import FakeEncoder, FakeTokenizer, assert_resumes_exactly, write_shards
from bertstream.tokens import Text, TokenizedText

TEXTS = [f"{'word ' * (i * 7 % 13)}{i}" for i in range(230)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_shards(tmp_path_factory.mktemp("shards"), TEXTS, shards=5)


def made(shards: Any, *, batch_size: int | None = 8, **options: Any) -> EmbeddingLoader:
    reading = StreamConfig(**{"lanes": 3, "bucket_size": 20, **options.pop("reading", {})})
    return bertstream.stream(shards, FakeEncoder(), batch_size=batch_size, reading=reading, **options)


SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=5)


@given(sizes=SIZES, data=st.data())
@settings(max_examples=40)
def test_the_length_is_the_number_of_batches(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    """On each of some ranks that do not wait for each other, in two epochs, and in the rest of one."""
    folder = tmp_path_factory.mktemp("sizes")
    shards = [write_shards(folder / str(number), ["a b"] * size)[0] for number, size in enumerate(sizes)]
    draw = data.draw
    world_size = draw(st.integers(1, 3), "ranks")
    reading = {
        "lanes": draw(st.integers(world_size, 5), "lanes"),
        "bucket_size": draw(st.integers(1, 40), "bucket_size"),
        "open_shards": draw(st.none() | st.integers(1, 3), "open_shards"),
        "uneven": "leave",
    }
    options = {
        "batch_size": draw(st.integers(1, 20), "batch_size"),
        "drop_last": draw(st.booleans(), "drop_last"),
        "shuffle": draw(st.booleans(), "shuffle"),
    }
    for rank in range(world_size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(world_size))
            with made(shards, reading=reading, **options) as loader:
                stream = loader.dataset
                for _ in range(2):
                    promised, received = len(loader), 0
                    if not promised and world_size == 1:  # an epoch without a batch is an error
                        with pytest.raises(ShardError, match="drop_last dropped each of the"):
                            list(loader)
                        break
                    for received, batch in enumerate(loader, 1):
                        sizes_seen = len(batch["text"])
                        assert sizes_seen == options["batch_size"] or not options["drop_last"]
                        state = loader.state_dict()
                        if received == 1 + promised // 2:
                            assert stream.count_batches() == promised
                            middle = state
                    assert received == promised
                if received:
                    loader.load_state_dict(middle)
                    assert stream.count_batches_left() == promised - 1 - promised // 2


def test_buckets_end_in_short_batches_which_the_length_counts(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, ["a"] * 1000)
    with made(shards, batch_size=32, reading={"bucket_size": 100, "lanes": 1}) as loader:
        assert len(loader) == 40 == sum(1 for _ in loader)
    with made(shards, batch_size=32, drop_last=True, reading={"bucket_size": 100, "lanes": 1}) as loader:
        assert len(loader) == 31 == sum(1 for _ in loader)
        assert loader.stats()["dropped_records"] == 8


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt", "tar", "parquet", "dataset", "list"])
def test_records_of_every_kind_that_can_be_counted_are(tmp_path: Path, kind: str) -> None:
    count = 57
    rows = [{"text": f"text {i}", "id": i} for i in range(count)]
    source: Any = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        source.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    elif kind == "csv":
        source.write_text("text,id\n" + "".join(f'"a\nb {i}",{i}\n' for i in range(count)))
    elif kind == "txt":
        source.write_text("".join(f"text {i}\n" for i in range(count)))
    elif kind == "tar":
        with tarfile.open(source, "w") as tar:
            for i in range(count):
                member = tarfile.TarInfo(f"{i:03}.text")
                member.size = 4
                tar.addfile(member, io.BytesIO(b"word"))
    elif kind == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), source, row_group_size=9)
    else:
        source = rows
        if kind == "dataset":
            source = pytest.importorskip("datasets").Dataset.from_list(rows)
    for shuffle in (False, True):
        with made(source, shuffle=shuffle) as loader:
            assert len(loader) == sum(1 for _ in loader)
            assert loader.stats()["texts"] == count


def test_ranks_that_share_records_count_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one file that cannot be cut: a csv with a quote that RFC 4180 forbids."""
    path = tmp_path / "a.csv"
    path.write_text("text\n" + 'a "b" c\n' * 31)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        with made(path, batch_size=2, reading={"lanes": None}) as loader:
            assert len(loader) == sum(1 for _ in loader) and loader.stats()["texts"] in (10, 11)


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 9))
    return path


def test_a_length_that_is_not_known_is_a_type_error_with_the_reason(shards: list[str], compressed: Path) -> None:
    for options, reason in [
        ({"batch_size": None, "max_tokens": 64}, "max_tokens= cuts batches by the lengths of texts"),
        ({"keep": len}, "keep= and map= may drop any number of records"),
        ({"map": dict}, "keep= and map= may drop any number of records"),
        ({"reading": {"max_bad_records": 0.1}}, "max_bad_records= may skip any number of records"),
    ]:
        with made(shards, **options) as loader, pytest.raises(TypeError, match=reason):
            len(loader)
    with made(compressed) as loader:
        with pytest.raises(TypeError, match="a.jsonl.gz cannot be counted .* steps_per_epoch="):
            len(loader)
        assert len(list(loader)) == 2, "list() asks for a length too"


def test_a_streaming_dataset_has_no_length() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a"}] * 9).to_iterable_dataset()
    with made(rows) as loader, pytest.raises(TypeError, match="an IterableDataset has no length"):
        assert loader, "is true without being asked for its length"
        len(loader)


def test_large_shards_are_not_read_for_their_length(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_MOST_BYTES", 1000)
    with made(shards) as loader, pytest.raises(TypeError, match="0.0 GiB of shards would have to be read"):
        len(loader)


def test_a_shard_that_breaks_while_it_is_counted_raises_where_it_is_read(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, TEXTS[:20], shards=2)
    with made(paths, reading={"lanes": 1, "open_shards": 1}) as loader:
        Path(paths[1]).unlink()
        with pytest.raises(TypeError, match="000001.jsonl"):
            len(loader)
        with pytest.raises(ShardError, match="000001.jsonl"):
            list(loader)


def test_a_mixture_has_no_length(shards: list[str]) -> None:
    with made(bertstream.Mixture([(shards, 1)])) as loader, pytest.raises(TypeError, match="a Mixture leaves out"):
        len(loader)


def test_each_shard_is_counted_once(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    right = counts.count_records
    monkeypatch.setattr(counts, "count_records", lambda path, options: counted.append(path) or right(path, options))
    with made(shards, shuffle=True) as loader:
        for _ in range(3):
            assert len(loader) == len(list(loader))
    assert sorted(counted) == sorted(shards)


# An epoch whose batches were all received is over


def test_a_loop_that_takes_as_many_batches_as_the_length_says_has_the_epoch(shards: list[str]) -> None:
    with made(shards, shuffle=True) as loader, made(shards, shuffle=True) as plain:
        whole = [[batch["id"].tolist() for batch in plain] for _ in range(4)]
        for epoch in range(4):
            taken: Iterator[Any] = iter(loader)
            assert loader.epoch == epoch
            count = len(loader)
            if epoch == 2:  # the rest of an epoch too
                next(taken)
                loader.load_state_dict(loader.state_dict())
                taken, count = iter(loader), count - 1
            assert [next(taken)["id"].tolist() for _ in range(count)] == whole[epoch][-count:]
            if epoch == 1:
                del taken  # otherwise it ends when the next loop begins
                assert loader.epoch == 2
        assert loader.epoch == 3
        del taken
        assert loader.epoch == loader.stats()["epochs"] == 4


def test_a_loop_that_is_left_before_has_not(shards: list[str]) -> None:
    with made(shards) as loader:
        for _ in range(2):
            taken = iter(loader)
            assert next(taken)["id"].tolist() and len(loader) > 2
        del taken
        assert loader.epoch == 0


# drop_last


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_batch_is_whole_and_what_is_dropped_is_counted(
    shards: list[str], shuffle: bool, num_workers: int
) -> None:
    with made(shards, drop_last=True, shuffle=shuffle, num_workers=num_workers) as loader:
        for epoch in range(1, 3):
            seen = [i for batch in loader for i in batch["id"].tolist()]
            assert len(seen) % 8 == 0 and len(set(seen)) == len(seen)
            assert len(seen) > len(TEXTS) - 3 * 8, "fewer than a batch a lane are dropped"
            dropped = loader.stats()["dropped_records"]
            assert loader.stats()["texts"] + dropped == epoch * len(TEXTS)


def test_the_texts_that_are_dropped_are_the_last_ones_not_the_longest(tmp_path: Path) -> None:
    texts = ["long " * 50 if i % 3 else "short" for i in range(10)]
    with made(write_shards(tmp_path, texts), batch_size=4, drop_last=True, reading={"lanes": 1}) as loader:
        assert sorted(i for batch in loader for i in batch["id"].tolist()) == list(range(8))


class RefusingTokenizer(FakeTokenizer):
    """Refuses every tenth of `TEXTS`."""

    def __call__(self, texts: Sequence[Text]) -> list[TokenizedText]:
        for i, text in enumerate(texts):
            if str(text).endswith("0"):
                raise EncoderError(f"text {i} is refused", records=[i])
        return super().__call__(texts)


def test_texts_that_are_skipped_cost_no_others(shards: list[str]) -> None:
    """A bucket without the texts that a tokenizer refuses is filled up: it would end in fewer than a batch."""
    encoder = FakeEncoder()
    encoder.tokenizer = RefusingTokenizer()
    reading = StreamConfig(lanes=1, bucket_size=16, max_bad_records=23)

    def make() -> EmbeddingLoader:
        return bertstream.stream(shards, encoder, batch_size=8, drop_last=True, reading=reading)

    with make() as loader:
        seen = sorted(i for batch in loader for i in batch["id"].tolist())
        assert len(seen) == 207 // 8 * 8 and seen == [i for i in range(230) if i % 10][: len(seen)]
        assert (loader.stats()["bad_records"], loader.stats()["dropped_records"]) == (23, 7)
    assert_resumes_exactly(make, cuts=(0, 1, 5, 24, 25))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_whole_batches_resume_exactly(shards: list[str], num_workers: int) -> None:
    cuts = (0, 20, 27) if num_workers else (0, 1, 7, 19, 26, 27)
    assert_resumes_exactly(lambda: made(shards, drop_last=True, shuffle=True, num_workers=num_workers), cuts=cuts)


@pytest.mark.parametrize("cut", [0, 1, 20, 26, 27])
def test_what_is_dropped_is_counted_once_by_a_run_and_the_one_that_continues_it(shards: list[str], cut: int) -> None:
    with made(shards, drop_last=True) as loader:
        list(loader)
        dropped = loader.stats()["dropped_records"]
        assert dropped
    with made(shards, drop_last=True) as first, made(shards, drop_last=True) as second:
        taken = iter(first)
        for _ in range(cut):
            next(taken)
        second.load_state_dict(first.state_dict())
        list(second)
        assert first.stats()["dropped_records"] + second.stats()["dropped_records"] == dropped


def test_states_with_and_without_drop_last_do_not_fit(shards: list[str]) -> None:
    with made(shards, drop_last=True) as loader, made(shards) as other:
        assert "drop_last" not in other.state_dict()["settings"]
        with pytest.raises(StateError, match="saved with drop_last=True, this stream has drop_last=False") as caught:
            other.load_state_dict(loader.state_dict())
        assert caught.value.key == "drop_last"
        with pytest.raises(StateError, match="saved with drop_last=False, this stream has drop_last=True"):
            loader.load_state_dict(other.state_dict())


def test_whole_batches_of_max_tokens_are_refused(shards: list[str]) -> None:
    with pytest.raises(ConfigError, match="drop_last=True with max_tokens=64: .* write batch_size="):
        TextStream(shards, FakeEncoder(), max_tokens=64, drop_last=True)


def test_an_epoch_of_which_everything_was_dropped_is_an_error(tmp_path: Path) -> None:
    with made(write_shards(tmp_path, ["a"] * 7), drop_last=True) as loader:
        assert len(loader) == 0
        with pytest.raises(ShardError, match="^drop_last dropped each of the 7 records that were read in the epoch$"):
            list(loader)


# Ranks that end together


RANK = """
import json, sys
import torch.distributed as dist
import bertstream
from bertstream.testing import FakeEncoder

options = json.loads(sys.argv[1])
init = f"file://{options['store']}"
dist.init_process_group("gloo", init_method=init, rank=options["rank"], world_size=options["world_size"])
counts = []
for uneven in ("pad", "stop", "leave"):
    for drop_last in (False, True):
        reading = bertstream.StreamConfig(lanes=4, bucket_size=20, open_shards=1, uneven=uneven, rank_timeout_s=20)
        loader = bertstream.stream(
            options["shards"], FakeEncoder(), batch_size=8, drop_last=drop_last, shuffle=True, reading=reading
        )
        for epoch in range(2):
            counts.append([uneven, len(loader), sum(1 for _ in loader)])
print(json.dumps(counts))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_length_on_ranks_that_end_together_is_that_of_all(
    shards: list[str], tmp_path: Path, world_size: int
) -> None:
    given = {"store": str(tmp_path / f"store-{time.monotonic_ns()}"), "shards": shards, "world_size": world_size}
    ranks = [RANKS.start(RANK, json.dumps(given | {"rank": rank})) for rank in range(world_size)]
    found = [json.loads(rank.finish()[0]) for rank in ranks]
    for own in found:
        assert [promised for _, promised, _ in own] == [received for _, _, received in own]
        assert len(own) == 12
    assert [[count for count in counts if count[0] != "leave"] for counts in found[1:]] == [
        [count for count in found[0] if count[0] != "leave"]
    ] * (world_size - 1)
