"""The fused forward: equal to plain transformers, never stale, and left alone where a model is not what it knows."""

from __future__ import annotations

import copy
import logging
import os
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import PAIRS, WORDS, Tokenizer, make
from torch import Tensor, nn

from bertstream import Encoder, EncoderError
from bertstream.encoding import onednn
from bertstream.tokens import Text

FUSED = ("Bert", "Roberta", "XLMRoberta", "Camembert", "DistilBert", "Electra", "Albert", "Ernie", "ModernBert")
FUSED = (*FUSED, "NomicBert", "EuroBert", "GroupedEuroBert")

TEXTS: list[Text] = ["a bank", "", "The bank raised its rates again this spring.", [*WORDS], "one", "a bat"]


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return make("Bert").requires_grad_(False)


@pytest.fixture(scope="module")
def unused(bert: nn.Module, minilm_folder: str) -> Encoder:
    own = copy.deepcopy(bert)
    return Encoder(own, Tokenizer(minilm_folder, own))


@pytest.fixture(params=["plain", "blocked"])
def encoder(unused: Encoder, request: pytest.FixtureRequest) -> Encoder:
    """One that a test may change."""
    encoder = copy.deepcopy(unused)
    return with_blocked_weights(encoder) if request.param == "blocked" else encoder


def with_blocked_weights(encoder: Encoder) -> Encoder:
    assert encoder._fused is not None
    encoder._fused.use_blocked_weights(64)
    return encoder


def alone(model: nn.Module, encoder: Encoder, texts: list[Text], *layers: int) -> Tensor:
    """The hidden states of each text by the model itself, one after the other; of several layers side by side."""
    rows = []
    with torch.no_grad():
        for text in texts:
            batch = encoder.tokenizer.batch([text])
            if not batch.num_tokens:
                continue
            inputs = {"input_ids": torch.from_numpy(batch.input_ids).long()[None]}
            if batch.token_type_ids is not None:
                inputs["token_type_ids"] = torch.from_numpy(batch.token_type_ids).long()[None]
            out = model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), output_hidden_states=True)
            rows.append(torch.cat([out.hidden_states[layer][0] for layer in layers], -1))
    return torch.cat(rows)


def error(found: Tensor, right: Tensor) -> float:
    return float((found.float() - right).norm() / right.norm())


@pytest.mark.parametrize("name", FUSED)
def test_every_layer_of_every_fused_family_equals_the_model_itself(name: str, minilm_folder: str) -> None:
    model = make(name).requires_grad_(False)
    for layers in ((0, 1, 2, 3), (FUSED.index(name) % 3,)):  # the second cuts the model off, here or there
        encoder = Encoder(model, Tokenizer(minilm_folder, model), layers=layers)
        assert encoder.batching.way == "fused", encoder.batching
        right = alone(model, encoder, TEXTS, *layers)
        assert error(encoder(TEXTS).values, right) < 1e-5
        assert error(with_blocked_weights(encoder)(TEXTS).values, right) < 1e-5


@pytest.mark.parametrize("name", FUSED)
def test_blocked_weights_of_bfloat16_are_no_less_exact(name: str, minilm_folder: str) -> None:
    model = make(name).requires_grad_(False)
    right = alone(model, encoder := Encoder(model, Tokenizer(minilm_folder, model)), TEXTS, 3)
    encoder.to(torch.bfloat16)
    plain = error(encoder(TEXTS).values, right)
    assert error(with_blocked_weights(encoder)(TEXTS).values, right) < 1.2 * plain


def test_the_task_of_ernie_counts(minilm_folder: str) -> None:
    model = make("Ernie", use_task_id=True).requires_grad_(False)
    encoder = Encoder(model, Tokenizer(minilm_folder, model))
    assert encoder.batching.way == "fused"
    assert error(encoder(TEXTS).values, alone(model, encoder, TEXTS, 3)) < 1e-5


