"""Train a convolutional network on CIFAR-10 and save it with its training curve."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ROOT, ArgumentParser, answer_early, run_main
from utils.training.arguments import add_cnn_training_arguments
from utils.training.certified.arguments import add_certified_arguments, recipe_of


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_cnn_training_arguments(parser, shift=4, flip=True)
    add_certified_arguments(parser, of_sequences=False)
    parser.set_defaults(save_dir=ROOT / "models" / "cifar10_classifier")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from data.cifar10 import load_cifar10
from utils.network.checkpoint import model_name, save_checkpoint
from utils.runs.cli import apply_common_arguments
from utils.runs.ranks import joined
from utils.runs.results import check_writable
from utils.training.certified.objective import Certified
from utils.training.held_back import accuracies, evaluate, hold_back
from utils.training.images.changes import random_change
from utils.training.images.cnn import as_images, make_cnn_config, settle_statistics
from utils.training.images.start import begin
from utils.training.loop import Objective, plot_history, rehearse, train
from utils.training.state import TrainingState


def main() -> None:
    args = get_args()
    device = apply_common_arguments(args)
    recipe = recipe_of(args, frames=1, input_penalty=0.0)
    objective = Objective() if recipe is None else Certified(recipe)
    with joined(device) as ranks:
        # Load: images, (N, channels, height, width), for training and test.
        data = load_cifar10(args.data_dir)
        images = [as_images(part).to(device) for part in (data.train_x, data.test_x)]
        labels = [classes.to(device) for classes in (data.train_y, data.test_y)]
        change = random_change(args.shift, args.flip)

        # Build.
        config = make_cnn_config(args, data, recipe)
        model = begin(config, args, objective, device)
        path = args.save_dir / model_name(config) / "cnn"
        if args.dry_run:
            return rehearse(model, images[0], labels[0], args, path, objective, change)
        check_writable(path.parent)

        # Train; every epoch is kept, and --resume goes on from the last one.
        state = TrainingState(path, args, labels[0])
        seen = hold_back(images, labels, args.held_back)  # the training set's, and what is watched meanwhile
        history = train(model, *seen, args, state, objective, ranks, change)
        settle_statistics(model, seen[0][0])

        # Evaluate, save and draw.
        if ranks.first:
            config |= evaluate(model, images, labels, objective, history)
            save_checkpoint(path, model, config)
            state.discard()
            watched = "test" if args.held_back is None else "held-back"
            plot_history(history, path.parent / "training_curve.png", model_name(config), watched)
            print(f"{accuracies(config)} ({len(labels[1])} test images of {data.source}); saved {path}")


if __name__ == "__main__":
    run_main(main)
