"""CUDA: vectors are right, safe to read from any stream, and made without a wait; on a CPU the side stream is idle."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import host_must_not_wait
from families import Tokenizer, make
from torch import Tensor, nn

import bertstream
from bertstream import ConfigError, Encoder, StreamConfig
from bertstream.caching.memory import MemoryTier
from bertstream.encoding.attention import Packing, packed_attention
from bertstream.encoding.autotune import fastest_dtype
from bertstream.system.cuda import InTurn, SideStream, resolve_device, to_device
from bertstream.testing import FakeEncoder
from bertstream.tokens import Text, cumulate

cuda = pytest.mark.cuda


def test_on_a_cpu_the_same_calls_do_nothing() -> None:
    side = SideStream(torch.device("cpu"))
    with side.run():
        values = torch.ones(2)
    assert side.mark() is None
    side.hand_over(None, [values])
    side.follow()
    with InTurn().use(values.device, values):
        values += 1


def test_each_turn_waits_for_the_previous_one_and_keeps_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_event(self, event: object) -> None:
            done.append(f"{self.name} waits for {event}")

        def record_event(self) -> str:
            done.append(f"{self.name} ends")
            return self.name

    shared: Any = SimpleNamespace(record_stream=lambda stream: done.append(f"kept for {stream.name}"))
    turns = InTurn()
    for name in ("one", "two"):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, name=name: Stream(name))
        with turns.use(torch.device("cuda", 0), shared):
            done.append("work")
    first = ["work", "kept for one", "one ends"]
    assert done == [*first, "two waits for one", "work", "kept for two", "two ends"]


def test_without_cuda_auto_is_the_cpu_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device='cuda:1', but torch sees no CUDA device"):
        resolve_device("cuda:1")


@pytest.mark.parametrize(("current", "local", "found"), [(0, None, 0), (3, "1", 3), (0, "2", 2), (0, "9", 1)])
def test_auto_is_the_current_device_or_that_of_the_local_rank(
    monkeypatch: pytest.MonkeyPatch, current: int, local: str | None, found: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert resolve_device("auto") == torch.device("cuda", found)
    assert resolve_device("cuda") == torch.device("cuda", current)


def test_a_device_index_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    for device in ("cuda:2", torch.device("cuda", 2)):
        with pytest.raises(ConfigError, match="device='cuda:2', but torch sees 2 CUDA devices, counted from cuda:0"):
            resolve_device(device)


# --- on a device ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_cuda(minilm_folder: str, cuda: torch.device) -> Encoder:
    """MiniLM in the dtype that dtype="auto" chooses on CUDA."""
    return Encoder.from_pretrained(minilm_folder, device=cuda)


@cuda
def test_packed_bfloat16_vectors_equal_plain_transformers(
    on_cuda: Encoder, sentences: list[str], plain_minilm: Callable[[Text], Tensor]
) -> None:
    texts: list[Any] = ["", *sentences[:200], *sorted(sentences, key=len)[-20:], (sentences[0], sentences[1])]
    assert on_cuda.device.type == "cuda" and on_cuda.dtype == torch.bfloat16
    assert on_cuda.batching.way in ("fused", "packed")
    found = on_cuda(texts)
    assert found.values.is_cuda and found.values.dtype == torch.float32 and found.cu_seqlens.is_cuda
    for i, text in enumerate(texts):
        right = plain_minilm(text)
        assert float((found[i].cpu() - right).norm() / right.norm()) <= 0.025


@cuda
@pytest.mark.parametrize("cached", [False, True])
def test_vectors_come_from_the_weights_that_the_training_stream_has_queued(
    minilm_folder: str, sentences: list[str], cuda: torch.device, cached: bool
) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, device=cuda)
    cache = bertstream.EmbeddingCache("64MiB", device=encoder.device) if cached else None
    loader = bertstream.wrap([sentences[:50]] * 3, encoder, cache=cache)
    for _ in range(3):
        encoder.unfreeze()
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.mul_(0.9)
        encoder.freeze()
        found = [batch.values for batch in loader]
        torch.cuda.synchronize()
        right = encoder(sentences[:50]).values
        for values in found:
            torch.testing.assert_close(values, right, rtol=0.05, atol=0.05)


@cuda
def test_packed_float32_vectors_equal_plain_transformers(
    minilm_folder: str, sentences: list[str], plain_minilm: Callable[[Text], Tensor], cuda: torch.device
) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, dtype="float32", device=cuda)
    found = encoder(sentences[:60])
    for i, text in enumerate(sentences[:60]):
        right = plain_minilm(text)
        assert float((found[i].cpu() - right).norm() / right.norm()) <= 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "Albert", "ModernBert"])
def test_every_layer_of_a_family_equals_plain_transformers(
    family: str, device: str, minilm_folder: str, sentences: list[str]
) -> None:
    """In float32 text by text; in bfloat16 the error is about that of plain transformers in bfloat16, or smaller."""
    model = make(family, hidden_size=64, dim=64, intermediate_size=128, hidden_dim=128)  # heads of 16
    options: dict[str, Any] = {"layers": (0, 1, 2, 3), "combine": "stack", "overflow": "truncate", "device": device}
    options["tokenizer"] = Tokenizer(minilm_folder, model)
    encoder, half = (Encoder(copy.deepcopy(model), dtype=dtype, **options) for dtype in ("float32", "bfloat16"))
    batch = encoder.tokenizer.batch(["a", *sentences[:20], *sentences[-10:]])

    @torch.no_grad()
    def plain(dtype: torch.dtype) -> list[Tensor]:
        own: Any = copy.deepcopy(model).to(device, dtype)
        own.set_attn_implementation("eager")
        texts = torch.from_numpy(batch.input_ids.astype(np.int64)).to(device).split(batch.lengths.tolist())
        states = [own(ids[None], output_hidden_states=True).hidden_states for ids in texts]
        return [torch.cat(layers).transpose(0, 1).float() for layers in states]

    right = plain(torch.float32)
    for rows, expected in zip(encoder(batch), right, strict=True):
        assert float((rows - expected).norm() / expected.norm()) <= 1e-5

    def error(found: Tensor) -> float:
        return float((found - torch.cat(right)).norm() / torch.cat(right).norm())

    assert error(half(batch).values) <= 1.25 * error(torch.cat(plain(torch.bfloat16)))


@cuda
@pytest.mark.parametrize(("scaling", "window"), [(None, None), (0.05, None), (None, 1), (None, 33), (0.05, 400)])
def test_the_flash_kernel_equals_attention_text_by_text(scaling: float | None, window: int | None) -> None:
    lengths = [1, 5, 5, 64, 300]
    q, k, v = (torch.randn(1, 4, sum(lengths), 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    packing = Packing(np.array(lengths, np.int32), torch.from_numpy(cumulate(np.array(lengths))).cuda())
    out, _ = packed_attention(nn.Identity(), q, k, v, None, scaling=scaling, packing=packing, sliding_window=window)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        steps = torch.arange(length, device="cuda")
        seen = (steps[:, None] - steps).abs() < (window or length)
        right = nn.functional.scaled_dot_product_attention(
            *(x[:, :, part].float() for x in (q, k, v)), attn_mask=seen, scale=scaling
        ).transpose(1, 2)
        torch.testing.assert_close(out[:, part].float(), right, atol=2e-2, rtol=2e-2)
        start += length


def write_shard(folder: Path, count: int) -> Path:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "word " * (i % 61 + 1), "id": i}) + "\n" for i in range(count)))
    return path


@cuda
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_gives_every_record_its_own_vectors(on_cuda: Encoder, tmp_path: Path, num_workers: int) -> None:
    path = write_shard(tmp_path, 400)
    right = on_cuda(["word " * (i + 1) for i in range(61)])
    seen = []
    reading = StreamConfig(lanes=3, bucket_size=64)
    for batch in bertstream.stream(
        path, on_cuda, batch_size=16, shuffle=True, num_workers=num_workers, reading=reading
    ):
        for record, rows in zip(batch["id"].tolist(), batch["text"], strict=True):
            expected = right[record % 61]
            assert float((rows - expected).norm() / expected.norm()) <= 0.02
            seen.append(record)
    assert sorted(seen) == list(range(400))


class LateEncoder(FakeEncoder):
    """A token's vector is its id 256 times, written some milliseconds after the host has moved on."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(hidden_size=256, max_forward_tokens=1 << 16)
        self.device = device

    def encode(self, batch: bertstream.TokenBatch) -> bertstream.Embeddings:
        torch.cuda._sleep(2_000_000)  # a reader that does not wait finds what the memory held before
        ids = to_device(batch.input_ids, self.device).float()
        lengths = torch.from_numpy(batch.lengths.astype(np.int64))
        offsets = to_device(batch.cu_seqlens, self.device)
        return bertstream.Embeddings(ids[:, None].repeat(1, 256), offsets, lengths, batch, "tokens")