# Without them here; with them where test_kernels.py runs this in Triton's interpreter.
@pytest.mark.parametrize("name", ["Bert", "ModernBert", "GroupedEuroBert"])
def test_heads_that_fit_the_kernels_are_right_with_and_without_them(name: str, minilm_folder: str) -> None:
    # Heads of 16, few of them, and a short self-test: the interpreter is slow.
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 24}
    if "Euro" in name:
        sizes |= {"num_key_value_heads": 1, "head_dim": 16}
    model = make(name, **sizes).requires_grad_(False)
    encoder = Encoder(model, Tokenizer(minilm_folder, model), layers=(0, 1, 2), combine="stack")
    texts: list[Text] = ["a bank", "The bank of the river", "one"]
    found = encoder(texts).values
    assert encoder.batching.way == "fused" and encoder._fused is not None
    assert encoder._fused._kernels == (os.environ.get("TRITON_INTERPRET") == "1")
    for place, layer in enumerate(encoder.layers):
        assert error(found[:, place], alone(model, encoder, texts, layer)) < 1e-5


@pytest.mark.parametrize("name", FUSED)
def test_pairs_and_windows_equal_the_packed_forward(name: str, minilm_folder: str) -> None:
    model = make(name).requires_grad_(False)
    tokenizer = Tokenizer(minilm_folder, model)
    options: dict[str, Any] = {"layers": (0, 2, 3), "combine": "stack", "overflow": "windows", "stride": 4}
    encoder = Encoder(model, tokenizer, max_length=16, **options)
    assert encoder.batching.way == "fused", encoder.batching
    long = " ".join(WORDS * 3)
    kinds = [[long, *TEXTS], PAIRS] if getattr(model.config, "type_vocab_size", 0) > 1 else [[long, *TEXTS]]
    fused = [encoder(texts).values for texts in kinds]
    encoder._fused = None
    for texts, found in zip(kinds, fused, strict=True):
        assert error(found, encoder(texts).values) < 1e-5


def test_a_lower_half_is_fused_and_the_upper_half_continues_it(encoder: Encoder) -> None:
    right = encoder(TEXTS).values
    lower, upper = encoder.split(2)
    assert lower.batching.way == "fused"
    upper.requires_grad_(False)
    assert error(upper(lower(TEXTS)).values, right) < 1e-5


def written_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.encoder.layer[1].attention.self.key.weight.mul_(1.5)


