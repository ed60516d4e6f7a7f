"""Local Lipschitz constants by three chains beside sampled ones, on recurrent classifiers of MNIST.

    python benchmarks/compare_chains.py                                  # five models, l_2 and l_inf, 3 images
    python benchmarks/compare_chains.py --models lstm_7_64 --N 10 --shares 0.5

Of the margin above the class of the next logit, all frames moving, each by at most eps; eps is a share of the radius
that crown certifies for the image. Prints a table of means over the images, and how often a chain is greater than the
next: joint, chord, recurjac.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import (
    ROOT,
    ArgumentParser,
    add_common_arguments,
    answer_early,
    apply_common_arguments,
    norm_value,
    positive_float,
    positive_int,
    run_main,
)

MODELS = ("rnn_4_32_tanh", "rnn_7_64_relu", "rnn_7_64_tanh", "lstm_4_32", "gru_4_32")


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="folders in models/mnist_classifier")
    parser.add_argument("--p", type=norm_value, nargs="+", default=(2.0, float("inf")), help="norms: 1, 2, inf")
    parser.add_argument("--shares", type=positive_float, nargs="+", default=(0.25, 0.5, 1.0), help="of crown's radius")
    parser.add_argument("--N", type=positive_int, default=3, help="first test images, the misclassified left out")
    parser.add_argument("--samples", type=positive_int, default=100, help="gradients sampled in each ball")
    add_common_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from torch import Tensor, nn

from data.mnist import as_frames, load_mnist
from utils.certify import certified_radius, local_lipschitz, sampled_lipschitz
from utils.network.checkpoint import load_checkpoint

CHAINS = ("joint", "chord", "recurjac")


def constants(model: nn.Module, x: Tensor, eps: Tensor, rows: Tensor, norm: float, samples: int) -> dict[str, Tensor]:
    """(batch,) by every chain, and by sampling. Raises ValueError if a gradient is steeper than a bound."""
    found = {chain: local_lipschitz(model, x, eps, rows, norm=norm, chain=chain).constant[:, 0] for chain in CHAINS}
    found["sampled"] = sampled_lipschitz(model, x, eps, rows, norm=norm, samples=samples).constant[:, 0]
    for chain in CHAINS:
        if bool((found["sampled"] > found[chain] * (1 + 1e-6)).any()):
            raise ValueError(f"a gradient is steeper than the bound by {chain}: one of both is wrong")
    return found


@torch.no_grad()
def main() -> None:
    args = get_args()
    apply_common_arguments(args)
    data = load_mnist(args.data_dir)
    models = args.models[:1] if args.dry_run else args.models
    shares = args.shares[:1] if args.dry_run else args.shares
    print("| model | p | share of crown's radius | sampled | joint | chord | recurjac | joint / sampled |")
    print("| :-- | :-- | --: | --: | --: | --: | --: | --: |")
    greater, total = 0, 0
    for name in models:
        path = next(p for p in sorted((ROOT / "models" / "mnist_classifier" / name).iterdir()) if p.suffix == "")
        model, config = load_checkpoint(path)
        x, labels = as_frames(data.test_x[: args.N], config["num_frames"]), data.test_y[: args.N]
        logits = model(x)
        kept = (logits.argmax(dim=1) == labels) | args.dry_run
        x, labels, logits = x[kept], logits.argmax(dim=1)[kept], logits[kept]
        following = logits.topk(2, dim=1).indices[:, 1]
        identity = torch.eye(config["num_classes"])
        rows = (identity[labels] - identity[following])[:, None]
        for norm in args.p[:1] if args.dry_run else args.p:
            radius = certified_radius(model, x, labels, norm=norm, targets=following)
            for share in shares:
                found = constants(model, x, share * radius, rows, norm, args.samples)
                for less, more in itertools.pairwise(CHAINS):
                    greater += int((found[less] > found[more] * (1 + 1e-9)).sum())
                    total += len(x)
                means = [float(found[kind].mean()) for kind in ("sampled", *CHAINS)]
                ratio = float((found["joint"] / found["sampled"]).mean())
                numbers = " | ".join(f"{value:.4g}" for value in (*means, ratio))
                print(f"| `{name}` | {norm:g} | {share:g} | {numbers} |", flush=True)
    print(f"a chain is greater than the next in {greater} of {total} cases")


if __name__ == "__main__":
    run_main(main)
