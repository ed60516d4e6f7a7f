"""Figures of a bound run, drawn from its result files alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from ..runs.bound_rows import Row, read_bound_rows
from ..runs.results import CSV_NAME, EXAMPLES_NAME, FIGURES, Record, read_record, replacing

DPI = 150
LINES_IN_LEGEND = 7
# Without the brightest part, on which white digits could not be seen.
COLORS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, 256)))


@dataclass(frozen=True)
class Results:
    """The result files of a run: run.json and the rows."""

    record: Record
    rows: list[Row]

    @property
    def frames(self) -> list[int]:
        """The frames that have radii of their own; empty if a sample has one radius."""
        return sorted({row.frame for row in self.rows if row.frame is not None})

    def radii(self, frame: int | None = None) -> np.ndarray:
        """Radii of a frame, or of all rows."""
        return np.array([row.radius for row in self.rows if frame is None or row.frame == frame])


def plot_results(folder: Path) -> list[str]:
    """Draw the figures of a result folder into it; returns their names."""
    results = Results(read_record(folder), read_bound_rows(folder / CSV_NAME))
    drawn = [(FIGURES[0], plot_histogram(results)), (FIGURES[1], plot_certified_fraction(results))]
    if results.frames and (folder / EXAMPLES_NAME).exists():
        with np.load(folder / EXAMPLES_NAME, allow_pickle=False) as examples:
            drawn.append((FIGURES[2], plot_heatmap(results, examples["index"], examples["pixels"])))
    for name, figure in drawn:
        with replacing(folder / name) as path:
            figure.savefig(path, dpi=DPI)
    return [name for name, _ in drawn]


def new_figure(results: Results, width: float = 6.0, height: float = 3.8) -> Figure:
    """An empty figure with the model and the threat model above it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    images = f"{len({row.index for row in results.rows})} images"
    figure.suptitle(f"{results.record['model']['name']}, {images}: {results.record['title']}", fontsize=10)
    return figure


def eps_label(results: Results, quantity: str) -> str:
    norm = f"{float(results.record['arguments']['p']):g}".replace("inf", r"\infty")
    unit = results.record.get("unit", "pixel")
    unit = "pixel values in [0, 1]" if unit.startswith("pixel") else unit
    return rf"{quantity} ($\ell_{{{norm}}}$, {unit})"


def plot_histogram(results: Results) -> Figure:
    """How many radii lie where, with their mean; those of all frames together if there are several a sample."""
    radii = results.radii()
    figure = new_figure(results)
    axes = figure.add_subplot()
    axes.hist(radii, bins="auto" if np.ptp(radii) > 0 else 10, color="tab:blue", edgecolor="white", linewidth=0.6)
    axes.axvline(radii.mean(), color="black", linestyle="--", label=f"mean {radii.mean():.4g}")
    frames = len(results.frames)
    axes.locator_params(axis="x", nbins=7)
    axes.set_xlabel(eps_label(results, "certified radius"))
    axes.set_ylabel(f"radii, {frames} frames an image" if frames else "images")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    tidy(axes)
    return figure


def plot_certified_fraction(results: Results) -> Figure:
    """Share of the images that are certified at eps, over eps; a line for each frame if they have their own radii."""
    figure = new_figure(results)
    axes = figure.add_subplot()
    frames = results.frames
    if frames:
        colors = COLORS(np.linspace(0, 1, len(frames)))
        for frame, color in zip(frames, colors, strict=True):
            radii = results.radii(frame)
            stairs(axes, radii, len(radii), color=color, label=f"frame {frame}")
        if len(frames) <= LINES_IN_LEGEND:
            axes.legend(frameon=False)
        else:
            bounds = Normalize(min(frames) - 0.5, max(frames) + 0.5)
            figure.colorbar(ScalarMappable(bounds, ListedColormap(colors)), ax=axes, label="frame")
        axes.set_ylabel(f"certified share of the {len(radii)} correctly\nclassified images (%)")
    else:
        counts, radii = results.record["counts"], results.radii()
        kept = f"of the {counts['kept']} correctly classified"
        stairs(axes, radii, counts["kept"], label=kept, color="tab:blue")
        if counts["misclassified"]:
            drawn = counts["kept"] + counts["misclassified"]
            kind = " of another class than the target" if counts["left_out"] else ""
            stairs(axes, radii, drawn, label=f"of all {drawn} drawn{kind}", color="tab:gray", linestyle="--")
        attacked = np.array([row.attack_radius for row in results.rows])
        if not np.isnan(attacked).any():
            stairs(axes, attacked[np.isfinite(attacked)], len(attacked), label="not broken by PGD", color="tab:red")
        axes.legend(frameon=False)
        axes.set_ylabel("certified share of the images (%)")
    axes.set_xlabel(eps_label(results, r"perturbation $\epsilon$"))
    axes.set_ylim(0, 103)
    axes.set_xlim(left=0)
    tidy(axes)
    return figure


