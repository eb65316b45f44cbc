"""Draw the JSON lines of tools/bench.py: a light and a dark picture of each benchmark that has a plot.

python tools/bench.py encode --data ../shared/data > encode.json
python tools/plot_bench.py encode.json --out pictures     writes pictures/encode-light.png and encode-dark.png

With the file that tools/gpu_check.py wrote, a CPU's line of `encode` also makes the picture of the front page:

python tools/plot_bench.py tools/results/*.json* --out tools/results

Needs `pip install 'bertstream[plot]'`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Background, text, others' bars, ours, a third. The backgrounds are those of a web page in each theme.
THEMES = {
    "light": ("#ffffff", "#1f2328", "#a8b1bb", "#0969da", "#d4762c"),
    "dark": ("#0d1117", "#e6edf3", "#5d6773", "#4493f8", "#e09b52"),
}


def draw_encode(line: dict[str, Any], axes: Axes, theme: tuple[str, ...]) -> None:
    """A bar for each contender, labelled with its rate, error and share of the matrix products' rate."""
    _, _, others, ours, _ = theme
    rates = dict(sorted(line["tokens_per_s"].items(), key=lambda item: -item[1]))
    errors, shares = line["worst_text_relative_l2_error"], line["share_of_product"]
    bars = axes.barh(list(map(spoken, rates)), rates.values(), color=[ours if n in shares else others for n in rates])
    labels = []
    for name, rate in rates.items():
        parts = [f"{rate:,}"]
        parts += [f"error {errors[name]:.0e}"] if errors.get(name) else []
        parts += [f"{shares[name]:.0%} of the product"] if name in shares else []
        labels.append(", ".join(parts))
    axes.bar_label(bars, labels, padding=4, fontsize=9, color=theme[1])
    axes.set_xlim(0, 1.75 * max(rates.values()))
    axes.xaxis.set_visible(False)
    axes.set_title(f"Token vectors, tokens/s ({line['texts']:,} texts, {device_of(line)})")


def draw_wrap(line: dict[str, Any], axes: Axes, theme: tuple[str, ...]) -> None:
    """Two bars for each batch size."""
    _, _, others, ours, _ = theme
    rates, times = line["tokens_per_s"], line["together_times_one_by_one"]
    for place, size in enumerate(times):
        for shift, way, color in ((-0.2, "one_by_one", others), (0.2, "together", ours)):
            bar = axes.bar(
                place + shift, rates[f"{way}_{size}"], 0.38, color=color, label=None if place else spoken(way)
            )
            text = f"{rates[f'{way}_{size}']:,}" + (f"\n{times[size]} x" if way == "together" else "")
            axes.bar_label(bar, [text], padding=2, fontsize=9, color=theme[1])
    axes.set_xticks(range(len(times)), [f"batches of {size}" for size in times])
    axes.set_ylim(0, 1.35 * max(rates.values()))
    axes.yaxis.set_visible(False)
    axes.legend(loc="upper left", frameon=False, labelcolor=theme[1])
    axes.set_title(f"Short texts through wrap, tokens/s ({line['dtype']}, {device_of(line)})")


def draw_epoch(line: dict[str, Any], axes: Axes, theme: tuple[str, ...]) -> None:
    """For each kind of step: encoding and training one after the other, and both together."""
    _, text, others, ours, third = theme
    steps = line["steps"]
    for place, found in enumerate(steps.values()):
        first = place == 0
        axes.barh(place - 0.2, found["encode_s"], 0.38, color=others, label="encoding alone" if first else None)
        label = "training alone" if first else None
        axes.barh(place - 0.2, found["train_s"], 0.38, left=found["encode_s"], color=third, label=label)
        bar = axes.barh(place + 0.2, found["both_s"], 0.38, color=ours, label="together" if first else None)
        said = f"{found['over_sum']:.2f} of the sum, {found['over_max']:.2f} of the longer"
        axes.bar_label(bar, [said], padding=4, fontsize=9, color=text)
    axes.set_yticks(range(len(steps)), list(map(spoken, steps)))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.6 * max(max(s["both_s"], s["encode_s"] + s["train_s"]) for s in steps.values()))
    axes.legend(loc="upper right", frameon=False, labelcolor=text)
    axes.set_title(f"An epoch of training, seconds ({device_of(line)})")


