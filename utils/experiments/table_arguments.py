"""The flags of the scripts behind tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..runs.cli import ROOT, add_common_arguments, norm_value, positive_int
from ..training.certified.recipe import LOSSES

MODELS_DIR = ROOT / "models" / "mnist_classifier"
RECURRENT = ("rnn", "lstm", "gru")
QUICK_MODELS = ("rnn_4_32_tanh", "rnn_7_64_tanh", "lstm_4_32", "gru_4_32")


def add_table_arguments(parser: argparse.ArgumentParser, models: Sequence[str] | None, out_dir: Path) -> None:
    """Add --models, --N, --p, --out-dir and the common flags."""
    add_model_arguments(parser, models, out_dir)
    parser.add_argument("--p", type=norm_value, default=2.0, help="norm of the ball around every frame: 1, 2 or inf")


def add_model_arguments(parser: argparse.ArgumentParser, models: Sequence[str] | None, out_dir: Path) -> None:
    """Add --models, --N, --out-dir and the common flags."""
    parser.add_argument(
        "--models",
        nargs="+",
        default=models,
        metavar="MODEL",
        help=f"folders in {MODELS_DIR.relative_to(ROOT)}, or paths of checkpoints",
    )
    parser.add_argument("--N", type=positive_int, default=20, help="test images drawn; the misclassified are left out")
    parser.add_argument("--out-dir", type=Path, default=out_dir, help="folder of the table")
    add_common_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser, norms: Sequence[float], batch_size: int) -> None:
    """Add --models, --N, --p (several), --batch-size, --resume, --quick, --out-dir and the common flags."""
    add_model_arguments(parser, None, ROOT / "docs" / "tables")
    parser.add_argument(
        "--p", type=norm_value, nargs="+", default=list(norms), help="norms of the balls around the frames: 1, 2, inf"
    )
    parser.add_argument("--batch-size", type=positive_int, default=batch_size, help="images of a batch of rows")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run of the same arguments")
    parser.add_argument("--quick", action="store_true", help="few images of small models: under two minutes")


def finish_run_arguments(args: argparse.Namespace, quick_images: int, gated: bool = False) -> argparse.Namespace:
    """Models and images if they are not given: all committed models, or a few with --quick."""
    if args.models is None:
        args.models = list(QUICK_MODELS) if args.quick else committed_models()
        args.models = [name for name in args.models if not (gated and name.startswith("rnn"))]
    if args.quick:
        args.N = min(args.N, quick_images)
    args.p = list(dict.fromkeys(args.p))
    return args


def models_dir(dataset: str = "mnist") -> Path:
    """The folder of a data set's model folders."""
    return MODELS_DIR if dataset == "mnist" else MODELS_DIR.parent / f"{dataset}_classifier"


def committed_models(certified: bool = False, kinds: Sequence[str] = RECURRENT, dataset: str = "mnist") -> list[str]:
    """Names of all folders that hold a checkpoint of these kinds, with those of certified training if asked for."""
    found = sorted(path.parent.name for path in models_dir(dataset).glob("*/*") if path.name in kinds)
    return [name for name in found if certified or not is_certified(name)]


def is_certified(folder: str) -> bool:
    """Whether a model folder's name ends with a recipe of certified training: lstm_7_64_ibp_inf_0.1."""
    return any(f"_{loss}_" in folder for loss in LOSSES)
