"""Tightness and cost of every method on committed models: certified radius, worst margin and seconds.

    python benchmarks/compare_methods.py               # all models, 10 images each: hours, for the least-volume planes
    python benchmarks/compare_methods.py --quick       # three small models, 5 images, without least-volume planes
    python benchmarks/compare_methods.py --N 5 --models rnn_7_64_tanh lstm_4_32 lstm_7_64 gru_4_32 gru_7_64
    python benchmarks/compare_methods.py --p inf --eps 0.005 --models lstm_7_64 gru_7_64

Writes methods_l2.csv and .md (after the norm) to benchmarks/results/. Times are comparable within one table only.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.choices import RELAXATIONS
from utils.experiments.table_arguments import add_table_arguments, committed_models
from utils.runs.cli import ROOT, ArgumentParser, answer_early, apply_common_arguments, positive_float, run_main

QUICK_MODELS = ("rnn_4_32_tanh", "lstm_4_32", "gru_4_32")


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_table_arguments(parser, None, ROOT / "benchmarks" / "results")
    parser.set_defaults(N=10)
    parser.add_argument("--eps", type=positive_float, default=0.05, help="eps of the margin, in pixel values in [0, 1]")
    parser.add_argument("--quick", action="store_true", help="small models, 5 images at most, no least-volume planes")
    args = parser.parse_args()
    if args.models is None:
        args.models = list(QUICK_MODELS) if args.quick else committed_models()
    if args.quick:
        args.N = min(args.N, 5)
    return args


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch

from data.mnist import load_mnist
from utils.certify import certified_margin, certified_radius
from utils.experiments.tables import Case, load_case, markdown_table, provenance, write_csv, write_lines

DTYPE = torch.float64


def methods_of(case: Case, quick: bool) -> list[tuple[str, str]]:
    """(method, relaxation) pairs; intervals need no relaxation, a vanilla RNN has one kind of lines."""
    relaxations = ["plane"]
    if case.gated:
        relaxations = [name for name in RELAXATIONS if not (quick and name == "volume")]
    return [("ibp", "plane"), *((method, name) for method in ("crown-ibp", "crown") for name in relaxations)]


def measure(case: Case, method: str, relaxation: str, norm: float, eps: float) -> dict:
    """One row: mean over the samples of the worst margin at eps and of the certified radius, and what they took."""
    x = case.x.to(DTYPE)
    # Processor time does not count what else the machine does; it is not there for a GPU.
    clock = time.process_time if x.device.type == "cpu" else time.perf_counter
    options = {"norm": norm, "targets": case.targets, "method": method, "relaxation": relaxation}
    with torch.no_grad():
        started = clock()
        margin = certified_margin(case.model, x, case.labels, eps, **options).amin(dim=1)
        bound_seconds = clock() - started
    started = clock()
    radius = certified_radius(case.model, x, case.labels, search_dtype=DTYPE, batch_size=20, **options)
    search_seconds = clock() - started
    name = relaxation if case.gated and method != "ibp" else ""
    return {
        "model": case.name,
        "method": method,
        "relaxation": name,
        "samples": len(case),
        "mean_radius": radius.mean().item(),
        "mean_margin": margin.mean().item(),
        "certified_at_eps": int((margin > 0).sum()),
        "bound_seconds_per_sample": bound_seconds / len(case),
        "radius_seconds_per_sample": search_seconds / len(case),
    }


def report(records: list[dict], norm: float, eps: float, origin: list[str]) -> list[str]:
    header = ["model", "method", "relaxation", "mean radius", "share of crown's", f"mean margin at eps {eps:g}"]
    header += ["certified there", "s per bound", "s per radius"]
    best = {r["model"]: r["mean_radius"] for r in records if (r["method"], r["relaxation"]) in CROWN}
    rows = []
    for r in records:
        row = [f"`{r['model']}`", r["method"], r["relaxation"] or "–", f"{r['mean_radius']:.3g}"]
        row += [f"{r['mean_radius'] / best[r['model']]:.3f}", f"{r['mean_margin']:.3g}"]
        row += [f"{r['certified_at_eps']} of {r['samples']}"]
        row += [f"{r['bound_seconds_per_sample']:.2g}", f"{r['radius_seconds_per_sample']:.2g}"]
        rows.append(row)
    return [
        f"# Methods: tightness and time, l_{norm:g}",
        "",
        "Means over the images: certified radius and lower bound of the margin to the target class (pixel values in",
        "[0, 1], a ball around every frame). Seconds (processor time on a CPU) are per image, all in one batch: of one",
        "bound at eps, and of a whole radius search (relative tolerance 1e-3). Everything in float64. `plane` has",
        "contracting slopes, `volume` those of least volume, searched numerically for this comparison, which is slow.",
        "",
        *markdown_table(header, rows, text_columns=3),
        "",
        *origin,
    ]


CROWN = (("crown", "plane"), ("crown", ""))


def main() -> None:
    args = get_args()
    device = apply_common_arguments(args)
    data = load_mnist(args.data_dir)
    cases = [load_case(name, data, args, device) for name in args.models]
    pairs = [(case, *pair) for case in cases for pair in methods_of(case, args.quick)]
    if args.dry_run:
        print(f"dry run: {len(cases)} models, {len(pairs)} rows would be measured, nothing written")
        return
    records = []
    for case, method, relaxation in pairs:
        records.append(measure(case, method, relaxation, args.p, args.eps))
        row = records[-1]
        print(f"{case.name} {method} {row['relaxation']}: radius {row['mean_radius']:.4g}", flush=True)
    path = args.out_dir / f"methods_l{args.p:g}"
    write_csv(path.with_suffix(".csv"), records)
    lines = report(records, args.p, args.eps, provenance(args, device, data.source))
    write_lines(path.with_suffix(".md"), lines)
    print("\n".join(lines))


if __name__ == "__main__":
    run_main(main)
