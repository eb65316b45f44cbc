"""An encoder is right in every layer, family and mix of texts, or is refused in words when it is made."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import TINY, VOCABULARY, Tokenizer, make
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
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
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

from bertstream import ConfigError, Encoder, EncoderError
from bertstream.encoding import attention
from bertstream.encoding.attention import PACKED, BatchingSupport, packed_positions
from bertstream.encoding.pretrained import most_positions
from bertstream.encoding.probe import MOST_TOKENS, _odd_lengths, batch_of, probe_texts
from bertstream.encoding.self_test import probe_batching
from bertstream.tokens import Int32Array

MASK, UNKNOWN = 103, 100
OPTIONS: dict[str, dict[str, Any]] = {
    "BigBird": {"block_size": 4, "num_random_blocks": 1},
    "Data2VecText": {"pad_token_id": 1},
    "EsmWithMaskRatio": {"mask_token_id": MASK, "token_dropout": True, "position_embedding_type": "rotary"},
    "Esm": {"mask_token_id": MASK, "token_dropout": False},
    "IBert": {"pad_token_id": 1},
    "Longformer": {"attention_window": [16] * 3},
    "Nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 8},
    "SqueezeBert": {"embedding_size": 32},
    "XLM": {"emb_dim": 32, "n_layers": 3, "n_heads": 4, "pad_index": 0},
}
RIGHT_IN_EVERY_LAYER = [*OPTIONS, "ConvBert", "CLIPText", "Deberta", "MarkupLM", "Splinter"]


def tiny(model: type[nn.Module], config: type[Any], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return model(config(**TINY | options)).eval()


def probed(model: nn.Module) -> BatchingSupport:
    """How the last layer of a tiny model runs."""
    return probe_batching(model, (3,), 3)[1]


def family(name: str, **options: Any) -> nn.Module:
    return make(name.removesuffix("WithMaskRatio"), **OPTIONS.get(name, {}) | options)


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


def random_texts(lengths: Sequence[int], special: Sequence[int] = (), seed: int = 0) -> list[Int32Array]:
    """Texts with these ids inside, each at another place, and not in every text."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(1000, VOCABULARY, length, np.int32) for length in lengths]
    for number, text in enumerate(texts):
        for i in special[number % (len(special) + 1) :]:
            text[rng.integers(1, max(2, len(text) - 1))] = i
    return texts


@pytest.mark.parametrize("name", RIGHT_IN_EVERY_LAYER)
def test_every_layer_is_the_models_own_whatever_is_beside_a_text(name: str, minilm_folder: str) -> None:
    model = family(name)
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
    model = family(name)
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


class Crowded(BertModel):
    """A model in which every text depends on how many share its forward."""

    def forward(self, input_ids: Tensor, **named: Any) -> Any:
        out = super().forward(input_ids=input_ids, **named)
        out.last_hidden_state = out.last_hidden_state + 0.01 * len(input_ids)
        return out


def test_a_model_that_is_right_in_no_way_is_refused() -> None:
    with pytest.raises(EncoderError, match=r"layers \[3\] are not right in any way: .*grouped differs from one by one"):
        probed(tiny(Crowded, BertConfig))


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


@pytest.mark.parametrize("padding", [1, UNKNOWN])
@pytest.mark.parametrize("packed", [None, False])
@pytest.mark.parametrize("name", ["Roberta", "XLMRoberta", "Data2VecText", "Esm"])
def test_positions_are_counted_as_the_model_counts_them(
    name: str, minilm_folder: str, packed: bool | None, padding: int
) -> None:
    model = family(name, pad_token_id=padding, max_position_embeddings=padding + 41)
    encoder = Encoder(model, Tokenizer(minilm_folder, model), packed=packed)
    assert encoder.batching.packs == (packed is None)
    texts = random_texts([9, 4, 40, 9, 3], (padding, padding, UNKNOWN))
    assert any(padding in text[:-1] for text in texts)
    assert worst_error(encoder, model, texts) <= 1e-5
    lower, upper = encoder.split(1)
    torch.testing.assert_close(
        upper(lower(batch_of(texts))).values, encoder(batch_of(texts)).values, atol=1e-5, rtol=1e-5
    )


