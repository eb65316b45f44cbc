"""Plots for light and dark pages alike: no background, and colours that contrast with both white and black."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import ConfigError

# Each has a contrast of about 4 to 1 with white and with GitHub's #0d1117; a test computes it.
TEXT, BLUE, ORANGE, GREEN = "#7a7a7a", "#2f81d6", "#c2631a", "#2e8b57"


def check_plot(path: str | os.PathLike[str]) -> None:
    """Refuse a plot that cannot be written, before the long work that leads to it.

    Args:
        path: of a .png, .svg or .pdf file.
    Raises:
        ConfigError: matplotlib is not installed, or does not know the file's ending.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib: pip install 'bertstream[plot]'")
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in known:
        raise ConfigError(f"cannot draw to {os.fspath(path)!r}: name a file that ends in .png, .svg or .pdf")


def plot_lengths(
    path: str | os.PathLike[str],
    *,
    edges: Sequence[int],
    counts: Sequence[int],
    max_length: int,
    padding: Sequence[tuple[str, float]],
) -> None:
    """Plot how long texts are and what padding costs.

    Args:
        path: of a .png, .svg or .pdf file.
        edges: [n + 1] bounds of the bins, in tokens; bin i holds lengths from edges[i] to edges[i + 1] - 1.
        counts: [n] texts in each bin.
        max_length: tokens that the model takes; longer texts are marked.
        padding: ways to batch the texts, each with its share of padding.
    Raises:
        ConfigError: matplotlib is not installed, or does not know the file's ending.
        OSError: the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [str(low) if high - low == 1 else f"{low}-{high - 1}" for low, high in pairwise(edges)]
    too_long = [low > max_length for low in edges[:-1]]
    left.bar(range(len(counts)), counts, color=[ORANGE if long else BLUE for long in too_long], width=0.85)
    left.set_xticks(range(len(counts)), names, rotation=45, ha="right")
    left.set(title="Texts by length", xlabel="tokens", ylabel="texts")
    if any(too_long):
        left.axvline(too_long.index(True) - 0.5, color=ORANGE, linestyle="--")
        note = f"longer than {max_length}"
        left.annotate(note, (0.99, 0.93), xycoords="axes fraction", ha="right", color=ORANGE)
    labels, shares = zip(*padding, strict=True)
    for y, share in enumerate(shares):
        right.barh(y, 1 - share, color=GREEN)
        right.barh(y, share, left=1 - share, color=ORANGE)
        right.annotate(f"{share:.0%} padding", (1.03, y), va="center", color=TEXT, annotation_clip=False)
    right.set_yticks(range(len(labels)), labels)
    right.invert_yaxis()
    right.set(title="What a forward computes", xticks=[], xlim=(0, 1.45))
    for axes in (left, right):
        _plain(axes)
    right.spines["bottom"].set_visible(False)
    figure.savefig(os.path.expanduser(path), dpi=150, transparent=True)


def plot_step(path: str | os.PathLike[str], *, loop: Mapping[str, float], work: Mapping[str, float]) -> None:
    """Plot where the time of a step goes; each bar begins where the one above it ends.

    Args:
        path: of a .png, .svg or .pdf file.
        loop: "step" and "wait" of the training loop, in milliseconds per batch.
        work: each stage of the work on a batch, in milliseconds per batch.
    Raises:
        ConfigError: matplotlib is not installed, or does not know the file's ending.
        OSError: the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), layout="constrained")
    both = figure.subplots(2, 1, sharex=True, height_ratios=(len(loop), len(work)))
    for axes, title, parts in zip(both, ("The training loop", "The work on a batch"), (loop, work), strict=True):
        total, left = sum(parts.values()), 0.0
        for y, (stage, ms) in enumerate(parts.items()):
            axes.barh(y, ms, left=left, color={"step": GREEN, "wait": ORANGE}.get(stage, BLUE))
            left += ms
            note = f"{ms:,.2f} ms, {ms / (total or 1.0):.0%}"
            where = {"xy": (1.02, y), "xycoords": ("axes fraction", "data"), "annotation_clip": False}
            axes.annotate(note, va="center", color=TEXT, **where)
        axes.set_yticks(range(len(parts)), [stage.replace("_", " ") for stage in parts])
        axes.invert_yaxis()
        axes.set_title(title, loc="left", color=TEXT)
        _plain(axes)
    both[-1].set(xlabel="milliseconds per batch", xlim=(0, max(sum(loop.values()), sum(work.values())) or 1.0))
    figure.savefig(os.path.expanduser(path), dpi=150, transparent=True)


def _plain(axes: Any) -> None:
    axes.tick_params(colors=TEXT)
    for part in (axes.title, axes.xaxis.label, axes.yaxis.label):
        part.set_color(TEXT)
    for side, spine in axes.spines.items():
        spine.set(color=TEXT, visible=side in ("left", "bottom"))
