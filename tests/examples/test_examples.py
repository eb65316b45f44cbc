"""The examples are short, run as they are, and print the expected results."""

from __future__ import annotations

import csv
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fork_server import ENCODERS

from bertstream import ShardError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a script of the repository with arguments, as the command line would, and return what it printed."""

    def run(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def topics(tmp_path: Path) -> tuple[Path, Path]:
    """Two small CSV files: sentences, and the ambiguous word of each as its class, sorted by class."""
    paths = []
    for split, count in (("train", 96), ("test", 48)):
        lines = (ROOT / "examples" / "data" / f"senses-{split}.jsonl").read_text("utf-8").splitlines()[:count]
        rows = [{"text": " ".join(row["words"]), "category": row["word"]} for row in map(json.loads, lines)]
        paths.append(tmp_path / f"{split}.csv")
        with paths[-1].open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "category"])
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: row["category"]))
    return paths[0], paths[1]


# Twelve steps an epoch on `topics`: enough to learn six classes in three.
QUICK = ("--epochs", 3, "--batch-size", 8)


def accuracy(printed: str) -> float:
    """The printed test accuracy; checks that the line counts the six classes and 48 texts of `topics`."""
    match = re.search(r"^test accuracy (\d\.\d{4}) of 48 texts in 6 classes$", printed, re.MULTILINE)
    assert match, printed
    return float(match[1])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_has_fewer_than_80_lines(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) < 80


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_prints_its_usage(path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(f"examples/{path.name}", "--help")
    assert stopped.value.code == 0
    assert f"usage: {path.name}" in capsys.readouterr().out


def test_the_quickstart_tells_senses_apart_by_context_and_not_by_the_word(run: Run) -> None:
    printed = run("examples/quickstart.py")
    assert "sense accuracy on 120 held-out sentences" in printed
    rows = dict(re.findall(r"^  (\S.*?) +(\d\.\d{3})$", printed, re.MULTILINE))
    found = {name: float(number) for name, number in rows.items()}
    assert list(found) == [
        "majority class",
        "the word's static vector",
        "mean static vector, 5 words each side",
        "mean static vector, whole sentence",
        "the word's contextual vector",
    ]
    assert found["majority class"] == 0.5  # the data are balanced within each word
    assert abs(found["the word's static vector"] - found["majority class"]) <= 0.02
    assert found["the word's contextual vector"] >= 0.9
    assert found["the word's contextual vector"] > found["mean static vector, 5 words each side"] > 0.6


def test_train_classifier_learns_from_tars_of_make_shards(run: Run, topics: tuple[Path, Path], tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    for path in topics:
        labels = ["--labels", shards / "labels.json"] if path.stem == "test" else []
        out = shards / f"{path.stem}-%03d.tar"
        run("tools/make_shards.py", path, "--out", out, "--label", "category", "--per-shard", 40, *labels)
    train, test = shards / "train-*.tar", shards / "test-{000..001}.tar"
    assert accuracy(run("examples/train_classifier.py", "--train", train, "--test", test, *QUICK)) >= 0.9


@pytest.mark.parametrize("num_workers", [0, 2])
def test_train_classifier_learns_from_a_csv_with_named_classes(
    run: Run, topics: tuple[Path, Path], num_workers: int
) -> None:
    train, test = topics
    columns = ["--text", "text", "--label", "category", "--num-workers", num_workers]
    assert accuracy(run("examples/train_classifier.py", "--train", train, "--test", test, *columns, *QUICK)) >= 0.9


def test_train_classifier_names_the_record_whose_class_was_never_trained(run: Run, topics: tuple[Path, Path]) -> None:
    train, test = topics
    with test.open("a", encoding="utf-8") as file:
        file.write("A new sentence.,newt\r\n")
    columns = ["--text", "text", "--label", "category", "--epochs", 1]
    with pytest.raises(ShardError, match="newt") as caught:
        run("examples/train_classifier.py", "--train", train, "--test", test, *columns)
    assert (caught.value.path, caught.value.index, caught.value.field) == (str(test), 48, "category")


def test_wrap_dataloader_runs_as_it_is_on_the_shipped_sentences(run: Run) -> None:
    printed = run("examples/wrap_dataloader.py")
    match = re.search(r"^test accuracy (\d\.\d{4}) of 120 texts in 12 classes$", printed, re.MULTILINE)
    assert match, printed
    assert float(match[1]) >= 0.9


def test_wrap_dataloader_learns_from_a_csv(run: Run, topics: tuple[Path, Path]) -> None:
    train, test = topics
    columns = ["--text", "text", "--label", "category"]
    assert accuracy(run("examples/wrap_dataloader.py", "--train", train, "--test", test, *columns, *QUICK)) >= 0.9


def test_the_tagger_learns_parts_of_speech_from_word_vectors(run: Run, tmp_path: Path) -> None:
    words = {"DET": ["the", "a"], "ADJ": ["unbelievable", "red"], "NOUN": ["bank", "electroencephalograph", "spring"]}
    words |= {"VERB": ["sees", "repairs"], "PUNCT": ["."]}
    for name, start in (("train", 0), ("test", 40)):
        rows = []
        for number in range(start, start + 40):
            tags = ["DET", "ADJ", "NOUN", "VERB", "DET", "NOUN", "PUNCT"][number % 3 == 0 :]
            for i, tag in enumerate(tags, 1):
                rows.append(f"{i}\t{words[tag][(number * i) % len(words[tag])]}\t_\t{tag}\t_\t_\t0\t_\t_\t_")
            rows.append("")
        (tmp_path / name).write_text("# a comment\n" + "\n".join(rows), encoding="utf-8")
    printed = run("examples/tag_words.py", "--train", tmp_path / "train", "--test", tmp_path / "test", "--epochs", 6)
    match = re.search(r"^accuracy with layer 2: (\d\.\d{4}) \(mean of 1\)$", printed, re.MULTILINE)
    assert match, printed
    assert float(match[1]) >= 0.95


def test_finetune_trains_the_encoder_after_its_frozen_epochs(run: Run) -> None:
    printed = run("examples/finetune.py", "--epochs", 2, "--frozen", 1)
    match = re.search(r"^test accuracy (\d\.\d{4}) of 120 texts in 12 classes$", printed, re.MULTILINE)
    assert match and float(match[1]) >= 0.95


def test_split_finetune_trains_the_upper_half(run: Run) -> None:
    printed = run("examples/split_finetune.py", "--epochs", 2)
    match = re.search(r"^test accuracy (\d\.\d{4}) of 120 texts in 12 classes$", printed, re.MULTILINE)
    assert match and float(match[1]) >= 0.9


def test_replacing_static_vectors_helps(run: Run) -> None:
    found = {}
    for vectors, epochs in (("static", 6), ("bert", 3)):
        printed = run("examples/replace_glove.py", "--vectors", vectors, "--epochs", epochs)
        match = re.search(r"accuracy (\d\.\d{4}) on 120", printed)
        assert match
        found[vectors] = float(match[1])
    assert found["bert"] >= 0.9 > found["static"] + 0.1


@pytest.mark.parametrize("framework", ["lightning", "trainer", "accelerate"])
@pytest.mark.filterwarnings("ignore")  # the frameworks' own
def test_frameworks_take_the_loader(framework: str, run: Run) -> None:
    match = re.search(r"^accuracy (\d\.\d{4}) on 120", run(f"examples/with_{framework}.py"), re.MULTILINE)
    assert match and float(match[1]) >= 0.85


# Ranks are forked, not spawned: each would import torch and transformers, which takes longer than its training.
FORKED = """
import runpy, sys
from functools import partial
import torch.multiprocessing
torch.multiprocessing.spawn = partial(torch.multiprocessing.start_processes, start_method="fork")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ranks_train_one_model_even_after_a_frozen_epoch() -> None:
    program = f"import sys; sys.argv[0] = 'examples/several_ranks.py'{FORKED}"
    printed, errors, status = ENCODERS.start(program, "--epochs", "2").finish()
    assert status == 0, errors
    assert len(set(re.findall(r"weights add up to (\d+\.\d{9})", printed))) == 1
    steps = dict(re.findall(r"rank (\d), epoch 1: (\d+) steps", printed))
    assert len(steps) == 2 and steps["0"] == steps["1"]
    assert errors.count("does not average them over ranks") == 2, "once per rank"
