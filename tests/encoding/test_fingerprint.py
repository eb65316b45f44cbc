"""A fingerprint changes with everything that changes the vectors, and with nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, Tokenizer, make
from fork_server import RANKS
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel

from bertstream import EmbeddingCache, Encoder
from bertstream.encoding import fingerprint
from bertstream.encoding.fingerprint import hash_weights, weights_state


@pytest.fixture(scope="module")
def tokenizer(small_folder: str) -> Any:
    return AutoTokenizer.from_pretrained(small_folder)


def tiny_bert(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertModel(BertConfig(vocab_size=VOCABULARY, **sizes | options)).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("options", "right"),
    [
        ({}, "a1efbbc8e89e6667dcfabf46e40bced4"),
        ({"output": "words", "layers": (2,)}, "87f91df256e56fe69a90cd185c28551a"),
        ({"output": "sentence"}, "79cb5963707bc38bebadae0cf21f56ca"),
    ],
)
def test_a_fingerprint_stays_what_it_was_when_caches_were_filled(options: dict[str, Any], right: str) -> None:
    """Computed by f85df61; if one changes, every cache on disk is lost."""
    encoder = Encoder.from_pretrained("all-MiniLM-L6-v2", dtype="float32", device="cpu", **options)
    assert (encoder.fingerprint() or b"").hex() == right


def test_the_fingerprint_of_a_lower_half_stays_what_it_was() -> None:
    lower, _ = Encoder.from_pretrained("all-MiniLM-L6-v2", dtype="float32", device="cpu").split(at=4)
    assert (lower.fingerprint() or b"").hex() == "a4856d3cd8cd934a7aff77adb0f4ddfa"


def test_everything_that_changes_the_vectors_changes_the_fingerprint(tokenizer: Any) -> None:
    makes: list[tuple[nn.Module, dict[str, Any]]] = [
        (tiny_bert(), {}),
        (tiny_bert(seed=1), {}),
        (tiny_bert(layer_norm_eps=1e-6), {}),
        (tiny_bert(), {"layers": (1,)}),
        (tiny_bert(), {"layers": (1, 2)}),
        (tiny_bert(), {"layers": (2, 1)}),
        (tiny_bert(), {"layers": (1, 2), "combine": "mean"}),
        (tiny_bert(), {"output": "words"}),
        (tiny_bert(), {"output": "words", "pooling": "first"}),
        (tiny_bert(), {"output": "sentence"}),
        (tiny_bert(), {"output": "sentence", "normalize": True}),
        (tiny_bert(), {"output": "sentence", "special_tokens": False}),
        (tiny_bert(), {"dtype": "bfloat16"}),
        (tiny_bert(), {"output_dtype": torch.float16}),
    ]
    found = [Encoder(model, tokenizer, **options).fingerprint() for model, options in makes]
    assert None not in found and len(set(found)) == len(makes)


def test_options_that_do_not_change_the_vectors_keep_the_fingerprint(tokenizer: Any) -> None:
    named = tiny_bert()
    named.config._name_or_path = "elsewhere"
    encoders = [
        Encoder(tiny_bert(), tokenizer),
        Encoder(named, tokenizer),
        Encoder(tiny_bert(), tokenizer, max_forward_tokens=7),
        Encoder(tiny_bert(), tokenizer, packed=False),
        Encoder(tiny_bert(), tokenizer, overflow="windows", stride=3),
    ]
    assert len({encoder.fingerprint() for encoder in encoders}) == 1


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    """And whatever the seed of its strings' hashes."""
    code = """
import torch
from torch import nn
from bertstream.encoding.fingerprint import hash_weights
print(hash_weights(nn.Embedding.from_pretrained(torch.eye(3)), "s", {"b": 1, "a": {2: 3}}).hex(), hash("a"))
"""
    out, errors, status = RANKS.start(code).finish()
    assert status == 0, errors
    there, hashed = out.split()
    assert int(hashed) != hash("a") or "PYTHONHASHSEED" in os.environ
    here = hash_weights(nn.Embedding.from_pretrained(torch.eye(3)), "s", {"a": {2: 3}, "b": 1})
    assert there == here.hex()


def test_the_fingerprint_follows_the_weights_there_and_back(tokenizer: Any) -> None:
    encoder = Encoder(tiny_bert(), tokenizer)
    first = encoder.fingerprint()
    weight = next(encoder.model.parameters())
    before = weight.detach().clone()
    weight.add_(1)
    second = encoder.fingerprint()
    weight.copy_(before)
    assert first == encoder.fingerprint() != second
    encoder.to(torch.bfloat16)
    assert encoder.fingerprint() not in (first, second)


