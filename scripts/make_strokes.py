"""Make pen strokes from MNIST: thin every digit to its skeleton and trace that by a pen (needs scikit-image).

    python scripts/make_strokes.py                      # all of MNIST; two minutes
    python scripts/make_strokes.py --num-train 20000    # less to train on

Writes strokes.npz to data/strokes/, where the stroke scripts look for it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ROOT, ArgumentParser, answer_early, positive_int, run_main


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, metavar="FOLDER", help="folder that holds MNIST/raw (default: data/)")
    parser.add_argument("--save-dir", type=Path, default=ROOT / "data" / "strokes", help="where strokes.npz is written")
    parser.add_argument("--stride", type=positive_int, default=3, help="keep every so many pixels of a stroke")
    parser.add_argument("--num-train", type=positive_int, help="training digits (default: all)")
    parser.add_argument("--num-test", type=positive_int, help="test digits (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="trace one digit and write nothing")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import numpy as np
from tqdm import tqdm

from data.mnist import load_mnist
from data.strokes import FILE_NAME, image_to_sequence, skeleton, write_strokes
from utils.runs.results import check_writable, replacing


def main() -> None:
    args = get_args()
    skeleton(np.ones((28, 28)))  # says at once if scikit-image is missing
    data = load_mnist(args.data_dir)
    parts = {
        "train": (data.train_x[: args.num_train], data.train_y[: args.num_train]),
        "test": (data.test_x[: args.num_test], data.test_y[: args.num_test]),
    }
    if args.dry_run:
        points = image_to_sequence(data.test_x[0].numpy(), args.stride)
        print(f"dry run: test digit 0 has {len(points)} points, nothing written to {args.save_dir / FILE_NAME}")
        return
    check_writable(args.save_dir)
    traced = {}
    for part, (images, labels) in parts.items():
        # disable=None: a bar on a terminal, silence in a log file
        sequences = [
            image_to_sequence(image, args.stride) for image in tqdm(images.numpy(), unit="digit", disable=None)
        ]
        traced[part] = (sequences, labels.numpy())
    with replacing(args.save_dir / FILE_NAME) as path:
        write_strokes(path, traced, f"{data.source}-stride{args.stride}")
    lengths = [len(sequence) for sequences, _ in traced.values() for sequence in sequences]
    print(f"{len(lengths)} digits, {np.mean(lengths):.1f} points on average, {max(lengths)} at most", end="; ")
    print(f"saved {args.save_dir / FILE_NAME}")


if __name__ == "__main__":
    run_main(main)
