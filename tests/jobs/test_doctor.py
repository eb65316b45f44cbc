"""The doctor reports what is installed and which models load."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch

import bertstream
from bertstream import Encoder
from bertstream.jobs.doctor import examine


def test_versions_devices_and_models_are_plain_json(minilm: Encoder) -> None:
    found = json.loads(json.dumps(examine(["all-MiniLM-L6-v2", "no-such-model"], dtype="float32", device="cpu")))
    assert found["versions"]["bertstream"] == bertstream.__version__
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu" and cpu["auto_dtype"] in ("float32", "bfloat16")
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    model = found["models"]["all-MiniLM-L6-v2"]
    assert model["runs"] == minilm.batching.way == "fused"
    assert model["because"].startswith("packed equals one by one")  # the figure after it depends on the threads
    assert (model["max_length"], model["embedding_dim"], model["dtype"]) == (512, 384, "float32")
    assert model["weight_bytes"] == sum(weight.nbytes for weight in minilm.model.parameters())
    assert 0 < model["copied_weight_bytes"] < model["weight_bytes"]
    assert model["forward_ms"] > 0 and model["tokens_per_s"] > 0
    assert "no model 'no-such-model'" in found["models"]["no-such-model"]["error"]
    assert found["installed_models"] == ["all-MiniLM-L6-v2"]
    assert "Installed here: all-MiniLM-L6-v2." in found["models"]["no-such-model"]["error"]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertstream.jobs.doctor._OPTIONAL", {"no-such-package": "parquet"})
    assert examine()["optional"] == {"no-such-package": "pip install 'bertstream[parquet]'"}


def advice(monkeypatch: pytest.MonkeyPatch, installed: Sequence[str] = (), **about: object) -> str:
    monkeypatch.setattr("bertstream.jobs.doctor.installed_models", lambda: [*installed])
    monkeypatch.setattr("bertstream.jobs.doctor.fastest_dtype", lambda device, hidden: torch.bfloat16)
    monkeypatch.setattr("bertstream.jobs.doctor._model", lambda name, dtype, device: about)
    return " ".join(examine(["one"] if about else [])["next"])


def test_it_ends_with_what_to_do_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    monkeypatch.setattr("bertstream.jobs.doctor.usable_cores", lambda: 1)
    assert "bertstream[demo]" in advice(monkeypatch) and "doctor --model NAME_OR_FOLDER" in advice(monkeypatch)
    assert advice(monkeypatch, ["two"]) == "How a model runs here, and how fast: bertstream doctor --model two"
    good = {"runs": "fused", "because": "it is", "device": "cpu", "dtype": "bfloat16"}
    assert advice(monkeypatch, ["two"], **good) == ""
    assert "one runs packed, not fused, because it is" in advice(monkeypatch, **good | {"runs": "packed"})
    assert "one was to run in float32; bfloat16" in advice(monkeypatch, **good | {"dtype": "float32"})
    assert "one" not in advice(monkeypatch, ["two"], error="no model")
    monkeypatch.setattr("bertstream.jobs.doctor.usable_cores", lambda: 4)
    assert "torch computes on 1 of 4 cores" in advice(monkeypatch, ["two"], **good)