@cuda
def test_no_batch_is_read_before_it_is_written_or_overwritten_before_it_is_read(cuda: torch.device) -> None:
    encoder = LateEncoder(cuda)
    # Batches of one size, so that one takes the memory of another; neighbors differ at every token.
    batches = [[" ".join(str(b + i * j) for j in range(200)) for i in range(16)] for b in range(60)]
    right = [
        to_device(np.concatenate([text.input_ids for text in encoder.tokenizer(texts)]), encoder.device)
        for texts in batches
    ]
    errors = []
    for ids, batch in zip(right, bertstream.wrap(batches, encoder, prefetch=3), strict=True):
        torch.cuda._sleep(3_000_000)  # this loop's reads are queued late too
        errors.append((batch.values - ids[:, None]).abs().max())
        del batch  # a later batch may take the memory while this read still waits
    assert torch.stack(errors).tolist() == [0.0] * 60


@cuda
def test_encoding_and_handing_over_do_not_wait_for_the_device(on_cuda: Encoder, sentences: list[str]) -> None:
    on_cuda(sentences[:8])
    side = SideStream(on_cuda.device)
    batch = on_cuda.tokenizer.batch(sentences[:64])
    with host_must_not_wait():
        with side.run():
            found = on_cuda.encode(batch)
        side.hand_over(side.mark(), [found.values, found.cu_seqlens])
        found.padded()
        found.nested()


