"""What the first stages of the cascade say of models on the images that their trainings held back.

    python benchmarks/verify_held_back.py models/mnist_classifier/*_ibp_inf_0.1/rnn

Recipes are chosen by these figures, so that the test set plays no part: at the ball that a model was trained for, the
shares of images that it classifies right, that a short attack against the runner-up does not break, that intervals
verify, and that these or backward bounds do. Recurrent networks on MNIST; seconds a model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ArgumentParser, add_common_arguments, answer_early, apply_common_arguments, run_main

BOUNDS = ("ibp", "crown")


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help="checkpoints from certified training")
    add_common_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from torch import Tensor, nn

from data.mnist import as_frames, load_mnist
from utils.certify import Effort, cascade
from utils.network.checkpoint import Config, load_checkpoint
from utils.training.held_back import hold_back

STAGES = ("ibp", "runner-up", "crown")


def shares(model: nn.Module, x: Tensor, y: Tensor, config: Config) -> dict[str, float]:
    """Of the images x, (N, T, n), at the ball of the model's recipe."""
    recipe = config["certified"]
    threat = {"norm": float(recipe["p"]), "ball": recipe["ball"], "frames": recipe["frames"]}
    threat["clip"] = (0.0, 1.0) if recipe["clip"] else None
    settled = cascade(model, x, y, float(recipe["train_eps"]), effort=Effort(STAGES), **threat).settled_by
    clean, broken, *verified = (settled.count(stage) / len(y) for stage in ("clean", "runner-up", *BOUNDS))
    return {"clean": 1.0 - clean, "PGD": 1.0 - clean - broken, "ibp": verified[0], "crown": sum(verified)}


def main() -> None:
    args = get_args()
    device = apply_common_arguments(args)
    data = load_mnist(args.data_dir)
    print("model | clean | not broken | verified by ibp | or by crown | of")
    for path in args.models[: 1 if args.dry_run else None]:
        model, config = load_checkpoint(path, device)
        if not config.get("certified") or "num_frames" not in config:
            raise ValueError(f"{path} is no recurrent network from certified training")
        frames = [as_frames(images, config["num_frames"]).to(device) for images in (data.train_x, data.test_x)]
        labels = [data.train_y.to(device), data.test_y.to(device)]
        x, y = (parts[1] for parts in hold_back(frames, labels, config.get("held_back", 5000)))
        with torch.no_grad():
            found = shares(model, x, y, config)
        print(path.parent.name, *(f"{100 * share:.1f}" for share in found.values()), len(y), sep=" | ", flush=True)


if __name__ == "__main__":
    run_main(main)
