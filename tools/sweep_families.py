"""Every encoder family of the installed transformers, in tiny models of random weights, against plain transformers.

    python tools/sweep_families.py                                   all families; a few minutes
    python tools/sweep_families.py --families bert longformer        some of them
    python tools/sweep_families.py --markdown tools/results/families.md

Each family: every layer, and `split` at every layer, x tokens, words and sentences x texts with mask, padding and
unknown ids; then texts around windows, blocks and the longest that the model takes, and pairs. A check is right if the
relative L2 error of each text is at most 1e-5 in float32, refused if the encoder says so in an error of its own, and
wrong otherwise: other vectors, or an error of somebody else's. The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from sweeps.families import names
from sweeps.family_checks import GROUPS, Report, sweep

HEADER = ("family", "way", *(f"{group} right / refused / wrong" for group in GROUPS), "worst error", "seconds")

SHOWN = 4
"""Checks that are named for each reason; `--json` has all."""


def cells(report: Report) -> tuple[str, ...]:
    """The columns of one family."""
    if report.skipped and not report.wrong and not report.refusals:
        return (report.name, "-", *["-"] * len(GROUPS), "-", f"{report.seconds:.1f}")
    counts = [str(report.counts[group]) for group in GROUPS]
    worst = f"{report.worst:.1e}" if report.worst else "0" if report.counts["layers"].right else "-"
    return (report.name, ", ".join(report.ways) or "-", *counts, worst, f"{report.seconds:.1f}")


def notes(reports: list[Report]) -> list[str]:
    """What the table leaves out: what was wrong, what was refused and why, and what was not built."""
    out = []
    for report in reports:
        for reason in dict.fromkeys(wrong.reason for wrong in report.wrong):
            alike = [wrong for wrong in report.wrong if wrong.reason == reason]
            shown = [f"{wrong.what} ({wrong.detail})" if wrong.detail else wrong.what for wrong in alike]
            if len(shown) > SHOWN:
                shown[SHOWN - 1 :] = [f"and {len(shown) - SHOWN + 1} more"]
            out.append(f"wrong: {report.name}, {len(alike)} times {reason}: {', '.join(shown)}")
    for report in reports:
        if report.skipped:
            out.append(f"without a reference: {report.name}: {report.skipped}")
        out += [f"refused: {report.name}, {count} times: {text}" for text, count in report.refusals.items()]
    return out


def total(reports: list[Report]) -> str:
    """One line about all of them."""
    kinds = ("right", "refused", "wrong")
    sums = [sum(getattr(c, kind) for report in reports for c in report.counts.values()) for kind in kinds]
    checked = [report for report in reports if not report.skipped]
    counted = ", ".join(f"{number} {kind}" for number, kind in zip(sums, kinds, strict=True))
    return f"{len(checked)} of {len(reports)} families run in plain transformers; checks: {counted}"


def as_markdown(reports: list[Report]) -> str:
    """The table, and the notes below it."""
    lines = [
        "# Encoder families against plain transformers",
        "",
        f"`python tools/sweep_families.py`, transformers {transformers.__version__}, torch {torch.__version__}. "
        f"{total(reports)}.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(cells(report)) + " |" for report in reports),
        "",
        *(f"* {line.replace('|', '/').replace(chr(10), ' ')}" for line in notes(reports)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", metavar="NAME", help="by transformers' names; all if left out")
    parser.add_argument("--limit-s", type=float, default=120, help="the most seconds for one family")
    parser.add_argument("--json", metavar="FILE", help="write what was found as JSON, too")
    parser.add_argument("--markdown", metavar="FILE", help="write the table and its notes, too")
    parser.add_argument("--list", action="store_true", help="print the names of all families and stop")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(names()))
        return 0
    unknown = sorted({*(options.families or ())} - {*names()})
    if unknown:
        parser.error(f"no such families: {', '.join(unknown)}; --list prints them")
    reports = []
    print(" | ".join(HEADER))
    for name in options.families or names():
        reports.append(sweep(name, options.limit_s))
        print(" | ".join(cells(reports[-1])), flush=True)
    print("\n".join(["", *notes(reports), "", total(reports)]))
    if options.json:
        Path(options.json).write_text(json.dumps([dataclasses.asdict(report) for report in reports], indent=1), "utf-8")
    if options.markdown:
        Path(options.markdown).write_text(as_markdown(reports), "utf-8")
    return int(any(report.wrong for report in reports))


if __name__ == "__main__":
    # Here, not in main(), which tests call: these are settings of the whole process.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # tiny models: threads would wait for each other
    raise SystemExit(main())
