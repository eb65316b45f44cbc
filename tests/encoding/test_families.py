"""Every encoder family: what comes out equals plain transformers, one text at a time, eager attention, float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FULL_RUN
from fake_cuda import CUDA, fake_cuda
from families import PAIRS, WORDS, Tokenizer, make
from torch import Tensor, nn

from bertstream import ConfigError, Encoder, EncoderError
from bertstream.tokens import Text

PACKED = ("Bert", "Roberta", "XLMRoberta", "Camembert", "DistilBert", "Electra", "Albert", "ModernBert", "NomicBert")
PACKED = (*PACKED, "EuroBert", "GroupedEuroBert", "Ernie")
NOT_PACKED = ("MPNet", "DebertaV2", "MobileBert", "FNet")
FAMILIES = PACKED + NOT_PACKED

TEXTS: list[Text] = [
    "a bank",
    "The bank raised its interest rates again this spring.",
    "",
    "Bass",
    [*WORDS],
    ["one"],
    "An electroencephalography of a bat, unbelievably.",
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, make(request.param)


@pytest.fixture
def plain(family: tuple[str, nn.Module]) -> Callable[..., list[Tensor]]:
    model = copy.deepcopy(family[1])
    with suppress(ValueError):  # fnet has no attention at all
        model.set_attn_implementation("eager")

    @torch.no_grad()
    def run(ids: np.ndarray, types: np.ndarray | None = None) -> list[Tensor]:
        """The hidden states of one text: L + 1 of [T, H]."""
        inputs = {"input_ids": torch.from_numpy(ids.astype(np.int64))[None]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if types is not None:
            inputs["token_type_ids"] = torch.from_numpy(types.astype(np.int64))[None]
        out = model(**inputs, output_hidden_states=True)
        assert torch.equal(out.last_hidden_state, out.hidden_states[-1])
        return [layer[0] for layer in out.hidden_states]

    return run


def encoder_of(family: tuple[str, nn.Module], minilm_folder: str, **options: Any) -> Encoder:
    return Encoder(family[1], Tokenizer(minilm_folder, family[1]), **options)


@pytest.fixture(scope="module")
def encoder(family: tuple[str, nn.Module], minilm_folder: str) -> Encoder:
    """Token output, by default."""
    return encoder_of(family, minilm_folder)


def hidden(encoder: Encoder, text: Text, plain: Callable[..., list[Tensor]]) -> list[Tensor]:
    batch = encoder.tokenizer.batch([text])
    return plain(batch.input_ids, batch.token_type_ids)


def test_each_family_runs_in_its_fastest_correct_way(family: tuple[str, nn.Module], encoder: Encoder) -> None:
    assert encoder.batching.packs == (family[0] in PACKED), encoder.batching
    assert encoder.batching.reason


@pytest.mark.parametrize("layers", [(3, 0, 2, 1), (1,)])  # the last cuts the model off
def test_token_vectors_of_every_layer(
    family: tuple[str, nn.Module], minilm_folder: str, plain: Callable[..., list[Tensor]], layers: tuple[int, ...]
) -> None:
    encoder = encoder_of(family, minilm_folder, layers=layers)
    texts = TEXTS + (PAIRS if encoder.tokenizer.segments else [])
    for text, found in zip(texts, encoder(texts), strict=True):
        states = hidden(encoder, text, plain)
        right = torch.cat([states[layer] for layer in layers], -1)
        torch.testing.assert_close(found, right, atol=1e-5, rtol=0)


# How words are pooled is not a family's own, so each has one way with windows and one without.
WAYS = [("first", False), ("last", True), ("mean", False), ("mean", True), ("max", False), ("first_last", True)]


@pytest.mark.parametrize("windows", [False, True])
def test_word_vectors(
    family: tuple[str, nn.Module], minilm_folder: str, plain: Callable[..., list[Tensor]], windows: bool
) -> None:
    pooling: Any = [way for way, of_windows in WAYS if of_windows == windows][FAMILIES.index(family[0]) % 3]
    options: dict[str, Any] = {"output": "words", "pooling": pooling, "layers": (1, -1), "combine": "mean"}
    if windows:
        options |= {"overflow": "windows", "max_length": 12, "stride": 4}
    encoder = encoder_of(family, minilm_folder, **options)
    texts: list[Text] = [WORDS, WORDS[:1], [], ["a", "", "b"], "split by blanks", WORDS * 2]
    found = encoder(texts)
    for i, text in enumerate(texts):
        words = text.split() if isinstance(text, str) else text
        assert len(found[i]) == len(words)
        tokenized = encoder.tokenizer([text])[0]
        states = []
        start = 0
        for length in [len(tokenized.input_ids)] if tokenized.window_lengths is None else tokenized.window_lengths:
            layers = plain(tokenized.input_ids[start : start + length])
            states.append((layers[1] + layers[3]) / 2)
            start += length
        tokens = torch.cat(states)
        for number in range(len(words)):
            mine = tokenized.word_ids == number
            if tokenized.owned is not None:
                mine &= tokenized.owned
            rows = tokens[torch.from_numpy(mine)]
            if not len(rows):
                assert not found[i][number].any()
                continue
            right = {
                "first": lambda rows: rows[0],
                "last": lambda rows: rows[-1],
                "mean": lambda rows: rows.mean(0),
                "max": lambda rows: rows.amax(0),
                "first_last": lambda rows: torch.cat([rows[0], rows[-1]]),
            }[pooling](rows)
            torch.testing.assert_close(found[i][number], right, atol=1e-5, rtol=0)


def test_sentence_vectors(
    family: tuple[str, nn.Module], minilm_folder: str, plain: Callable[..., list[Tensor]]
) -> None:
    special = FAMILIES.index(family[0]) % 2 == 0
    pooling = ("cls", "mean", "max", "weighted_mean")
    encoder = encoder_of(family, minilm_folder, output="sentence", pooling=pooling, special_tokens=special)
    assert encoder.embedding_dim == 4 * 32
    texts = TEXTS + (PAIRS if encoder.tokenizer.segments else [])
    for text, found in zip(texts, encoder(texts), strict=True):
        states = hidden(encoder, text, plain)[-1]
        kept = states[torch.from_numpy(~encoder.tokenizer([text])[0].special)] if not special else states
        weights = torch.arange(1, len(kept) + 1)[:, None]
        parts = [states[0], *(torch.zeros(32),) * 3]
        if len(kept):
            parts[1:] = [kept.mean(0), kept.amax(0), (kept * weights).sum(0) / weights.sum()]
        torch.testing.assert_close(found, torch.cat(parts), atol=1e-5, rtol=0)


def test_the_models_own_pooler(family: tuple[str, nn.Module], minilm_folder: str) -> None:
    if getattr(family[1], "pooler", None) is None:
        with pytest.raises(ConfigError, match="has no pooler"):
            encoder_of(family, minilm_folder, output="sentence", pooling="pooler")
        return
    encoder = encoder_of(family, minilm_folder, output="sentence", pooling="pooler")
    for text in ("a bank", "An electroencephalography of a bat."):
        ids = torch.from_numpy(encoder.tokenizer.batch([text]).input_ids.astype(np.int64))[None]
        with torch.no_grad():
            right = family[1](input_ids=ids, attention_mask=torch.ones_like(ids)).pooler_output[0]
        torch.testing.assert_close(encoder([text]).vectors[0], right, atol=1e-5, rtol=0)


HALVES = ("bfloat16", "float16")


@pytest.mark.parametrize("number", range(2 if FULL_RUN else 1))  # neighbours in the list have the other dtype
def test_half_precision_stays_close(
    family: tuple[str, nn.Module], minilm_folder: str, encoder: Encoder, number: int
) -> None:
    right = encoder(TEXTS).values
    dtype = HALVES[(FAMILIES.index(family[0]) + number) % 2]
    if family[0] == "FNet":  # torch has no Fourier transform in half precision on a CPU
        with pytest.raises(EncoderError, match=f"does not run in torch.{dtype}"):
            encoder_of(family, minilm_folder, dtype=dtype)
        return
    half = encoder_of(family, minilm_folder, dtype=dtype)
    found = half(TEXTS).values
    assert found.dtype == torch.float32 and half.dtype == getattr(torch, dtype)
    cosine = nn.functional.cosine_similarity(found.flatten(), right.flatten(), dim=0)
    assert cosine >= 0.999
    assert all(parameter.dtype == torch.float32 for parameter in family[1].parameters())


# Each family in one dtype, way and output, and each of these in one family; in the full run each in two.
APART = 6 if FULL_RUN else 12
ON_CUDA = [
    (name, *ways)
    for number, name in enumerate(PACKED)
    for ways in [
        *product(("tokens", "words", "sentence"), ("float32", "bfloat16"), ("packed", "fused with our kernels"))
    ][number % APART :: APART]
]


@pytest.mark.parametrize(("name", "output", "dtype", "way"), ON_CUDA)
def test_on_cuda_all_tensors_are_on_the_device_and_the_host_never_waits(
    name: str, minilm_folder: str, monkeypatch: pytest.MonkeyPatch, output: Any, dtype: Any, way: str
) -> None:
    encoder = encoder_of((name, make(name)), minilm_folder, output=output, dtype=dtype, layers=(1, -1))
    texts: list[Text] = [WORDS, [], ["one"], WORDS]
    batch, right = encoder.tokenizer.batch(texts), encoder(texts).values
    if way == "packed":
        encoder._fused = None
    with fake_cuda(encoder, monkeypatch, triton="kernels" in way):
        found = encoder.encode(batch)
        assert found.values.device == found.cu_seqlens.device == CUDA and found.lengths.device.type == "cpu"
        assert found.values.shape == right.shape and found.values.dtype == right.dtype


def test_the_users_model_is_never_changed(family: tuple[str, nn.Module], minilm_folder: str) -> None:
    model = family[1]
    before = (repr(model), model.config.to_dict(), {name: p.data_ptr() for name, p in model.named_parameters()})
    attention = model.config._attn_implementation
    for layers in ((-1,), (1,)):
        encoder_of(family, minilm_folder, layers=layers)(TEXTS)
    assert (repr(model), model.config.to_dict(), {n: p.data_ptr() for n, p in model.named_parameters()}) == before
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("name", NOT_PACKED)
def test_packed_true_is_refused_for_a_model_that_would_be_wrong(name: str, minilm_folder: str) -> None:
    model = make(name)
    with pytest.raises(EncoderError, match="cannot run packed"):
        Encoder(model, Tokenizer(minilm_folder, model), packed=True)
    assert Encoder(model, Tokenizer(minilm_folder, model), packed=False).batching.way != "packed"
    # What it would have given: the second of two texts in one row, against the same text alone.
    alone, both = torch.arange(1000, 1009)[None], torch.arange(990, 1009)[None]
    positions = torch.cat([torch.arange(10), torch.arange(9)])[None]
    with torch.no_grad():
        right = model(input_ids=alone).last_hidden_state[0]
        forced = model(input_ids=both, position_ids=positions).last_hidden_state[0, 10:]
    assert float((forced - right).norm() / right.norm()) > 1e-2


@pytest.mark.parametrize("name", ["ModernBert", "EuroBert"])
def test_half_precision_keeps_the_angles_of_far_positions(name: str, minilm_folder: str) -> None:
    model = make(name)
    before = {path: buffer.clone() for path, buffer in model.named_buffers()}
    half = Encoder(model, Tokenizer(minilm_folder, model), dtype="bfloat16")
    angles = {path: buffer for path, buffer in half.model.named_buffers() if "inv_freq" in path}
    assert angles and all(torch.equal(buffer, before[path]) for path, buffer in angles.items())


@pytest.mark.parametrize("name", ["Roberta", "MPNet"])
def test_positions_after_a_padding_id_count_packed_or_not(name: str, minilm_folder: str) -> None:
    model = make(name)
    for packed in (None, False):
        tokenizer = Tokenizer(minilm_folder, model)
        tokenizer.model_max_length = 1000
        encoder = Encoder(model, tokenizer, packed=packed, overflow="truncate")
        assert encoder.tokenizer.max_length == 80 - 1 - model.embeddings.padding_idx
        assert encoder(["word " * 100]).values.isfinite().all()
