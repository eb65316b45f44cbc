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
from conftest import FULL_RUN

from bertstream import ConfigError, Encoder, EncoderError
from bertstream.integrations.ray_data import Embed, padded

ROOT = Path(__file__).parents[2]
# An actor that starts costs as much as all other tests of this file, so only the full run has two at once.
ACTORS = [1, 2] if FULL_RUN else [1]

# Ray keeps threads and emits warnings, so everything that needs a cluster runs in one process of its own. There the
# example's actors are mortal ones, and its vectors are kept on their way to the training workers.
CLUSTER = """
import os, pickle, runpy, signal, sys
import ray
from bertstream.integrations import ray_data

folder = sys.argv.pop()

class Mortal(ray_data.Embed):
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

def split_and_kept(dataset, *arguments, **options):
    kept.append(dataset.materialize())
    return streaming_split(kept[0], *arguments, **options)

kept, streaming_split = [], ray.data.Dataset.streaming_split
ray.data.Dataset.streaming_split = split_and_kept
ray_data.Embed = Mortal
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
sys.argv = ["ray_embed.py", *sys.argv[1:]]  # joins this cluster
runpy.run_path("examples/ray_embed.py", run_name="__main__")
with open(os.path.join(folder, "kept"), "wb") as file:
    pickle.dump([(row["label"], row["vectors"]) for row in kept[0].take_all()], file)
ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("actors", ACTORS)
def test_the_example_trains_from_the_vectors_of_one_process_though_an_actor_dies(
    minilm_folder: str, tmp_path: Path, actors: int
) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": ""}
    environment["HOME"] = str(tmp_path)  # where Ray writes a token
    command = [sys.executable, "-c", CLUSTER, "--epochs", "1", "--actors", str(actors), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]

    # The actors, one in place of the killed, and the example's own encoder for the texts that it tests with.
    assert (tmp_path / "killed").exists() and len(list(tmp_path.glob("started-*"))) == actors + 1 + 1
    with (tmp_path / "kept").open("rb") as file:
        labels, vectors = map(np.array, zip(*pickle.load(file), strict=True))
    with (ROOT / "examples" / "data" / "senses-train.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    encoder = Encoder.from_pretrained(minilm_folder, output="sentence", dtype="float32", device="cpu")
    right = encoder([" ".join(row["words"]) for row in rows]).vectors.numpy()
    order = (vectors @ right.T).argmax(1)
    assert sorted(order) == list(range(len(rows)))  # nothing lost, nothing twice
    np.testing.assert_allclose(vectors, right[order], rtol=1e-3, atol=1e-5)
    assert len({(rows[i]["word"], label) for i, label in zip(order, labels, strict=True)}) == 6  # each with its label

    assert f"trained on 144 + 144 rows of {actors} actors' vectors" in done.stdout
    accuracy = re.search(r"^test accuracy (\d\.\d{4}) of 120 texts in 6 classes$", done.stdout, re.MULTILINE)
    assert accuracy and float(accuracy[1]) >= 0.9


# --- an actor's work, without a cluster -------------------------------------------------------------------------------


def column(*values: Any) -> np.ndarray[Any, Any]:
    """A column as Ray delivers it."""
    found = np.empty(len(values), object)
    found[:] = values
    return found


@pytest.mark.parametrize("output", ["tokens", "words", "sentence"])
def test_a_batch_gets_a_column_of_vectors(small_folder: str, output: str) -> None:
    embed = Embed(small_folder, output=output, dtype="float32", device="cpu")
    texts = ["The bank.", "A river bank of the river.", "The bank."]
    found = embed({"text": np.array(texts), "id": np.arange(3)})
    assert list(found) == ["text", "id", "vectors"] and found["id"].tolist() == [0, 1, 2]
    for text, vectors in zip(texts, found["vectors"], strict=True):
        np.testing.assert_allclose(vectors, embed.encoder([text])[0].numpy(), rtol=1e-3, atol=1e-5)
    if output == "sentence":
        assert found["vectors"].shape == (3, 32)
        return
    x, mask = padded(found["vectors"])
    assert x.shape[:2] == mask.shape == (3, max(map(len, found["vectors"])))
    assert torch.equal(x[0][mask[0]], torch.from_numpy(found["vectors"][0])) and not x[~mask].any()


def test_word_lists_and_pairs_are_texts_too(small_folder: str) -> None:
    words = [["Bats", "fly"], ["The", "unbelievable", "bass", "swims"]]
    embed = Embed(small_folder, text="a", output="words", dtype="float32", device="cpu")
    found = embed({"a": column(*map(np.array, words))})
    assert [len(vectors) for vectors in found["vectors"]] == [2, 4]
    pairs = Embed(small_folder, text="a", pair="b", into="x", output="sentence", dtype="float32", device="cpu")
    found = pairs({"a": np.array(["Who?"]), "b": np.array(["The bank."])})
    right = pairs.encoder([("Who?", "The bank.")]).vectors.numpy()
    np.testing.assert_allclose(found["x"], right, rtol=1e-3, atol=1e-5)


def test_a_repeated_text_is_computed_once(small_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = Embed(small_folder, output="sentence", cache={"memory": "1MiB"}, dtype="float32", device="cpu")
    encode, computed = embed.encoder.encode, []
    monkeypatch.setattr(embed.encoder, "encode", lambda batch: computed.append(len(batch)) or encode(batch))
    for _ in range(2):
        embed({"text": np.array(["The bank.", "A river.", "The bank."])})
    assert computed == [2]


def test_an_empty_batch_stays_empty(small_folder: str) -> None:
    for output in ("words", "sentence"):
        embed = Embed(small_folder, output=output, dtype="float32", device="cpu")
        assert len(embed({"text": np.array([], str)})["vectors"]) == 0


def test_a_dtype_that_numpy_lacks_is_refused_before_a_model_is_loaded(small_folder: str) -> None:
    with pytest.raises(ConfigError, match="output_dtype=torch.bfloat16: .* take torch.float32 or torch.float16"):
        Embed("no-such-model", output_dtype=torch.bfloat16)
    embed = Embed(small_folder, output_dtype=torch.float16, device="cpu")
    assert embed({"text": np.array(["The bank."])})["vectors"][0].dtype == np.float16


@pytest.mark.parametrize("empty", [[], column()], ids=["list", "array"])
def test_a_column_without_rows_cannot_be_padded(empty: Any) -> None:
    with pytest.raises(ConfigError, match="no row"):
        padded(empty)


def test_mistakes_are_named(small_folder: str) -> None:
    embed = Embed(small_folder, device="cpu")
    with pytest.raises(ConfigError, match="no column is called 'text': this batch has \\['body'\\]"):
        embed({"body": np.array(["a"])})
    with pytest.raises(ConfigError, match="'vectors' already"):
        embed({"text": np.array(["a"]), "vectors": np.zeros(1)})
    with pytest.raises(EncoderError, match="text 1"):
        embed({"text": column("a", None)})
    assert repr(embed) == "Embed(text='text', into='vectors', output='tokens')"
