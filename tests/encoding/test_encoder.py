"""`Encoder` equals plain transformers, text by text, in any batch."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tiny_bert
from fork_server import RANKS
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    MPNetConfig,
    MPNetModel,
)

from bertstream import ConfigError, Embeddings, Encoder, ScalarMix, TokenBatch
from bertstream.encoding import pretrained
from bertstream.tokens import Text


@pytest.fixture(scope="module")
def texts(sentences: list[str]) -> list[Text]:
    """Strings from 1 to some hundred tokens, an empty one, lists of words and pairs."""
    chosen: list[Text] = ["", "a", *sentences[:50], *sorted(sentences, key=len)[-3:]]
    return [*chosen, sentences[0].split(), ["", "\ufffd"], (sentences[1], sentences[2]), ("", "b")]


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


def test_a_text_without_any_token_is_a_row_of_zeros_however_it_is_pooled(tokenizer: Any) -> None:
    no_token = TokenBatch.from_padded(torch.tensor([[101, 102], [0, 0]]), torch.tensor([[1, 1], [0, 0]]))
    model: Any = tiny_bert()
    nn.init.ones_(model.pooler.dense.bias)
    for pooling in ("mean", "cls", "max", "pooler", ("pooler", "mean")):
        vectors = Encoder(model, tokenizer, output="sentence", pooling=pooling)(no_token).vectors
        assert vectors[0].any() and not vectors[1].any()


def test_the_log_says_at_load_how_an_encoder_runs(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bertstream"):
        encoder = Encoder(tiny_bert(), tokenizer)
    assert f"BertModel runs fused: {encoder.batching.reason}" in [record.getMessage() for record in caplog.records]


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


def test_it_survives_pickle_and_deepcopy(tokenizer: Any) -> None:
    encoder = Encoder(tiny_bert(), tokenizer, output="sentence", overflow="truncate")
    right = encoder(["a text"]).values
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(twin(["a text"]).values, right)


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


@pytest.mark.parametrize(("model", "config"), [(MPNetModel, MPNetConfig), (DebertaV2Model, DebertaV2Config)])
def test_a_model_that_cannot_be_packed_is_padded_and_equally_exact(
    model: Any, config: Any, tokenizer: Any, sentences: list[str]
) -> None:
    options = {"max_position_embeddings": 512, "pad_token_id": 0, "type_vocab_size": 0}
    own = tiny(model, config, vocab_size=30522, **options)
    encoder = Encoder(own, tokenizer, max_forward_tokens=200)
    assert encoder.batching.way == "padded" and "padded" in repr(encoder)

    @torch.no_grad()
    def plain(text: Text) -> Tensor:
        return own(input_ids=tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0]

    assert worst_error(encoder(sentences[:50]), sentences[:50], plain) <= 1e-5


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