def loaded(model: nn.Module) -> None:
    state = {name: 1.25 * tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    model.load_state_dict(state, strict=False)


def replaced(model: nn.Module) -> None:
    old = model.encoder.layer[0].attention.self.value
    model.encoder.layer[0].attention.self.value = nn.Linear(old.in_features, old.out_features).requires_grad_(False)


def another_parameter(model: nn.Module) -> None:
    out = model.encoder.layer[2].output.dense
    out.weight = nn.Parameter(2 * out.weight, requires_grad=False)


def a_layer_moved(model: nn.Module) -> None:
    layers = model.encoder.layer
    layers[0], layers[1] = layers[1], layers[0]


def swapped_data(model: nn.Module) -> None:
    query = model.encoder.layer[0].attention.self.query
    query.weight.data = 1.5 * query.weight.data


@pytest.mark.parametrize("change", [written_in_place, loaded, replaced, another_parameter, a_layer_moved, swapped_data])
def test_a_changed_model_gives_its_new_vectors(encoder: Encoder, change: Any) -> None:
    before = encoder(TEXTS).values
    change(encoder.model)
    after = encoder(TEXTS).values
    assert encoder._fused is not None and encoder._fused.ready(encoder.model)
    packed = copy.deepcopy(encoder)
    packed._fused = None
    assert error(after, packed(TEXTS).values) < 1e-5 < error(after, before)


def test_another_dtype_converts_the_joined_weights(encoder: Encoder) -> None:
    encoder(TEXTS)
    encoder.to(torch.bfloat16)
    found = encoder(TEXTS).values
    packed = copy.deepcopy(encoder)
    packed._fused = None
    assert error(found, packed(TEXTS).values) < 0.05


@pytest.mark.parametrize("fused_optimizer", [False, True])
@pytest.mark.parametrize("part", ["", "query.bias", "value.weight"])
def test_training_is_seen_at_every_step(encoder: Encoder, fused_optimizer: bool, part: str) -> None:
    frozen = encoder(TEXTS).values
    trained = [p for name, p in encoder.named_parameters() if name.endswith(part) and "pooler" not in name]
    encoder.unfreeze(parameters=trained)
    optimizer = torch.optim.AdamW(trained, 0.1, fused=fused_optimizer)
    seen = [frozen]
    for _ in range(2):
        encoder(TEXTS).values.pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(encoder.encode(TEXTS).values)
    encoder.freeze()
    assert torch.allclose(encoder(TEXTS).values, seen[-1], atol=1e-5)
    assert all(error(a, b) > 1e-3 for a, b in pairwise(seen))


def test_weights_that_another_module_trains_are_never_joined(bert: nn.Module, minilm_folder: str) -> None:
    model = copy.deepcopy(bert).requires_grad_(True)
    encoder = Encoder(model, Tokenizer(minilm_folder, model))
    before = encoder(TEXTS).values
    assert encoder.batching.way == "fused" and encoder._fused is not None and encoder._fused.copied_bytes == 0
    for parameter in model.parameters():
        parameter.data.mul_(1.1)  # leaves no trace
    after = encoder(TEXTS).values
    assert error(after, alone(model, encoder, TEXTS, 3)) < 1e-5 < error(after, before)


def test_an_attention_that_would_mix_packed_texts_is_refused(encoder: Encoder) -> None:
    right = encoder(TEXTS).values
    with pytest.raises(EncoderError, match=r"set_attn_implementation\('sdpa'\) on a copy of it"):
        encoder.model(torch.ones(1, 4, dtype=torch.int64))
    encoder.model.set_attn_implementation("sdpa")  # type: ignore[operator]
    with pytest.raises(EncoderError, match="attention is 'sdpa' now, which mixes the texts"):
        encoder.unfreeze()(TEXTS)
    encoder.model.set_attn_implementation("bertstream_packed")  # type: ignore[operator]
    assert error(encoder(TEXTS).values.detach(), right) < 1e-5


def test_gradients_are_those_of_the_model(bert: nn.Module, minilm_folder: str) -> None:
    model = copy.deepcopy(bert).requires_grad_(True)
    encoder = Encoder(model, Tokenizer(minilm_folder, model))
    encoder.embed(["a bank"]).values.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pooler" not in name)


def test_a_hook_runs_and_is_named_once_in_the_log(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    right = encoder(TEXTS).values
    layer = encoder.model.get_submodule("encoder.layer.1")
    with caplog.at_level(logging.WARNING):
        handle = layer.register_forward_hook(lambda module, arguments, out: 0 * out)
        assert error(encoder(TEXTS).values, right) > 0.1
        encoder(TEXTS)
    handle.remove()
    assert torch.equal(encoder(TEXTS).values, right)
    (record,) = caplog.records
    assert "encoder.layer.1" in record.message and "hook" in record.message


def test_the_way_is_the_one_that_is_used_now(encoder: Encoder) -> None:
    layer = encoder.model.get_submodule("encoder.layer.1")
    handle = layer.register_forward_hook(lambda module, arguments, out: 0 * out)
    assert (
        encoder.batching.way == "packed"
        and "not fused now: it has a hook on encoder.layer.1" in encoder.batching.reason
    )
    assert ", packed, " in repr(encoder)
    handle.remove()
    assert encoder.batching.way == "fused" and ", fused, " in repr(encoder)
    layer.forward = lambda states, *given, **options: states  # type: ignore[assignment]
    assert encoder.batching.way == "packed" and "a forward of its own" in encoder.batching.reason
    del layer.forward
    encoder.model.get_submodule("encoder.layer.0.output").dense = Doubled(64, 32)
    assert encoder.batching.way == "packed" and "Doubled" in encoder.batching.reason


def test_a_trained_encoder_says_that_its_own_modules_run(encoder: Encoder) -> None:
    encoder.unfreeze().train()
    assert encoder.batching.way == "packed" and "train mode" in encoder.batching.reason
    assert encoder.freeze().batching.way == "fused"


def test_freeze_notices_weights_that_were_written_through_data(encoder: Encoder) -> None:
    """As the averages of an EMA are; also of an encoder that is frozen, and of another over the same weights."""
    other = Encoder(encoder.model, encoder._pretrained_tokenizer)
    before, named = encoder(TEXTS).values, other.fingerprint()
    assert torch.equal(other(TEXTS).values, before)
    for parameter in encoder.parameters():
        parameter.data.mul_(1.1)
    encoder.freeze()
    packed = copy.deepcopy(encoder)
    packed._fused = None
    right = packed(TEXTS).values
    for one in (encoder, other):
        assert error(one(TEXTS).values, right) < 1e-5 < error(before, right)
    assert other.fingerprint() == encoder.fingerprint() != named


def test_vectors_with_dropout_have_no_name_in_a_cache(encoder: Encoder) -> None:
    named = encoder.fingerprint()
    encoder.model.get_submodule("encoder.layer.1").train()
    assert named is not None and encoder.fingerprint() is None
    assert encoder.freeze().fingerprint() == named


def test_vectors_under_a_hook_or_a_patched_forward_have_no_name_in_a_cache(encoder: Encoder) -> None:
    named = encoder.fingerprint()
    layer = encoder.model.get_submodule("encoder.layer.1")
    handle = layer.register_forward_hook(lambda module, arguments, out: 0 * out)
    assert named is not None and encoder.fingerprint() is None
    handle.remove()
    assert encoder.fingerprint() == named
    layer.forward = lambda states, *given, **options: states  # type: ignore[assignment]
    assert encoder.fingerprint() is None
    del layer.forward
    assert encoder.fingerprint() == named


def test_a_pre_hook_and_a_patched_forward_run(encoder: Encoder) -> None:
    right = encoder(TEXTS).values
    dense = encoder.model.get_submodule("encoder.layer.0.intermediate.dense")
    handle = dense.register_forward_pre_hook(lambda module, arguments: (0 * arguments[0],))
    assert error(encoder(TEXTS).values, right) > 0.1
    handle.remove()
    dense.forward = lambda x: torch.zeros(*x.shape[:-1], dense.out_features)  # type: ignore[assignment]
    assert error(encoder(TEXTS).values, right) > 0.1
    del dense.forward
    assert torch.equal(encoder(TEXTS).values, right)


def test_an_adapter_put_into_a_layer_runs(encoder: Encoder) -> None:
    peft = pytest.importorskip("peft")
    right = encoder(TEXTS).values
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["query"], init_lora_weights=False), encoder.model
    )
    found = [encoder(TEXTS).values for _ in range(3)]
    assert adapted is encoder.model and error(found[0], right) > 1e-3
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


