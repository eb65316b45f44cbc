"""Use in a notebook: objects with a readable repr, and a cell that is interrupted and run again."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

import bertstream
from bertstream import Encoder
from bertstream.testing import write_shards

ROOT = Path(__file__).parents[2]


def test_every_public_object_has_a_repr_of_one_line(minilm: Encoder, tmp_path: Path) -> None:
    shards = write_shards(tmp_path, ["The bank.", "A river."])
    loader = bertstream.stream(shards, minilm, batch_size=2)
    batch = next(iter(loader))
    mix = bertstream.ScalarMix(2)
    with bertstream.EmbeddingCache("1MiB") as cache:
        objects = [minilm, loader, loader.dataset, batch["text"], batch["text"].tokens, cache, mix]
        objects += [bertstream.TokenCollate(minilm, text="a", pair="b"), bertstream.StreamConfig()]
        objects += [bertstream.ShardError("x: is missing", path="x")]
        shown = [repr(thing) for thing in objects]
    loader.close()
    for thing, line in zip(objects, shown, strict=True):
        assert line.startswith(type(thing).__name__) and " at 0x" not in line and "\n" not in line and len(line) < 300
    assert shown[0] == "Encoder(BertModel, output='tokens', layers=(6,), embedding_dim=384, fused, float32, cpu)"
    assert shown[2] == "TextStream(1 shards, text='text', batch_size=2, shuffle=False, epoch=0, rank 0 of 1)"
    assert shown[3] == f"Embeddings(2 texts, tokens [{len(batch['text'].values)}, 384], float32, cpu)"
    assert shown[7] == "TokenCollate(text='a', pair='b', TextTokenizer(max_length=512, overflow='error'))"
    with torch.no_grad():
        mix.weights[0] += 100
    assert repr(mix) == "ScalarMix(shares=[1.0, 0.0], gamma=1)"


def test_names_are_completed_and_typed() -> None:
    assert set(bertstream.__all__) <= set(dir(bertstream))
    assert (ROOT / "bertstream" / "py.typed").exists()


# A notebook keeps the last error with its frames, and so their loops, alive; so does this interpreter.
NOTEBOOK = """
import code, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
shell = code.InteractiveInterpreter({"shards": sys.argv[2:], "workers": int(sys.argv[1])})

def cell(source):
    if shell.runsource(source, "cell", "exec"):
        raise SystemExit("incomplete")

cell('''
import time, bertstream
from bertstream.testing import FakeEncoder
loader = bertstream.stream(shards, FakeEncoder(), batch_size=4, num_workers=workers, prefetch=2)
seen = []
''')
cell('''
for number, batch in enumerate(loader):
    seen += batch["id"].tolist()
    if number == 1:
        print("running", flush=True)
        time.sleep(60)
''')
print("kept:", sys.last_type.__name__, flush=True)
cell('print("seen:", len(seen)); state = loader.state_dict(); again = []')
cell('''
loader.load_state_dict(state)
for batch in loader:
    again += batch["id"].tolist()
print("rest:", sorted(seen + again) == list(range(40)))
print("whole:", sorted(i for batch in loader for i in batch["id"].tolist()) == list(range(40)))
loader.close()
''')
print("threads:", [thread.name for thread in threading.enumerate() if thread.name.startswith("bertstream")])
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cell_that_was_interrupted_is_run_again(tmp_path: Path, workers: int) -> None:
    shards = write_shards(tmp_path, [f"text {i}" for i in range(40)])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", NOTEBOOK, str(workers), *shards],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None and process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert out.splitlines() == ["kept: KeyboardInterrupt", "seen: 8", "rest: True", "whole: True", "threads: []"]
    assert len(re.findall(r"^Traceback", errors, re.MULTILINE)) == 1


@pytest.mark.slow
def test_the_tour_runs_and_prints_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    matplotlib.use("agg")
    monkeypatch.chdir(ROOT / "examples")
    path = Path("tour.ipynb")
    assert path.stat().st_size < 60_000, "outputs are to be small"
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    namespace: dict[str, object] = {}
    for cell in cells:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), namespace)
        outputs = cell["outputs"]
        shown = "".join(line for output in outputs for line in output.get("text", ()))
        if "stats()" not in cell["source"][-1] and "bottleneck()" not in "".join(
            cell["source"]
        ):  # these are of a clock
            assert re.sub(r"\d+ of", "n of", printed.getvalue()) == re.sub(r"\d+ of", "n of", shown)
        assert bool(plt.get_fignums()) == any("image/png" in output.get("data", {}) for output in outputs)
        plt.close("all")
    assert namespace["right"] >= 0.8 * namespace["total"]  # type: ignore[operator]
    for name in ("train", "test"):
        namespace[name].close()  # type: ignore[attr-defined]
