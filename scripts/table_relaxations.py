"""The paper's ablation on this project's models: mean certified radius by planes, lines and constants.

    python scripts/table_relaxations.py                # 20 images, about 10 minutes on one core
    python scripts/table_relaxations.py --N 100       --p inf

Writes relaxations_l2.csv, .md and .png (after the norm) to docs/tables/.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure

from data.mnist import load_mnist
from utils.certify import certified_radius
from utils.cli import ROOT, ArgumentParser, apply_common_arguments, run_main
from utils.results import replacing
from utils.tables import Case, add_table_arguments, load_case, markdown_table, provenance, write_csv, write_lines

RELAXATIONS = ("plane", "line", "constant")
MODELS = tuple(f"{kind}_{size}" for kind in ("lstm", "gru") for size in ("4_32", "7_64", "14_64"))
# Mean bounds that Ko et al., "POPQORN: Quantifying robustness of recurrent neural networks" (ICML 2019), report for
# their own LSTMs, by the number of slices of an MNIST image: 2-D planes, 1-D lines, constants; p = 2.
PAPER = {4: (0.232, 0.071, 0.041), 7: (0.140, 0.015, 0.012), 14: (0.059, 1.5e-4, 2e-5)}


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_table_arguments(parser, MODELS, ROOT / "docs" / "tables")
    return parser.parse_args()


def measure(case: Case, norm: float) -> dict:
    """Mean radii over the samples, and how many samples have their radii in the order of the relaxations."""
    record = {"model": case.name, "samples": len(case)}
    radii = {}
    for relaxation in RELAXATIONS:
        started = time.perf_counter()
        found = certified_radius(
            case.model,
            case.x.double(),
            case.labels,
            targets=case.targets,
            norm=norm,
            relaxation=relaxation,
            search_dtype=case.x.double().dtype,
            batch_size=20,
        )
        radii[relaxation] = found
        record[relaxation] = found.mean().item()
        record[f"{relaxation}_seconds_per_sample"] = (time.perf_counter() - started) / len(case)
        print(f"{case.name} {relaxation}: {record[relaxation]:.4g}", flush=True)
    ordered = (radii["plane"] >= radii["line"]) & (radii["line"] >= radii["constant"])
    return record | {"in_order": int(ordered.sum())}


def paper_of(case: Case, norm: float) -> tuple[float, ...] | None:
    known = case.config["architecture"] == "lstm" and case.config["num_layers"] == 1 and norm == 2
    return PAPER.get(case.config["num_frames"]) if known else None


def report(records: list[dict], papers: list[tuple[float, ...] | None], norm: float, origin: list[str]) -> list[str]:
    header = ["model", "images", *RELAXATIONS, "plane / line", "plane / constant", "in this order"]
    header += ["paper's LSTM: plane / line / constant", "its ratios"]
    rows = []
    for record, paper in zip(records, papers, strict=True):
        plane, line, constant = (record[name] for name in RELAXATIONS)
        row = [f"`{record['model']}`", str(record["samples"]), *(f"{v:.3g}" for v in (plane, line, constant))]
        row += [f"{plane / line:.3g}", f"{plane / constant:.3g}", f"{record['in_order']} of {record['samples']}"]
        row += ["–", "–"] if paper is None else [" / ".join(f"{v:g}" for v in paper), _ratios(paper)]
        rows.append(row)
    return [
        f"# Planes, lines and constants around the gates' products, l_{norm:g}",
        "",
        "Mean certified radius (pixel values in [0, 1], a ball around every slice, one random target class).",
        '"In this order": images whose plane radius is at least the line radius, and that the constant one.',
        "The paper's figures are for its own trained LSTMs, with trained planes, so only orders and ratios compare:",
        'Ko et al., "POPQORN: Quantifying robustness of recurrent neural networks", ICML 2019.',
        "",
        *markdown_table(header, rows),
        "",
        *origin,
        "- searched and certified in float64, relative tolerance 1e-3",
    ]


def _ratios(paper: tuple[float, ...]) -> str:
    return " / ".join(f"{paper[0] / other:.3g}" for other in paper[1:])


def plot(records: list[dict], papers: list[tuple[float, ...] | None], norm: float) -> Figure:
    """Bars of the mean radii, a group a model, and the paper's figures as marks."""
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(RELAXATIONS)
    for number, (name, color) in enumerate(zip(RELAXATIONS, ("tab:blue", "tab:orange", "tab:gray"), strict=True)):
        places = [group + (number - 1) * width for group in range(len(records))]
        axes.bar(places, [record[name] for record in records], width, color=color, label=name)
        marks = [(place, paper[number]) for place, paper in zip(places, papers, strict=True) if paper is not None]
        if marks:
            label = "the paper's LSTMs" if number == 0 else None
            axes.plot(*zip(*marks, strict=True), "kD", markersize=5, markerfacecolor="white", label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(records)), [record["model"] for record in records])
    axes.set_ylabel(rf"mean certified radius ($\ell_{{{norm:g}}}$)".replace("inf", r"\infty"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def main() -> None:
    args = get_args()
    device = apply_common_arguments(args)
    data = load_mnist(args.data_dir)
    cases = [load_case(name, data, args, device) for name in args.models]
    for case in cases:
        if not case.gated:
            raise ValueError(f"{case.name} has no gates: --models must name LSTMs and GRUs")
    if args.dry_run:
        print(f"dry run: {len(cases)} models would be measured, nothing written")
        return
    records = [measure(case, args.p) for case in cases]
    papers = [paper_of(case, args.p) for case in cases]
    path = args.out_dir / f"relaxations_l{args.p:g}"
    write_csv(path.with_suffix(".csv"), records)
    lines = report(records, papers, args.p, provenance(args, device, data.source))
    write_lines(path.with_suffix(".md"), lines)
    with replacing(path.with_suffix(".png")) as temporary:
        plot(records, papers, args.p).savefig(temporary, dpi=150)
    print("\n".join(lines))


if __name__ == "__main__":
    run_main(main)
