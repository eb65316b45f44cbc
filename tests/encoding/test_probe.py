"""The self-test's texts hold what breaks packing, and what a model gives each of them alone is right or refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import Tokenizer, make, probed, tiny
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)

from bertstream import Encoder, EncoderError
from bertstream.encoding.probe import MOST_TOKENS, _odd_lengths, probe_texts
from bertstream.encoding.self_test import probe_batching


@pytest.mark.parametrize("name", ["Bart", "LED"])
def test_layers_that_the_model_does_not_give_are_refused_by_name(name: str, minilm_folder: str) -> None:
    sizes = {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in (("layers", 3), ("ffn_dim", 64))}
    model = make(name, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=1, **sizes)
    with pytest.raises(EncoderError, match=rf"{name}Model gives 0 hidden_states.*layers=\(1,\).*leave layers= out"):
        Encoder(model, Tokenizer(minilm_folder, model), layers=1)


def test_a_model_that_needs_more_than_ids_is_refused_with_the_way_out(minilm_folder: str) -> None:
    model = make("T5", d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
    for layers in (-1, 1):
        with pytest.raises(EncoderError, match=r"T5Model does not run.*get_encoder"):
            Encoder(model, Tokenizer(minilm_folder, model), layers=layers)
    with pytest.raises(EncoderError, match="base_model"):
        probed(tiny(BertForTokenClassification, BertConfig))


class Differing:
    """A config whose layers differ in a setting, which transformers then refuses to give for all of them."""

    def __init__(self) -> None:
        self.block_size = 8
        self.is_heterogeneous = True
        self.per_layer_config = [SimpleNamespace(sliding_window=40), SimpleNamespace(sliding_window=None)]

    @property
    def sliding_window(self) -> int:
        raise ValueError("differs from layer to layer")


def test_windows_that_differ_from_layer_to_layer_are_probed() -> None:
    assert list(_odd_lengths(Differing())) == [9, 41]


class Wide(BertModel):
    """Like reformer, whose last layer is two tensors side by side."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        out = super().forward(*arguments, **named)
        out.last_hidden_state = torch.cat([out.last_hidden_state] * 2, -1)
        return out


def test_vectors_of_another_size_than_the_config_says_are_refused() -> None:
    for layers in ((3,), (1,)):
        with pytest.raises(EncoderError, match="vectors of (32 and )?64 numbers, and its config says hidden_size=32"):
            probe_batching(tiny(Wide, BertConfig), layers, 3)


def test_the_probed_texts_hold_what_breaks_packing() -> None:
    model = tiny(RobertaModel, RobertaConfig, pad_token_id=1, mask_token_id=150, attention_window=[64, 32, 5000])
    texts = probe_texts(model, (78, None, 10**6))
    lengths = [len(text) for text in texts]
    assert {1, 78, 150} <= set(np.concatenate(texts).tolist()) <= set(range(200))
    assert {33, 65} <= set(lengths) and max(lengths) > 10 * min(lengths) and len(set(lengths)) < len(lengths)
    assert sum(lengths) <= MOST_TOKENS
    assert all({1, 78, 150}.isdisjoint((text[0], text[-1])) for text in texts)
    short = tiny(RobertaModel, RobertaConfig, pad_token_id=1, max_position_embeddings=8)
    assert max(len(text) for text in probe_texts(short)) == 6


def test_a_model_whose_vectors_are_not_finite_is_refused() -> None:
    model = tiny(BertModel, BertConfig)
    with torch.no_grad():
        model.embeddings.LayerNorm.weight.fill_(float("nan"))
    with pytest.raises(EncoderError, match="not finite"):
        probed(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_self_test_judges_half_precision_by_its_own_noise(dtype: torch.dtype) -> None:
    assert probed(tiny(BertModel, BertConfig).to(dtype)).packs
    assert probed(tiny(MPNetModel, MPNetConfig).to(dtype)).way == "padded"
