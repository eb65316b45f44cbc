"""A loader yields the same vectors with and without a cache, whatever it holds, evicts, changes or loses."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from families import tokenizer_with_marks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import bertstream
from bertstream import CacheError, ConfigError, EmbeddingCache, Embeddings, Encoder, EncoderError, TokenBatch, testing
from bertstream.caching.cached_encoder import text_keys
from bertstream.caching.codec import Storage
from bertstream.encoding.words import Blanks
from bertstream.tokens import Text, TokenizedText


class FakeEncoder(testing.FakeEncoder):
    """A fake for caches: column 3 of its rows is `weight`, and it has a fingerprint while it is `frozen`."""

    row_shape = (4,)
    output_dtype = torch.float32

    def __init__(self, weight: float = 0.0) -> None:
        super().__init__(hidden_size=4, max_forward_tokens=64)
        self.weight = weight
        self.frozen = True
        self.fail: Callable[[TokenBatch], None] = lambda batch: None
        self.encoded: list[list[tuple[int, ...]]] = []
        """The texts of each call."""

    def fingerprint(self) -> bytes | None:
        return str(self.weight).encode() if self.frozen else None

    def row_counts(self, batch: TokenBatch) -> npt.NDArray[np.int32]:
        return batch.lengths

    def encode(self, batch: TokenBatch) -> Embeddings:
        starts, ends = batch.cu_seqlens[:-1], batch.cu_seqlens[1:]
        self.encoded.append([tuple(batch.input_ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)])
        self.fail(batch)
        found = super().encode(batch)
        found.values[:, 3] = self.weight
        return found

    def assemble(self, values: torch.Tensor, batch: TokenBatch) -> Embeddings:
        lengths = torch.from_numpy(batch.lengths.astype(np.int64))
        return Embeddings(values, torch.from_numpy(batch.cu_seqlens), lengths, batch, "tokens")


def batch_of(*texts: Sequence[int]) -> TokenBatch:
    return TokenBatch.from_texts([TokenizedText(np.array(text, np.int32)) for text in texts])


def equal(found: Embeddings, right: Embeddings) -> bool:
    """Whether two batches are equal in every part, bit for bit."""
    arrays = [(found.values, right.values), (found.cu_seqlens, right.cu_seqlens), (found.lengths, right.lengths)]
    same = all(a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all()) for a, b in arrays)
    for a, b in ((found.present, right.present), (found.word_ids, right.word_ids)):
        same &= (a is None) == (b is None) and (a is None or bool((a == b).all()))
    return same and found.tokens is right.tokens and found.output == right.output


@contextmanager
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    messages: list[str] = []
    with caplog.at_level(logging.WARNING, "bertstream.caching"):
        yield messages
    messages += [record.getMessage() for record in caplog.records]


# --- the same vectors -------------------------------------------------------------------------------------------------

some_texts = st.lists(st.lists(st.integers(1, 4), max_size=4), max_size=6)


@given(st.lists(some_texts, max_size=12), st.sampled_from([1, 700, 1500, 100_000]))
def test_any_batches_and_bound_return_what_the_encoder_returns(batches: list[list[list[int]]], memory: int) -> None:
    encoder, plain = FakeEncoder(), FakeEncoder()
    with EmbeddingCache(memory=memory) as cache:
        cached = cache.of(encoder)
        for texts in batches:
            batch = batch_of(*texts)
            assert equal(cached.encode(batch), plain.encode(batch))
            assert cache.stats()["memory_bytes"] <= memory
        stats = cache.stats()
        asked = stats["memory_hits"] + stats["misses"] + stats["repeats"]
        assert asked == sum(map(len, batches)) and stats["misses"] == sum(map(len, encoder.encoded))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "int8"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_vectors_that_are_not_finite_are_returned_but_not_kept(
    dtype: Storage, on_disk: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(FakeEncoder):
        def encode(self, batch: TokenBatch) -> Embeddings:
            found = super().encode(batch)
            found.values[found.values[:, 0] == 3, 1] = torch.nan
            return found

    encoder = Broken()
    with logged(caplog) as said, EmbeddingCache("1MiB", tmp_path if on_disk else None, "64MiB", dtype=dtype) as cache:
        cached = cache.of(encoder)
        for texts in ([[1, 2], [], [2, 3, 1], [4], [3]], [[4], [3], [1, 2]], [[3]]):
            found = cached.encode(batch_of(*texts))
            assert [text.isnan().any().item() for text in found] == [3 in text for text in texts]
        cache.flush()
        assert encoder.encoded == [[(1, 2), (), (2, 3, 1), (4,), (3,)], [(3,)], [(3,)]]
        assert cached.fill(batch_of([3], [1])) == 2
        cache.flush()
        assert cache.stats()["memory_texts"] == 4 and cache.stats().get("disk_texts", 4) == 4
    assert len(said) == 1 and "2 of 5 texts" in said[0] and "number 2, [2, 3, 1]" in said[0]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(some_texts, st.booleans()), max_size=8),
    st.sampled_from([0, 700, 100_000]),
)
def test_the_same_is_true_with_a_disk(
    tmp_path_factory: pytest.TempPathFactory, batches: list[tuple[list[list[int]], bool]], memory: int
) -> None:
    encoder, plain = FakeEncoder(), FakeEncoder()
    folder = tmp_path_factory.mktemp("cache")
    cache = EmbeddingCache(memory=memory, disk=folder, disk_limit="1MiB")
    try:
        for texts, open_again in batches:
            if open_again:
                cache.close()
                cache = EmbeddingCache(memory=memory, disk=folder, disk_limit="1MiB")
            batch = batch_of(*texts)
            assert equal(cache.of(encoder).encode(batch), plain.encode(batch))
            cache.flush()
        # Everything was written, so nothing was computed twice.
        texts = [text for texts in encoder.encoded for text in texts]
        assert len(texts) == len(set(texts))
    finally:
        cache.close()


def tiny(tokenizer: Any, **options: Any) -> Encoder:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertModel(BertConfig(vocab_size=30522, **sizes)).eval().requires_grad_(False)
    return Encoder(model, tokenizer, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"special_tokens": False},
        {"layers": (1, 2), "combine": "stack"},
        {"output": "words"},
        {"output": "words", "pooling": "first_last", "overflow": "truncate", "max_length": 8},
        {"output": "words", "overflow": "windows", "max_length": 8, "stride": 2},
        {"overflow": "windows", "max_length": 8, "stride": 2},
        {"output": "sentence", "pooling": ("cls", "mean")},
        {"output": "sentence", "overflow": "windows", "max_length": 8},
        {"output_dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_every_kind_of_output_survives_the_cache(tokenizer: Any, options: dict[str, Any]) -> None:
    encoder = tiny(tokenizer, **options)
    words: list[Text] = [["The", "bank", "", "raised", "its", "unbelievable", "rates"], [], ["a", "\ufffd"], ["a"]]
    pair: list[Text] = [(["a", "bank"], ["of", "the", "river"]), (["a"], ["bank"])]
    strings: list[Text] = [] if encoder.output == "words" else ["The bank raised its unbelievable rates.", "", "a"]
    batches = [encoder.tokenizer.batch(texts) for texts in (words, words[::-1] + pair, strings + words + strings)]
    cache = EmbeddingCache("1MiB")
    cached = cache.of(encoder)
    for _ in range(2):
        for batch in batches:
            found, right = cached.encode(batch), encoder.encode(batch)
            found.values, values = right.values, found.values
            assert equal(found, right)
            torch.testing.assert_close(values, right.values, rtol=0.01, atol=1e-5)
    assert cache.stats()["misses"] == cache.stats()["memory_texts"]
    assert cache.stats()["memory_hits"] > len(batches)


def test_a_hit_equals_the_row_that_was_first_returned(tokenizer: Any, tmp_path: Path) -> None:
    encoder = tiny(tokenizer)
    batch = encoder.tokenizer.batch(["The bank raised its rates.", "They moored at the bank."])
    storages: list[Storage] = ["auto", "float32", "bfloat16", "int8"]
    for storage in storages:
        with EmbeddingCache("1MiB", tmp_path / storage, "16MiB", dtype=storage) as cache:
            first = cache.of(encoder).encode(batch)
            again = cache.of(encoder).encode(batch)
            assert cache.stats()["memory_hits"] == 2
        with EmbeddingCache(0, tmp_path / storage, "16MiB", dtype=storage) as cache:
            read = cache.of(encoder).encode(batch)
            assert cache.stats()["disk_hits"] == 2
        assert equal(first, again) and equal(first, read)
        exact = bool((first.values == encoder.encode(batch).values).all())
        assert exact == (storage in ("auto", "float32"))


def test_writing_to_returned_rows_does_not_change_the_cache(tmp_path: Path) -> None:
    encoder, batch = FakeEncoder(), batch_of([1, 2], [3])
    right = encoder.encode(batch)
    with EmbeddingCache("1MiB", tmp_path, "16MiB") as cache:
        for _ in range(3):
            found = cache.of(encoder).encode(batch)
            assert equal(found, right)
            found.values.zero_()
    with EmbeddingCache(0, tmp_path, "16MiB") as cache:
        for _ in range(2):
            found = cache.of(encoder).encode(batch)
            assert equal(found, right)
            found.values.zero_()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_vectors_are_independent_of_the_callers_grad_mode(tokenizer: Any, mode: Callable[[], Any]) -> None:
    encoder = tiny(tokenizer)
    batch = encoder.tokenizer.batch(["a bank", "a river"])
    with mode():
        cached = EmbeddingCache("1MiB").of(encoder)
        cached.encode(batch)
        values = cached.encode(batch).values
    layer = torch.nn.Linear(16, 1)
    layer(values).sum().backward()  # an inference tensor would raise here
    cached.encode(encoder.tokenizer.batch(["a bank", "another"]))  # and so would writing to one
    assert layer.weight.grad is not None and not values.requires_grad


# --- what is computed -------------------------------------------------------------------------------------------------


def test_each_missing_text_is_encoded_once_in_one_call(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    with EmbeddingCache("1MiB", tmp_path, "16MiB") as cache:
        cached = cache.of(encoder)
        cached.encode(batch_of([1], [2, 2]))
        cached.encode(batch_of([3], [1], [3], [4, 4], [2, 2], [4, 4]))
        assert encoder.encoded == [[(1,), (2, 2)], [(3,), (4, 4)]]
        stats = cache.stats()
        assert (stats["misses"], stats["memory_hits"], stats["repeats"], stats["disk_hits"]) == (4, 2, 2, 0)
    with EmbeddingCache("1MiB", tmp_path, "16MiB") as cache:
        for _ in range(2):
            cache.of(encoder).encode(batch_of([4, 4], [5], [1]))
        assert encoder.encoded[2:] == [[(5,)]]
        stats = cache.stats()
        assert (stats["misses"], stats["memory_hits"], stats["repeats"], stats["disk_hits"]) == (1, 3, 0, 2)


def test_the_forward_size_of_a_call_reaches_the_encoder_only_if_given() -> None:
    class Sized(FakeEncoder):
        def encode(self, batch: TokenBatch, **options: Any) -> Embeddings:
            given.append(options)
            return super().encode(batch)

    given: list[dict[str, Any]] = []
    cached = EmbeddingCache("1MiB").of(Sized())
    cached.encode(batch_of([1]))
    cached.encode(batch_of([2]), max_forward_tokens=7)
    cached.encode(batch_of([1], [2]), max_forward_tokens=8)  # both are in memory
    assert given == [{}, {"max_forward_tokens": 7}]


def test_the_least_recently_used_text_is_computed_again() -> None:
    encoder = FakeEncoder()
    cache = EmbeddingCache(3 * (320 + 16 + 8))
    cached = cache.of(encoder)
    for text in (1, 2, 3, 1, 4, 1, 3, 2):  # 4 evicts 2, which then evicts 4
        cached.encode(batch_of([text]))
    assert [text for (text,) in [*map(tuple, encoder.encoded)]] == [(1,), (2,), (3,), (4,), (2,)]
    assert cache.stats()["memory_evictions"] == 2


def test_rows_of_other_weights_are_never_hits(tmp_path: Path) -> None:
    encoder, batch = FakeEncoder(1.0), batch_of([1], [2, 3])
    with EmbeddingCache("1MiB", tmp_path, "16MiB") as cache:
        for weight in (1.0, 2.0, 1.0):
            encoder.weight = weight
            assert bool((cache.of(encoder).encode(batch).values[:, 3] == weight).all())
        assert len(encoder.encoded) == 2 and cache.stats()["memory_hits"] == 2


def test_the_cache_is_off_while_parameters_require_gradients_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    encoder, batch = FakeEncoder(), batch_of([1], [2, 3])
    cache = EmbeddingCache("1MiB")
    cached = cache.of(encoder)
    cached.encode(batch)
    encoder.frozen = False
    with logged(caplog) as messages:
        for _ in range(2):
            assert equal(cached.encode(batch), encoder.encode(batch))
    assert [message.partition(" while")[0] for message in messages] == ["the cache is off"]
    assert cache.stats()["off"] == 4 and cache.stats()["memory_hits"] == 0
    encoder.frozen = True
    cached.encode(batch)
    assert cache.stats()["memory_hits"] == 2


def test_rows_are_not_kept_if_training_starts_while_they_are_encoded() -> None:
    encoder, batch = FakeEncoder(), batch_of([1], [2, 3])
    cache = EmbeddingCache("1MiB")

    def train(batch: TokenBatch) -> None:
        encoder.frozen = False

    encoder.fail = train
    cache.of(encoder).encode(batch)
    assert cache.stats()["memory_texts"] == 0


def test_an_encoder_error_names_indices_of_the_whole_batch(tokenizer: Any) -> None:
    encoder = tiny(tokenizer, max_length=6)
    cache = EmbeddingCache("1MiB")
    good = encoder.tokenizer.batch(["a", "b"])
    cache.of(encoder).encode(good)
    long = TokenizedText(np.full(9, 1000, np.int32), special=np.zeros(9, bool))
    batch = TokenBatch.from_texts([*encoder.tokenizer(["a", "b"]), long])
    with pytest.raises(EncoderError, match="text 2 has 9 tokens") as caught:
        cache.of(encoder).encode(batch)
    assert caught.value.records == (2,)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_everything_that_enters_the_model_changes_the_key() -> None:
    def text(**more: Any) -> TokenizedText:
        return TokenizedText(np.array([7, 8, 9], np.int32), **more)

    def ints(*values: int) -> npt.NDArray[np.int32]:
        return np.array(values, np.int32)

    different = [
        text(),
        TokenizedText(ints(7, 9, 8)),
        TokenizedText(ints(7, 8)),
        TokenizedText(ints()),
        text(token_type_ids=ints(0, 0, 1)),
        text(word_ids=ints(0, 0, 1), num_words=2),
        text(word_ids=ints(0, 1, 1), num_words=2),
        text(word_ids=ints(0, 1, 1), num_words=3),
        text(special=np.array([True, False, True])),
        text(window_lengths=ints(2, 1)),
        text(window_lengths=ints(1, 2)),
        text(window_lengths=ints(1, 2), owned=np.array([True, False, True])),
    ]
    keys = text_keys(TokenBatch.from_texts(different), b"prefix..", b"one")
    assert len(set(keys)) == len(different) and {len(key) for key in keys} == {24}
    # The same keys for texts that come alone, and for defaults that are written out.
    alone = [text_keys(TokenBatch.from_texts([one]), b"prefix..", b"one")[0] for one in different]
    assert alone == keys
    explicit = text(
        token_type_ids=ints(0, 0, 0), window_lengths=ints(3), owned=np.ones(3, bool), special=np.zeros(3, bool)
    )
    assert text_keys(TokenBatch.from_texts([explicit]), b"prefix..", b"one") == keys[:1]
    assert not set(keys) & set(text_keys(TokenBatch.from_texts(different), b"prefix..", b"two"))


def test_picked_texts_equal_the_same_texts_batched_alone(tokenizer: Any) -> None:
    encoder = tiny(tokenizer, output="words", overflow="windows", max_length=8, stride=2)
    texts = encoder.tokenizer([["The", "unbelievable", "bank", "of", "the", "river"], [], ["a"], ["raised"] * 12])
    whole = TokenBatch.from_texts([TokenizedText(np.zeros(0, np.int32)), *texts])
    for picked in ([3, 0, 4], [2], [1, 4], []):
        found = whole.pick(np.array(picked, np.int64))
        right = TokenBatch.from_texts([[TokenizedText(np.zeros(0, np.int32)), *texts][i] for i in picked])
        assert text_keys(found, b"", b"") == text_keys(right, b"", b"")
        assert found.window_lengths is not None and found.num_words.tolist() == right.num_words.tolist()
        if right.window_lengths is not None:
            assert found.window_lengths.tolist() == right.window_lengths.tolist()


# --- the loader -------------------------------------------------------------------------------------------------------


def test_a_loader_yields_the_same_with_a_cache_and_reports_its_stats() -> None:
    batches = [{"text": [f"batch {b % 3} " + "word " * i for i in range(4)], "n": b} for b in range(9)]
    encoder = FakeEncoder()
    cache = EmbeddingCache("1MiB")
    loader = bertstream.wrap(batches, encoder, text="text", cache=cache)
    plain = bertstream.wrap(batches, encoder, text="text")
    for _ in range(2):
        for found, right in zip(loader, plain, strict=True):
            assert found["n"] == right["n"] and bool((found["text"].values == right["text"].values).all())
    stats = loader.stats()
    assert stats["cache_misses"] == stats["cache_memory_texts"] == 12
    assert stats["cache_memory_hits"] + stats["cache_repeats"] == 2 * 36 - 12
    assert "cache_misses" not in plain.stats()


def test_cached_minilm_vectors_are_within_tolerance(minilm: Encoder, sentences: list[str], tmp_path: Path) -> None:
    batches = [sentences[i : i + 8] for i in range(0, 48, 8)]
    other = [sentences[i : i + 6] for i in range(0, 48, 6)]  # different batches, so different last bits
    with EmbeddingCache("8MiB", tmp_path, "64MiB") as cache:
        for _ in bertstream.wrap(batches, minilm, cache=cache):
            pass
        for found in bertstream.wrap(other, minilm, cache=cache):
            right = minilm.encode(found.tokens).values
            assert float((found.values - right).norm() / right.norm()) <= 1e-5
        assert cache.stats()["misses"] == 48


def test_several_loaders_share_a_cache_at_the_same_time() -> None:
    batches = [[f"text {'word ' * ((b * 7 + i) % 50)}" for i in range(8)] for b in range(60)]
    encoder, plain = FakeEncoder(), FakeEncoder()
    cache = EmbeddingCache(8000)  # far too small
    wrong: list[int] = []

    def run() -> None:
        for number, found in enumerate(bertstream.wrap(batches, encoder, cache=cache)):
            if not equal(found, plain.encode(found.tokens)):
                wrong.append(number)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and cache.stats()["memory_evictions"] > 0


def test_a_closed_cache_computes_everything(tmp_path: Path) -> None:
    encoder, plain, batch = FakeEncoder(), FakeEncoder(), batch_of([1], [2, 2])
    cache = EmbeddingCache(0, tmp_path, "16MiB")
    cached = cache.of(encoder)
    cached.encode(batch)
    cache.close()
    assert equal(cached.encode(batch), plain.encode(batch))
    assert len(encoder.encoded) == 2
    cache.flush()


def test_a_loop_over_a_closed_cache_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    encoder = FakeEncoder()
    with EmbeddingCache("1MiB") as cache:
        loader = bertstream.wrap([["a", "b"]], encoder, cache=cache)
        list(loader)
        list(loader)
    assert len(encoder.encoded) == 1 and "closed" not in caplog.text
    list(loader)
    list(loader)
    assert cache.is_closed and len(encoder.encoded) == 3
    assert caplog.text.count("the cache was closed, so every text is encoded again") == 1


def test_lookups_skip_a_disk_that_is_slower_than_computing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bertstream.caching.store._JUDGED_ROWS", 10)
    monkeypatch.setattr("bertstream.caching.store._ASIDE_LOOKUPS", 3)
    encoder = FakeEncoder()
    with EmbeddingCache(0, tmp_path, "16MiB") as cache, logged(caplog) as messages:
        cached = cache.of(encoder)
        cached.encode(batch_of([1] * 20))
        cache.flush()
        cached.encode(batch_of([1] * 20))
        assert cache.stats()["disk_hits"] == 1 and cache.stats()["disk_aside"] == 0
        cache._store._judge.read(20, 1000.0)  # as if reading were slow
        cached.encode(batch_of([1] * 20))
        assert cache.stats()["disk_hits"] == 1 and cache.stats()["disk_aside"] == 1
        for _ in range(3):
            cached.encode(batch_of([1] * 20))
        assert cache.stats()["disk_hits"] == 1 and cache.stats()["disk_aside"] == 0
        cached.encode(batch_of([1] * 20))
        assert cache.stats()["disk_hits"] == 2
    assert len(messages) == 1 and "the next 3 lookups skip the disk" in messages[0]


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_reopens_the_folder_even_while_the_parent_holds_the_lock(tmp_path: Path) -> None:
    encoder, plain, batch = FakeEncoder(), FakeEncoder(), batch_of([1], [2, 2])
    with EmbeddingCache("1MiB", tmp_path, "16MiB") as cache:
        cached = cache.of(encoder)
        cached.encode(batch)
        cache.flush()
        with cache._store._lock:
            child = os.fork()
            if not child:
                status = 1
                try:
                    found = [cached.encode(b) for b in (batch, batch, batch_of([3]))]
                    cache.flush()
                    stats = cache.stats()
                    good = equal(found[0], plain.encode(batch)) and stats["memory_hits"] == stats["disk_hits"] == 2
                    status = 0 if good else 2
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                finally:
                    os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        cached.encode(batch_of([3]))
        assert cache.stats()["disk_hits"] == 1 and equal(cached.encode(batch), plain.encode(batch))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_that_cannot_open_the_folder_works_without_it(tmp_path: Path) -> None:
    encoder, plain, batch = FakeEncoder(), FakeEncoder(), batch_of([1], [2, 2])
    with EmbeddingCache("1MiB", tmp_path, "16MiB") as cache:
        cached = cache.of(encoder)
        child = os.fork()
        if not child:
            status = 1
            try:
                logging.disable()
                cache._store._folder = os.devnull  # no folder
                good = all(equal(cached.encode(batch), plain.encode(batch)) for _ in range(2))
                status = 0 if good and cache.stats()["memory_hits"] == 2 else 2
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_hits_do_not_count_as_encoded(minilm: Encoder) -> None:
    with EmbeddingCache("1MiB") as cache:
        loader = bertstream.wrap([["a bank", "a bass"], ["a bank"]], minilm, cache=cache)
        list(loader)
        first = loader.stats()
        assert (first["encoded_tokens"], first["tokens"], first["cache_misses"]) == (8, 12, 2)
        list(loader)
        again = loader.stats()
        assert again["tokens"] == 24 and all(again[n] == first[n] for n in ("encode_calls", "encoded_tokens"))
        assert "cache_misses" in str(bertstream.wrap([["a bank"]], minilm, cache=cache).stats())


def test_a_pickled_cache_keeps_its_settings_only(tmp_path: Path) -> None:
    cache = EmbeddingCache("1MiB", tmp_path, "16MiB", dtype="int8")
    cache.of(FakeEncoder()).encode(batch_of([1]))
    data = pickle.dumps(cache)
    cache.close()
    with pickle.loads(data) as again:
        assert repr(again) == repr(cache) and again.stats()["memory_texts"] == 0
        assert again.stats()["disk_texts"] == 1
    assert pickle.loads(pickle.dumps(EmbeddingCache("1MiB", device="meta"))).device == torch.device("meta")


def test_a_closed_cache_stays_closed_in_other_processes(tmp_path: Path) -> None:
    cache = EmbeddingCache("1MiB", tmp_path / "cache", "16MiB")
    cache.close()
    shutil.rmtree(tmp_path / "cache")
    forked = copy.deepcopy(cache)
    forked._store._pid = 0  # as a forked child finds it
    for elsewhere in (pickle.loads(pickle.dumps(cache)), forked):
        elsewhere.of(FakeEncoder()).encode(batch_of([1]))
        assert elsewhere.stats()["memory_texts"] == 0 and not (tmp_path / "cache").exists()


# --- tools, arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("disk", [False, True])
def test_fingerprints_can_be_counted_and_dropped(tmp_path: Path, disk: bool) -> None:
    one, two = FakeEncoder(1), FakeEncoder(2)
    with EmbeddingCache("1MiB", tmp_path if disk else None, "16MiB") as cache:
        cache.of(one).encode(batch_of([1], [2]))
        cache.of(two).encode(batch_of([1], [2], [3]))
        cache.flush()
        names = cache.fingerprint(one), cache.fingerprint(two)
        assert None not in names and cache.fingerprints() == {names[0]: 2, names[1]: 3}
        assert cache.verify() == 0
        assert cache.drop(str(names[0])) == 2 and cache.fingerprints() == {names[1]: 3}
        cache.of(one).encode(batch_of([1]))
        assert cache.stats()["misses"] == 6
        with pytest.raises(ConfigError, match="fingerprint='x'"):
            cache.drop("x")


def test_fingerprints_and_verify_wait_for_rows_that_are_still_being_written(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    with EmbeddingCache(0, tmp_path, "16MiB") as cache:
        cached, disk = cache.of(encoder), cache._store._disk
        assert disk is not None
        for text, look in ((1, cache.fingerprints), (2, cache.verify)):
            disk._write_lock.acquire()
            cached.encode(batch_of([text]))
            assert cache.stats()["disk_texts"] == text - 1
            threading.Timer(0.05, disk._write_lock.release).start()
            look()
            assert cache.stats()["disk_texts"] == text
        assert cache.fingerprints() == {cache.fingerprint(encoder): 2}


def test_a_read_only_cache_refuses_an_encoder_it_holds_nothing_of(tmp_path: Path) -> None:
    one, two = FakeEncoder(1), FakeEncoder(2)
    with EmbeddingCache(0, tmp_path, "16MiB") as cache:
        cache.of(one).encode(batch_of([1]))
        name = cache.fingerprint(one)
    with EmbeddingCache("1MiB", tmp_path, "16MiB", read_only=True) as cache:
        cache.of(one).encode(batch_of([1], [2]))
        assert cache.stats()["disk_hits"] == 1 and cache.stats()["disk_texts"] == 1
        with pytest.raises(CacheError, match=rf"nothing of this encoder.*only of {name}"):
            cache.of(two)
        with pytest.raises(CacheError, match="read-only"):
            cache.drop(str(name))


def test_encoders_with_different_row_sizes_cannot_share_memory() -> None:
    cache = EmbeddingCache("1MiB")
    cache.of(FakeEncoder())
    wide = FakeEncoder()
    wide.row_shape = (5,)
    with pytest.raises(ConfigError, match=r"rows of 16 bytes.*have 20"):
        cache.of(wide)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": "2 gigs"}, "memory='2 gigs': write bytes"),
        ({"memory": -1}, "memory=-1"),
        ({"memory": 0}, "holds nothing"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"read_only": True}, "read_only"),
        ({"device": "nowhere"}, "device='nowhere'"),
        ({"disk": "unused", "disk_limit": 100}, "disk_limit=100"),
        ({"disk": "unused", "read_only": "no"}, "read_only='no': write True or False"),
        ({"disk": "unused", "disk_limit": "1PB"}, "disk_limit='1PB'"),
    ],
)
def test_bad_arguments_are_refused_before_a_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        EmbeddingCache(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_sizes_may_be_numbers_or_strings_with_units() -> None:
    sizes = {"2GiB": 2 << 30, "1.5 MiB": 3 << 19, "500MB": 500 * 10**6, "64k": 64000, "12": 12, 7: 7}
    assert {size: EmbeddingCache(size).memory_bytes for size in sizes} == sizes


def test_an_encoder_that_cannot_be_cached_is_refused_with_what_it_lacks() -> None:
    class Bare:
        device, max_forward_tokens = torch.device("cpu"), 1
        tokenizer = encode = staticmethod(lambda texts: texts)

    with pytest.raises(ConfigError, match="this Bare has no row_shape, output_dtype, fingerprint"):
        bertstream.wrap([["a"]], Bare(), cache=EmbeddingCache("1MiB"))  # type: ignore[arg-type]


def test_training_a_real_encoder_turns_the_cache_off_and_freezing_turns_it_on(tokenizer: Any) -> None:
    encoder = tiny(tokenizer)
    cache = EmbeddingCache("1MiB")
    cached, batch = cache.of(encoder), encoder.tokenizer.batch(["a bank"])
    before = cached.encode(batch).values
    encoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=0.1, fused=True)
    for parameter in encoder.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert cached.encode(batch) is not None and cache.stats()["off"] == 1
    optimizer.step()
    encoder.requires_grad_(False)
    after = cached.encode(batch).values
    assert bool((after == encoder.encode(batch).values).all()) and not torch.allclose(before, after)


def test_a_batch_without_texts_or_tokens_has_no_rows(tokenizer: Any) -> None:
    cached = EmbeddingCache("1MiB").of(tiny(tokenizer))
    for texts in ([], [TokenizedText(np.zeros(0, np.int32))]):
        found = cached.encode(TokenBatch.from_texts(texts))
        assert found.values.shape == (0, 16) and len(found) == len(texts)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "int8"])
def test_rows_kept_on_a_device_stay_there_and_the_host_never_waits(
    minilm_folder: str, sentences: list[str], monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, dtype="bfloat16", device="cpu")
    some, more = encoder.tokenizer.batch(sentences[:8]), encoder.tokenizer.batch(sentences[4:12])
    monkeypatch.setattr(encoder, "fingerprint", lambda: b"weights")  # fake tensors have no content to hash
    with fake_cuda(encoder, monkeypatch), EmbeddingCache("64MiB", dtype=dtype, device=CUDA) as cache:
        cached = cache.of(encoder)
        for batch in (some, some, more):
            assert cached.encode(batch).values.device == CUDA
        assert cache.stats()["misses"] == 12 and cache.stats()["memory_hits"] == 12


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_from_host_or_disk_return_to_cuda(
    minilm_folder: str, sentences: list[str], tmp_path: Path, device: str
) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, dtype="float32", device="cuda", output="words")
    batches = [sentences[i : i + 8] for i in range(0, 48, 8)]
    right = [encoder(texts).values for texts in batches]
    for memory in ("64MiB", 0):
        with EmbeddingCache(memory, tmp_path / str(memory), "64MiB", device=device) as cache:
            for _ in range(2):
                for found, values in zip(bertstream.wrap(batches, encoder, cache=cache), right, strict=True):
                    assert found.values.device == values.device and found.present is not None
                    assert float((found.values - values).norm() / values.norm()) <= 1e-5
                cache.flush()
            assert cache.stats()["misses"] == 48 and cache.stats()["memory_hits" if memory else "disk_hits"] == 48


def test_rows_of_words_that_an_earlier_version_glued_together_are_not_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key is made of token ids, so a tokenizer that makes other ones needs no other fingerprint."""
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    marks = tokenizer_with_marks(["the banks of the river", "a bank raised its rates"], [*special.values()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=marks, model_max_length=64, **special)
    texts: list[Text] = [["the", "river", "banks"], ["a", "bank", "of", "the", "river"]]
    with monkeypatch.context() as patch, EmbeddingCache("1MiB", tmp_path, "16MiB") as cache:
        patch.setattr("bertstream.encoding.tokenizers_backend.find_blanks", lambda backend: Blanks())  # as in 0.1.0
        glued = tiny(tokenizer, output="words")
        wrong = cache.of(glued).encode(glued.tokenizer.batch([*texts, ["river"]]))
    with EmbeddingCache(0, tmp_path, "16MiB") as cache:
        encoder = tiny(tokenizer, output="words")
        found = cache.of(encoder).encode(encoder.tokenizer.batch([*texts, ["river"]]))
        assert encoder.fingerprint() == glued.fingerprint()
        assert cache.stats()["misses"] == 2 and cache.stats()["disk_hits"] == 1, "one word alone was right"
    torch.testing.assert_close(found.values, encoder([*texts, ["river"]]).values)
    assert torch.equal(found[2], wrong[2])
    assert all((found[i] - wrong[i]).abs().max() > 0.1 for i in (0, 1))
