"""Certified radii of a GRU on MNIST: within them, no perturbation of the slices changes the classification.

    python gru/bound_gru.py                                     # 100 images, random targets, l_2
    python gru/bound_gru.py --p inf --untargeted --clip
    python gru/bound_gru.py --per-frame                         # a radius for every single slice

Reads WORK_DIR/gru_4_32/gru (after the flags --time-step, --hidden-size ...); writes certified_bound.csv,
run.json and figures to 2_norm_bound_crown_plane/ (after norm, method and whatever is not as usual) beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.experiments.arguments import add_bound_arguments
from utils.runs.cli import ArgumentParser, answer_early, run_main


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_bound_arguments(parser, "gru", hidden_size=32, time_step=4)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from dataclasses import replace

import torch
from torch import Tensor

from data.mnist import load_mnist
from utils.certify import MarginProblem, search_radius
from utils.experiments.arguments import method_of, result_folder, result_folder_name, valid_range
from utils.experiments.mnist import Run, largest_eps, load_classifier, make_record, print_introduction, started
from utils.experiments.samples import draw_samples
from utils.question import Question, Threat


def main() -> None:
    args = get_args()
    with started(args) as (device, ranks):
        # Load.
        model, config, path = load_classifier(args, "gru", None, device)
        data = load_mnist(args.data_dir)

        # Draw --N test images by the seed; those that are misclassified, or of the target's class, are left out.
        samples = draw_samples(data, model, args)
        images, labels = samples.frames(args.time_step).to(device), samples.labels.to(device)
        targets = None if samples.targets is None else samples.targets.to(device)

        # Ask: what may move, which classes must not be reached, and how that is bounded.
        threat = Threat(args.p, args.ball, args.frames, clip=valid_range(args), together=args.together)
        method = method_of(args)

        def problem_of(chosen: list[int], frame: int | None) -> MarginProblem:
            own = threat if frame is None else replace(threat, frames=frame)  # one frame after the other
            goal = None if targets is None else targets[chosen]
            return MarginProblem(Question(model, images[chosen], labels[chosen], goal, own), method)

        def columns_of(problem: MarginProblem) -> dict[str, Tensor]:
            how = {
                "tol": args.tol,
                "eps0": args.k or args.eps0,
                "max_eps": largest_eps(args),
                "dtype": getattr(torch, args.dtype),
            }
            found = search_radius(problem, batch_size=len(problem.x), **how)
            columns = {"radius": found.radius, "failed_eps": found.failed, "start_radius": found.start}
            return columns | {"margin": found.margin, "evaluations": found.evaluations}

        # Write a row for every image (and frame) as they are found; then summarise and draw.
        run = Run(args, samples, problem_of, columns_of)
        record = make_record(args, samples, path, config, data, device)
        print_introduction(record)
        if args.dry_run:
            run.rehearse()
        else:
            run.write(result_folder(args, path.parent, result_folder_name(args)), record, ranks)


if __name__ == "__main__":
    run_main(main)
