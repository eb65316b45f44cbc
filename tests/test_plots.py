"""Pictures can be read on bright and on dark pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from bertstream import ConfigError, plots

EXAMPLE = {
    "edges": [5, 7, 9, 13, 17, 25],
    "counts": [3, 20, 41, 12, 1],
    "padding": [("file order", 0.4), ("packed", 0.0)],
}


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
@pytest.mark.parametrize("colour", [plots.TEXT, plots.BLUE, plots.ORANGE, plots.GREEN])
def test_every_colour_stands_out_on_bright_and_on_dark_pages(colour: str, page: str) -> None:
    low, high = sorted((luminance(colour), luminance(page)))
    assert (high + 0.05) / (low + 0.05) >= 3.9


@pytest.mark.parametrize("max_length", [12, 512])
def test_a_plot_has_no_page_of_its_own_and_marks_what_is_too_long(tmp_path: Path, max_length: int) -> None:
    plots.plot_lengths(tmp_path / "lengths.png", max_length=max_length, **EXAMPLE)
    picture = imread(tmp_path / "lengths.png")
    assert picture.shape[2] == 4 and picture[0, 0, 3] == 0
    left = picture[:, : picture.shape[1] // 2]
    orange = np.array([int(plots.ORANGE[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    shown = (np.abs(left[..., :3] - orange).max(-1) < 0.02) & (left[..., 3] > 0.9)
    assert (shown.sum() > 500) == (max_length == 12)


def test_what_cannot_be_drawn_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lengths.foo", "lengths"):
        with pytest.raises(ConfigError, match=r"ends in .png"):
            plots.check_plot(tmp_path / name)
    plots.check_plot(tmp_path / "lengths.SVG")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bertstream\[plot\]"):
        plots.check_plot(tmp_path / "lengths.png")
