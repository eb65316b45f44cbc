"""Measure bertstream against the alternatives, in one run; prints one JSON line.

    python tools/bench.py encode --data ../shared/data      token vectors, against other libraries
    python tools/bench.py wrap --data ../shared/data        small batches of short texts, together and one by one
    python tools/bench.py epoch --data ../shared/data       a training loop: how much encoding overlaps with the step
    python tools/bench.py train --data ../shared/data       BERT trained inside the model, packed against padded
    python tools/bench.py split --data ../shared/data       the upper layers over a cached lower half
    python tools/bench.py outputs --data ../shared/data     the cost of fewer layers and of word vectors
    python tools/bench.py embed --data ../shared/data       vectors written to files, against encoding alone
    python tools/bench.py launch                            what a forward costs beside its arithmetic
    python tools/bench.py forward                           a frozen encoder's forward on a CPU, in three ways
    python tools/bench.py cache --data ../shared/data       epochs from the cache, and a tagger's over tensors in memory
    python tools/bench.py stream --data ../shared/data      reading, tokenizing and bucketing, against the tokenizer
    python tools/bench.py host --data ../shared/data        the main thread's own time, without encoding
    python tools/bench.py mix --data ../shared/data         how well a shuffled stream mixes data sorted by class

The contenders take turns, because a machine's speed drifts; figures are medians over the rounds, and ratios are taken
within a round. Each verb is a file of tools/benchmarks. `plot_bench.py` draws the lines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import common

VERBS = sorted({file.stem for file in (Path(__file__).parent / "benchmarks").glob("[a-z]*.py")} - {"common", "models"})


def measure(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run one benchmark.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    Returns:
        The content of its JSON line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for verb in VERBS:
        module = import_module(f"benchmarks.{verb}")
        command = commands.add_parser(verb, help=module.__doc__)
        command.set_defaults(run=getattr(module, verb), needs_texts=getattr(module, "NEEDS_TEXTS", True))
        common.add_options(command)
        if hasattr(module, "add_options"):
            module.add_options(command)
    chosen = parser.parse_args(arguments)
    if chosen.needs_texts and chosen.data is None and chosen.corpus is None:
        parser.error("no texts: write --data FOLDER or --corpus FILE")
    return {"benchmark": chosen.benchmark} | chosen.run(chosen) | {"machine": common.machine(chosen.device)}


if __name__ == "__main__":
    print(json.dumps(measure()))
