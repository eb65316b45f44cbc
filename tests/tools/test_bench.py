"""Every verb of the benchmarks runs, and its figures other than speed are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bench
import pytest
import torch
from benchmarks import common, encode, epoch, forward
from benchmarks.common import ratio, useful_flops
from benchmarks.models import write_bert
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from bertstream.encoding import onednn


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny BERT of random weights."""
    return write_bert(tmp_path_factory.mktemp("bert"), "tiny")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences[:60]), encoding="utf-8")
    return path


@pytest.fixture
def measure(model: str, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A verb over 40 short texts and the tiny model, in one round."""
    monkeypatch.setattr(common, "matmul_rate", lambda dtype, device="cpu": 1.0)  # slow, and not under test
    small = ["--corpus", str(corpus), "--model", model, "--texts", "40", "--rounds", "1", "--dtypes", "float32"]
    return lambda verb, *more: bench.measure([verb, *small, *more])


def test_the_verbs_are_the_files() -> None:
    assert {"cache", "encode", "epoch", "host", "mix", "outputs", "split", "stream", "train", "wrap"} <= set(
        bench.VERBS
    )
    assert not {"common", "models", "__init__"} & set(bench.VERBS)


def test_every_contender_of_encode_gives_the_plain_loops_vectors(measure: Any) -> None:
    found = measure("encode")
    own, errors = {"bertstream_float32", "stream_float32"}, found["worst_text_relative_l2_error"]
    others = {"plain", "pipeline", "sentence_transformers_float32"}
    assert own | others <= found["tokens_per_s"].keys() and min(found["tokens_per_s"].values()) > 0
    assert errors.keys() == found["tokens_per_s"].keys() - {"plain"} and max(errors.values()) <= 1e-5
    assert found["times"].keys() == own and found["times"]["stream_float32"].keys() >= others
    assert found["share_of_product"].keys() == own and 0 < min(found["share_of_product"].values()) < 1
    assert "flair" in found["absent"].keys() | found["tokens_per_s"].keys()


def test_contenders_may_be_left_out_and_a_missing_package_is_named(
    measure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flair", None)
    found = measure("encode", "--without", "pipeline", "sentence")
    assert set(found["tokens_per_s"]) == {"plain", "bertstream_float32", "stream_float32"}
    assert "flair" in found["absent"]["flair"]


def test_wrap_reports_how_many_tokens_were_encoded_together(measure: Any) -> None:
    found = measure("wrap")
    assert found["together_times_one_by_one"].keys() == {"8", "32", "128"}
    assert found["tokens_encoded_together"]["8"] > found["tokens_a_batch"]["8"] > 0


def test_host_measures_texts_of_about_the_length_that_was_asked_for(measure: Any) -> None:
    found = measure("host", "--words", "20", "--tokens", "40000", "--num-workers", "1")
    assert 20 <= found["tokens_a_text"] <= 40 and found["texts"] > 64
    assert min(found["main_thread_s_a_million_tokens"].values()) > 0


def test_training_packed_is_training_padded(measure: Any) -> None:
    found = measure("train")
    assert found["relative_l2_error"] <= 1e-5 and min(found["seconds"].values()) > 0


def test_training_over_a_cached_lower_half_has_the_losses_of_the_whole(measure: Any) -> None:
    found = measure("split", "--at", "1")
    losses = found["losses_of_epochs"]
    assert losses["whole_1"] == pytest.approx(losses["split_1"], rel=1e-4) and found["times_whole"][1] > 0


def test_epoch_measures_every_kind_of_step(measure: Any) -> None:
    found = measure("epoch", "--batch-size", "8")
    assert found["steps"].keys() == epoch.STEPS.keys() and found["batches"] == 5
    for step in found["steps"].values():
        assert min(step["encode_s"], step["train_s"], step["both_s"]) > 0 and step["amount"] >= 1


def test_overlap_is_computed_from_the_three_times() -> None:
    hidden = epoch.compare([2.0], [2.0], [2.2])
    assert hidden["over_max"] == 1.1 and hidden["over_sum"] == 0.55 and hidden["overlap_efficiency"] == 0.9
    in_turn = epoch.compare([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], [3.0, 9.0, 3.0])
    assert (in_turn["over_sum"], in_turn["over_max"], in_turn["overlap_efficiency"]) == (1.0, 1.5, 0.0)


@pytest.mark.parametrize("verb", ["outputs", "cache"])
def test_the_other_verbs_run(measure: Any, verb: str) -> None:
    found = measure(verb)
    assert found["benchmark"] == verb and found["machine"]["device"] == "cpu" and found["rounds"] == 1


def test_a_corpus_is_jsonl_or_text_and_some_texts_are_required(
    measure: Any, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "corpus.txt"
    lines.write_text("one\ntwo words\nthree more words\n", encoding="utf-8")
    assert measure("outputs", "--corpus", str(lines))["texts"] == 3
    with pytest.raises(SystemExit):
        bench.measure(["outputs", "--model", model])
    assert "--data FOLDER or --corpus FILE" in capsys.readouterr().err


def test_useful_flops_are_those_of_the_products_in_the_layers() -> None:
    """Counted on a model whose intermediate size is four times its hidden size."""
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    model.set_attn_implementation("eager")  # the counter knows its products
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for length in (5, 17):
            model(torch.ones(1, length, dtype=torch.long))
    assert useful_flops(config, [5, 17]) == counter.get_total_flops()


def test_ratios_are_taken_within_a_round() -> None:
    assert ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0


def test_the_error_is_that_of_the_worst_text() -> None:
    right = [torch.ones(2, 2), torch.ones(3, 2)]
    assert common.worst_error([right[0], right[1] * 1.5], right) == pytest.approx(0.5)
    assert encode.dtype_of("sentence_transformers_bfloat16") == "bfloat16"


def test_forward_compares_the_ways_of_one_model(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "TOKENS", (128, 300))
    found = measure("forward")["forwards"]
    assert list(found) == ["float32 128", "float32 300"]
    ways = ["packed", "fused", *(["blocked"] if onednn.available(torch.float32) else [])]
    for figures in found.values():
        assert list(figures["milliseconds"]) == ways and figures["times_packed"]["packed"] == 1
