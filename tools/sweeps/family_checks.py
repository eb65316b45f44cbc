"""One family of models: every layer, output and split against plain transformers, one text at a time."""

from __future__ import annotations

import copy
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bertstream import BertstreamError, Encoder
from bertstream.tokens import Text

from .families import Family, NotBuiltError, build
from .reference import NoAnswerError, Tokens, plain_states, pooled, relative_error, tokenize
from .tokenizers import UNKNOWN, WORDS

TOLERANCE = 1e-5
"""Relative L2 error of each text in float32."""

OUTPUTS = ("tokens", "words", "sentence")
GROUPS = ("layers", "split", "long")
LONGEST = 96
"""Tokens of the longest text, of a model without a limit."""

Found: TypeAlias = tuple[float, Text]


@dataclass
class Counts:
    """How many checks of one kind came out how."""

    right: int = 0
    refused: int = 0
    wrong: int = 0

    def __str__(self) -> str:
        return f"{self.right} / {self.refused} / {self.wrong}"


@dataclass
class Wrong:
    """One check that failed.

    Attributes:
        what: the check.
        reason: why, the same for checks that fail in one way.
        detail: the error and the text, of other vectors.
    """

    what: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Report:
    """What the sweep found of a family.

    Attributes:
        name: of the family.
        ways: how texts shared forwards, each way that was met.
        counts: by group: "layers", every layer and output; "split", every place; "long", texts around windows, blocks
            and the longest the model takes, pairs, and a text that is too long.
        wrong: the checks with other vectors or a foreign error.
        refusals: what the encoder said, how often.
        worst: the largest error of a right check.
        skipped: why nothing was checked, or "".
        seconds: wall clock.
    """

    name: str
    ways: list[str] = field(default_factory=list)
    counts: dict[str, Counts] = field(default_factory=lambda: {group: Counts() for group in GROUPS})
    wrong: list[Wrong] = field(default_factory=list)
    refusals: dict[str, int] = field(default_factory=dict)
    worst: float = 0.0
    skipped: str = ""
    seconds: float = 0.0

    def check(self, group: str, what: str, run: Callable[[], Found]) -> None:
        """Count one check.

        Args:
            group: one of `GROUPS`.
            what: the check, for a line about it.
            run: returns the worst error of its texts and which text has it, or raises.
        """
        counts = self.counts[group]
        try:
            error, text = run()
        except BertstreamError as refusal:
            counts.refused += 1
            said = f"{type(refusal).__name__}: {refusal}"
            self.refusals[said] = self.refusals.get(said, 0) + 1
            return
        except NoAnswerError as missing:
            counts.wrong += 1
            self.wrong.append(Wrong(what, f"vectors where there is no right answer: {missing}"))
            return
        except TookTooLong:
            raise
        except Exception as foreign:
            counts.wrong += 1
            said = " ".join(str(foreign).split())[:160]
            self.wrong.append(Wrong(what, f"foreign error {type(foreign).__name__}: {said}"))
            return
        if error <= TOLERANCE:
            counts.right += 1
            self.worst = max(self.worst, error)
        else:
            counts.wrong += 1
            self.wrong.append(Wrong(what, "other vectors", f"relative error {error:.1e} of {str(text)[:40]!r}"))

    def note_way(self, encoder: Encoder) -> None:
        if encoder.batching.way not in self.ways:
            self.ways.append(encoder.batching.way)


