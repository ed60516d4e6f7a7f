"""How many certificates with curved bounds the checker confirms, at the radius itself and with a larger eps.

    python benchmarks/check_certificates.py            # five models, 10 images each, l_2
    python benchmarks/check_certificates.py --models rnn_7_64_tanh --N 3 --p 1 2 inf
    python benchmarks/check_certificates.py --method bab --time-limit 30 --models lstm_4_32 --N 2 --untargeted

For every image: the radius that --method certifies, a certificate of it, what scripts/check_certificate.py says of that
file and of tampered ones: with a larger eps and the same slopes and curvatures (1 % may be proved by them: the checker
bounds some things more tightly; 10 % are not), with label and target exchanged, another input, other slopes, or no
curvatures. Writes certificates_METHOD.csv and .md to benchmarks/results/. Seconds are processor time on one machine:
comparable within one table only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "scripts"))

from utils.choices.method import CURVED_METHODS, TIME_LIMIT
from utils.experiments.arguments import fill_in
from utils.experiments.table_arguments import add_model_arguments
from utils.runs.cli import (
    ROOT,
    ArgumentParser,
    answer_early,
    apply_common_arguments,
    norm_value,
    positive_float,
    run_main,
)

MODELS = ("rnn_7_64_tanh", "rnn_7_64_relu", "lstm_4_32", "gru_4_32", "lstm_7_32_2layer")


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_model_arguments(parser, MODELS, ROOT / "benchmarks" / "results")
    parser.add_argument("--p", type=norm_value, nargs="+", default=[2.0], help="norms of the balls: 1, 2, inf")
    parser.add_argument("--method", choices=("alpha", *CURVED_METHODS), default="curve", help="of the radii")
    parser.add_argument("--time-limit", type=positive_float, help=f"seconds an image of bab (default: {TIME_LIMIT:g})")
    parser.add_argument("--untargeted", action="store_true", help="against all other classes, not one random one")
    parser.set_defaults(N=10)
    args = parser.parse_args()
    fill_in(args, [args.method])
    return args


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import check_certificate as checker
import numpy as np

from data.mnist import load_mnist
from utils.certify import certified_radius, save_certificates
from utils.experiments.tables import Case, load_case, markdown_table, provenance, write_csv, write_lines


def verdict(path: Path) -> tuple[str, float]:
    """What the checker says of a file, and the processor time that it takes."""
    started = time.process_time()
    try:
        checker.check(path)
        return "confirmed", time.process_time() - started
    except checker.Rejected:
        return "rejected", time.process_time() - started


def larger(factor: float) -> Callable[[dict, dict], None]:
    def change(header: dict, arrays: dict) -> None:
        arrays["eps"] = arrays["eps"] * factor

    return change


def exchange_classes(header: dict, arrays: dict) -> None:
    header["label"], header["targets"][0] = header["targets"][0], header["label"]


def move_input(header: dict, arrays: dict) -> None:
    arrays["x"] = 0.9 * arrays["x"]


def change_slopes(header: dict, arrays: dict) -> None:
    for name in [name for name in arrays if name.startswith("slopes")]:
        arrays[name] = 2.0 * arrays[name]


def drop_curvatures(header: dict, arrays: dict) -> None:
    for name in [name for name in arrays if name.startswith("curvatures")]:
        del arrays[name]


TAMPERED = {"eps + 1 %": larger(1.01), "eps + 10 %": larger(1.1), "other classes": exchange_classes}
TAMPERED |= {"other input": move_input, "other slopes": change_slopes, "no curvatures": drop_curvatures}


def tampered(path: Path, change: Callable[[dict, dict], None]) -> Path:
    """A copy of a certificate, changed."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    copy = path.with_name(f"tampered_{path.name}")
    np.savez(copy, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
    return copy


def measure(case: Case, norm: float, args: argparse.Namespace, folder: Path) -> list[dict]:
    """A row for every image."""
    records = []
    for n in range(len(case)):
        own = slice(n, n + 1)
        targets = None if args.untargeted else case.targets[own]
        question = {"norm": norm, "targets": targets, "method": args.method, "time_limit": args.time_limit}
        row = {"model": case.name, "norm": norm, "image": int(case.index[n])}
        started = time.process_time()
        radius = certified_radius(case.model, case.x[own], case.labels[own], **question)
        row |= {"radius": float(radius), "search_seconds": time.process_time() - started}
        started = time.process_time()
        inside = folder / f"{case.name}_{norm:g}"
        paths = save_certificates(inside, case.model, case.x[own], case.labels[own], radius, names=[n], **question)
        row |= {"written": len(paths), "write_seconds": time.process_time() - started}
        if paths:
            with np.load(paths[0]) as file:
                row["curved"] = int(any(name.startswith("curvatures") for name in file.files))
            row["verdict"], row["check_seconds"] = verdict(paths[0])
            row |= {kind: verdict(tampered(paths[0], change))[0] for kind, change in TAMPERED.items()}
        records.append({key: row.get(key, "") for key in COLUMNS})
        print(", ".join(f"{key} {value}" for key, value in records[-1].items()), flush=True)
    return records


COLUMNS = ("model", "norm", "image", "radius", "written", "curved", "verdict", *TAMPERED)
COLUMNS += ("search_seconds", "write_seconds", "check_seconds")


def report(records: list[dict], method: str, origin: list[str]) -> list[str]:
    header = ["model", "norm", "images", "certificates", "curved", "confirmed", "with eps + 1 %", "otherwise tampered"]
    header += ["s per search", "s to write", "s to check"]
    rows = []
    for model, norm in dict.fromkeys((r["model"], r["norm"]) for r in records):
        own = [r for r in records if (r["model"], r["norm"]) == (model, norm)]
        written = [r for r in own if r["written"]]
        row = [f"`{model}`", f"l_{norm:g}", len(own), len(written), sum(r["curved"] for r in written)]
        row += [sum(r[key] == "confirmed" for r in written) for key in ("verdict", "eps + 1 %")]
        others = [r[kind] for r in written for kind in TAMPERED if kind != "eps + 1 %"]
        row.append(f"{others.count('confirmed')} of {len(others)}")
        for key in ("search_seconds", "write_seconds", "check_seconds"):
            row.append(f"{np.mean([r[key] for r in written] or [np.nan]):.2g}")
        rows.append([str(cell) for cell in row])
    return [
        f"# Certificates of radii by `{method}`",
        "",
        "Each at the very radius that `certified_radius` returns (tol 1e-3); then how many are confirmed with eps 1 %",
        f"larger, and of files tampered with otherwise: {', '.join(kind for kind in TAMPERED if kind != 'eps + 1 %')}.",
        "",
        *markdown_table(header, rows, text_columns=2),
        "",
        *origin,
    ]


def main() -> None:
    args = get_args()
    device = apply_common_arguments(args)
    data = load_mnist(args.data_dir)
    drawing = argparse.Namespace(**(vars(args) | {"time_limit": None}))
    cases = [load_case(name, data, drawing, device) for name in args.models]
    if args.dry_run:
        print(f"dry run: {len(cases)} models, {len(cases) * len(args.p) * args.N} certificates, nothing written")
        return
    with tempfile.TemporaryDirectory() as folder:
        records = [row for case in cases for norm in args.p for row in measure(case, norm, args, Path(folder))]
    path = args.out_dir / f"certificates_{args.method}"
    write_csv(path.with_suffix(".csv"), records)
    lines = report(records, args.method, provenance(args, device, data.source))
    write_lines(path.with_suffix(".md"), lines)
    print("\n".join(lines))


if __name__ == "__main__":
    run_main(main)
