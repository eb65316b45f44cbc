"""BERT inside a model: gradients are plain transformers' own, and loaders hand over to it when it is unfrozen."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import WORDS, Tokenizer, loss_of, make
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import bertstream
from bertstream import (
    BertEmbedding,
    ConfigError,
    EmbeddingCache,
    Embeddings,
    Encoder,
    EncoderError,
    TokenBatch,
    UnfreezeSchedule,
)

TEXTS: list[Any] = [
    ["a", "bank"],
    [*WORDS],
    ["one"],
    ["The", "bank", "raised", "its", "rates", "again", "."],
    ["Bass", "unbelievably"],
    ["two", "words"],
]


def encoder_of(model: nn.Module, minilm_folder: str, **options: Any) -> Encoder:
    return Encoder(model, Tokenizer(minilm_folder, model), **options)


def words_of(hidden: list[Tensor], batch: TokenBatch) -> Tensor:
    assert batch.word_ids is not None
    return torch.stack([hidden[-1][batch.word_ids == word].mean(0) for word in range(int(batch.num_words[0]))])


OUTPUTS: dict[str, tuple[dict[str, Any], Callable[[list[Tensor], TokenBatch], Tensor]]] = {
    "words": ({"output": "words"}, words_of),
    "sentence": ({"output": "sentence"}, lambda hidden, batch: hidden[-1].mean(0, keepdim=True)),
    "mix of layers": (
        {"layers": (1, 2, 3), "combine": "stack"},
        lambda hidden, batch: torch.stack([hidden[layer] for layer in (1, 2, 3)], 1),
    ),
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "ModernBert"])
def test_loss_and_gradients_equal_those_of_a_plain_loop(family: str, output: str, minilm_folder: str) -> None:
    model = make(family)
    options, of_hidden = OUTPUTS[output]
    encoder = encoder_of(copy.deepcopy(model), minilm_folder, max_forward_tokens=16, **options).unfreeze()
    assert encoder.batching.way == "fused"
    found = BertEmbedding(encoder)(TEXTS)
    loss = loss_of(list(found))
    loss.backward()

    model.set_attn_implementation("eager")  # type: ignore[operator]
    rows = []
    for text in TEXTS:
        batch = encoder.tokenizer.batch([text])
        ids = torch.from_numpy(batch.input_ids.astype(np.int64))[None]
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        rows.append(of_hidden([layer[0] for layer in out.hidden_states], batch))
    right = loss_of(rows)
    right.backward()
    assert abs(loss - right) <= 1e-5 * abs(right)
    own = dict(encoder.model.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert own[name].grad is None or not own[name].grad.any(), name
            continue
        largest = float(parameter.grad.abs().max())
        if largest < 1e-6:  # a key's bias moves all scores of a query alike, so its gradient is zero but for rounding
            assert "k" in name and name.endswith("bias") and own[name].grad.abs().max() < 1e-6
            continue
        assert (own[name].grad - parameter.grad).abs().max() <= 1e-5 * largest, name
        compared += 1
    assert compared >= 20


def test_a_bert_embedding_takes_all_that_a_loader_yields(minilm: Encoder) -> None:
    texts = ["a bank", "the river bank"]
    (from_loader,) = bertstream.wrap([texts], minilm)
    embed = BertEmbedding(minilm)
    assert embed(from_loader) is from_loader
    for given in (texts, minilm.tokenizer.batch(texts), [("a bank", "a river"), ["in", "words"]]):
        assert isinstance(embed(given), Embeddings)
    assert embed(texts).values.equal(from_loader.values) and not embed(texts).values.requires_grad
    assert embed.embedding_dim == minilm.embedding_dim


def test_calling_an_unfrozen_encoder_gives_gradients(small_folder: str) -> None:
    encoder = Encoder.from_pretrained(small_folder, dtype="float32", output="sentence")
    assert not encoder(["a bank"]).vectors.requires_grad
    assert encoder.unfreeze(1)(["a bank"]).vectors.requires_grad
    assert not encoder.freeze()(["a bank"]).vectors.requires_grad


def test_vectors_of_another_encoder_are_refused(small: Encoder, small_folder: str) -> None:
    words = Encoder.from_pretrained(small_folder, output="words")
    with pytest.raises(EncoderError, match=r"another encoder.* are \('words', \(3,\), \(32,\)\), this encoder's are"):
        BertEmbedding(small)(words([["a", "bank"]]))


def test_with_a_layout_a_bert_embedding_fits_into_a_sequential(small_folder: str) -> None:
    encoder = Encoder.from_pretrained(small_folder, output="sentence", dtype="float32")
    model = nn.Sequential(BertEmbedding(encoder, layout="padded"), nn.Linear(encoder.embedding_dim, 2))
    assert model(["a", "b c", "d"]).shape == (3, 2)
    values, mask = BertEmbedding(Encoder.from_pretrained(small_folder), layout="padded")(["a", "b c"])
    assert values.shape[:2] == mask.shape == (2, 4)


def test_dropout_is_on_in_trained_layers_and_off_in_frozen_ones(
    small_folder: str,
) -> None:
    encoder = Encoder.from_pretrained(small_folder, dtype="float32")
    model = nn.ModuleDict({"embed": BertEmbedding(encoder)}).train()
    embed = model["embed"]
    assert embed(["a bank"]).values.equal(embed(["a bank"]).values)
    encoder.unfreeze(2)
    model.train()
    assert not embed(["a bank"]).values.equal(embed(["a bank"]).values)
    dropouts = [m.training for m in encoder.model.modules() if isinstance(m, nn.Dropout)]
    assert any(dropouts) and not all(dropouts), "the layers that are frozen have none"
    model.eval()
    assert embed(["a bank"]).values.equal(embed(["a bank"]).values)
    encoder.freeze()
    model.train()
    assert embed(["a bank"]).values.equal(embed(["a bank"]).values) and not embed(["a bank"]).values.requires_grad


def test_layers_unfrozen_later_get_the_last_requested_mode(minilm_folder: str) -> None:
    encoder = encoder_of(make("Bert"), minilm_folder)
    dropouts = [m for m in encoder.model.modules() if isinstance(m, nn.Dropout)]
    assert not encoder.training and not encoder.unfreeze().training and not any(m.training for m in dropouts)
    encoder.freeze()
    model = nn.ModuleDict({"embed": BertEmbedding(encoder)}).train()
    schedule = UnfreezeSchedule(encoder, start=2)
    schedule.set(1)
    assert not encoder.training and not any(m.training for m in dropouts)
    schedule.set(2)  # a step in the middle of an epoch, whose train() is long past
    assert encoder.training and all(m.training for m in dropouts)
    encoder.freeze()
    assert not any(m.training for m in dropouts)
    assert encoder.unfreeze(1).training
    model.eval()
    assert not encoder.freeze().unfreeze().training


def test_training_only_the_embedding_layer_leaves_dropout_off_in_the_layers(minilm_folder: str) -> None:
    encoder = encoder_of(make("Bert"), minilm_folder).train()
    embeddings, layers = encoder.model.embeddings, encoder.model.encoder.layer  # type: ignore[union-attr]
    encoder.unfreeze(parameters=[embeddings.word_embeddings.weight])  # type: ignore[union-attr,list-item]
    assert embeddings.dropout.training  # type: ignore[union-attr]
    assert not any(m.training for layer in layers for m in layer.modules())  # type: ignore[union-attr]


def test_parameters_that_cannot_be_trained_are_refused_before_anything_is_frozen(minilm_folder: str) -> None:
    model = make("Bert")
    encoder = encoder_of(model, minilm_folder).unfreeze(1)
    copied = encoder_of(model, minilm_folder, dtype="bfloat16")
    (parameter, *_) = encoder.parameter_groups(0.1)[0]["params"]
    foreign = [parameter, *copied.parameters()]
    for options in ({"parameters": []}, {"parameters": foreign}, {"layers": 1, "parameters": [parameter]}):
        with pytest.raises(ConfigError, match="parameters="):
            encoder.unfreeze(**options)  # type: ignore[arg-type]
        assert encoder.trainable and parameter.requires_grad
    assert [p for p in encoder.unfreeze(parameters=[parameter]).parameters() if p.requires_grad] == [parameter]


def test_training_in_half_precision_warns(minilm_folder: str, caplog: pytest.LogCaptureFixture) -> None:
    encoder_of(make("Bert"), minilm_folder).unfreeze().split(1)
    assert "rounded away" not in caplog.text
    half = encoder_of(make("Bert"), minilm_folder, dtype="bfloat16")
    half.unfreeze(1)
    half.unfreeze(2)  # is not said again
    half.split(1)
    assert caplog.text.count("parameters are trained in bfloat16") == 2


def test_an_outer_requires_grad_without_unfreeze_warns_once(
    minilm_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    embed = BertEmbedding(encoder_of(make("Bert"), minilm_folder).freeze())
    embed(["a bank"])
    assert not caplog.text
    nn.Sequential(embed).requires_grad_(True)
    assert not embed(["a bank"]).values.requires_grad and not embed(["a bank"]).values.requires_grad
    assert caplog.text.count("call encoder.unfreeze()") == 1


def test_unfreeze_counts_used_layers_from_the_top(small_folder: str) -> None:
    encoder = Encoder.from_pretrained(small_folder, dtype="float32")
    layers = encoder.model.encoder.layer  # type: ignore[union-attr]
    encoder.unfreeze(2)
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    assert trained == [False, True, True] and encoder.trainable and encoder.fingerprint() is None
    encoder.unfreeze()
    still = {name for name, p in encoder.model.named_parameters() if not p.requires_grad}
    assert still == {"pooler.dense.weight", "pooler.dense.bias"}, "which nothing uses"
    assert Encoder.from_pretrained(small_folder, layers=2).unfreeze(1).trainable
    assert not encoder.unfreeze(0).trainable
    for options in ({"layers": 4}, {"layers": -1}):
        with pytest.raises(ConfigError):
            encoder.unfreeze(**options)


@pytest.mark.parametrize("family", ["Bert", "Albert", "ModernBert"])
def test_parameter_groups_hold_each_parameter_once_top_layer_first(family: str, minilm_folder: str) -> None:
    encoder = encoder_of(make(family), minilm_folder, layers=(1, -1))
    groups = encoder.parameter_groups(1e-3, layer_decay=0.5)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert {id(p) for name, p in encoder.model.named_parameters() if "pooler" not in name} == set(ids)
    assert [group["lr"] for group in groups] == [1e-3 * 0.5**depth for depth in range(len(groups))]
    torch.optim.AdamW(groups)


def test_a_schedule_unfreezes_all_layers_together_or_one_by_one(minilm_folder: str) -> None:
    encoder = encoder_of(make("Bert"), minilm_folder)

    def trained(schedule: UnfreezeSchedule, number: int) -> list[bool]:
        schedule.set(number)
        parts = [encoder.model.embeddings, *encoder.model.encoder.layer]  # type: ignore[union-attr]
        return [any(p.requires_grad for p in part.parameters()) for part in parts]  # type: ignore[union-attr]

    at_once = UnfreezeSchedule(encoder, start=2)
    assert [sum(trained(at_once, epoch)) for epoch in range(4)] == [0, 0, 4, 4]
    by_layer = UnfreezeSchedule(encoder, start=1, every=2)
    assert [sum(trained(by_layer, epoch)) for epoch in range(8)] == [0, 1, 1, 2, 2, 3, 3, 4]
    assert trained(by_layer, 3) == [False, False, True, True]
    encoder.freeze()  # to test in between, say
    assert trained(by_layer, 4) == [False, False, True, True]
    assert sum(trained(by_layer, 0)) == 0, "a new run begins frozen"
    for options in ({"start": -1}, {"every": 0}):
        with pytest.raises(ConfigError):
            UnfreezeSchedule(encoder, **options)
    with pytest.raises(ConfigError, match=r"pass a bertstream\.Encoder"):
        UnfreezeSchedule(BertEmbedding(encoder))  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", [None, "padded"])
def test_after_unfreezing_inside_an_epoch_no_older_vector_is_yielded(small_folder: str, layout: Any) -> None:
    encoder = Encoder.from_pretrained(small_folder, dtype="float32")
    data = [{"text": [f"the bank number {i}", "a river"], "n": i} for i in range(12)]
    with EmbeddingCache("16MiB") as cache:
        loader = bertstream.wrap(data, encoder, text="text", prefetch=8, cache=cache, layout=layout)
        list(loader)  # every text is in the cache
        embed = BertEmbedding(encoder)
        optimizer = torch.optim.AdamW(encoder.parameter_groups(1e-2), fused=True)
        for number, batch in enumerate(loader):
            if number == 0:
                while threading.active_count() > 1 and loader._parts.clocks.items["encode"] < 24:
                    threading.Event().wait(0.01)  # the queue is full of vectors
                assert not isinstance(batch["text"], TokenBatch)
                encoder.unfreeze()
                continue
            assert isinstance(batch["text"], TokenBatch) and batch["n"] == number
            found = embed(batch["text"])
            encoder.freeze()
            assert torch.allclose(found.values, encoder.encode(batch["text"]).values, atol=1e-5)
            encoder.unfreeze()
            loss = found.values.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        encoder.freeze()
        after = [b["text"] if layout is None else b["text"][b["text_mask"]] for b in loader]
        right = [encoder(b["text"]).values for b in data]
        for found, own in zip(after, right, strict=True):
            values = found.values if isinstance(found, Embeddings) else found
            assert torch.allclose(values, own, atol=1e-5), "vectors of the weights before"


def test_after_training_between_two_batches_no_older_vector_is_yielded(small_folder: str) -> None:
    encoder = Encoder.from_pretrained(small_folder, dtype="float32")
    data = [{"text": [f"the bank number {i}", "a river"]} for i in range(6)]
    for number, batch in enumerate(bertstream.wrap(data, encoder, text="text", prefetch=8)):
        assert torch.allclose(batch["text"].values, encoder(data[number]["text"]).values, atol=1e-5)
        if number == 1:
            encoder.unfreeze()
            with torch.no_grad():
                for parameter in encoder.parameters():
                    parameter.mul_(1.05)
            encoder.freeze()


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(minilm_folder: str) -> None:
    data = [{"text": " ".join(WORDS[: 1 + n % 9]), "label": n % 2} for n in range(24)]
    cuts: list[tuple[int, int]] = [(0, 1), (1, 0), (1, 4), (2, 2)]  # in a frozen epoch and in trained ones

    def run(stop: tuple[int, int] | None, saved: dict[str, Any] | None = None) -> tuple[list[float], dict[str, Any]]:
        torch.manual_seed(0)
        encoder = encoder_of(make("Bert"), minilm_folder, output="sentence").freeze()
        model = nn.ModuleDict({"embed": BertEmbedding(encoder), "head": nn.Linear(encoder.embedding_dim, 2)}).eval()
        optimizer = torch.optim.AdamW([{"params": model["head"].parameters()}, *encoder.parameter_groups(1e-3)])
        schedule = UnfreezeSchedule(encoder, start=1, every=1)
        cache = EmbeddingCache("16MiB")
        options: Any = {"batch_size": 4, "shuffle": True, "cache": cache, "deterministic": True}
        loader = bertstream.stream(data, encoder, **options)
        first = 0
        if saved is not None:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            loader.load_state_dict(saved["loader"])
            first = saved["epoch"]
        losses = []
        for epoch in range(first, 3):
            schedule.set(epoch)
            for number, batch in enumerate(loader):
                scores = model["head"](model["embed"](batch["text"]).vectors)
                loss = nn.functional.cross_entropy(scores, batch["label"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                if stop == (epoch, number):
                    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    return losses, copy.deepcopy(saved | {"loader": loader.state_dict(), "epoch": epoch})
        return losses, {}

    whole, _ = run(None)
    assert len(whole) == 18
    for cut in cuts:
        before, saved = run(cut)
        after, _ = run(None, saved)
        assert before + after == pytest.approx(whole, abs=1e-6)


def test_a_trained_encoders_stream_yields_tokens_with_their_fields(small_folder: str, tmp_path: Path) -> None:
    from bertstream.testing import write_shards

    encoder = Encoder.from_pretrained(small_folder, dtype="float32").unfreeze()
    shards = write_shards(tmp_path, ["a bank", "the river bank", "bass"], shards=1)
    (batch,) = bertstream.stream(shards, encoder)
    assert isinstance(batch["text"], TokenBatch) and not batch["text"].fields and batch["id"].tolist() == [0, 1, 2]
    embed = BertEmbedding(encoder)
    assert embed(batch["text"]).values.requires_grad
    encoder.freeze()
    (again,) = bertstream.stream(shards, encoder)
    assert torch.allclose(embed(batch["text"]).values, again["text"].values, atol=1e-5)


def test_gradient_checkpointing_and_autocast_give_the_same_gradients(minilm_folder: str) -> None:
    model = make("Bert")
    encoder = encoder_of(model, minilm_folder).unfreeze()
    embed = BertEmbedding(encoder)

    def gradients() -> list[Tensor]:
        embed.zero_grad()
        loss_of([embed(TEXTS).values]).backward()
        return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    right = gradients()
    enable = getattr(encoder.model, "activation_checkpointing_enable", None)
    (enable or encoder.model.gradient_checkpointing_enable)()  # type: ignore[operator]
    embed.train()
    for module in encoder.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    encoder.model.config.attention_probs_dropout_prob = 0.0  # type: ignore[union-attr]
    for module in encoder.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(gradients(), right, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients()
    far = [float((a - b).norm() / b.norm().clamp(min=1e-3)) for a, b in zip(rough, right, strict=True)]
    assert 0 < np.median(far) < 0.1


def test_a_trained_model_is_saved_for_transformers_and_sentence_transformers(small_folder: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = Encoder.from_pretrained(small_folder, dtype="float32", output="sentence", normalize=False).unfreeze(1)
    optimizer = torch.optim.SGD(encoder.parameter_groups(0.1))
    BertEmbedding(encoder)(["a bank"]).values.sum().backward()
    optimizer.step()
    encoder.freeze().save_pretrained(tmp_path)
    right = encoder(["The bank of the river."]).values
    again = Encoder.from_pretrained(str(tmp_path), dtype="float32", output="sentence", normalize=False)
    assert torch.allclose(again(["The bank of the river."]).values, right, atol=1e-6)
    assert AutoModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    assert AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"] == [101, 1037, 102]
    theirs = SentenceTransformer(str(tmp_path), device="cpu").encode(["The bank of the river."])
    assert np.allclose(theirs, right, atol=1e-5)
    with pytest.raises(ConfigError, match="were dropped and cannot be saved"):
        Encoder.from_pretrained(small_folder, layers=2).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("pooling", "normalize"),
    [("cls", True), ("last", False), ("mean_sqrt_len", True), ("weighted_mean", False), (("cls", "max", "mean"), True)],
)
def test_how_sentences_are_pooled_is_saved_with_the_model(
    small_folder: str, tmp_path: Path, pooling: Any, normalize: bool
) -> None:
    from sentence_transformers import SentenceTransformer

    options: Any = {"output": "sentence", "dtype": "float32"}
    encoder = Encoder.from_pretrained(small_folder, pooling=pooling, normalize=normalize, **options)
    encoder.save_pretrained(tmp_path)
    right = encoder(["The bank of the river.", "a bass"]).values
    again = Encoder.from_pretrained(tmp_path, **options)
    assert again.pooling == encoder.pooling and again(["The bank of the river.", "a bass"]).values.equal(right)
    theirs = SentenceTransformer(str(tmp_path), device="cpu").encode(["The bank of the river.", "a bass"])
    assert np.allclose(theirs, right, atol=1e-5)


def test_an_inexpressible_pooling_removes_the_folders_earlier_one(
    small_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: Any = {"output": "sentence", "dtype": "float32"}
    Encoder.from_pretrained(small_folder, pooling="cls", **options).save_pretrained(tmp_path)
    assert Encoder.from_pretrained(tmp_path, **options).pooling == ("cls",)
    Encoder.from_pretrained(small_folder, pooling=("mean", "cls"), **options).save_pretrained(tmp_path)
    assert Encoder.from_pretrained(tmp_path, **options).pooling == ("mean",) and "no name for" in caplog.text


def test_a_model_that_cannot_be_saved_whole_is_refused_with_the_way_out(minilm_folder: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(make("Bert"), LoraConfig(target_modules=["query"])).base_model.model
    with pytest.raises(ConfigError, match="merge_and_unload"):
        encoder_of(adapted, minilm_folder).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="layers=-1"):  # its one group is three layers here
        encoder_of(make("Albert"), minilm_folder, layers=(1, -1)).save_pretrained(tmp_path)
    Encoder(make("Albert", vocab_size=30522), AutoTokenizer.from_pretrained(minilm_folder)).save_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler looks
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # torch, on Python 3.13.0
@pytest.mark.parametrize("part", ["whole", "upper half"])
def test_a_compiled_model_has_the_same_vectors_and_gradients(part: str, minilm_folder: str) -> None:
    encoder = encoder_of(make("Bert"), minilm_folder)
    lower, upper = encoder.split(1)
    whole = BertEmbedding(encoder.unfreeze())

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert, self.head = whole if part == "whole" else upper, nn.Linear(32, 2)

        def forward(self, texts: list[str]) -> Tensor:
            rows, mask = self.bert(texts if part == "whole" else lower.encode(texts)).padded()
            found: Tensor = (self.head(rows).tanh() * mask[..., None]).sum(1)
            return found

    model = Model()
    compiled = torch.compile(model, backend="eager")
    for texts in (["a bank", "the river"], ["a", "", "of the bank"]):
        gradients = []
        for one in (model, compiled):
            model.zero_grad()
            found = one(texts)
            found.sum().backward()
            gradients.append([found.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert len(gradients[0]) == len(gradients[1]) > 2
        torch.testing.assert_close(gradients[1], gradients[0])


def test_only_the_adapters_of_peft_are_trained(small_folder: str) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(AutoModel.from_pretrained(small_folder), LoraConfig(target_modules=["query", "value"]))
    encoder = Encoder(adapted, AutoTokenizer.from_pretrained(small_folder))
    encoder.unfreeze(parameters=[p for p in encoder.parameters() if p.requires_grad])
    before = encoder.encode(encoder.tokenizer.batch(["a bank"])).values
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):  # the first step moves B alone: A's gradient is zero while B is
        BertEmbedding(encoder)(["a bank"]).values.sum().backward()
        optimizer.step()
    trained = {name.split(".")[-3] for name, p in encoder.model.named_parameters() if p.grad is not None}
    assert trained == {"lora_A", "lora_B"}
    after = encoder.encode(encoder.tokenizer.batch(["a bank"])).values
    assert encoder.batching.way == "packed" and not torch.allclose(after, before)
    ids = torch.from_numpy(encoder.tokenizer.batch(["a bank"]).input_ids.astype(np.int64))[None]
    assert torch.allclose(adapted.eval()(input_ids=ids).last_hidden_state[0], after, atol=1e-5), "the user's own too"


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_adapters_that_the_user_merges_count_once(small_folder: str, merge: str) -> None:
    """The weights that they are merged into are the encoder's too."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    adapted = get_peft_model(AutoModel.from_pretrained(small_folder), config)
    encoder = Encoder(adapted, AutoTokenizer.from_pretrained(small_folder)).freeze()
    before, named = encoder(["a bank"]).values, encoder.fingerprint()
    getattr(adapted, merge)()
    torch.testing.assert_close(encoder(["a bank"]).values, before, rtol=0, atol=1e-5)
    assert encoder.fingerprint() not in (None, named)


def test_adapters_that_are_not_in_the_model_are_refused(minilm_folder: str) -> None:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2)
    with pytest.raises(ConfigError, match="PROMPT_TUNING.*such as LoRA"):
        encoder_of(get_peft_model(make("Bert"), config), minilm_folder)


def test_a_bert_embedding_refuses_anything_but_an_encoder() -> None:
    with pytest.raises(ConfigError, match="pass a bertstream.Encoder"):
        BertEmbedding(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_layout_of_a_loader_that_yields_tokens_is_told_once(
    minilm_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = encoder_of(make("Bert"), minilm_folder)
    loader = bertstream.wrap([["a", "b"]], encoder, layout="padded")
    list(loader)
    assert "layout" not in caplog.text
    encoder.unfreeze()
    for _ in range(2):
        [batch] = loader
        assert isinstance(batch, bertstream.TokenBatch)
    assert caplog.text.count("layout='padded' has no effect while the encoder is trained") == 1
