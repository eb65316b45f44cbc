"""Write the benchmarks' corpus: short and long texts, each once, shuffled with seed 0.

    python tools/corpus.py --data ../shared/data --out corpus.jsonl

It holds all banking queries and web sentences of the data, and the paragraphs of the manual that comes with Python.
Prints the number of texts, their lengths in words, and the file's sha256, which differs between Python releases.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from benchmarks.common import read_texts


def make_corpus(data: Path) -> list[str]:
    """Every text of the data and every paragraph of Python's manual, each once, shuffled with seed 0."""
    paragraphs = (" ".join(part.split()) for topic in sorted(topics) for part in topics[topic].split("\n\n"))
    texts = list(dict.fromkeys([*read_texts(data, sys.maxsize), *filter(None, paragraphs)]))
    np.random.default_rng(0).shuffle(texts)
    return texts


def main() -> int:
    """Write the file and print its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with banking77/ and ud_english_ewt/")
    parser.add_argument("--out", type=Path, required=True, help="the jsonl to write")
    arguments = parser.parse_args()
    texts = make_corpus(arguments.data)
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    arguments.out.write_bytes(content)
    words = [len(text.split()) for text in texts]
    quantiles = {f"{q:g}": float(np.quantile(words, q)) for q in (0, 0.1, 0.5, 0.9, 0.99, 1)}
    print(
        json.dumps(
            {
                "texts": len(texts),
                "words": sum(words),
                "quantiles_of_words": quantiles,
                "sha256": hashlib.sha256(content).hexdigest(),
                "python": sys.version.split()[0],
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
