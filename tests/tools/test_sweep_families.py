"""The sweep of families: a sample of it, and that it sees what it is for."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep_families
import torch
from conftest import FULL_RUN
from sweeps import family_checks
from sweeps.families import LAYERS, build, names
from sweeps.family_checks import OUTPUTS, sweep

from bertstream import Encoder

SAMPLE = {"bert": OUTPUTS, "longformer": ("tokens",)}
"""Fused; padded inside. Each with the outputs to try."""
if FULL_RUN:  # with a padding id, with windows; changed by its own forwards
    SAMPLE |= {"roberta": OUTPUTS, "modernbert": ("words",), "big_bird": ("words",)}


@pytest.fixture
def tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token vectors are enough to see a mistake in."""
    monkeypatch.setattr(family_checks, "OUTPUTS", ("tokens",))


@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_is_right_in_every_layer_output_and_split_or_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = SAMPLE[name]
    monkeypatch.setattr(family_checks, "OUTPUTS", tried)
    report = sweep(name)
    assert list(map(str, report.wrong)) == [] and not report.skipped
    assert report.counts["layers"].right >= len(tried), "not even the last layer is right"
    checks = sum(sum(vars(counts).values()) for counts in report.counts.values())
    # Layers and splits of each output, splits of two layers, long texts of each layer, pairs, and one that is too long.
    assert checks == len(tried) * (LAYERS + 1) + len(tried) * (LAYERS - 1) + (LAYERS - 1) + (LAYERS + 1) + 2


def test_the_installed_transformers_has_many_families() -> None:
    listed = names()
    assert len(listed) > 45 and {*SAMPLE, "longformer", "xlnet", "t5", "esm"} <= {*listed}


def other_token(self: Encoder, found: Any) -> Any:
    """The vectors of texts whose first word is another one."""
    ids = found.tokens.input_ids.copy()
    ids[found.tokens.cu_seqlens[:-1] + 1] -= 1
    found.tokens.input_ids = ids
    return Encoder.encode(self, found.tokens)


def swapped(self: Encoder, found: Any) -> Any:
    found.values[[0, 1]] = found.values[[1, 0]]
    return found


def last_bits(self: Encoder, found: Any) -> Any:
    found.values *= 1 + 3e-5
    return found


def not_finite(self: Encoder, found: Any) -> Any:
    found.values[-1, -1] = torch.nan
    return found


def foreign(self: Encoder, found: Any) -> Any:
    raise IndexError("index out of range in self")


@pytest.mark.usefixtures("tokens_alone")
@pytest.mark.parametrize("mistake", [other_token, swapped, last_bits, not_finite, foreign])
def test_the_sweep_sees_a_mistake(mistake: Callable[[Any, Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Mistaken(Encoder):
        def forward(self, texts: Any) -> Any:
            return mistake(self, super().forward(texts))

    monkeypatch.setattr(family_checks, "Encoder", Mistaken)
    report = sweep("bert", groups=["layers"])
    assert report.counts["layers"].wrong == LAYERS + 1, report.wrong
    named = "foreign error IndexError" if mistake is foreign else "other vectors"
    assert all(named in wrong.reason for wrong in report.wrong)


@pytest.mark.usefixtures("tokens_alone")
def test_the_sweep_sees_a_layer_that_is_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mistaken(Encoder):
        def __init__(self, model: Any, tokenizer: Any, *, layers: Any = -1, **options: Any) -> None:
            super().__init__(model, tokenizer, layers=max(layers - 1, 0) if layers != -1 else -1, **options)

    monkeypatch.setattr(family_checks, "Encoder", Mistaken)
    report = sweep("bert", groups=["layers"])
    assert report.counts["layers"].wrong == LAYERS and report.counts["layers"].right == 1


def test_vectors_of_a_text_that_is_too_long_count_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cutting(Encoder):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, overflow="truncate")

    monkeypatch.setattr(family_checks, "Encoder", Cutting)
    (wrong,) = sweep("bert", groups=["long"]).wrong
    assert wrong.what == "a text that is too long" and "no right answer" in wrong.reason


@pytest.mark.usefixtures("tokens_alone")
def test_a_text_that_plain_transformers_does_not_run_has_to_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = family_checks.plain_states

    def failing(model: Any, ids: Any, types: Any = None) -> Any:
        if len(ids) == 3:
            raise RuntimeError("too short for its pooling")
        return plain(model, ids, types)

    monkeypatch.setattr(family_checks, "plain_states", failing)
    report = sweep("bert", groups=["layers"])
    (wrong,) = report.wrong
    assert wrong.what == "texts that plain transformers does not run" and "too short for its pooling" in wrong.reason
    assert report.counts["layers"].right == LAYERS + 1 and not report.skipped


def test_a_family_that_takes_too_long_counts_as_wrong() -> None:
    gc.disable()  # Hypothesis times collections in a callback, and an error raised in there is lost
    try:
        report = sweep("bert", limit_s=0.01)
    finally:
        gc.enable()
    assert report.counts["layers"].wrong and "took more than" in report.wrong[-1].reason


def test_special_tokens_have_the_ids_of_the_config() -> None:
    for name in ("bert", "roberta", "distilbert"):
        family = build(name)
        config: Any = family.model.config
        assert config.vocab_size == len(family.tokenizer) and config.pad_token_id == family.tokenizer.pad_token_id
    assert build("roberta").tokenizer.pad_token_id == 1


@pytest.mark.usefixtures("tokens_alone")
def test_the_table_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "found.json", tmp_path / "found.md"
    arguments = ["--families", "bert", "--json", str(files[0]), "--markdown", str(files[1])]
    assert sweep_families.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "bert | packed" in printed or "bert | fused" in printed
    (found,) = json.loads(files[0].read_text())
    assert found["name"] == "bert" and found["wrong"] == []
    assert "| bert |" in files[1].read_text() and "1 of 1 families" in files[1].read_text()


@pytest.mark.usefixtures("tokens_alone")
def test_a_wrong_family_gives_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Mistaken(Encoder):
        def forward(self, texts: Any) -> Any:
            return foreign(self, texts)

    monkeypatch.setattr(family_checks, "Encoder", Mistaken)
    assert sweep_families.main(["--families", "bert"]) == 1
    printed = capsys.readouterr().out
    assert "times foreign error IndexError: index out of range in self: tokens of layer 0, tokens of layer 1" in printed