class Mirrored(nn.Module):
    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.value, self.own = own.query, own.key, own.value, own

    def forward(self, states: Tensor, *given: Any, **named: Any) -> Any:
        attended, *others = self.own(states, *given, **named)
        return -attended, *others


@pytest.mark.parametrize("path", ["encoder.layer.1.attention.self", "encoder.layer.1.intermediate.intermediate_act_fn"])
def test_a_module_of_another_class_with_the_same_weights_runs(encoder: Encoder, path: str) -> None:
    right = encoder(TEXTS).values
    owner, _, name = path.rpartition(".")
    old = encoder.model.get_submodule(path)
    new = Mirrored(old) if name == "self" else nn.ReLU()
    setattr(encoder.model.get_submodule(owner), name, new)
    found = [encoder(TEXTS).values for _ in range(2)]
    assert error(found[0], right) > 1e-3 and torch.equal(found[0], found[1])
    setattr(encoder.model.get_submodule(owner), name, old)
    assert torch.equal(encoder(TEXTS).values, right)


def test_an_object_whose_class_is_swapped_runs(encoder: Encoder) -> None:
    right = encoder(TEXTS).values
    encoder.model.get_submodule("encoder.layer.1.output.dense").__class__ = Doubled
    assert error(encoder(TEXTS).values, right) > 1e-3


def test_a_model_in_train_mode_has_its_dropout(encoder: Encoder) -> None:
    right = encoder(TEXTS).values
    encoder.model.train()
    assert error(encoder(TEXTS).values, right) > 1e-3
    encoder.model.eval()
    assert torch.equal(encoder(TEXTS).values, right)