def draw_performance(cpu: dict[str, Any], gpu: dict[str, Any], figure: Figure, theme: tuple[str, ...]) -> None:
    """The front page's picture: `encode` on a CPU on the left, forwards and streams of a GPU on the right."""
    _, text, others, ours, _ = theme
    rates = cpu["tokens_per_s"]
    forward, stream = gpu["parts"]["forward"]["rows"], gpu["parts"]["stream"]["rows"]
    left = [
        ("plain transformers loop", rates["plain"], others),
        ("sentence-transformers", rates["sentence_transformers_float32"], others),
        ("bertstream, from shards", rates["stream_float32"], ours),
    ]
    right = []
    for size, name in (("bert_base", "BERT-base"), ("minilm", "MiniLM")):
        right += [
            (f"{name}, its own modules", forward[f"{size} 32k"]["packed_tokens_per_s"] / 1e6, others),
            (f"{name}, bertstream", forward[f"{size} 32k"]["tokens_per_s"] / 1e6, ours),
            (f"{name}, from shards", stream[size]["tokens_per_s"] / 1e6, ours),
        ]
    panels = (
        (left, "{:,.0f}", f"MiniLM on {device_of(cpu)}: tokens/s"),
        (right, "{:.3g}", f"{device_of(gpu).removeprefix('NVIDIA ').partition(' ')[0]}: million tokens/s"),
    )
    for axes, (bars, form, title) in zip(figure.subplots(1, 2), panels, strict=True):
        names, values, colors = zip(*bars, strict=True)
        drawn = axes.barh(range(len(bars)), values, color=colors)
        axes.set_yticks(range(len(bars)), names)
        axes.invert_yaxis()
        axes.bar_label(drawn, list(map(form.format, values)), padding=4, fontsize=9, color=text)
        axes.set_xlim(0, 1.3 * max(values))
        axes.xaxis.set_visible(False)
        axes.set_title(title)


PLOTS: dict[str, Callable[[dict[str, Any], Axes, tuple[str, ...]], None]] = {
    "encode": draw_encode,
    "wrap": draw_wrap,
    "epoch": draw_epoch,
}


def spoken(name: str) -> str:
    return name.replace("sentence_transformers", "sentence-transformers").replace("_", " ")


def device_of(line: dict[str, Any]) -> str:
    found = line["machine"]
    return f"{found['threads']} CPU cores" if found.get("device", "cpu") == "cpu" else found["device"]


def draw(line: dict[str, Any], folder: Path) -> list[Path]:
    """Write a line's pictures; none if its benchmark has no plot."""
    plot = PLOTS.get(line["benchmark"])
    if plot is None:
        return []
    return save(line["benchmark"], lambda figure, theme: plot(line, figure.subplots(), theme), folder)


def save(name: str, plot: Callable[[Figure, tuple[str, ...]], None], folder: Path) -> list[Path]:
    """Write a picture in each theme."""
    paths = []
    for theme_name, theme in THEMES.items():
        background, text = theme[:2]
        figure = plt.figure(figsize=(9, 3.8), dpi=120, facecolor=background, layout="constrained")
        plot(figure, theme)
        for axes in figure.axes:
            axes.set_facecolor(background)
            axes.title.set_color(text)
            axes.tick_params(colors=text, length=0)
            axes.spines[:].set_visible(False)
        path = folder / f"{name}-{theme_name}.png"
        figure.savefig(path)
        plt.close(figure)
        paths.append(path)
    return paths


def values_of(text: str) -> list[dict[str, Any]]:
    """The JSON values of a file: one a line, or one over several lines."""
    values, decoder = [], json.JSONDecoder()
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        values.append(value)
        text = text[end:]
    return values


def main(given: list[str] | None = None) -> int:
    """Draw what the files hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="what bench.py printed and gpu_check.py wrote")
    parser.add_argument("--out", type=Path, default=Path())
    arguments = parser.parse_args(given)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = [value for path in arguments.files for value in values_of(path.read_text(encoding="utf-8"))]
    lines = [value for value in found if "benchmark" in value]
    pictures = [picture for line in lines for picture in draw(line, arguments.out)]
    cpu = next((line for line in lines if line["benchmark"] == "encode"), None)
    gpu = next((value for value in found if "parts" in value), None)
    if cpu and gpu:
        pictures += save("performance", lambda figure, theme: draw_performance(cpu, gpu, figure, theme), arguments.out)
    for picture in pictures:
        print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
