"""Draw the planes around both gate products on a box: contracting slopes beside those of least volume.

    python scripts/draw_planes.py

Writes planes.png to docs/figures/.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ROOT, ArgumentParser, answer_early, run_main


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--out-dir", type=Path, default=ROOT / "docs" / "figures", help="folder of the figure")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.relaxation.lines import Relaxation
from utils.relaxation.planes import PRODUCTS, relax_product
from utils.runs.results import replacing

X, Y = (-1.5, 2.0), (-1.5, 2.5)  # the box
TITLES = {"x*sigmoid(y)": r"$x\,\sigma(y)$", "tanh(x)*sigmoid(y)": r"$\tanh(x)\,\sigma(y)$"}
CHOICES = {"plane": ("contracting", "tab:blue"), "volume": ("least volume", "tab:orange")}


def relaxations(name: str) -> dict[str, Relaxation]:
    x, y = (tuple(torch.tensor([end], dtype=torch.float64) for end in ends) for ends in (X, Y))
    return {choice: relax_product(name, x, y, choice) for choice in CHOICES}


def heights(plane, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    (a, b), c = plane
    return a.item() * x + b.item() * y + c.item()


def function(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return PRODUCTS[name].function(torch.as_tensor(x), torch.as_tensor(y)).numpy()


def draw_surface(axes, name: str, planes: Relaxation) -> None:
    """The product and its contracting planes over the box."""
    x, y = np.meshgrid(np.linspace(*X, 41), np.linspace(*Y, 41))
    for plane in planes:
        axes.plot_surface(x, y, heights(plane, x, y), color="tab:blue", alpha=0.28, linewidth=0, shade=False)
    axes.plot_surface(x, y, function(name, x, y), cmap="Greys", alpha=0.9, vmin=-3, vmax=3, linewidth=0)
    axes.view_init(elev=16, azim=-62)
    axes.locator_params(nbins=4)
    axes.set_xlabel("state x")
    axes.set_ylabel("gate y")
    axes.set_title(f"{TITLES[name]} between its contracting planes", fontsize=10)


def draw_section(axes: Axes, name: str, along: str, choices: dict[str, Relaxation]) -> None:
    """The product at the ends and the middle of one operand, over the other, and the planes at the middle."""
    moving, fixed = (X, Y) if along == "x" else (Y, X)
    t = np.linspace(*moving, 201)
    levels = (fixed[0], 0.5 * sum(fixed), fixed[1])

    def at(level: float) -> tuple[np.ndarray, np.ndarray]:
        return (t, np.full_like(t, level)) if along == "x" else (np.full_like(t, level), t)

    curves = [function(name, *at(level)) for level in np.linspace(*fixed, 41)]
    axes.fill_between(t, np.min(curves, axis=0), np.max(curves, axis=0), color="0.88")
    other = "y" if along == "x" else "x"
    for level, style in zip(levels, (":", "-", "--"), strict=True):
        label = f"product at {other} = {level:g}" + " (the middle)" * (level == levels[1])
        axes.plot(t, function(name, *at(level)), color="0.25", linestyle=style, linewidth=1.3, label=label)
    for choice, planes in choices.items():
        label, color = CHOICES[choice]
        for number, plane in enumerate(planes):
            text = f"planes at the middle, {label}" if number == 0 else None
            axes.plot(t, heights(plane, *at(levels[1])), color=color, linewidth=1.8, label=text)
    axes.set_xlabel("state x" if along == "x" else "gate y")
    axes.set_title(f"{TITLES[name]} over {along}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="upper left")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.42 * (high - low))


def draw() -> Figure:
    figure = Figure(figsize=(12.5, 8.4), layout="constrained")
    box = f"x from {X[0]:g} to {X[1]:g}, y from {Y[0]:g} to {Y[1]:g}"
    figure.suptitle(f"Products of a state and a gate over the box {box}; light grey: all values there", fontsize=11)
    for row, name in enumerate(PRODUCTS):
        choices = relaxations(name)
        draw_surface(figure.add_subplot(2, 3, 3 * row + 1, projection="3d"), name, choices["plane"])
        for column, along in enumerate(("x", "y")):
            draw_section(figure.add_subplot(2, 3, 3 * row + 2 + column), name, along, choices)
    return figure


def main() -> None:
    args = get_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    with replacing(args.out_dir / "planes.png") as path:
        draw().savefig(path, dpi=130)
    print(f"drew {args.out_dir / 'planes.png'}")


if __name__ == "__main__":
    run_main(main)
