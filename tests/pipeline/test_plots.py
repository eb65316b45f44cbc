"""Plots are legible on light and on dark pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from bertstream import ConfigError
from bertstream.pipeline import plots

EXAMPLE = {
    "edges": [5, 7, 9, 13, 17, 25],
    "counts": [3, 20, 41, 12, 1],
    "padding": [("file order", 0.4), ("packed", 0.0)],
}


STEP = {
    "loop": {"step": 6.0, "wait": 2.0},
    "work": {"read": 1.0, "tokenize": 0.5, "lookup": 0.0, "encode": 5.0, "hand_over": 1.5},
}


def painted(picture: Any, colour: str) -> Any:
    """[height, width] bool: where a picture has this colour and is opaque."""
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return (np.abs(picture[..., :3] - wanted).max(-1) < 0.02) & (picture[..., 3] > 0.9)


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
@pytest.mark.parametrize("colour", [plots.TEXT, plots.BLUE, plots.ORANGE, plots.GREEN])
def test_every_colour_has_contrast_on_light_and_on_dark_pages(colour: str, page: str) -> None:
    low, high = sorted((luminance(colour), luminance(page)))
    assert (high + 0.05) / (low + 0.05) >= 3.9


@pytest.mark.parametrize("max_length", [12, 512])
def test_a_plot_has_no_background_and_marks_texts_that_are_too_long(tmp_path: Path, max_length: int) -> None:
    plots.plot_lengths(tmp_path / "lengths.png", max_length=max_length, **EXAMPLE)
    picture = imread(tmp_path / "lengths.png")
    assert picture.shape[2] == 4 and picture[0, 0, 3] == 0
    assert (painted(picture[:, : picture.shape[1] // 2], plots.ORANGE).sum() > 500) == (max_length == 12)


def test_a_steps_bars_are_as_long_as_its_parts_and_follow_each_other(tmp_path: Path) -> None:
    plots.plot_step(tmp_path / "step.png", **STEP)
    picture = imread(tmp_path / "step.png")

    def ends(colour: str) -> Any:
        columns = painted(picture, colour).sum(0).nonzero()[0]
        return np.array([columns[0], columns[-1] + 1])

    step, wait, work = (ends(colour) for colour in (plots.GREEN, plots.ORANGE, plots.BLUE))
    assert step[1] == pytest.approx(wait[0], abs=2)
    assert (wait[1] - wait[0]) / (step[1] - step[0]) == pytest.approx(2 / 6, abs=0.02)
    assert [*work] == pytest.approx([step[0], wait[1]], abs=2), "the work's 8 ms are as long as the loop's 8 ms"
    # Bars do not overlap: each column crosses one bar.
    tall = painted(picture, plots.BLUE).sum(0)[work[0] : work[1]]
    assert tall.max() <= tall.min() + 4


@pytest.mark.parametrize("name", ["lengths", "step"])
def test_all_text_and_bars_have_one_of_the_colours(tmp_path: Path, name: str) -> None:
    if name == "lengths":
        plots.plot_lengths(tmp_path / "plot.png", max_length=12, **EXAMPLE)
    else:
        plots.plot_step(tmp_path / "plot.png", **STEP)
    picture = imread(tmp_path / "plot.png")
    ours = sum(painted(picture, colour) for colour in (plots.TEXT, plots.BLUE, plots.ORANGE, plots.GREEN))
    assert picture[0, 0, 3] == 0 and ours.sum() > 10_000
    others = (picture[..., 3] > 0.9) & (ours == 0)
    assert others.sum() < 0.01 * ours.sum(), "other colours appear only where two meet"


def test_a_loader_that_yielded_nothing_can_be_plotted(tmp_path: Path) -> None:
    plots.plot_step(tmp_path / "step.svg", **{part: dict.fromkeys(stages, 0.0) for part, stages in STEP.items()})
    assert (tmp_path / "step.svg").stat().st_size > 0


def test_a_plot_that_cannot_be_written_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lengths.foo", "lengths"):
        with pytest.raises(ConfigError, match=r"ends in .png"):
            plots.check_plot(tmp_path / name)
    plots.check_plot(tmp_path / "lengths.SVG")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bertstream\[plot\]"):
        plots.check_plot(tmp_path / "lengths.png")