def stairs(axes: Axes, radii: np.ndarray, total: int, **style) -> None:
    """Add the share in per cent of ``total`` samples that have at least eps as their radius, over eps."""
    ends = np.concatenate([[0.0], np.sort(radii)])
    style = {"linewidth": 1.6} | style
    axes.step(ends, 100 * np.arange(len(radii), -1, -1) / total, where="post", **style)


def plot_heatmap(results: Results, indices: np.ndarray, images: np.ndarray) -> Figure:
    """The mean radius of every frame over the image's rows, and example images over their own radii.

    Args:
        indices: (k,) numbers of the examples in the test set.
        images: (k, side, side) their pixels from 0 to 255.
    """
    frames = results.frames
    side = images.shape[1]
    mean = np.array([results.radii(frame).mean() for frame in frames])
    own = {row.index: row.label for row in results.rows}
    by_key = {(row.index, row.frame): row.radius for row in results.rows}
    example = [np.array([by_key[index, frame] for frame in frames]) for index in indices.tolist()]
    scale = Normalize(0, max(values.max() for values in [mean, *example]))
    figure = new_figure(results, width=1.4 + 2.15 * (1 + len(example)), height=3.0)
    left, *others = figure.subplots(1, 1 + len(example))
    _bands(left, mean, side, scale)
    size = 9 if len(frames) <= 10 else 7 if len(frames) <= 14 else 4.5
    for frame, value in enumerate(mean):
        middle = (frame + 0.5) * side / len(frames) - 0.5
        left.text((side - 1) / 2, middle, f"{value:.3g}", color="white", fontsize=size, ha="center", va="center")
    left.set_title(f"all {len(results.radii(frames[0]))} images\nmean", fontsize=10)
    left.set_ylabel("frame (a band of rows)", fontsize=10)
    left.set_yticks((np.arange(len(frames)) + 0.5) * side / len(frames) - 0.5, frames, fontsize=size)
    for axes, index, values, image in zip(others, indices.tolist(), example, images, strict=True):
        _bands(axes, values, side, scale)
        ink = np.ones((side, side, 4))
        ink[..., 3] = image / 255
        axes.imshow(ink, interpolation="nearest")
        axes.set_title(f"test image {index}\nlabel {own[index]}", fontsize=10)
        axes.set_yticks([])
    bar = figure.colorbar(ScalarMappable(scale, COLORS), ax=figure.axes, shrink=0.9, pad=0.015)
    bar.set_label(eps_label(results, "certified radius of the frame").replace(" (", "\n("), fontsize=9)
    return figure


def _bands(axes: Axes, values: np.ndarray, side: int, scale: Normalize) -> None:
    picture = np.repeat(values, side // len(values))[:, None].repeat(side, axis=1)
    axes.imshow(picture, cmap=COLORS, norm=scale, interpolation="nearest")
    axes.set_xticks([])
    for edge in np.arange(1, len(values)) * side / len(values) - 0.5:
        axes.axhline(edge, color="white", linewidth=0.5)


def tidy(axes: Axes) -> None:
    """Take away what frames the axes, and put a faint grid behind the lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def size_of_model(name: str) -> tuple:
    """What models are sorted by: the cell, the number of slices, the hidden size, then the rest of the name."""
    cell, *rest = name.split("_")
    order = ("rnn", "lstm", "gru")
    return order.index(cell) if cell in order else len(order), [int(part) for part in rest if part.isdigit()], name


def columns_of_panels(count: int, most: int = 4) -> int:
    """How many of some panels stand side by side: at most so many, and so that few places stay empty."""
    return min(range(min(count, most), max(1, min(count, most) - 2), -1), key=lambda n: -count % n, default=count)


def images_text(counts: Sequence[int], noun: str = "images") -> str:
    """N of the panels of a figure: "97 to 99 images"."""
    low, high = min(counts), max(counts)
    return f"{low} {noun}" if low == high else f"{low} to {high} {noun}"


def norm_symbol(norm: float | str) -> str:
    return rf"$\ell_{{{norm if isinstance(norm, str) else f'{norm:g}'}}}$".replace("inf", r"\infty")


def headline(figure: Figure, *words: str) -> None:
    """What the whole figure shows, above it: N, threat model, method."""
    figure.suptitle("\n".join(words), fontsize=10)


def log_axis(axis: Axis) -> None:
    """A logarithmic axis that labels 1, 2 and 5 of every decade, as plain numbers."""
    axis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    for kind in (axis.set_major_formatter, axis.set_minor_formatter):
        kind(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_tick_params(which="both", labelsize=8)