@cuda
def test_rows_kept_on_the_device_are_found_without_waiting_for_it(on_cuda: Encoder, sentences: list[str]) -> None:
    cached = bertstream.EmbeddingCache("64MiB", device=on_cuda.device).of(on_cuda)
    batch = on_cuda.tokenizer.batch(sentences[:64])
    right = cached.encode(batch)
    with host_must_not_wait():
        found = cached.encode(batch)
    assert found.values.device == on_cuda.device and torch.equal(found.values, right.values)


@cuda
def test_rows_kept_on_the_device_are_right_on_whatever_stream_they_are_put_and_found(cuda: torch.device) -> None:
    """Streams sleep before they put or read, and each text takes the rows of another."""
    tier = MemoryTier(3 * (64 * (4096 + 8) + 320), 4096, cuda)
    streams = [torch.cuda.Stream(cuda) for _ in range(3)]
    found = []
    for step in range(60):
        with torch.cuda.stream(streams[step % 3]):
            torch.cuda._sleep(2_000_000)  # about a millisecond
            tier.put([b"%d" % step], [64], torch.full((64, 4096), step, dtype=torch.uint8, device=cuda))
        with torch.cuda.stream(streams[(step + 1) % 3]):
            rows = tier.gather([b"%d" % step])
            assert rows is not None
            found.append((rows == step).all())
    torch.cuda.synchronize()
    assert all(map(bool, found)) and tier.evictions == 57


