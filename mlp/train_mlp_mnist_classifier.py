"""Train a multi-layer perceptron on MNIST or CIFAR-10 and save it with its training curve."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ArgumentParser, answer_early, run_main
from utils.training.arguments import add_mlp_training_arguments
from utils.training.certified.arguments import add_certified_arguments, recipe_of
from utils.training.datasets import add_dataset_argument, settle_folder


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_mlp_training_arguments(parser)
    add_certified_arguments(parser, of_sequences=False)
    add_dataset_argument(parser.add_argument_group("data"))
    args = parser.parse_args()
    settle_folder(args, "save_dir")
    return args


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from utils.network.checkpoint import model_name, save_checkpoint
from utils.runs.cli import apply_common_arguments
from utils.runs.results import check_writable
from utils.training.certified.objective import Certified
from utils.training.certified.weights import objective_of
from utils.training.datasets import load_images
from utils.training.held_back import accuracies, evaluate, hold_back
from utils.training.images.mnist import make_mlp_config
from utils.training.images.start import begin
from utils.training.loop import plot_history, rehearse, train
from utils.training.state import TrainingState


def main() -> None:
    args = get_args()
    device = apply_common_arguments(args)
    recipe = recipe_of(args, frames=1, input_penalty=0.0)
    if recipe is not None and (args.lipschitz_weight or args.perturb):
        raise ValueError("--certified, --perturb and --lipschitz-weight are different trainings: give one of them")
    objective = objective_of(args) if recipe is None else Certified(recipe)

    # Load: images as vectors of pixels, (N, 784) or (N, 3072), for training and test.
    data = load_images(args)
    pixels = [images.flatten(1).to(device) for images in (data.train_x, data.test_x)]
    labels = [classes.to(device) for classes in (data.train_y, data.test_y)]

    # Build.
    config = make_mlp_config(args, data, recipe)
    model = begin(config, args, objective, device)
    path = args.save_dir / model_name(config) / "mlp"
    if args.dry_run:
        return rehearse(model, pixels[0], labels[0], args, path, objective)
    check_writable(path.parent)

    # Train; every epoch is kept, and --resume goes on from the last one.
    state = TrainingState(path, args, labels[0])
    seen = hold_back(pixels, labels, args.held_back)  # the training set's, and what is watched meanwhile
    history = train(model, *seen, args, state, objective)

    # Evaluate, save and draw.
    config |= evaluate(model, pixels, labels, objective, history)
    save_checkpoint(path, model, config)
    state.discard()
    watched = "test" if args.held_back is None else "held-back"
    plot_history(history, path.parent / "training_curve.png", model_name(config), watched)
    print(f"{accuracies(config)} ({len(labels[1])} test images of {data.source}); saved {path}")


if __name__ == "__main__":
    run_main(main)
