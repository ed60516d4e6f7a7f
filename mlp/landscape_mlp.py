"""Balls without a stationary point: around MNIST images, how far the gradient of a logit surely does not vanish.

python mlp/landscape_mlp.py                                   # 20 images, l_2, logit of class 1
python mlp/landscape_mlp.py --p inf --logit-class 3 --entries --chain recurjac     # as RecurJac does it
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.choices.method import CHAINS, DIRECT_METHODS
from utils.experiments.arguments import add_folder_arguments, add_search_arguments
from utils.runs.cli import ArgumentParser, add_common_arguments, answer_early, norm_value, positive_int, run_main
from utils.training.arguments import add_mlp_model_arguments, add_recipe_argument
from utils.training.datasets import add_dataset_argument


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    group = parser.add_argument_group("model (the checkpoint must agree)")
    add_folder_arguments(group, "mlp")
    add_mlp_model_arguments(group)
    add_recipe_argument(group)
    add_dataset_argument(group)
    group = parser.add_argument_group("of what (radii are in pixel values, which lie in [0, 1])")
    group.add_argument("--N", type=positive_int, default=20, help="test images drawn; the misclassified get no radius")
    group.add_argument("--p", type=norm_value, default=2.0, help="norm of the ball: 1, 2 or inf")
    group.add_argument("--logit-class", type=int, default=1, choices=range(10), help="class whose logit it is")
    group = parser.add_argument_group("how")
    group.add_argument("--chain", choices=CHAINS, default=CHAINS[0], help="bounds of gradients")
    group.add_argument("--layer-method", choices=DIRECT_METHODS, default="crown", help="what bounds the layers")
    group.add_argument(
        "--entries", action="store_true", help="only entries of the gradient count, no directions: as RecurJac"
    )
    add_search_arguments(group)
    add_common_arguments(parser)
    args = parser.parse_args()
    given = {"time_step": 1, "frames": None, "per_frame": False, "ball": "frame", "save_certificate": False}
    given |= {
        "untargeted": True,
        "target": None,
        "clip": False,
        "method": "jacobian",
        "lipsteps": None,
        "time_limit": None,
    }
    given |= {"alpha_steps": None, "curve_steps": None}
    vars(args).update(given)
    return args


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from torch import Tensor

from utils.certify import MarginProblem, search_without_stationary_point
from utils.experiments.mlp import load_mlp
from utils.experiments.mnist import Run, largest_eps, make_record, print_introduction, started
from utils.experiments.samples import draw_samples
from utils.question import Question, Threat
from utils.training.datasets import load_images


def main() -> None:
    args = get_args()
    with started(args) as (device, ranks):
        # Load and draw --N test images; those that are misclassified are left out.
        model, config, path = load_mlp(args, device)
        data = load_images(args, train=False)
        samples = draw_samples(data, model, args)
        images, labels = samples.frames(1).to(device), samples.labels.to(device)
        logit = torch.eye(config["num_classes"])[args.logit_class][None]
        how = {"norm": args.p, "chain": args.chain, "layers": args.layer_method, "directions": not args.entries}
        largest = largest_eps(args, config["input_size"])
        how |= {"tol": args.tol, "max_eps": largest, "dtype": getattr(torch, args.dtype)}

        def problem_of(chosen: list[int], frame: int | None) -> MarginProblem:
            return MarginProblem(Question(model, images[chosen], labels[chosen], None, Threat(args.p)))

        def columns_of(problem: MarginProblem) -> dict[str, Tensor]:
            found = search_without_stationary_point(model, problem.x, logit, **how)
            columns = {"radius": found.low, "failed_eps": found.high}
            return columns | {"margin": found.margin, "evaluations": found.evaluations}

        # Write a row for every image as they are found; then summarise and draw.
        run = Run(args, samples, problem_of, columns_of)
        counted = "entries" if args.entries else "entries and directions"
        words = {"goal": f"the gradient of class {args.logit_class}'s logit is 0 nowhere in the ball"}
        words |= {"method": f"{args.chain} over {args.layer_method}, by {counted} of the gradient"}
        words |= {"title": f"no stationary point of class {args.logit_class}'s logit; {words['method']}"}
        record = make_record(args, samples, path, config, data, device) | words
        print_introduction(record)
        name = f"{args.p:g}_norm_landscape_class_{args.logit_class}" + "_entries" * args.entries
        name += f"_{args.chain}_{args.layer_method}"
        if args.dry_run:
            run.rehearse()
        else:
            run.write(args.out_dir or path.parent / name, record, ranks)


if __name__ == "__main__":
    run_main(main)
