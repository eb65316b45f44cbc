"""The cookbook's "Coming from another library": what it calls before and after gives equal vectors."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from flair_vectors import DOCUMENTS, LONG, SHORT, WORDS, blocks_below, sample
from torch import nn
from transformers import AutoModel, AutoTokenizer

import bertstream
from bertstream import Encoder

HERE = Path(__file__).parent
RECORDED = json.loads((HERE / "flair_vectors.json").read_text("utf-8"))
SAID = 1e-5  # what the page says of all these vectors


@pytest.fixture
def names(minilm_folder: str) -> dict[str, Any]:
    """What the blocks use, with a folder for the name on the hub."""
    found: dict[str, Any] = {"torch": torch, "nn": nn, "bertstream": bertstream}
    exec(blocks_below("## Coming from another library")[0], found)
    return found | {"name": minilm_folder}


@pytest.fixture(scope="module")
def peer(minilm_folder: str) -> Any:
    """A SentenceTransformer of the same folder."""
    return pytest.importorskip("sentence_transformers").SentenceTransformer(minilm_folder, device="cpu")


@pytest.fixture(scope="module")
def plain_outputs(minilm_folder: str) -> Any:
    """What transformers returns for the first text."""
    model, tokenizer = AutoModel.from_pretrained(minilm_folder), AutoTokenizer.from_pretrained(minilm_folder)
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXTS[:1], return_tensors="pt"), output_hidden_states=True)


def assert_equal(before: Any, after: Any) -> None:
    assert len(before) == len(after) > 0
    for left, right in zip(before, after, strict=True):
        torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), atol=SAID, rtol=SAID)


@pytest.mark.parametrize("heading", ["### From sentence-transformers", "### From a loop of your own over transformers"])
def test_the_blocks_before_and_after_give_equal_vectors(heading: str, names: dict[str, Any]) -> None:
    before, after = blocks_below(heading)
    exec(after, names)
    try:
        exec(before, names)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    assert_equal(names["before"], names["after"])


def test_the_vectors_of_nn_embedding_and_those_in_its_place_have_one_shape(names: dict[str, Any]) -> None:
    before, after = blocks_below("### From nn.Embedding with GloVe or fastText vectors")
    exec(before, names)
    shape, mask = names["x"].shape, names["mask"]
    exec(after, names)
    assert names["x"].shape[:2] == shape[:2]
    assert torch.equal(names["mask"], mask)


OURS: dict[str, dict[str, Any]] = {
    "the first token, by default": {"pooling": "first"},
    "the last token": {"pooling": "last"},
    "the mean of a word's tokens": {},
    "the first and the last token": {"pooling": "first_last"},
    "the mean of all layers": {"pooling": "first", "layers": range(7), "combine": "mean"},
    "the mean of two layers": {"pooling": "first", "layers": (-1, -2), "combine": "mean"},
    "two layers side by side": {"pooling": "first", "layers": (-1, -2)},
    "cut": {"pooling": "first", "overflow": "truncate"},
    "a document's first token, by default": {"pooling": "cls", "overflow": "truncate", "max_length": 512},
    "the mean of a document": {"pooling": "mean"},
    "the maximum of a document": {"pooling": "max"},
}


@pytest.mark.parametrize("case", [*WORDS, *DOCUMENTS])
def test_the_table_names_the_options_that_give_the_vectors_of_flair(case: str, minilm_folder: str) -> None:
    output = "words" if case in WORDS else "sentence"
    encoder = Encoder.from_pretrained(minilm_folder, output=output, dtype="float32", device="cpu", **OURS[case])
    texts = LONG if case == "cut" else SHORT + LONG * (len(RECORDED[case]) - len(SHORT))
    found = [rows if case in WORDS else rows[None] for rows in encoder.encode(texts)]
    assert_equal(RECORDED[case], [sample(rows) for rows in found])


def test_the_block_for_flair_gives_the_vectors_that_flair_gave(names: dict[str, Any]) -> None:
    exec(blocks_below("### From flair")[1], names)
    assert_equal(RECORDED["the page"], [sample(rows) for rows in names["after"]])


@pytest.mark.skipif("FLAIR_PYTHON" not in os.environ, reason="FLAIR_PYTHON names a Python that has flair")
def test_flair_gives_the_recorded_vectors(minilm_folder: str) -> None:
    script = HERE / "flair_vectors.py"
    printed = subprocess.run(
        [os.environ["FLAIR_PYTHON"], script, minilm_folder], check=True, stdout=subprocess.PIPE, text=True
    )
    now = json.loads(printed.stdout)
    assert now.keys() == RECORDED.keys()
    for case, texts in now.items():
        assert_equal(RECORDED[case], texts)


TEXTS = ["They moored at the riverbank.", "The bank unexpectedly raised its rates.", "", "a long bank " * 200]


def test_sentence_transformers_cuts_where_truncate_does(minilm_folder: str, peer: Any) -> None:
    encoder = Encoder.from_pretrained(
        minilm_folder, output="sentence", overflow="truncate", dtype="float32", device="cpu"
    )
    found = encoder.encode(TEXTS)
    assert_equal(peer.encode(TEXTS), found.vectors)
    assert found.tokens.cut_tokens[-1] > 0
    fewer = nn.functional.normalize(found.vectors[:, :128])
    assert_equal(peer.encode(TEXTS, truncate_dim=128, normalize_embeddings=True), fewer)


def test_a_prompt_of_sentence_transformers_is_that_of_an_encoder(minilm_folder: str, peer: Any) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, output="sentence", prompt="query: ", dtype="float32", device="cpu")
    assert_equal(peer.encode(TEXTS[:2], prompt="query: "), encoder.encode(TEXTS[:2]).vectors)


def test_sentence_transformers_token_embeddings_are_cut_at_the_folders_limit(minilm_folder: str, peer: Any) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, max_length=256, overflow="truncate", dtype="float32", device="cpu")
    found = encoder.encode(TEXTS)
    assert int(found.lengths.max()) == 256
    assert_equal(peer.encode(TEXTS, output_value="token_embeddings"), list(found))


def test_a_longer_max_seq_length_is_max_length(minilm_folder: str, peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "max_seq_length", 512)
    encoder = Encoder.from_pretrained(
        minilm_folder, output="sentence", max_length=512, overflow="truncate", dtype="float32", device="cpu"
    )
    assert_equal(peer.encode(TEXTS), encoder.encode(TEXTS).vectors)


@pytest.mark.parametrize(
    ("read", "ours"),
    [
        (lambda found: found.hidden_states[4], {"layers": 4}),
        (lambda found: torch.stack(found.hidden_states[-4:]).sum(0), {"layers": (-1, -2, -3, -4), "combine": "sum"}),
        (lambda found: found.last_hidden_state[:, :1], {"output": "sentence", "pooling": "cls"}),
        (lambda found: found.pooler_output[:, None], {"output": "sentence", "pooling": "pooler"}),
    ],
    ids=["a layer", "the last four", "the first token", "the pooler"],
)
def test_the_table_names_what_a_loop_of_ones_own_reads(
    read: Any, ours: dict[str, Any], plain_outputs: Any, minilm_folder: str
) -> None:
    encoder = Encoder.from_pretrained(minilm_folder, dtype="float32", device="cpu", **ours)
    assert_equal(read(plain_outputs)[0], encoder.encode(TEXTS[:1]).values)
