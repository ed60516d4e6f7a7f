"""Certified radii of your own model on your own data.

    python scripts/certify.py --model my_model.py:Net --weights w.pt --data x.npy --labels y.npy
    python scripts/certify.py --model my_model.py:Net --weights w.pt --data x.npy --p 0 --clip 0 1   # counts changes
    python scripts/certify.py --model my_model.py:Net --weights w.pt --data x.npy --box lower.npy upper.npy
    python scripts/certify.py --model net.onnx --data x.npz:x --labels x.npz:y --p inf --clip 0 1 --eps 0.01
    python scripts/certify.py --model net.py:Padded --weights w.pt --data x.npy --extra lengths.npy
    torchrun --nproc-per-node 2 scripts/certify.py ... --out-dir FOLDER     # shared among processes, --resume goes on

Writes certified_bound.csv, run.json and figures to --out-dir, certified/ unless told otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.own.arguments import add_certificates, add_model_and_data, add_question, check_arguments
from utils.runs.cli import ArgumentParser, add_common_arguments, answer_early, run_main


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_model_and_data(parser)
    add_question(parser)
    add_certificates(parser)
    add_common_arguments(parser, data="not used: --data says where the inputs are")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from torch import Tensor

from utils.own.loading import load_array, load_own
from utils.own.run import OwnRun
from utils.runs.cli import apply_common_arguments
from utils.runs.ranks import joined

BATCH = 20


def load_box(args: argparse.Namespace, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The ends of --box, those of every input in the shape of x."""
    if args.box is None:
        return None
    ends = [load_array(file, "--box").to(x) for file in args.box]
    return tuple(end[: len(x)].reshape(x.shape) if end.numel() >= x.numel() else end for end in ends)


def main() -> None:
    args = get_args()
    check_arguments(args)
    device = apply_common_arguments(args)
    args.batch_size = args.batch_size or BATCH
    with joined(device) as ranks:
        args.N = 1 if args.dry_run else args.N
        model, x, labels, extra = load_own(args, args.model, device)
        scales = None if args.scales is None else load_array(args.scales, "--scales")
        args.N = len(x)  # a later run may have more
        run = OwnRun(args, model, x, labels, scales, load_box(args, x), extra)
        run.check()
        counts = run.counts
        print(f"{args.model}: {counts['drawn']} inputs of {args.data}, {counts['misclassified']} misclassified", end="")
        print(f", {counts['kept']} to certify in l_{args.p:g} by {args.method}", flush=True)
        if args.dry_run:
            print(f"dry run: input 0 has radius {run.search([0])[0].radius:.4g}, nothing written")
            return
        files = {"model": args.model.rpartition(":")[0] or args.model, "weights": args.weights}
        hashes = {
            f"{name}_sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()
            for name, file in files.items()
            if file
        }
        run.write(args.out_dir or Path("certified"), run.record(device, hashes), ranks)


if __name__ == "__main__":
    run_main(main)
