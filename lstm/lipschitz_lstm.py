"""Local Lipschitz constants of an LSTM on MNIST over balls of growing size, of all frames and of each alone.

python lstm/lipschitz_lstm.py                        # 10 images, all frames move, each in an l_2 ball
python lstm/lipschitz_lstm.py --p inf --log-start -4 --log-end -1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.experiments.arguments import add_stack_arguments
from utils.experiments.lipschitz_arguments import add_lipschitz_arguments, lipschitz_folder_name
from utils.runs.cli import ArgumentParser, answer_early, run_main


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    group = parser.add_argument_group("model (the checkpoint must agree)")
    add_stack_arguments(group, hidden_size=32, time_step=4)
    add_lipschitz_arguments(parser, group, "lstm")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from data.mnist import load_mnist
from utils.experiments.lipschitz import LipschitzRun, introduce, make_lipschitz_record, started
from utils.experiments.mnist import load_classifier
from utils.experiments.samples import draw_samples


def main() -> None:
    args = get_args()
    with started(args) as (device, ranks):
        model, config, path = load_classifier(args, "lstm", None, device)
        data = load_mnist(args.data_dir)
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
