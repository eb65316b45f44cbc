"""flair's vectors of a few sentences, for test_migration.py: flair needs transformers 4, and so a Python of its own.

python -m venv flair; flair/bin/pip install flair==0.15.1
flair/bin/python tests/examples/flair_vectors.py FOLDER_OF_ALL_MINILM_L6_V2 > tests/examples/flair_vectors.json
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

SHORT = [["The", "unbelievable", "contrabassoonist", "Basses"], ["They", "moored", " ", "at", "the", "riverbank."]]
LONG = [["They", "moored", "at", "the", "contrabassoonist", "."] * 100]
WORDS: dict[str, dict[str, Any]] = {
    "the first token, by default": {},
    "the last token": {"subtoken_pooling": "last"},
    "the mean of a word's tokens": {"subtoken_pooling": "mean"},
    "the first and the last token": {"subtoken_pooling": "first_last"},
    "the mean of all layers": {"layers": "all"},
    "the mean of two layers": {"layers": "-1,-2"},
    "two layers side by side": {"layers": "-1,-2", "layer_mean": False},
    "cut": {"allow_long_sentences": False},
}
DOCUMENTS: dict[str, dict[str, Any]] = {
    "a document's first token, by default": {},
    "the mean of a document": {"cls_pooling": "mean"},
    "the maximum of a document": {"cls_pooling": "max"},
}


def sample(rows: Any) -> list[list[float]]:
    """The first and last three numbers of some of [N, H] rows, of words far apart in a long text."""
    few = rows[:: max(1, len(rows) // 6)]
    return [[round(number, 6) for number in row[:3].tolist() + row[-3:].tolist()] for row in few]


def blocks_below(heading: str) -> list[str]:
    """The blocks of Python between a heading of the cookbook and the next one."""
    page = (Path(__file__).parents[2] / "examples" / "README.md").read_text("utf-8")
    section = re.split(r"^#+ ", page.split(f"{heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def main(folder: str) -> None:
    import torch
    from flair.data import Sentence
    from flair.embeddings import TransformerDocumentEmbeddings, TransformerWordEmbeddings

    found = {}
    for case, options in WORDS.items():
        sentences = [Sentence(text) for text in (LONG if case == "cut" else SHORT)]
        TransformerWordEmbeddings(folder, fine_tune=False, **options).embed(sentences)
        found[case] = [sample(torch.stack([word.embedding for word in sentence])) for sentence in sentences]
    for case, options in DOCUMENTS.items():
        sentences = [Sentence(text) for text in SHORT + LONG[:1] * (not options)]
        TransformerDocumentEmbeddings(folder, fine_tune=False, **options).embed(sentences)
        found[case] = [sample(sentence.embedding[None]) for sentence in sentences]
    names: dict[str, Any] = {"torch": torch}
    exec(blocks_below("## Coming from another library")[0], names)
    names["name"] = folder
    exec(blocks_below("### From flair")[0], names)
    found["the page"] = [sample(rows) for rows in names["before"]]
    json.dump(found, sys.stdout, indent=0)


if __name__ == "__main__":
    main(sys.argv[1])
