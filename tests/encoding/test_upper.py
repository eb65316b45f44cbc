"""An encoder in two halves: together they are the whole, and the upper one learns as it would in the whole."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FULL_RUN
from families import PAIRS, WORDS, Tokenizer, loss_of, make, random_texts
from torch import Tensor, nn

import bertstream
from bertstream import ConfigError, EmbeddingCache, Embeddings, Encoder, EncoderError
from bertstream.encoding.layers import layer_list
from bertstream.encoding.probe import batch_of
from bertstream.testing import write_shards

FAMILIES = ("Bert", "Roberta", "DistilBert", "Electra", "Albert", "ModernBert", "DebertaV2", "MPNet", "MobileBert")
SHARED = {"Albert", "DebertaV2", "MPNet"}  # both halves use some of their weights

TEXTS: list[Any] = [WORDS, ["one"], [], ["a", "", "bank"], "split by blanks", WORDS * 2]
WINDOWS: dict[str, Any] = {"overflow": "windows", "max_length": 12, "stride": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "tokens": {"special_tokens": False, "max_forward_tokens": 24},
    "windows of words": {**WINDOWS, "output": "words", "pooling": "first_last"},
    "windows of tokens": WINDOWS,
    "sentence": {"output": "sentence", "pooling": ("cls", "mean"), "normalize": True},
    "layers": {"layers": (2, -1), "combine": "stack"},
    "a lower last layer": {"layers": 2, "output": "words"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, make(request.param)


def encoder_of(model: nn.Module, minilm_folder: str, **options: Any) -> Encoder:
    return Encoder(model, Tokenizer(minilm_folder, model), **options)


def texts_of(encoder: Encoder) -> list[Any]:
    return TEXTS + (PAIRS if encoder.tokenizer.segments and encoder.output != "words" else [])


def trained(upper: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in upper.named_parameters()}


# Two of the options in the order of the families: neighbours have others. So with the layer of a split, below.
@pytest.mark.parametrize("number", range(len(OPTIONS) if FULL_RUN else 2))
def test_both_halves_together_equal_the_whole(family: tuple[str, nn.Module], minilm_folder: str, number: int) -> None:
    options = [*OPTIONS.values()][(FAMILIES.index(family[0]) + number) % len(OPTIONS)]
    encoder = encoder_of(copy.deepcopy(family[1]), minilm_folder, **options)
    texts = texts_of(encoder)
    right = encoder(texts)
    for at in range(1, min(max(encoder.layers), min(encoder.layers) + 1)):
        lower, upper = encoder.split(at)
        assert lower.batching.packs == upper.batching.packs == encoder.batching.packs
        states = lower(texts)
        assert states.values.shape == (states.tokens.num_tokens, 32) and not states.values.requires_grad
        found = upper(states)
        torch.testing.assert_close(found.values, right.values, atol=1e-5, rtol=0)
        assert found.values.requires_grad and found.lengths.equal(right.lengths) and found.output == right.output
        assert (found.present is None) == (right.present is None)
        assert upper.embedding_dim == encoder.embedding_dim and upper.row_shape == encoder.row_shape


@pytest.mark.parametrize("number", range(2 if FULL_RUN else 1))
def test_the_lower_half_gives_the_hidden_states_of_its_layer(
    family: tuple[str, nn.Module], minilm_folder: str, number: int
) -> None:
    at = 1 + (FAMILIES.index(family[0]) + number) % 2
    encoder = encoder_of(copy.deepcopy(family[1]), minilm_folder)
    right = encoder_of(family[1], minilm_folder, layers=at)(TEXTS)
    assert encoder.split(at)[0](TEXTS).values.equal(right.values)


@pytest.mark.parametrize("number", range(2 if FULL_RUN else 1))
def test_gradients_equal_those_of_a_plain_loop(family: tuple[str, nn.Module], minilm_folder: str, number: int) -> None:
    model, at = family[1], 2 - (FAMILIES.index(family[0]) + number) % 2
    encoder = encoder_of(copy.deepcopy(model), minilm_folder, max_forward_tokens=16)
    lower, upper = encoder.split(at)
    texts = texts_of(encoder)
    loss = loss_of(list(upper(lower(texts))))
    loss.backward()

    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")  # type: ignore[operator]
    _no_gradients_below(plain, at)
    rows = []
    for text in encoder.tokenizer(texts):
        inputs = {"input_ids": torch.from_numpy(text.input_ids).long()[None]}
        if text.token_type_ids is not None:
            inputs["token_type_ids"] = torch.from_numpy(text.token_type_ids).long()[None]
        out = plain(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
        rows.append(out.last_hidden_state[0])
    right = loss_of(rows)
    right.backward()
    assert abs(loss - right) <= 1e-5 * abs(right)
    own = dict(encoder.model.named_parameters())
    compared = 0
    for path, parameter in plain.named_parameters():
        if parameter.grad is None:
            assert own[path].grad is None and not own[path].requires_grad, path
            continue
        largest = float(parameter.grad.abs().max())
        found = own[path].grad
        assert found is not None, path
        if largest < 1e-5:  # a key's bias moves all scores of a query alike, so its gradient is zero but for rounding
            assert "k" in path and path.endswith("bias") and found.abs().max() < 1e-5
            continue
        assert (found - parameter.grad).abs().max() <= 1e-5 * largest, path
        compared += 1
    assert compared >= 7
    assert all(parameter.grad is None for parameter in lower.parameters())


def _no_gradients_below(model: nn.Module, at: int) -> None:
    """As a plain loop would have it that trains the layers from `at` on; albert runs its one entry several times."""
    calls = 0
    total = model.config.num_hidden_layers  # type: ignore[union-attr]
    for layer in layer_list(model):
        run = layer.forward

        @functools.wraps(run)
        def forward(*arguments: Any, run: Any = run, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if (calls - 1) % total >= at:
                return run(*arguments, **named)
            with torch.no_grad():
                return run(*arguments, **named)

        layer.forward = forward
    for path, part in model.named_modules():
        if path in ("embeddings", "encoder.conv"):  # the second is deberta's, after its first layer
            part.requires_grad_(False)


def test_training_the_upper_half_does_not_change_the_lower_one(
    family: tuple[str, nn.Module], minilm_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = encoder_of(copy.deepcopy(family[1]), minilm_folder)
    lower, upper = encoder.split(2)
    assert ("both halves" in caplog.text) == (family[0] in SHARED)
    key, before, weights = lower.fingerprint(), lower(TEXTS), trained(upper)
    assert key is not None and encoder.fingerprint() is None
    optimizer = torch.optim.AdamW(upper.parameter_groups(1e-2, layer_decay=0.5))
    loss_of([upper(before).values]).backward()
    optimizer.step()
    assert all(not parameter.equal(weights[name]) for name, parameter in upper.named_parameters())
    assert lower.fingerprint() == key and lower(TEXTS).values.equal(before.values)
    lowers, uppers = ({id(p) for p in half.parameters()} for half in (lower, upper))
    assert lowers.isdisjoint(uppers) and uppers <= {id(p) for p in encoder.parameters()}
    if family[0] not in SHARED:  # the whole was trained as well: all the weights are its own
        assert lowers <= {id(p) for p in encoder.parameters()}
        torch.testing.assert_close(upper(lower(TEXTS)).values, encoder(TEXTS).values, atol=1e-5, rtol=0)


def test_the_lower_halfs_fingerprint_depends_on_its_own_layers_only(minilm_folder: str) -> None:
    model = make("ModernBert")

    def key(changed: nn.Module, at: int = 1, **options: Any) -> bytes | None:
        return encoder_of(changed, minilm_folder, **options).split(at)[0].fingerprint()

    def with_other(path: str) -> nn.Module:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(path).add_(1)
        return other

    right = key(copy.deepcopy(model))
    for path in ("layers.1.mlp.Wi.weight", "layers.2.attn.Wqkv.weight", "final_norm.weight"):
        assert key(with_other(path)) == right
    assert key(copy.deepcopy(model), output="sentence") == right
    for path in ("layers.0.mlp.Wi.weight", "embeddings.tok_embeddings.weight"):
        assert key(with_other(path)) != right
    assert key(copy.deepcopy(model), at=2) != right
    assert encoder_of(copy.deepcopy(model), minilm_folder, layers=1).fingerprint() != right, "windows have other rows"


@pytest.mark.parametrize("name", ["Bert", "ModernBert", "DebertaV2"])
def test_dropout_and_gradient_checkpointing_work_in_the_upper_half(name: str, minilm_folder: str) -> None:
    _, upper = halves = encoder_of(make(name), minilm_folder).split(1)
    model = nn.ModuleDict(dict(zip(("lower", "upper"), halves, strict=True)))
    states, others = model["lower"](TEXTS), model["lower"](["other texts"])

    def gradients() -> list[Tensor]:
        upper.zero_grad()
        torch.manual_seed(0)
        found = upper(states)
        upper(others)  # a second forward before the first one's backward
        loss_of([found.values]).backward()
        return [p.grad.clone() for p in upper.parameters() if p.grad is not None]

    quiet = gradients()
    model.train()
    if name != "ModernBert":  # whose configuration has none
        assert not upper(states).values.equal(upper(states).values)
    assert model["lower"](TEXTS).values.equal(states.values)
    noisy = gradients()
    enable = getattr(upper.model, "activation_checkpointing_enable", None)
    (enable or upper.model.gradient_checkpointing_enable)()  # type: ignore[operator]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(gradients(), noisy, strict=True))
    model.eval()
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(gradients(), quiet, strict=True))
    with torch.no_grad():
        assert not upper(states).values.requires_grad


def test_a_pooler_is_trained_with_the_upper_half_if_it_is_used(minilm_folder: str) -> None:
    encoder = encoder_of(make("Albert"), minilm_folder, output="sentence", pooling="pooler")
    right = encoder(["a bank"])
    lower, upper = encoder.split(2)
    found = upper(lower(["a bank"]))
    torch.testing.assert_close(found.vectors, right.vectors, atol=1e-5, rtol=0)
    found.vectors.sum().backward()
    assert {name for name, p in upper.named_parameters() if "pooler" in name and p.grad is not None}
    _, upper = encoder_of(make("Bert"), minilm_folder).split(2)
    assert not [name for name, _ in upper.named_parameters() if "pooler" in name or "embeddings" in name]


def test_the_lower_half_streams_from_a_cache_while_the_upper_half_trains(small_folder: str, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [f"the bank number {i} of the river" for i in range(40)], shards=2)
    encoder = Encoder.from_pretrained(small_folder, dtype="float32", device="cpu", output="sentence")
    right = {}
    for batch in bertstream.stream(shards, encoder):
        right |= dict(zip(batch["id"].tolist(), batch["text"].vectors, strict=True))
    lower, upper = encoder.split(at=2)
    optimizer = torch.optim.AdamW(upper.parameters(), 1e-3)
    with EmbeddingCache("64MiB", tmp_path / "cache") as cache:
        loader = bertstream.stream(shards, lower, cache=cache, batch_size=8, shuffle=True)
        losses = []
        for epoch in range(3):
            encoded = loader.stats()["cache_misses"]
            total = 0.0
            for number, batch in enumerate(loader):
                assert isinstance(batch["text"], Embeddings)
                found = upper(batch["text"]).vectors
                if epoch == number == 0:
                    torch.testing.assert_close(found, torch.stack([right[i] for i in batch["id"].tolist()]))
                loss = (found - 0.1).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += float(loss.detach())
            losses.append(total)
            assert epoch == 0 or loader.stats()["cache_misses"] == encoded, "the lower half ran again"
        assert losses[2] < losses[1] < losses[0]


def test_a_bad_split_and_foreign_vectors_are_refused(minilm: Encoder, minilm_folder: str) -> None:
    encoder = encoder_of(make("Bert"), minilm_folder, layers=(1, 3))
    for at in (0, -1, 3, 4):
        with pytest.raises(ConfigError, match="write a number from 1 to 2"):
            encoder.split(at)
    with pytest.raises(ConfigError, match="layer 1 of layers=.* is below"):
        encoder.split(2)
    lower, upper = encoder_of(make("Bert"), minilm_folder, output="words").split(1)
    others = (minilm, *(encoder_of(make("Bert"), minilm_folder, **options) for options in ({"output": "sentence"}, {})))
    for wrong in (other(["a bank"]) for other in others):
        with pytest.raises(EncoderError, match="use the lower half of the same split"):
            upper(wrong)
    old = lower(["a bank"])
    old.layers = ()  # of a pickle, say, from before they were noted
    assert upper(old).values.equal(upper(lower(["a bank"])).values)
    with pytest.raises(EncoderError, match="leave layout= out"):
        upper(lower(["a bank"]).padded())
    untold = bertstream.TokenBatch.from_padded(torch.tensor([[101, 1037, 102]]), torch.ones(1, 3))
    with pytest.raises(EncoderError, match="belong to no word"):
        upper(lower(untold))


@pytest.mark.parametrize("name", ["Longformer", "CLIPText", "MarkupLM", "XLM", "SqueezeBert"])
def test_a_model_that_cannot_be_split_is_refused_in_words(name: str, minilm_folder: str) -> None:
    model = make(name)
    with pytest.raises(
        ConfigError, match=rf"split\(at=1\): {name}Model cannot be split, because .* from layer 1 on; .*unfreeze\(\)$"
    ):
        Encoder(model, Tokenizer(minilm_folder, model)).split(1)


def test_halves_that_differ_from_the_whole_are_refused(minilm_folder: str) -> None:
    model = make("BigBird")
    with pytest.raises(ConfigError, match="differ from the whole"):
        Encoder(model, Tokenizer(minilm_folder, model)).split(1)


def test_a_model_with_eager_attention_only_is_split(minilm_folder: str) -> None:
    model = make("Splinter")
    encoder = Encoder(model, Tokenizer(minilm_folder, model))
    lower, upper = encoder.split(1)
    batch = batch_of(random_texts([5, 9]))
    torch.testing.assert_close(upper(lower(batch)).values, encoder(batch).values, atol=1e-5, rtol=1e-5)
