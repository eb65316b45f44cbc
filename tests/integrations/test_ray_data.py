"""Ray Data on a local cluster: the vectors equal those of one process, with any number of actors, even if one dies."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bertstream import ConfigError, Encoder, EncoderError
from bertstream.integrations.ray_data import Embed, padded

ROOT = Path(__file__).parents[2]
COUNT = 120
# Starting an actor costs as much as all other tests of this file, so only the full run tries one actor alone.
RUNS = [("two, and one of them is killed", "Mortal", 2)]
if int(os.environ.get("BERTSTREAM_KILLS", "2")) >= 5:
    RUNS.append(("one", "Embed", 1))

# Ray keeps threads and emits warnings, so everything that needs a cluster runs in one process of its own.
CLUSTER = """
import json, os, pickle, runpy, signal, sys
import ray
from bertstream.integrations.ray_data import Embed

folder, texts = sys.argv[1], json.load(open(sys.argv[2]))

class Mortal(Embed):
    "The first actor to reach its second batch is killed, as the kernel does when memory runs out."

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.batches = 0
        open(os.path.join(folder, f"started-{os.getpid()}"), "w").close()

    def __call__(self, batch):
        self.batches += 1
        if self.batches == 2:
            try:
                open(os.path.join(folder, "killed"), "x").close()
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
rows = ray.data.from_items([{"id": i, "text": text} for i, text in enumerate(texts)])
options = {"model": "all-MiniLM-L6-v2", "output": "words", "dtype": "float32"}

def vectors(kind, actors):
    pool = ray.data.ActorPoolStrategy(size=actors)
    return rows.map_batches(kind, fn_constructor_kwargs=options, compute=pool, batch_size=16)

found = {}
for name, kind, actors in json.loads(sys.argv[3]):
    found[name] = [(row["id"], row["vectors"]) for row in vectors(globals()[kind], actors).take_all()]
with open(os.path.join(folder, "found"), "wb") as file:
    pickle.dump(found, file)
sys.argv = ["ray_embed.py", "--epochs", "1"]  # joins this cluster
runpy.run_path("examples/ray_embed.py", run_name="__main__")
ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cluster_gives_the_vectors_of_one_process_though_an_actor_dies_and_the_example_trains_from_it(
    minilm_folder: str, sentences: list[str], tmp_path: Path
) -> None:
    texts = [text for text in sentences if len(text) < 150][:COUNT]
    (tmp_path / "texts").write_text(json.dumps(texts))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", CLUSTER, str(tmp_path), str(tmp_path / "texts"), json.dumps(RUNS)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]

    assert (tmp_path / "killed").exists() and len(list(tmp_path.glob("started-*"))) == 3
    encoder = Encoder.from_pretrained(minilm_folder, output="words", dtype="float32", device="cpu")
    right = [encoder([text])[0].numpy() for text in texts]
    with (tmp_path / "found").open("rb") as file:
        runs = pickle.load(file)
    assert len(runs) == len(RUNS)
    for found in runs.values():
        assert sorted(i for i, _ in found) == list(range(COUNT))  # nothing lost, nothing twice
        for i, vectors in found:
            np.testing.assert_allclose(vectors, right[i], rtol=1e-3, atol=1e-5)

    assert "trained on 144 + 144 rows of 2 actors' vectors" in done.stdout
    accuracy = re.search(r"^test accuracy (\d\.\d{4}) of 120 texts in 6 classes$", done.stdout, re.MULTILINE)
    assert accuracy and float(accuracy[1]) >= 0.9


# --- an actor's work, without a cluster -------------------------------------------------------------------------------


def column(*values: Any) -> np.ndarray[Any, Any]:
    """A column as Ray delivers it."""
    found = np.empty(len(values), object)
    found[:] = values
    return found


@pytest.mark.parametrize("output", ["tokens", "words", "sentence"])
def test_a_batch_gets_a_column_of_vectors(minilm_folder: str, output: str) -> None:
    embed = Embed(minilm_folder, output=output, dtype="float32", device="cpu")
    texts = ["The bank.", "A river bank of the river.", "The bank."]
    found = embed({"text": np.array(texts), "id": np.arange(3)})
    assert list(found) == ["text", "id", "vectors"] and found["id"].tolist() == [0, 1, 2]
    for text, vectors in zip(texts, found["vectors"], strict=True):
        np.testing.assert_allclose(vectors, embed.encoder([text])[0].numpy(), rtol=1e-3, atol=1e-5)
    if output == "sentence":
        assert found["vectors"].shape == (3, 384)
        return
    x, mask = padded(found["vectors"])
    assert x.shape[:2] == mask.shape == (3, max(map(len, found["vectors"])))
    assert torch.equal(x[0][mask[0]], torch.from_numpy(found["vectors"][0])) and not x[~mask].any()


def test_word_lists_and_pairs_are_texts_too(minilm_folder: str) -> None:
    words = [["Bats", "fly"], ["The", "unbelievable", "bass", "swims"]]
    embed = Embed(minilm_folder, text="a", output="words", dtype="float32", device="cpu")
    found = embed({"a": column(*map(np.array, words))})
    assert [len(vectors) for vectors in found["vectors"]] == [2, 4]
    pairs = Embed(minilm_folder, text="a", pair="b", into="x", output="sentence", dtype="float32", device="cpu")
    found = pairs({"a": np.array(["Who?"]), "b": np.array(["The bank."])})
    right = pairs.encoder([("Who?", "The bank.")]).vectors.numpy()
    np.testing.assert_allclose(found["x"], right, rtol=1e-3, atol=1e-5)


def test_a_repeated_text_is_computed_once(minilm_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = Embed(minilm_folder, output="sentence", cache={"memory": "1MiB"}, dtype="float32", device="cpu")
    encode, computed = embed.encoder.encode, []
    monkeypatch.setattr(embed.encoder, "encode", lambda batch: computed.append(len(batch)) or encode(batch))
    for _ in range(2):
        embed({"text": np.array(["The bank.", "A river.", "The bank."])})
    assert computed == [2]


def test_an_empty_batch_stays_empty(minilm_folder: str) -> None:
    for output in ("words", "sentence"):
        embed = Embed(minilm_folder, output=output, dtype="float32", device="cpu")
        assert len(embed({"text": np.array([], str)})["vectors"]) == 0


def test_a_dtype_that_numpy_lacks_is_refused_before_a_model_is_loaded(minilm_folder: str) -> None:
    with pytest.raises(ConfigError, match="output_dtype=torch.bfloat16: .* take torch.float32 or torch.float16"):
        Embed("no-such-model", output_dtype=torch.bfloat16)
    embed = Embed(minilm_folder, output_dtype=torch.float16, device="cpu")
    assert embed({"text": np.array(["The bank."])})["vectors"][0].dtype == np.float16


@pytest.mark.parametrize("empty", [[], column()], ids=["list", "array"])
def test_a_column_without_rows_cannot_be_padded(empty: Any) -> None:
    with pytest.raises(ConfigError, match="no row"):
        padded(empty)


def test_mistakes_are_named(minilm_folder: str) -> None:
    embed = Embed(minilm_folder, device="cpu")
    with pytest.raises(ConfigError, match="no column is called 'text': this batch has \\['body'\\]"):
        embed({"body": np.array(["a"])})
    with pytest.raises(ConfigError, match="'vectors' already"):
        embed({"text": np.array(["a"]), "vectors": np.zeros(1)})
    with pytest.raises(EncoderError, match="text 1"):
        embed({"text": column("a", None)})
    assert repr(embed) == "Embed(text='text', into='vectors', output='tokens')"
