"""An encoder is right in every layer, family and mix of texts, or is refused in words when it is made."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import MASK, VOCABULARY, Tokenizer, make, probed, random_texts, tiny
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    FNetConfig,
    FNetModel,
    MobileBertConfig,
    MobileBertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)

from bertstream import ConfigError, Encoder, EncoderError
from bertstream.encoding import attention
from bertstream.encoding.attention import PACKED, Packing
from bertstream.encoding.probe import batch_of
from bertstream.tokens import Int32Array

UNKNOWN = 100
RIGHT_IN_EVERY_LAYER = [
    *("BigBird", "Data2VecText", "EsmWithMaskRatio", "Esm", "IBert", "Longformer", "Nystromformer", "SqueezeBert"),
    *("XLM", "ConvBert", "CLIPText", "Deberta", "MarkupLM", "Splinter"),
]


def xlnet() -> nn.Module:
    torch.manual_seed(0)
    return transformers.XLNetModel(
        transformers.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=3, n_head=4, d_inner=64, pad_token_id=5)
    ).eval()


@torch.no_grad()
def alone(model: nn.Module, text: Int32Array) -> list[Tensor]:
    """The layers of one text through plain transformers; a fresh model, because some change themselves."""
    ids = torch.from_numpy(text.astype(np.int64))[None]
    out = copy.deepcopy(model)(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    return [layer[0, : len(text)] for layer in (*out.hidden_states[:-1], out.last_hidden_state)]


def worst_error(
    encoder: Encoder, model: nn.Module, texts: Sequence[Int32Array], known: dict[bytes, list[Tensor]] | None = None
) -> float:
    """Of each text, all of which are encoded in one call; `known` keeps the right layers of each for further calls."""
    errors, known = [], {} if known is None else known
    for text, found in zip(texts, encoder(batch_of(texts)), strict=True):
        key = text.tobytes()
        if key not in known:
            known[key] = alone(model, text)
        right = torch.cat([known[key][layer] for layer in encoder.layers], -1)
        errors.append(float((found - right).norm() / right.norm()))
    return max(errors)


@pytest.mark.parametrize("name", RIGHT_IN_EVERY_LAYER)
def test_every_layer_is_the_models_own_whatever_is_beside_a_text(name: str, minilm_folder: str) -> None:
    model = make(name)
    texts = random_texts([5, 17, 60, 5, 16, 33, 4, 9, 75, 8], (MASK, 0, UNKNOWN, 1))
    known: dict[bytes, list[Tensor]] = {}
    for layers in ((1,), (3, 2, 0)):
        encoder = Encoder(model, Tokenizer(minilm_folder, model), layers=layers)
        assert worst_error(encoder, model, texts, known) <= 1e-5, encoder.batching
        assert worst_error(encoder, model, texts[::-1] * 2, known) <= 1e-5, encoder.batching


class MixesSegments(BertModel):
    """Counts the second segment over the whole row."""

    def forward(self, position_ids: Any = None, token_type_ids: Tensor | None = None, **options: Any) -> Any:
        if token_type_ids is not None:
            token_type_ids = (token_type_ids.cumsum(-1) > 3).long()
        return super().forward(position_ids=position_ids, token_type_ids=token_type_ids, **options)


def test_a_model_that_mixes_the_segments_of_its_row_is_not_packed() -> None:
    assert probed(tiny(BertModel, BertConfig)).packs
    found = probed(tiny(MixesSegments, BertConfig))
    assert found.way == "padded" and "packed differs" in found.reason
    assert probed(tiny(MixesSegments, BertConfig, type_vocab_size=1)).packs  # it has none


@pytest.mark.parametrize("name", ["BigBird", "XLM"])
def test_an_encoder_of_the_models_own_states_is_picklable(name: str, minilm_folder: str) -> None:
    model = make(name)
    encoder = Encoder(model, Tokenizer(minilm_folder, model), layers=1)
    assert encoder.batching.reads_own
    texts = random_texts([5, 9])
    right = encoder(batch_of(texts)).values  # transformers leaves hooks
    for twin in (pickle.loads(pickle.dumps(encoder)), copy.deepcopy(encoder), encoder):
        assert torch.equal(twin(batch_of(texts)).values, right)
    torch.save(encoder, io.BytesIO())


@pytest.mark.parametrize("layer", [0, 2])
def test_time_first_layers_are_read_from_the_models_own_states(minilm_folder: str, layer: int) -> None:
    model = xlnet()
    encoder = Encoder(model, Tokenizer(minilm_folder, model), layers=layer)
    assert encoder.batching.reads_own and "cannot be read" not in encoder.batching.reason
    assert worst_error(encoder, model, random_texts([5, 3, 3, 20])) <= 1e-5


class Crowded(BertModel):
    """A model in which every text depends on how many share its forward."""

    def forward(self, input_ids: Tensor, **named: Any) -> Any:
        out = super().forward(input_ids=input_ids, **named)
        out.last_hidden_state = out.last_hidden_state + 0.01 * len(input_ids)
        return out


def test_a_model_that_is_right_in_no_way_is_refused() -> None:
    with pytest.raises(EncoderError, match=r"layers \[3\] are not right in any way: .*grouped differs from one by one"):
        probed(tiny(Crowded, BertConfig))


@pytest.mark.parametrize("padding", [1, UNKNOWN])
@pytest.mark.parametrize("packed", [None, False])
@pytest.mark.parametrize("name", ["Roberta", "XLMRoberta", "Data2VecText", "Esm"])
def test_positions_are_counted_as_the_model_counts_them(
    name: str, minilm_folder: str, packed: bool | None, padding: int
) -> None:
    model = make(name, pad_token_id=padding, max_position_embeddings=padding + 41)
    encoder = Encoder(model, Tokenizer(minilm_folder, model), packed=packed)
    assert encoder.batching.packs == (packed is None)
    texts = random_texts([9, 4, 40, 9, 3], (padding, padding, UNKNOWN))
    assert any(padding in text[:-1] for text in texts)
    assert worst_error(encoder, model, texts) <= 1e-5
    lower, upper = encoder.split(1)
    torch.testing.assert_close(
        upper(lower(batch_of(texts))).values, encoder(batch_of(texts)).values, atol=1e-5, rtol=1e-5
    )


def test_a_mask_in_a_text_does_not_change_the_texts_beside_it(minilm_folder: str) -> None:
    for name, packs in (("EsmWithMaskRatio", False), ("Esm", True)):
        encoder = Encoder(make(name), Tokenizer(minilm_folder, make(name)))
        assert encoder.batching.packs == packs, encoder.batching
        plain, masked = random_texts([7, 9])
        masked[2:5] = MASK
        left = encoder(batch_of([plain]))[0]
        torch.testing.assert_close(encoder(batch_of([plain, masked]))[0], left, atol=1e-6, rtol=1e-5)


def test_a_model_that_changes_itself_begins_each_forward_as_it_was_loaded(minilm_folder: str) -> None:
    model = make("BigBird")
    encoder = Encoder(model, Tokenizer(minilm_folder, model))
    assert encoder.batching.way == "grouped" and encoder.batching.changes_itself
    assert model.attention_type == encoder.model.attention_type == "block_sparse"
    short, long = random_texts([5, 70])  # attention is sparse above 7 blocks of 4
    for texts in ([long], [short], [long], [short, long]):
        assert worst_error(encoder, model, texts) == 0
    again = pickle.loads(pickle.dumps(encoder))
    assert worst_error(again, model, [short, long]) == 0


def test_no_forward_is_longer_than_a_table_of_the_model(minilm_folder: str) -> None:
    def encoder_of(name: str, positions: int, layers: int = -1) -> Encoder:
        model = make(name, max_position_embeddings=positions)
        return Encoder(model, Tokenizer(minilm_folder, model), layers=layers, max_forward_tokens=4000)

    assert encoder_of("Bert", 1500).max_forward_tokens == 1500
    assert encoder_of("Bert", 80).max_forward_tokens == encoder_of("ModernBert", 1500).max_forward_tokens == 4000
    texts = random_texts([40, 39]) * 25
    for name, positions in (("ConvBert", 80), ("FNet", 80), ("MPNet", 80), ("RemBert", 1500)):
        encoder = encoder_of(name, positions, layers=0)  # which has no attention, so that almost any model packs it
        assert worst_error(encoder, make(name, max_position_embeddings=positions), texts) <= 1e-5


def test_a_model_with_several_lists_of_layers_is_trained_whole_or_not_at_all(minilm_folder: str) -> None:
    model = make("XLM")
    encoder = Encoder(model, Tokenizer(minilm_folder, model))
    with pytest.raises(ConfigError, match="4 lists of 3 layers"):
        encoder.unfreeze(1)
    encoder.unfreeze().train()
    encoder.embed(batch_of(random_texts([5, 9]))).values.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_a_model_that_gave_its_hidden_states_before_is_pickled(minilm_folder: str) -> None:
    model = make("Bert")
    alone(model, np.arange(5, 9, dtype=np.int32))
    model(input_ids=torch.tensor([[5, 6]]), output_hidden_states=True)
    encoder = Encoder(model, Tokenizer(minilm_folder, model), layers=1)
    assert pickle.loads(pickle.dumps(encoder.model)).config.num_hidden_layers == 2


def test_segments_that_the_model_does_not_know_are_refused(minilm_folder: str) -> None:
    model = make("Roberta")
    tokenizer = Tokenizer(minilm_folder, model)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    encoder = Encoder(model, tokenizer)
    with pytest.raises(EncoderError, match=r"text 1 has the segment id 1, the model knows 0 to 0 .*type_vocab_size=1"):
        encoder(["one", ("a question", "an answer")])


def test_bert_runs_packed_and_roberta_with_its_own_first_position() -> None:
    bert, roberta = tiny(BertModel, BertConfig), tiny(RobertaModel, RobertaConfig, pad_token_id=1)
    assert probed(bert).first_position == 0
    assert probed(roberta).first_position == 2
    assert bert.config._attn_implementation == roberta.config._attn_implementation == PACKED


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (MPNetModel, MPNetConfig),
        (DebertaV2Model, DebertaV2Config),
        (MobileBertModel, MobileBertConfig),
        (FNetModel, FNetConfig),
    ],
)
def test_a_model_that_mixes_packed_neighbours_is_refused_and_left_as_it_was(model: Any, config: Any) -> None:
    refused = tiny(model, config)
    before = refused.config._attn_implementation
    support = probed(refused)
    assert not support.packs and support.reason
    assert refused.config._attn_implementation == before
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    assert refused(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state.isfinite().all()


def test_the_self_test_looks_beyond_a_sliding_window(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"local_attention": 16, "global_attn_every_n_layers": 2, "pad_token_id": 0}
    assert probed(tiny(ModernBertModel, ModernBertConfig, **options)).packs
    blind = attention.packed_attention

    def without_window(*arguments: Any, **named: Any) -> Any:
        return blind(*arguments, **named | {"sliding_window": None})

    monkeypatch.setattr(attention, "packed_attention", without_window)
    assert not probed(tiny(ModernBertModel, ModernBertConfig, **options)).packs
    monkeypatch.undo()
    attention.register()


def test_the_self_test_tries_blocks_of_short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    block_mask = Packing.block_mask

    def noted(packing: Packing, texts: int, length: int, more: int, like: Tensor) -> Tensor:
        tried.append(texts)
        return block_mask(packing, texts, length, more, like)

    monkeypatch.setattr(Packing, "block_mask", noted)
    assert probed(tiny(BertModel, BertConfig, max_position_embeddings=4096)).way == "fused"
    assert max(tried, default=0) >= 3