def test_a_hooked_encoder_is_copied_with_its_hook(encoder: Encoder) -> None:
    right = encoder(TEXTS).values
    encoder.model.get_submodule("encoder.layer.1").register_forward_hook(lambda module, given, out: 0 * out)
    other = copy.deepcopy(encoder)
    assert torch.equal(other(TEXTS).values, encoder(TEXTS).values) and error(other(TEXTS).values, right) > 0.1


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_model_with_foreign_modules_runs_packed_and_says_so(bert: nn.Module, minilm_folder: str) -> None:
    model = copy.deepcopy(bert)
    dense = model.encoder.layer[1].output.dense
    doubled = Doubled(dense.in_features, dense.out_features)
    doubled.load_state_dict(dense.state_dict())
    model.encoder.layer[1].output.dense = doubled
    encoder = Encoder(model, Tokenizer(minilm_folder, model))
    assert encoder.batching.way == "packed" and "Doubled" in encoder.batching.reason
    assert error(encoder(TEXTS).values, alone(model, encoder, TEXTS, 3)) < 1e-5


def test_what_the_description_does_not_see_fails_the_self_test(
    bert: nn.Module, minilm_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(bert)
    kind = type(model.encoder.layer[0].output)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *given: 1.5 * forward(self, *given))
    encoder = Encoder(model, Tokenizer(minilm_folder, model))
    assert encoder.batching.way == "packed" and "fused differs" in encoder.batching.reason


def test_packed_false_does_not_fuse(bert: nn.Module, minilm_folder: str) -> None:
    assert Encoder(bert, Tokenizer(minilm_folder, bert), packed=False).batching.way == "padded"


def test_autocast_applies_to_embed(encoder: Encoder) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder.embed(TEXTS).values
    assert 1e-4 < error(found, encoder(TEXTS).values) < 0.05


def test_a_copied_and_a_pickled_encoder_are_fused_over_their_own_weights(encoder: Encoder) -> None:
    right = encoder(TEXTS).values
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        written_in_place(other.model)
        assert other._fused.model is other.model and error(other(TEXTS).values, right) > 1e-3
    assert torch.equal(encoder(TEXTS).values, right)


def test_layers_that_share_weights_share_the_joined_ones(minilm_folder: str) -> None:
    albert = make("Albert").requires_grad_(False)
    encoder = Encoder(albert, Tokenizer(minilm_folder, albert), layers=(1, 3))
    encoder(TEXTS)
    one_layer = 3 * 32 * 32 + 3 * 32
    assert encoder._fused is not None and encoder._fused.copied_bytes == 4 * one_layer


def test_blocked_weights_are_counted_and_given_up_again(bert: nn.Module, minilm_folder: str) -> None:
    encoder = Encoder(bert, Tokenizer(minilm_folder, bert))
    right, fused = encoder(TEXTS).values, encoder._fused
    assert fused is not None
    joined = fused.copied_bytes
    with_blocked_weights(encoder)(TEXTS)
    products = [w for name, w in bert.named_parameters() if "encoder.layer" in name and w.dim() == 2]
    biases = [w for name, w in bert.named_parameters() if "attention.self" in name and w.dim() == 1]
    assert fused.copied_bytes == sum(weight.nbytes for weight in (*products, *biases)) > joined
    fused.use_blocked_weights(None)
    assert torch.equal(encoder(TEXTS).values, right) and fused.copied_bytes == joined


def test_without_the_operators_weights_stay_as_they_are(
    bert: nn.Module, minilm_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "available", lambda dtype: False)
    encoder = Encoder(bert, Tokenizer(minilm_folder, bert))
    right = encoder(TEXTS).values
    assert torch.equal(with_blocked_weights(encoder)(TEXTS).values, right)


@pytest.mark.parametrize("is_faster", [True, False])
def test_calibrate_takes_the_faster_layout_once(
    bert: nn.Module, minilm_folder: str, is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def measured(run: Any, than: Any) -> bool:
        timed.append([work() for work in (run, than)])
        return is_faster

    monkeypatch.setattr("bertstream.encoding.calibrating.is_faster", measured)
    encoder = Encoder(bert, Tokenizer(minilm_folder, bert), max_forward_tokens=128)
    right, fused = encoder(TEXTS).values, encoder._fused
    assert fused is not None
    plain = fused.copied_bytes
    for _ in range(2):
        assert encoder.calibrate() == 128
        assert error(encoder(TEXTS).values, right) < 1e-5 and (fused.copied_bytes > plain) == is_faster
    assert len(timed) == 1
