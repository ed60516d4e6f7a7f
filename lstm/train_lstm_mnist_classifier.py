"""Train an LSTM on MNIST, an image being a sequence of T slices, and save it with its training curve."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ArgumentParser, answer_early, run_main
from utils.training.arguments import add_stack_arguments, add_training_arguments
from utils.training.certified.arguments import add_certified_arguments, recipe_of


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_training_arguments(parser, hidden_size=32, time_step=4)
    add_stack_arguments(parser)
    add_certified_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from data.mnist import as_frames, load_mnist
from utils.network.checkpoint import model_name, save_checkpoint
from utils.runs.cli import apply_common_arguments
from utils.runs.ranks import joined
from utils.runs.results import check_writable
from utils.training.certified.objective import Certified
from utils.training.held_back import accuracies, evaluate, hold_back
from utils.training.images.mnist import check_slices, make_config, shift_of_frames
from utils.training.images.start import begin
from utils.training.loop import Objective, plot_history, rehearse, train
from utils.training.state import TrainingState


def main() -> None:
    args = get_args()
    device = apply_common_arguments(args)
    check_slices(args.time_step)  # before minutes are spent on data
    recipe = recipe_of(args, args.time_step)
    objective = Objective() if recipe is None else Certified(recipe)
    with joined(device) as ranks:
        # Load: images as sequences of slices, (N, T, n), for training and test.
        data = load_mnist(args.data_dir)
        frames = [as_frames(images, args.time_step).to(device) for images in (data.train_x, data.test_x)]
        labels = [classes.to(device) for classes in (data.train_y, data.test_y)]
        change = shift_of_frames(args.shift)

        # Build.
        config = make_config(args, "lstm", None, data, recipe)
        model = begin(config, args, objective, device)
        path = args.save_dir / model_name(config) / "lstm"
        if args.dry_run:
            return rehearse(model, frames[0], labels[0], args, path, objective, change)
        check_writable(path.parent)

        # Train; every epoch is kept, and --resume goes on from the last one.
        state = TrainingState(path, args, labels[0])
        seen = hold_back(frames, labels, args.held_back)  # the training set's, and what is watched meanwhile
        history = train(model, *seen, args, state, objective, ranks, change)

        # Evaluate, save and draw.
        if ranks.first:
            config |= evaluate(model, frames, labels, objective, history)
            save_checkpoint(path, model, config)
            state.discard()
            watched = "test" if args.held_back is None else "held-back"
            plot_history(history, path.parent / "training_curve.png", model_name(config), watched)
            print(f"{accuracies(config)} ({len(labels[1])} test images of {data.source}); saved {path}")


if __name__ == "__main__":
    run_main(main)
