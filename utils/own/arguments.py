"""The flags of ``scripts/certify.py``, which its template has as well."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ..choices.method import CERTIFIED_METHODS
from ..choices.tables import BALLS, RELAXATIONS
from ..experiments.arguments import (
    add_method_arguments,
    add_norm_arguments,
    add_search_arguments,
    check_norm,
    fill_in,
    target_choice,
)
from ..runs.cli import finite, non_negative_int, positive_float, positive_int

ONNX_ENDS = (".onnx", ".onnx.gz")


def add_model_and_data(parser: argparse.ArgumentParser) -> None:
    """Where model and data lie."""
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model",
        required=True,
        metavar="FILE.py:NAME",
        help="a module, what gives one without arguments, or FILE.onnx",
    )
    _add_files(group, required=True)
    group.add_argument("--N", type=positive_int, help="only the first N inputs (default: all)")


def add_own_data(parser: argparse.ArgumentParser) -> None:
    """For scripts about models of the project that take one's own, and the inputs that it is asked about, as well."""
    group = parser.add_argument_group("your own model and data (the model as FILE.py:NAME or FILE.onnx)")
    _add_files(group, required=False)


def _add_files(group, required: bool) -> None:
    group.add_argument("--weights", type=Path, help="the model's state dict (torch, safetensors)")
    group.add_argument(
        "--data",
        required=required,
        metavar="FILE",
        help="inputs, (batch, ...): npy, npz, csv or torch; FILE:KEY of several",
    )
    group.add_argument("--labels", metavar="FILE", help="classes, (batch,) (default: what the model says)")
    group.add_argument("--shape", type=positive_int, nargs="+", help="of one input, such as T N, if data is flat")
    group.add_argument(
        "--extra",
        metavar="FILE",
        help="what the forward is given after the input, and is exact, such as lengths: an array, or several by their "
        "names; those of as many rows as the data have one an input",
    )


def check_own_data(args: argparse.Namespace, models: list[str]) -> None:
    """Raise ValueError if flags of one's own model and data do not belong to the models that are named."""
    own = [name for name in models if is_own(name)]
    given = [name for name in ("weights", "labels", "shape", "extra") if getattr(args, name)]
    if args.data is None:
        if own:
            raise ValueError(f"{own[0]} is a model of your own: say by --data what it is asked about")
        if given:
            raise ValueError(f"--{given[0]} belongs to a model of your own: give --data")
    elif args.weights is not None and len(models) > 1:
        raise ValueError("--weights are those of one model: name no other")


def is_own(model: str) -> bool:
    """Whether a model is named as a Python file's or an ONNX file."""
    file, colon, _ = model.rpartition(":")
    return model.endswith(ONNX_ENDS) or (bool(colon) and file.endswith(".py"))


def add_question(parser: argparse.ArgumentParser) -> None:
    """What is certified, and how."""
    group = parser.add_argument_group("what is certified (eps and radii are in the units of the data)")
    add_norm_arguments(group, ("pixel", "frame"))
    group.add_argument("--eps", type=positive_float, help="certify at this radius (default: search the largest)")
    group.add_argument(
        "--target",
        type=target_choice,
        metavar="{random,runnerup,least,K}",
        help="class to keep away from (default: all other classes)",
    )
    group.add_argument("--frames", type=non_negative_int, nargs="+", help="perturb only these frames")
    group.add_argument("--ball", choices=tuple(BALLS), default="frame", help="a ball around every frame, or around all")
    group.add_argument("--clip", type=finite, nargs=2, metavar=("LOW", "HIGH"), help="valid inputs")
    group.add_argument("--features", type=non_negative_int, nargs="+", help="perturb only these values of a frame")
    group.add_argument(
        "--scales", metavar="FILE", help="by what each value moves more than eps, (n,), (T, n) or (N, T, n)"
    )
    group.add_argument(
        "--box",
        metavar=("LOWER", "UPPER"),
        nargs=2,
        help="lower and upper ends of every value, likewise: radii are shares of that box, in which the input need not "
        "be the middle, up to all of it, 1",
    )
    group = parser.add_argument_group("how")
    add_method_arguments(group)
    group.add_argument("--relaxation", choices=tuple(RELAXATIONS), help="bounds of gates' products (default: plane)")
    add_search_arguments(group)
    group.add_argument("--max-eps", type=positive_float, default=1e6, help="largest eps of the search")


def add_certificates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--save-certificate",
        action="store_true",
        help="write a file for every radius that scripts/check_certificate.py can confirm (of a SequenceClassifier)",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError if flags contradict each other."""
    fill_in(args, [args.method])
    if args.box:
        args.p, args.max_eps = math.inf, min(args.max_eps, 1.0)  # of shares of the box
    check_norm(argparse.Namespace(**vars(args) | {"clip": False, "save_certificate": False}))
    if args.p == 0.0 and args.clip is None:
        raise ValueError("--p 0 lets values change to anything in a range: give --clip LOW HIGH")
    if args.box and (args.scales or args.features or args.clip or args.ball != "frame"):
        raise ValueError("--box says how far every value goes: leave out --clip, --scales, --features and --ball")
    flag = next((name for name in ("save_certificate", "save_certificates") if getattr(args, name, None)), None)
    if flag is not None:
        flag = f"--{flag.replace('_', '-')}"
        if args.method not in CERTIFIED_METHODS:
            raise ValueError(f"{flag} is for --method {', '.join(CERTIFIED_METHODS)}, not {args.method}")
        if args.features or args.scales or args.box:
            raise ValueError(f"{flag} knows balls and boxes alone: leave out --features, --scales and --box")
        if args.p == 0.0 or (args.clip and args.p != math.inf):
            raise ValueError(f"{flag} knows balls and, with --p inf, cut boxes: leave out --p 0 and --clip")
    if args.eps is not None and (args.method == "bab" or args.eps0 is not None):
        raise ValueError("--eps asks at one radius: leave out --eps0, and of methods take another than bab")