@cuda
def test_reserved_memory_is_flat_over_many_epochs(on_cuda: Encoder, sentences: list[str]) -> None:
    loader = bertstream.wrap([sentences[i : i + 32] for i in range(0, 256, 32)], on_cuda)
    reserved = []
    for epoch in range(40):
        for number, batch in enumerate(loader):
            batch.padded()
            if epoch % 3 == 2 and number == 4:
                break
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] <= reserved[3]


def poison(device: torch.device, mebibytes: int = 64) -> None:
    """Leave NaNs in the blocks that the allocator gives out next on the current stream, in many sizes."""
    blocks = [torch.full((1 << k,), torch.nan, device=device) for k in range(8, 22) for _ in range(4)]
    blocks.append(torch.full((mebibytes << 18,), torch.nan, device=device))
    del blocks  # free, and still full of NaNs


@cuda
def test_memory_full_of_nans_reaches_no_vector(
    on_cuda: Encoder, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows a row that is read before it is written, on the encoder's own stream too."""
    texts = [*sentences[:96], "", *sentences[:32]]
    right = on_cuda(texts).values.clone()
    batches = [texts[i : i + 24] for i in range(0, len(texts), 24)]
    encode = on_cuda.encode

    def poisoned(batch: bertstream.TokenBatch) -> bertstream.Embeddings:
        poison(on_cuda.device)  # the current stream is the loader's side stream
        return encode(batch)

    monkeypatch.setattr(on_cuda, "encode", poisoned)
    for _ in range(3):
        rows = []
        for batch in bertstream.wrap(batches, on_cuda):
            padded, mask = batch.padded()
            assert bool(padded.isfinite().all()), "padding or rows that nothing wrote"
            assert torch.equal(padded[mask], batch.values)
            rows.append(batch.values)
            poison(on_cuda.device)
        found = torch.cat(rows)
        assert float((found - right).norm() / right.norm()) <= 0.02


@cuda
def test_a_consumer_on_its_own_stream_that_sleeps_reads_its_batch_while_memory_churns(
    on_cuda: Encoder, sentences: list[str]
) -> None:
    """Its reads wait on the device while the host drops each batch and takes and frees memory of the same size."""
    texts = [sorted(sentences, key=len)[i : i + 16] for i in range(0, 320, 16)]
    right = [on_cuda(batch).values.double().sum() for batch in texts]
    consumer = torch.cuda.Stream(on_cuda.device)
    consumer.wait_stream(torch.cuda.current_stream())
    sums = []
    with torch.cuda.stream(consumer):
        for batch in bertstream.wrap(texts, on_cuda, prefetch=3):
            torch.cuda._sleep(20_000_000)  # about 10 ms, in which many batches are encoded
            sums.append(batch.values.double().sum())
            shape = batch.values.shape
            del batch
            for _ in range(4):
                torch.full(shape, torch.nan, device=on_cuda.device)  # freed right away
    consumer.synchronize()
    for found, expected in zip(sums, right, strict=True):
        assert float((found - expected).abs()) <= 0.02 * float(expected.abs()) + 1.0


@cuda
def test_batches_encoded_together_equal_those_encoded_alone_and_repeats_are_copies(
    on_cuda: Encoder, sentences: list[str]
) -> None:
    batches = [sentences[:8], [sentences[0], sentences[20], sentences[0]], sentences[8:16]] * 4
    loader = bertstream.wrap(batches, on_cuda)
    for texts, batch in zip(batches, loader, strict=True):
        assert batch.values.is_cuda and batch.cu_seqlens.is_cuda
        for rows, expected in zip(batch, on_cuda(texts), strict=True):
            assert float((rows - expected).norm() / expected.norm()) <= 0.02
        batch.values.zero_()  # must not change another batch
    stats = loader.stats()
    assert stats["encode_calls"] <= len(batches) and stats["repeated_texts"] >= 4


@cuda
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_leaving_early_keeps_the_last_batch_and_the_next_epoch_right(
    on_cuda: Encoder, sentences: list[str], stop: int
) -> None:
    batches = [sentences[i : i + 16] for i in range(0, 320, 16)]
    right = [on_cuda(texts).values for texts in batches]
    loader = bertstream.wrap(batches, on_cuda, prefetch=3)
    for number, batch in enumerate(loader):
        kept = batch
        if number == stop:
            break
    poison(on_cuda.device)  # takes the memory of the batches that were ahead
    assert float((kept.values - right[stop]).norm() / right[stop].norm()) <= 0.02
    for found, expected in zip(loader, right, strict=True):
        assert float((found.values - expected).norm() / expected.norm()) <= 0.02
    loader.close()


@cuda
def test_an_epoch_leaves_no_memory_in_use(on_cuda: Encoder, tmp_path: Path) -> None:
    path = write_shard(tmp_path, 400)
    loader = bertstream.stream(path, on_cuda, batch_size=16, shuffle=True)
    used = []
    for _ in range(6):
        for batch in loader:
            batch["text"].padded()
        del batch
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert max(used[1:]) <= used[1]


@cuda
def test_forwards_become_smaller_when_the_device_runs_out_of_memory(
    minilm_folder: str, sentences: list[str], cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, device=cuda, max_forward_tokens=1 << 15)
    texts = sentences[:64]
    right = encoder(texts).values
    forward = encoder._fused_forward

    def bounded(batch: bertstream.TokenBatch, rows: Any, lengths: Any, given: Any = None) -> list[Tensor]:
        if len(rows) > 500:
            torch.empty(1 << 45, dtype=torch.uint8, device=encoder.device)  # a real OutOfMemoryError
        return forward(batch, rows, lengths, given)

    monkeypatch.setattr(encoder, "_fused_forward", bounded)
    found = encoder(texts).values
    assert encoder.max_forward_tokens <= 500
    assert float((found - right).norm() / right.norm()) <= 0.02


@cuda
def test_layouts_on_the_device_hold_the_same_rows(on_cuda: Encoder, sentences: list[str]) -> None:
    found = on_cuda(sentences[:20])
    values, mask = found.padded()
    unpacked, lengths = nn.utils.rnn.pad_packed_sequence(found.packed_sequence(), batch_first=True)
    assert torch.equal(values[mask], found.values) and torch.equal(unpacked, values)
    assert torch.equal(lengths, found.lengths) and lengths.device.type == "cpu"
    assert all(torch.equal(a, b) for a, b in zip(found.nested().unbind(), found, strict=True))
    assert found.to("cpu").pin_memory().values.is_pinned()


@cuda
def test_a_downstream_model_on_the_device_trains_from_the_loader(on_cuda: Encoder) -> None:
    lstm = nn.LSTM(on_cuda.embedding_dim, 32, batch_first=True).cuda()
    head = nn.Linear(32, 2).cuda()
    optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], 0.01)
    batch = (["the river bank", "a bank loan", "banks of the stream", "the bank paid"], torch.tensor([0, 1, 0, 1]))
    losses = []
    for x, y in bertstream.wrap([batch] * 60, on_cuda, text=0):
        _, (state, _) = lstm(x.packed_sequence())
        loss = nn.functional.cross_entropy(head(state[-1]), y.cuda())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


@cuda
def test_an_encoder_moves_between_devices(on_cuda: Encoder) -> None:
    moved = copy.deepcopy(on_cuda).to("cpu")
    assert moved.device.type == "cpu" and moved(["a"]).values.device.type == "cpu"
    assert fastest_dtype(on_cuda.device, 384) == torch.bfloat16


@pytest.fixture(autouse=True)
def _synchronized() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
