"""The doctor reports what is installed and which models load."""

from __future__ import annotations

import json

import pytest
import torch

import bertstream
from bertstream import Encoder
from bertstream.jobs.doctor import examine


def test_versions_devices_and_models_are_plain_json(minilm: Encoder) -> None:
    found = json.loads(json.dumps(examine(["all-MiniLM-L6-v2", "no-such-model"], dtype="float32", device="cpu")))
    assert found["versions"]["bertstream"] == bertstream.__version__
    assert found["versions"]["torch"] == torch.__version__
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu" and cpu["auto_dtype"] in ("float32", "bfloat16")
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    model = found["models"]["all-MiniLM-L6-v2"]
    assert model["runs"] == minilm.batching.way == "fused"
    assert model["because"].startswith("packed equals one by one")  # the figure after it depends on the threads
    assert (model["max_length"], model["embedding_dim"], model["dtype"]) == (512, 384, "float32")
    assert model["weight_bytes"] == sum(weight.nbytes for weight in minilm.model.parameters())
    assert 0 < model["copied_weight_bytes"] < model["weight_bytes"]
    assert "no model 'no-such-model'" in found["models"]["no-such-model"]["error"]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertstream.jobs.doctor._OPTIONAL", {"no-such-package": "parquet"})
    assert examine()["optional"] == {"no-such-package": "pip install 'bertstream[parquet]'"}
