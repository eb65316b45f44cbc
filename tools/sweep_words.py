"""Words from the word cache against the tokenizers library, id for id, for tokenizers that are trained on the spot.

    python tools/sweep_words.py --data ../shared/data           20,000 random texts a tokenizer, and all real ones
    python tools/sweep_words.py --texts 500 --seed 7 --kinds bert gemma
    python tools/sweep_words.py --kinds --random 8000           tokenizers of random parts, 150 texts each

Real texts are Python's manual and, with --data, banking77 and UD English EWT. The exit status is 1 if a text is wrong.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import read_corpus
from sweeps.random_tokenizers import wrong_text
from sweeps.words import KINDS, paragraphs, random_text
from tokenizers import Tokenizer

from bertstream.encoding.word_cache import WholeTexts, WordCache
from bertstream.encoding.word_cuts import find_cut

CHUNK = 256


def wrong_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[str], WordCache]:
    """The texts that the cache gives other ids than the library, and the cache; each text also as a list of words."""
    cache, library = WordCache(tokenizer, find_cut(tokenizer)), WholeTexts(tokenizer)
    wrong = []
    for first in range(0, len(texts), CHUNK):
        chunk = texts[first : first + CHUNK]
        lists = [text.split(" ") for text in chunk]
        found = zip(cache.texts(chunk), cache.lists(lists), strict=True)
        right = zip(library.texts(chunk), library.lists(lists), strict=True)
        wrong += [text for text, ours, theirs in zip(chunk, found, right, strict=True) if ours != theirs]
    return wrong, cache


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; returns the number of wrong texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with banking77/ and ud_english_ewt/")
    parser.add_argument("--texts", type=int, default=20_000, help="random texts for each tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--random", type=int, default=0, metavar="N", help="tokenizers of random parts to try")
    options = parser.parse_args(arguments)
    real = [*paragraphs(), *(read_corpus(options.data) if options.data is not None else ())]
    failures = 0
    for kind in options.kinds:
        draw = random.Random(f"{options.seed} {kind}")
        texts = [*real, *(random_text(draw) for _ in range(options.texts))]
        started = time.perf_counter()
        wrong, cache = wrong_texts(KINDS[kind](), texts)
        failures += len(wrong)
        share = cache.count.found / max(1, cache.count.asked)
        print(
            f"{kind}: {len(wrong)} wrong of {len(texts)}, {share:.0%} of words found, "
            f"{time.perf_counter() - started:.0f} s",
            *(ascii(text)[:300] for text in wrong[:5]),
            sep="\n    ",
            flush=True,
        )
    cached = 0
    for seed in range(options.seed, options.seed + options.random):
        text, had_cache = wrong_text(seed)
        cached += had_cache
        if text is not None:
            failures += 1
            print(f"the random tokenizer of seed {seed} is wrong for {text!a}", flush=True)
    if options.random:
        print(f"{options.random} random tokenizers, {cached} with a word cache")
    return failures


if __name__ == "__main__":
    raise SystemExit(min(1, main()))
