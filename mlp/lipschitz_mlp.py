"""Local Lipschitz constants of a multi-layer perceptron on images over balls of growing size, beside sampled ones.

python mlp/lipschitz_mlp.py --p inf --log-start -3 --log-end 0
python mlp/lipschitz_mlp.py --layers 20 20 20 20 --activation leaky --logit --chains joint chord recurjac interval
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.experiments.lipschitz_arguments import add_lipschitz_arguments, lipschitz_folder_name
from utils.runs.cli import ArgumentParser, answer_early, run_main
from utils.training.arguments import add_mlp_model_arguments, add_recipe_argument
from utils.training.datasets import add_dataset_argument


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    group = parser.add_argument_group("model (the checkpoint must agree)")
    add_mlp_model_arguments(group)
    add_recipe_argument(group)
    add_dataset_argument(group)
    add_lipschitz_arguments(parser, group, "mlp")
    args = parser.parse_args()
    args.time_step = 1
    return args


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from utils.experiments.lipschitz import LipschitzRun, introduce, make_lipschitz_record, started
from utils.experiments.mlp import load_mlp
from utils.experiments.samples import draw_samples
from utils.training.datasets import load_images


def main() -> None:
    args = get_args()
    with started(args) as (device, ranks):
        model, config, path = load_mlp(args, device)
        data = load_images(args, train=False)
        samples = draw_samples(data, model, args)
        run = LipschitzRun(args, model, samples, device)
        record = make_lipschitz_record(args, samples, path, config, data, device)
        introduce(record)
        if args.dry_run:
            run.rehearse()
        else:
            run.write(args.out_dir or path.parent / lipschitz_folder_name(args), record, ranks)


if __name__ == "__main__":
    run_main(main)
