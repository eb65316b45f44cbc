"""Runs one part of the check: settings come as one JSON line on stdin, rows leave as JSON lines on stdout.

    python -m gpu.part forward

The imports are done before stdin is read, so a process that is started early starts its work at once.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol


class Emit(Protocol):
    def __call__(self, row: str, **figures: Any) -> None: ...


@dataclass(frozen=True)
class Settings:
    """What every part is told.

    Attributes:
        folder: made by the part `prepare`: `texts.json`, `shards/`, `bert_base/` and, if it made one, `minilm/`.
        device: where models run.
        tiny: whether models, texts and repeats are few, to try the tool.
        data: texts, as `benchmarks.common.read_corpus` takes them; None is Python's manual.
        model: a folder with MiniLM and its tokenizer; None is random weights of its shape.
        workers: processes that read and tokenize.
    """

    folder: str
    device: str
    tiny: bool
    data: str | None
    model: str | None
    workers: int

    def model_folder(self, name: str) -> str:
        """The folder of "bert_base" or "minilm"."""
        return self.model if name == "minilm" and self.model is not None else str(Path(self.folder) / name)

    def shards(self) -> list[str]:
        """The paths of the jsonl shards."""
        return sorted(map(str, (Path(self.folder) / "shards").iterdir()))

    def texts(self) -> list[str]:
        """Distinct texts in random order."""
        found: list[str] = json.loads((Path(self.folder) / "texts.json").read_text(encoding="utf-8"))
        return found


def main() -> None:
    """Run the part that the command line names."""
    rows = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the rows
    run = import_module(f"gpu.{sys.argv[1]}").run
    line = sys.stdin.readline()
    if not line:  # the check ended before it came to this part
        return

    def emit(row: str, **figures: Any) -> None:
        rows.write(json.dumps({"row": row} | figures) + "\n")
        rows.flush()

    run(Settings(**json.loads(line)), emit)


if __name__ == "__main__":
    main()
