"""The flags of the bound scripts of words and strokes."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..choices.tables import RELAXATIONS
from ..experiments.arguments import relative_tolerance
from ..runs.cli import ROOT, add_common_arguments, norm_value, positive_int
from ..training.arguments import STROKES_HELP
from ..training.tasks import TextTask

DRAWN_TEXTS = 200  # unless told otherwise
COMPARED = ("plane", "line", "constant")
COMPARED_COLUMNS = tuple(f"{name}_{value}" for name in COMPARED for value in ("radius", "seconds"))


def add_step_arguments(parser: argparse.ArgumentParser, sample: str, step: str, batch_size: int):
    """Add the flags that say how steps are bounded; returns their group. A step is a word or a point of a sample."""
    group = parser.add_argument_group("how")
    group.add_argument(
        "--relaxation",
        choices=tuple(RELAXATIONS),
        default="plane",
        help="bounds of the gates' products: planes with contracting slopes or of least volume, lines, constants",
    )
    group.add_argument("--no-attack", action="store_true", help=f"leave out the attack on every {step}")
    group.add_argument("--tol", type=relative_tolerance, default=1e-3, help="relative width of the final bracket")
    group.add_argument("--batch-size", type=positive_int, default=batch_size, help=f"{step}s bounded at a time")
    group.add_argument(
        "--save-every", type=positive_int, default=20, help=f"{sample}s whose rows are found and written at a time"
    )
    group.add_argument(
        "--out-dir", type=Path, metavar="FOLDER", help="folder of the results (default: beside the checkpoint)"
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run of the same arguments; --N may be larger than it was",
    )
    group.add_argument("--overwrite", action="store_true", help="replace results of another run in the folder")
    return group


def add_word_arguments(parser: argparse.ArgumentParser, architecture: str, task: TextTask) -> None:
    """Add the flags of a word bound script and the common ones."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--work-dir", type=Path, default=ROOT / "models" / task.folder, help="folder of the model folders"
    )
    group.add_argument("--model-name", default=architecture, help="name of the checkpoint in its model folder")
    group.add_argument("--hidden-size", type=positive_int, default=32, help="size of the hidden state")
    group.add_argument("--embedding-size", type=positive_int, default=100, help="numbers in a word's vector")
    group = parser.add_argument_group("what is certified (eps and radii are in units of the word vectors)")
    group.add_argument("--N", type=positive_int, help=f"test {task.item}s drawn (default: {DRAWN_TEXTS})")
    group.add_argument(
        "--text", action="append", metavar="TEXT", help=f"certify this {task.item} instead; may be given several times"
    )
    group.add_argument("--p", type=norm_value, default=2.0, help="norm of the perturbation: 1, 2 or inf")
    group = add_step_arguments(parser, task.item, "word", batch_size=200)
    group.add_argument("--compare", action="store_true", help=f"also find the radii by {' and '.join(COMPARED[1:])}s")
    group.add_argument("--show", type=positive_int, default=10, help=f"{task.item}s printed")
    group.add_argument("--sample", action="store_true", help=f"use the small built-in sample of made-up {task.item}s")
    add_common_arguments(parser, data=f"folder that holds the {task.item}s (default: data/)")


def add_stroke_arguments(parser: argparse.ArgumentParser, architecture: str) -> None:
    """Add the flags of a stroke bound script and the common ones."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--work-dir", type=Path, default=ROOT / "models" / "stroke_classifier", help="folder of the model folders"
    )
    group.add_argument("--model-name", default=architecture, help="name of the checkpoint in its model folder")
    group.add_argument("--hidden-size", type=positive_int, default=32, help="size of the hidden state")
    group = parser.add_argument_group("what is certified (eps and radii: pixels of dx and dy, units of the two flags)")
    group.add_argument("--N", type=positive_int, default=200, help="test digits drawn; the misclassified get no radius")
    group.add_argument("--p", type=norm_value, default=2.0, help="norm of the perturbation: 1, 2 or inf")
    add_step_arguments(parser, "digit", "point", batch_size=100)
    add_common_arguments(parser, data=STROKES_HELP)
