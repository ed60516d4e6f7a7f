"""Certified radii of a multi-layer perceptron on images: within them, no perturbation changes the classification.

    python mlp/bound_mlp.py                                        # 100 images, random targets, l_2, CROWN
    python mlp/bound_mlp.py --p inf --target runnerup --layer-bound fastlin
    python mlp/bound_mlp.py --layer-bound crown-adaptive --jacobian-bound chord   # integrated bounds of gradients
    python mlp/bound_mlp.py --method shell                         # both in turn; curve, bab ... as for the others
    python mlp/bound_mlp.py --dataset cifar10 --data-dir FOLDER

Reads WORK_DIR/mlp_20_20_relu/mlp (after the flags --layers and --activation); writes certified_bound.csv, run.json and
figures to 2_norm_bound_crown/ (after norm, method and whatever is not as usual) beside it.
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
    method_of,
    result_folder,
    result_folder_name,
    valid_range,
)
from utils.runs.cli import ArgumentParser, add_common_arguments, answer_early, run_main
from utils.training.arguments import add_mlp_model_arguments, add_recipe_argument
from utils.training.datasets import add_dataset_argument

# RecurJac's names of what is set by --method, --layer-method and --chain.
LAYER_BOUNDS = {
    "crown-adaptive": "crown",
    "crown-general": "crown",
    "fastlin": "fastlin",
    "interval": "ibp",
    "spectral": "spectral",
}
JACOBIAN_BOUNDS = {"disable": None, "recurjac": "recurjac", "fastlip": "interval", "chord": "chord", "joint": "joint"}


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    group = parser.add_argument_group("model (the checkpoint must agree)")
    add_folder_arguments(group, "mlp")
    add_mlp_model_arguments(group)
    add_recipe_argument(group)
    add_dataset_argument(group)
    add_goal_arguments(parser.add_argument_group("what is certified (eps and radii are in pixel values, in [0, 1])"))
    group = parser.add_argument_group("how")
    add_method_arguments(group)
    group.add_argument("--layer-bound", choices=LAYER_BOUNDS, help="RecurJac's names of what bounds the layers")
    group.add_argument("--jacobian-bound", choices=JACOBIAN_BOUNDS, help="RecurJac's names of what bounds gradients")
    group.add_argument("--quad", action="store_true", help="RecurJac's name of --method parabola")
    add_search_arguments(group)
    add_common_arguments(parser)
    args = parser.parse_args()
    try:
        by_other_names(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def by_other_names(args: argparse.Namespace) -> None:
    """Set --method and what belongs to it from RecurJac's names. Raises ValueError if they contradict each other."""
    args.time_step, args.frames, args.per_frame, args.ball, args.save_certificate = 1, None, False, "frame", False
    if args.quad and (args.method != "crown" or args.layer_bound or args.jacobian_bound):
        raise ValueError("--quad stands for --method parabola: give it no other bound")
    args.method = "parabola" if args.quad else args.method
    if args.layer_bound is None and args.jacobian_bound is None:
        return
    if args.method != "crown" or args.chain or args.layer_method:
        raise ValueError("--layer-bound and --jacobian-bound stand for --method, --chain and --layer-method: give one")
    layers = LAYER_BOUNDS[args.layer_bound or "crown-adaptive"]
    chain = JACOBIAN_BOUNDS[args.jacobian_bound or "disable"]
    if chain is None:
        args.method = layers
        return
    if layers == "spectral":
        raise ValueError("--layer-bound spectral bounds no layers: give it no --jacobian-bound")
    args.method, args.chain, args.layer_method = "jacobian", chain, layers
    smooth = args.activation not in ("relu", "leaky")
    if args.jacobian_bound == "fastlip" and smooth:
        raise ValueError("--jacobian-bound fastlip is for relu and leaky: its rule for others is --chain interval")


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from torch import Tensor

from utils.certify import MarginProblem, search_radius
from utils.experiments.mlp import load_mlp
from utils.experiments.mnist import Run, largest_eps, make_record, print_introduction, started
from utils.experiments.samples import draw_samples
from utils.question import Question, Threat
from utils.training.datasets import load_images


def main() -> None:
    args = get_args()
    with started(args) as (device, ranks):
        # Load.
        model, config, path = load_mlp(args, device)
        data = load_images(args, train=False)

        # Draw --N test images by the seed; those that are misclassified, or of the target's class, are left out.
        samples = draw_samples(data, model, args)
        images, labels = samples.frames(1).to(device), samples.labels.to(device)
        targets = None if samples.targets is None else samples.targets.to(device)

        # Ask: what may move, which classes must not be reached, and how that is bounded.
        threat = Threat(args.p, clip=valid_range(args))
        method = method_of(args)

        def problem_of(chosen: list[int], frame: int | None) -> MarginProblem:
            goal = None if targets is None else targets[chosen]
            return MarginProblem(Question(model, images[chosen], labels[chosen], goal, threat), method)

        def columns_of(problem: MarginProblem) -> dict[str, Tensor]:
            how = {"tol": args.tol, "eps0": args.k or args.eps0, "max_eps": largest_eps(args, config["input_size"])}
            found = search_radius(problem, batch_size=len(problem.x), dtype=getattr(torch, args.dtype), **how)
            columns = {"radius": found.radius, "failed_eps": found.failed}
            return columns | {"margin": found.margin, "evaluations": found.evaluations}

        # Write a row for every image as they are found; then summarise and draw.
        run = Run(args, samples, problem_of, columns_of)
        record = make_record(args, samples, path, config, data, device)
        print_introduction(record)
        if args.dry_run:
            run.rehearse()
        else:
            run.write(result_folder(args, path.parent, result_folder_name(args)), record, ranks)


if __name__ == "__main__":
    run_main(main)
