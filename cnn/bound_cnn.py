"""Certified radii of a convolutional network on images: within them, no perturbation changes the classification.

    python cnn/bound_cnn.py                                        # 100 images, random targets, l_2, CROWN
    python cnn/bound_cnn.py --model resnet --recipe ibp_inf_0.3_clip --p inf --untargeted --clip --method crown-ibp
    python cnn/bound_cnn.py --N 20 --attack                        # beside each radius, that of an attack
    python cnn/bound_cnn.py --dataset cifar10 --data-dir FOLDER --model cnn7

Reads WORK_DIR/cnn_small_16/cnn (after the flags --model, --width, --batch-norm and --recipe); writes
certified_bound.csv, run.json and figures to 2_norm_bound_crown/ (after norm, method and whatever is not as usual)
beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.experiments.arguments import (
    add_folder_arguments,
    add_goal_arguments,
    add_method_arguments,
    add_search_arguments,
    add_trained_argument,
    method_of,
    result_folder,
    result_folder_name,
    valid_range,
)
from utils.runs.cli import ArgumentParser, add_common_arguments, answer_early, run_main
from utils.training.arguments import add_cnn_model_arguments
from utils.training.datasets import add_dataset_argument


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    group = parser.add_argument_group("model (the checkpoint must agree)")
    add_folder_arguments(group, "cnn")
    add_cnn_model_arguments(group)
    add_trained_argument(group)
    add_dataset_argument(group)
    group = parser.add_argument_group("what is certified (eps and radii are in pixel values, in [0, 1])")
    add_goal_arguments(group, together=("pixel",))
    group = parser.add_argument_group("how")
    add_method_arguments(group)
    group.add_argument(
        "--attack", action="store_true", help="the smallest perturbation that PGD finds beside each radius"
    )
    add_search_arguments(group)
    add_common_arguments(parser)
    parser.set_defaults(time_step=1, frames=None, per_frame=False, ball="frame", save_certificate=False)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from torch import Tensor

from utils.certify import MarginProblem, search_radius
from utils.experiments.cnn import attacked, load_cnn
from utils.experiments.mnist import Run, largest_eps, make_record, print_introduction, started
from utils.experiments.samples import draw_samples, form_of
from utils.question import Question, Threat
from utils.training.datasets import load_images


def main() -> None:
    args = get_args()
    with started(args) as (device, ranks):
        # Load.
        model, config, path = load_cnn(args, device)
        data, form = load_images(args, train=False), form_of(config)
        folder = result_folder(args, path.parent, result_folder_name(args))

        # Draw --N test images by the seed; those that are misclassified, or of the target's class, are left out.
        samples = draw_samples(data, model, args, form)
        images, labels = form(samples.images).to(device), samples.labels.to(device)
        targets = None if samples.targets is None else samples.targets.to(device)

        # Ask: what may move, which classes must not be reached, and how that is bounded.
        threat = Threat(args.p, clip=valid_range(args), together=args.together)
        method = method_of(args)

        def problem_of(chosen: list[int], frame: int | None) -> MarginProblem:
            goal = None if targets is None else targets[chosen]
            return MarginProblem(Question(model, images[chosen], labels[chosen], goal, threat), method)

        def columns_of(problem: MarginProblem) -> dict[str, Tensor]:
            how = {"tol": args.tol, "eps0": args.k or args.eps0, "max_eps": largest_eps(args, images[0].numel())}
            found = search_radius(problem, batch_size=len(problem.x), dtype=getattr(torch, args.dtype), **how)
            columns = {"radius": found.radius, "failed_eps": found.failed, "start_radius": found.start}
            if args.attack:
                own = problem.x.reshape(-1, *images.shape[1:])
                columns["attack_radius"] = attacked(problem, own, found.radius, args.seed, folder / "contradiction.pt")
            return columns | {"margin": found.margin, "evaluations": found.evaluations}

        # Write a row for every image as they are found; then summarise and draw.
        run = Run(args, samples, problem_of, columns_of)
        record = make_record(args, samples, path, config, data, device)
        print_introduction(record)
        if args.dry_run:
            run.rehearse()
        else:
            run.write(folder, record, ranks)


if __name__ == "__main__":
    run_main(main)