@given(texts=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=8), min_size=1, max_size=5))
def test_positions_of_a_packed_row_are_those_of_its_texts(texts: list[list[int]]) -> None:
    lengths = np.array([len(text) for text in texts], np.int32)
    ids = np.concatenate(texts)
    for padding in (0, 3, 9):
        right = [
            RobertaEmbeddings.create_position_ids_from_input_ids(torch.tensor([text]), padding)[0].numpy()
            for text in texts
        ]
        found = packed_positions(ids, lengths, BatchingSupport("packed", "", skipped_id=padding))
        assert found.tolist() == np.concatenate(right).tolist()
    plain = packed_positions(ids, lengths, BatchingSupport("packed", ""))
    assert plain.tolist() == [i for text in texts for i in range(len(text))]


def test_a_mask_in_a_text_does_not_change_the_texts_beside_it(minilm_folder: str) -> None:
    for name, packs in (("EsmWithMaskRatio", False), ("Esm", True)):
        encoder = Encoder(family(name), Tokenizer(minilm_folder, family(name)))
        assert encoder.batching.packs == packs, encoder.batching
        plain, masked = random_texts([7, 9])
        masked[2:5] = MASK
        left = encoder(batch_of([plain]))[0]
        torch.testing.assert_close(encoder(batch_of([plain, masked]))[0], left, atol=1e-6, rtol=1e-5)


def test_a_model_that_changes_itself_begins_each_forward_as_it_was_loaded(minilm_folder: str) -> None:
    model = family("BigBird")
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


def test_positions_end_where_the_frequencies_of_a_whole_forward_change() -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    known = {"max_position_embeddings": 512}
    for made, right in (
        ({}, None),
        ({"max_position_embeddings": -1}, None),
        (known, 512),
        (known | {"rope_parameters": rope}, 64),
        (known | {"rope_scaling": rope}, 64),
        (known | {"rope_parameters": {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}}, 64),
        (known | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 512),
    ):
        assert most_positions(type("Config", (), made)) == right


def test_the_probed_texts_hold_what_breaks_packing() -> None:
    model = tiny(RobertaModel, RobertaConfig, pad_token_id=1, mask_token_id=150, attention_window=[64, 32, 5000])
    texts = probe_texts(model, (77, None, 10**6))
    lengths = [len(text) for text in texts]
    assert {1, 77, 150} <= set(np.concatenate(texts).tolist()) <= set(range(200))
    assert {33, 65} <= set(lengths) and max(lengths) > 10 * min(lengths) and len(set(lengths)) < len(lengths)
    assert sum(lengths) <= MOST_TOKENS
    assert all({1, 77, 150}.isdisjoint((text[0], text[-1])) for text in texts)
    short = tiny(RobertaModel, RobertaConfig, pad_token_id=1, max_position_embeddings=8)
    assert max(len(text) for text in probe_texts(short)) == 6


@pytest.mark.parametrize("name", ["Longformer", "CLIPText", "MarkupLM", "XLM", "SqueezeBert"])
def test_a_model_that_cannot_be_split_is_refused_in_words(name: str, minilm_folder: str) -> None:
    model = family(name)
    with pytest.raises(
        ConfigError, match=rf"split\(at=1\): {name}Model cannot be split, because .* from layer 1 on; .*unfreeze\(\)$"
    ):
        Encoder(model, Tokenizer(minilm_folder, model)).split(1)


def test_halves_that_differ_from_the_whole_are_refused(minilm_folder: str) -> None:
    model = family("BigBird")
    with pytest.raises(ConfigError, match="differ from the whole"):
        Encoder(model, Tokenizer(minilm_folder, model)).split(1)


def test_a_model_with_eager_attention_only_is_split(minilm_folder: str) -> None:
    model = family("Splinter")
    encoder = Encoder(model, Tokenizer(minilm_folder, model))
    lower, upper = encoder.split(1)
    batch = batch_of(random_texts([5, 9]))
    torch.testing.assert_close(upper(lower(batch)).values, encoder(batch).values, atol=1e-5, rtol=1e-5)


def test_a_model_with_several_lists_of_layers_is_trained_whole_or_not_at_all(minilm_folder: str) -> None:
    model = family("XLM")
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
