"""Pictures of benchmark lines: one per theme, with the measured figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plot_bench
import pytest
from conftest import ROOT
from matplotlib import image
from matplotlib import pyplot as plt

MACHINE = {"threads": 2, "device": "cpu"}
STEP = {"encode_s": 1.0, "train_s": 2.0, "both_s": 2.5, "over_sum": 0.83, "over_max": 1.25}
LINES: dict[str, dict[str, Any]] = {
    "encode": {
        "texts": 10,
        "tokens_per_s": {"plain": 3000, "sentence_transformers_float32": 4000, "stream_float32": 8000},
        "worst_text_relative_l2_error": {"sentence_transformers_float32": 1e-7, "stream_float32": 2e-6},
        "share_of_product": {"stream_float32": 0.71},
    },
    "wrap": {
        "dtype": "float32",
        "tokens_per_s": {"together_8": 9000, "one_by_one_8": 5000},
        "together_times_one_by_one": {"8": 1.8},
    },
    "epoch": {"steps": {"sleeping": STEP, "launch_bound": STEP}},
}


@pytest.mark.parametrize("benchmark", LINES)
def test_a_line_becomes_a_picture_of_each_theme(benchmark: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    path.write_text(json.dumps({"benchmark": benchmark, "machine": MACHINE} | LINES[benchmark]) + "\n")
    assert plot_bench.main([str(path), "--out", str(tmp_path / "out")]) == 0
    for theme, (background, *_) in plot_bench.THEMES.items():
        picture = image.imread(tmp_path / "out" / f"{benchmark}-{theme}.png")
        corner = "#" + "".join(f"{round(255 * part):02x}" for part in picture[0, 0, :3])
        assert corner == background and len({tuple(pixel) for row in picture[::7] for pixel in row[::7]}) > 3


def test_bars_are_labelled_with_rate_error_and_share() -> None:
    figure, axes = plt.subplots()
    plot_bench.draw_encode({"machine": MACHINE} | LINES["encode"], axes, plot_bench.THEMES["dark"])
    said = [text.get_text() for text in axes.texts]
    names = [label.get_text() for label in axes.get_yticklabels()]
    plt.close(figure)
    assert said[0] == "8,000, error 2e-06, 71% of the product" and names[0] == "stream float32"
    assert said[-1] == "3,000" and names[1] == "sentence-transformers float32"


def test_a_benchmark_without_a_plot_is_skipped(tmp_path: Path) -> None:
    assert plot_bench.draw({"benchmark": "mix", "machine": MACHINE}, tmp_path) == []


def test_the_front_page_says_in_words_what_its_picture_shows() -> None:
    """Its alternative text has each figure that is drawn of the results in the repository."""
    results = ROOT / "tools" / "results"
    (cpu,) = plot_bench.values_of((results / "cpu.jsonl").read_text(encoding="utf-8"))
    (gpu,) = plot_bench.values_of((results / "nvidia-h100-80gb-hbm3.json").read_text(encoding="utf-8"))
    figure = plt.figure()
    plot_bench.draw_performance(cpu, gpu, figure, plot_bench.THEMES["light"])
    drawn = [text.get_text() for axes in figure.axes for text in axes.texts]
    plt.close(figure)
    words = (ROOT / "README.md").read_text(encoding="utf-8").partition('alt="')[2].partition('"')[0]
    assert len(drawn) == 9 and [figure for figure in drawn if figure not in words] == []


def test_a_cpus_line_beside_a_gpus_file_makes_the_front_pages_picture(tmp_path: Path) -> None:
    assert plot_bench.main([*map(str, (ROOT / "tools" / "results").glob("*.json*")), "--out", str(tmp_path)]) == 0
    assert {f"performance-{theme}.png" for theme in plot_bench.THEMES} <= {path.name for path in tmp_path.iterdir()}
