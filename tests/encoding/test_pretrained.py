"""A model is found where transformers' own options say, and a folder's transformer where its modules say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from sentence_folders import make_folder, make_model, make_tokenizer

from bertstream import ConfigError, Encoder, EncoderError
from bertstream.encoding import pretrained


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
