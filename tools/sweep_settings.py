"""Random settings of `Encoder` and random texts, against a slow reference in plain transformers and plain Python.

    python tools/sweep_settings.py                            2,000 cases; some minutes
    python tools/sweep_settings.py --cases 100 --seed 7       fewer, and others
    python tools/sweep_settings.py --seed 7 --case 41         one of them, with all that is known of it

A case draws a model and a tokenizer, output, layers, combine, pooling, overflow, the side of truncation, prompts,
pairs, special tokens, normalisation, dtype, the size of forwards, packing, and whether texts come by a call, `wrap`,
`stream` or from a cache. It is right if the relative L2 error of each text is at most 1e-5 (bfloat16: 0.05), refused
if there is no right answer and the encoder says so in an error of its own, and wrong otherwise. The exit status is 1
if a case is wrong.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from sweeps.cases import LAYERS, MODELS, Case, draw
from sweeps.expected import Setting, expected, refusal
from sweeps.reference import NoAnswerError, relative_error
from sweeps.tokenizers import TOKENIZERS
from torch import Tensor

import bertstream
from bertstream import BertstreamError, EmbeddingCache, Embeddings, Encoder

TOLERANCES = {"float32": 1e-5, "bfloat16": 0.05}

setting_of = functools.cache(Setting)


def judge(case: Case) -> tuple[str, str]:
    """Run one case.

    Returns:
        "right", "refused" or "wrong", and what there is to say about it.
    """
    setting = setting_of(case.model, case.tokenizer, case.options["dtype"])
    reason = refusal(setting, case)
    right: list[Tensor] = []
    try:
        if not reason:
            right = [expected(setting, case, text) for text in case.texts]
    except NoAnswerError as missing:
        reason = str(missing)
    try:
        found = encoded(setting, case)
    except BertstreamError as error:
        said = f"{type(error).__name__}: {error}"
        return ("refused", said) if reason else ("wrong", f"refused without a reason: {said}")
    except Exception as error:
        return "wrong", f"foreign error {type(error).__name__}: {error}"
    if reason:
        return "wrong", f"vectors where there is no right answer: {reason}"
    worst = 0.0
    for number, (rows, target) in enumerate(zip(found, right, strict=True)):
        error = relative_error(rows.float(), target)
        if error > TOLERANCES[case.options["dtype"]]:
            shapes = f"{list(rows.shape)}, right is {list(target.shape)}"
            return "wrong", f"text {number}, {case.texts[number]!r}: relative error {error:.1e}, {shapes}"
        worst = max(worst, error)
    return "right", f"{worst:.1e}"


def encoded(setting: Setting, case: Case) -> list[Tensor]:
    """The rows of each text, in the way of the case."""
    setting.tokenizer.truncation_side = case.truncation_side
    encoder = Encoder(setting.model, setting.tokenizer, **case.options)
    # mpnet's embeddings of a literal padding token are zeros.
    zeros = any(layer % (LAYERS + 1) == 0 for layer in case.layers)
    if case.way == "call":
        return list(checked(encoder(case.texts), zeros))
    with tempfile.TemporaryDirectory() as folder:
        if case.way == "stream":
            return streamed(encoder, case, Path(folder), zeros)
        cache = EmbeddingCache("16MiB") if case.way == "cache" else None
        names = {"text": "text", "pair": "pair" if isinstance(case.texts[0], tuple) else None}
        with closing(
            bertstream.wrap(list(batches(case)), encoder, prefetch=case.prefetch, cache=cache, **names)
        ) as loader:
            for _ in range(2 if cache is not None else 1):  # the second epoch's vectors are the cache's
                found = [rows for batch in loader for rows in checked(batch["text"], zeros)]
        return found


def batches(case: Case) -> Iterator[dict[str, Any]]:
    for start in range(0, len(case.texts), case.batch_size):
        texts = case.texts[start : start + case.batch_size]
        yield columns(texts)


def columns(texts: Sequence[Any]) -> dict[str, Any]:
    if not isinstance(texts[0], tuple):
        return {"text": list(texts)}
    return {"text": [text[0] for text in texts], "pair": [text[1] for text in texts]}


def streamed(encoder: Encoder, case: Case, folder: Path, zeros: bool) -> list[Tensor]:
    lines = []
    for number, text in enumerate(case.texts):
        record = {name: column[0] for name, column in columns([text]).items()}
        lines.append(json.dumps(record | {"number": number}) + "\n")
    (folder / "0.jsonl").write_text("".join(lines), encoding="utf-8")
    pair = "pair" if isinstance(case.texts[0], tuple) else None
    found: dict[int, Tensor] = {}
    options: dict[str, Any] = {"batch_size": case.batch_size, "shuffle": case.shuffle, "prefetch": case.prefetch}
    with closing(bertstream.stream(str(folder / "0.jsonl"), encoder, pair=pair, **options)) as loader:
        for batch in loader:
            found |= dict(zip(batch["number"].tolist(), checked(batch["text"], zeros), strict=True))
    return [found[number] for number in range(len(case.texts))]


def checked(found: Embeddings, zeros: bool) -> Embeddings:
    """The same; that a word without a vector is marked, and only such a word, unless vectors may be zeros."""
    if found.present is not None:
        of_zeros = (found.values == 0).flatten(1).all(1)
        assert bool(of_zeros[~found.present].all()), "a word has a vector that present= does not tell of"
        assert zeros or not bool(of_zeros[found.present].any()), "present= tells of a vector that is not there"
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run the case of this number alone")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--tokenizers", nargs="+", choices=list(TOKENIZERS), default=list(TOKENIZERS))
    parser.add_argument("--json", metavar="FILE", help="write counts and wrong cases as JSON, too")
    options = parser.parse_args(arguments)
    chosen = range(options.cases) if options.case is None else [options.case]
    restricted = "".join(
        f" --{name} {' '.join(getattr(options, name))}"
        for name, every in (("models", MODELS), ("tokenizers", list(TOKENIZERS)))
        if list(getattr(options, name)) != list(every)
    )
    counts: Counter[str] = Counter()
    wrong = []
    started = time.perf_counter()
    for number in chosen:
        case = draw(number, options.seed, options.models, options.tokenizers)
        verdict, said = judge(case)
        counts[verdict] += 1
        if options.case is not None:
            print(f"{verdict}: {said}\n{case}")
        elif verdict == "wrong":
            kind = f"{case.model} {case.tokenizer} {case.way}"
            wrong.append(
                f"python tools/sweep_settings.py --seed {options.seed} --case {number}{restricted}  # {kind}: {said}"
            )
            print(wrong[-1], flush=True)
    kinds = ("right", "refused", "wrong")
    seconds = time.perf_counter() - started
    print(", ".join(f"{counts[kind]} {kind}" for kind in kinds) + f" of {len(chosen)} cases in {seconds:.0f} s")
    if options.json:
        Path(options.json).write_text(json.dumps({"counts": counts, "wrong": wrong}, indent=1), encoding="utf-8")
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    # Here, not in main(), which tests call: these are settings of the whole process.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # tiny models: threads would wait for each other
    raise SystemExit(main())