class TookTooLong(BaseException):
    """The family's time is up; no `except Exception` may take it for the model's error."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """A context that raises `TookTooLong` after this time, in the main thread; elsewhere without a limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TookTooLong(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sweep(name: str, limit_s: float = 120.0, groups: Sequence[str] = GROUPS) -> Report:
    """Check one family.

    Args:
        name: as `families.names` lists it.
        limit_s: after this time the rest is not checked, which counts as wrong.
        groups: the checks to run.
    """
    report = Report(name)
    started = time.perf_counter()
    try:
        with limited(limit_s):
            _Checks(build(name), report).run(groups)
    except NotBuiltError as why:
        report.skipped = f"not built: {why}"
    except TookTooLong as why:
        report.counts["layers"].wrong += 1
        report.wrong.append(Wrong("the family", str(why)))
    report.seconds = time.perf_counter() - started
    return report


class _Checks:
    def __init__(self, family: Family, report: Report) -> None:
        self.family = family
        self.report = report
        self.model = copy.deepcopy(family.model)  # the user's; the family's stays as it was made
        self.known: dict[str, tuple[Tokens, list[Tensor | None]]] = {}
        self.failed = ""  # the last error of plain transformers

    def run(self, groups: Sequence[str]) -> None:
        every = short_texts(self.family.tokenizer)
        texts = [text for text in every if self.runs(text)]
        if len(texts) < len(every):
            # Without a reference no vector is right.
            what = "texts that plain transformers does not run"
            self.report.check("layers", what, partial(self.refuses, [text for text in every if text not in texts]))
        if not texts:
            self.report.skipped = f"plain transformers: {self.failed}"
            return
        for group in groups:
            getattr(self, f"check_{group}")(texts)

    def check_layers(self, texts: Sequence[Text]) -> None:
        for output in OUTPUTS:
            for layer in range(self.family.layers + 1):
                self.report.check("layers", f"{output} of layer {layer}", partial(self.layer, texts, output, layer))

    def check_split(self, texts: Sequence[Text]) -> None:
        for at in range(1, self.family.layers):
            for output in OUTPUTS:
                self.report.check("split", f"{output}, split at {at}", partial(self.split, texts, output, (-1,), at))
            layers = (at, -1)
            what = f"tokens of layers {layers}, split at {at}"
            self.report.check("split", what, partial(self.split, texts, "tokens", layers, at))

    def check_long(self, texts: Sequence[Text]) -> None:
        for layer in range(self.family.layers + 1):
            self.report.check("long", f"long texts, layer {layer}", partial(self.long, texts, layer))
        pairs: list[Text] = [(" ".join(WORDS[:3]), " ".join(WORDS[3:9])), ("bank", "river")]
        self.report.check("long", "pairs", partial(self.pairs, pairs, texts))
        self.report.check("long", "a text that is too long", self.too_long)

    def encoder(self, **options: Any) -> Encoder:
        encoder = Encoder(self.model, self.family.tokenizer, **options)
        self.report.note_way(encoder)
        return encoder

    def refuses(self, texts: Sequence[Text]) -> Found:
        self.encoder()(texts)
        raise NoAnswerError(self.failed)

    def layer(self, texts: Sequence[Text], output: Any, layer: int) -> Found:
        found = self.encoder(output=output, layers=layer)(texts)
        return self.worst(found, texts, output, (layer,))

    def split(self, texts: Sequence[Text], output: Any, layers: tuple[int, ...], at: int) -> Found:
        lower, upper = self.encoder(output=output, layers=layers).split(at)
        return self.worst(upper(lower(texts)), texts, output, layers)

    def long(self, texts: Sequence[Text], layer: int) -> Found:
        encoder = self.encoder(layers=layer)
        most = min(encoder.tokenizer.max_length, LONGEST)
        longer = [text for text in long_texts(self.family.tokenizer, self.family.window, most) if self.runs(text)]
        if not longer:
            raise NoAnswerError(f"plain transformers runs no long text: {self.failed}")
        # Short ones first: they must not change how a model runs long ones.
        found = [self.worst(encoder(part), part, "tokens", (layer,)) for part in (texts, longer, [*longer, *texts])]
        return max(found, key=lambda found: found[0])

    def pairs(self, pairs: Sequence[Text], texts: Sequence[Text]) -> Found:
        found = self.encoder()([*pairs, *texts])
        return self.worst(found, [*pairs, *texts], "tokens", (-1,))

    def too_long(self) -> Found:
        encoder = self.encoder()
        if encoder.tokenizer.max_length > LONGEST:
            return 0.0, ""
        try:
            encoder(long_texts(self.family.tokenizer, self.family.window, encoder.tokenizer.max_length + 1)[-1:])
        except BertstreamError:  # the right answer
            return 0.0, ""
        raise NoAnswerError(f"a text of {encoder.tokenizer.max_length + 1} tokens")

    def runs(self, text: Text) -> bool:
        """Whether plain transformers takes this text."""
        try:
            self.states(text)
        except Exception as error:
            self.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            return False
        return True

    def states(self, text: Text) -> tuple[Tokens, list[Tensor | None]]:
        if repr(text) not in self.known:
            tokens = tokenize(self.family.tokenizer, text)
            self.known[repr(text)] = tokens, plain_states(self.family.model, tokens.ids, tokens.types)
        return self.known[repr(text)]

    def worst(self, found: Any, texts: Sequence[Text], output: str, layers: Sequence[int]) -> Found:
        assert len(found) == len(texts)
        errors = []
        for text, rows in zip(texts, found, strict=True):
            split = text.split() if isinstance(text, str) and output == "words" else text
            tokens, states = self.states(split)
            errors.append((relative_error(rows.detach(), expected(tokens, states, output, layers)), text))
        return max(errors, key=lambda found: found[0])


def expected(tokens: Tokens, states: Sequence[Tensor | None], output: str, layers: Sequence[int]) -> Tensor:
    """A text's rows: of layers side by side, means of a word's or a text's tokens."""
    chosen = []
    for layer in layers:
        state = states[layer]
        if state is None:
            raise NoAnswerError(f"plain transformers gives no hidden states of layer {layer}")
        chosen.append(state)
    rows = torch.cat(chosen, -1)
    if output == "tokens":
        return rows
    empty = torch.zeros(rows.shape[1])
    if output == "sentence":
        return pooled(list(rows), "mean", empty)
    of_word = [[rows[i] for i, word in enumerate(tokens.words) if word == number] for number in range(tokens.num_words)]
    return torch.stack([pooled(mine, "mean", empty) for mine in of_word])


def short_texts(tokenizer: Any) -> list[Text]:
    """Texts that break what is computed once a forward, or from ids: literal special tokens, unknown words."""
    mask, pad, unknown = tokenizer.mask_token, tokenizer.pad_token, tokenizer.unk_token
    return [
        "bank",
        " ".join(WORDS),
        f"the {mask} of the {mask} raised {mask} again",
        f"the {pad} of the river {pad} raised",
        f"{UNKNOWN} the {UNKNOWN} river {unknown} bank",
        f"the {mask} {pad} {UNKNOWN} of the bank this spring",
    ]


def long_texts(tokenizer: Any, window: int, most: int) -> list[Text]:
    """Texts of exactly so many tokens: around windows and blocks, and around the most, which is the last."""
    lengths = {window - 1, window, window + 1, 2 * window, 3 * window + 1, 7 * window, 7 * window + 1, most // 2, most}
    generator = random.Random(0)
    frame = len(tokenizer("").input_ids)
    usual = [*WORDS * 3, tokenizer.mask_token, UNKNOWN, tokenizer.pad_token]
    out: list[Text] = []
    for length in sorted(length for length in lengths if frame < length <= most):
        out.append(" ".join(generator.choice(usual) for _ in range(length - frame)))
    return out