def test_training_without_a_trace_changes_the_fingerprint(tokenizer: Any) -> None:
    model = tiny_bert()
    encoder = Encoder(model, tokenizer)
    first = encoder.fingerprint()
    parameter = next(model.parameters()).requires_grad_(True)
    assert encoder.fingerprint() is None
    state = weights_state(encoder.model)
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], fused=True).step()
    parameter.requires_grad_(False)
    assert state is None and encoder.fingerprint() not in (None, first)


def test_training_changes_the_fingerprint_of_every_encoder_that_shares_the_weights(tokenizer: Any) -> None:
    model = tiny_bert().requires_grad_(False)
    trained, other = Encoder(model, tokenizer), Encoder(model, tokenizer)
    first = other.fingerprint()
    trained.unfreeze(1)
    optimizer = torch.optim.AdamW(trained.parameter_groups(0.1), fused=True)
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    trained.freeze()
    assert other.fingerprint() == trained.fingerprint() != first


def test_training_an_upper_half_changes_the_fingerprint_of_the_whole(tokenizer: Any) -> None:
    encoder = Encoder(tiny_bert(), tokenizer)
    _, upper = encoder.split(1)
    keys = []
    for _ in range(2):
        upper.requires_grad_(True)
        optimizer = torch.optim.AdamW(upper.parameters(), 0.1, fused=True)
        for parameter in upper.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        upper.requires_grad_(False)
        keys.append(encoder.fingerprint())
    assert None not in keys and keys[0] != keys[1]


def test_freezing_through_an_outer_module_refreshes_the_fingerprint(tokenizer: Any) -> None:
    encoder = Encoder(tiny_bert(), tokenizer).freeze()
    first = encoder.fingerprint()
    optimizer = torch.optim.AdamW(encoder.unfreeze().parameters(), 0.1, fused=True)
    for parameter in encoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    nn.ModuleList([encoder]).requires_grad_(False)
    assert encoder.fingerprint() not in (None, first)


def test_the_fingerprint_depends_on_which_adapters_are_on_and_how_strong(tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"], init_lora_weights=False), "en")
    adapted.add_adapter("de", LoraConfig(target_modules=["query"], init_lora_weights=False))
    keys = set()
    for name in ("en", "de"):
        adapted.set_adapter(name)
        encoder = Encoder(adapted, tokenizer).freeze()
        keys.add(encoder.fingerprint())
    layers = [module for module in encoder.modules() if hasattr(module, "base_layer")]
    for module in layers:
        module.set_scale("de", 9.0)  # type: ignore[operator]
    keys.add(encoder.fingerprint())
    for module in layers:
        module.enable_adapters(False)  # type: ignore[operator]
    keys.add(encoder.fingerprint())
    assert len(keys) == 4 and None not in keys


def test_the_fingerprint_reads_the_weights_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tiny_bert(), tokenizer)
    first = encoder.fingerprint()
    monkeypatch.setattr("bertstream.encoding.text_forward.hash_weights", lambda *arguments: pytest.fail("read again"))
    assert encoder.fingerprint() == first


def test_a_model_made_in_inference_mode_has_a_fingerprint(tokenizer: Any) -> None:
    with torch.inference_mode():
        model = tiny_bert()
    assert hash_weights(model, "", {}) == hash_weights(tiny_bert(), "", {})
    assert weights_state(model) == weights_state(model) is not None


@pytest.mark.parametrize(("name", "stays"), [("Bert", True), ("ModernBert", True), ("Roberta", False), ("Esm", False)])
def test_rows_that_an_earlier_revision_may_have_got_wrong_are_not_found(
    name: str, stays: bool, minilm_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def misses() -> float:
        model = make(name).requires_grad_(False)
        with EmbeddingCache("1MiB", tmp_path, "16MiB") as cache:
            encoder = Encoder(model, Tokenizer(minilm_folder, model))
            cache.of(encoder).encode(encoder.tokenizer.batch(["a bank", "a river"]))
            return cache.stats()["misses"]

    monkeypatch.setattr(fingerprint, "_REVISION", 1)
    assert [misses(), misses()] == [2, 0]
    monkeypatch.undo()
    assert [misses(), misses()] == [0 if stays else 2, 0]
