"""The flags of a bound script, whether they fit each other and the checkpoint, and where the results go."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from ..choices.method import ALPHA_STEPS, CURVE_STEPS, CURVED_METHODS, TIME_LIMIT, WITH_SLOPES
from ..choices.tables import BALLS, METHODS, RELAXATIONS
from ..runs.cli import ROOT, add_common_arguments, non_negative_int, norm_value, positive_float, positive_int

TARGETS = ("random", "runnerup", "least")
# Flags that have an effect with some methods only: their values if they are left out, and these methods.
OF_METHODS = {
    "relaxation": ("plane", tuple(name for name in METHODS if name not in ("ibp", "ball"))),
    "alpha_steps": (ALPHA_STEPS, WITH_SLOPES),
    "curve_steps": (CURVE_STEPS, CURVED_METHODS),
    "time_limit": (TIME_LIMIT, ("bab",)),
}


def add_bound_arguments(parser: argparse.ArgumentParser, architecture: str, hidden_size: int, time_step: int) -> None:
    """Add the flags of a bound script, with the given defaults, and the common ones; gated cells get one more."""
    group = parser.add_argument_group("model (the checkpoint must agree)")
    group.add_argument(
        "--work-dir", type=Path, default=ROOT / "models" / "mnist_classifier", help="folder of the model folders"
    )
    group.add_argument("--model-name", default=architecture, help="name of the checkpoint in its model folder")
    group.add_argument("--hidden-size", type=positive_int, default=hidden_size, help="size of the hidden state")
    group.add_argument("--time-step", type=positive_int, default=time_step, help="frames an image is cut into")
    group.add_argument("--num-layers", type=positive_int, default=1, help="recurrent layers on top of each other")
    group.add_argument("--bidirectional", action="store_true", help="frames are read in both directions")
    group = parser.add_argument_group("what is certified (eps and radii are in pixel values, which lie in [0, 1])")
    group.add_argument("--N", type=positive_int, default=100, help="test images drawn; the misclassified get no radius")
    group.add_argument("--p", type=norm_value, default=2.0, help="norm of the perturbation: 1, 2 or inf")
    group.add_argument("--untargeted", action="store_true", help="against all other classes instead of one target")
    group.add_argument(
        "--target",
        type=target_choice,
        metavar="{random,runnerup,least,K}",
        help="class to keep away from: a random one, the one with the highest or the lowest logit besides the label, "
        "or class K (default: random)",
    )
    group.add_argument("--per-frame", action="store_true", help="a radius for every single frame, the others exact")
    group.add_argument("--frames", type=non_negative_int, nargs="+", help="perturb only these frames (0: the top one)")
    group.add_argument(
        "--ball", choices=tuple(BALLS), default="frame", help="a ball around every frame, or one around all"
    )
    group.add_argument("--clip", action="store_true", help="perturbed pixels stay in [0, 1] (only for --p inf)")
    group = parser.add_argument_group("how")
    group.add_argument(
        "--method",
        choices=tuple(METHODS),
        default="crown",
        help="bounds: backward, interval, or both; ball: layers as l_2 balls (not for recurrent networks); alpha: "
        "backward, slopes tuned to each image (10 times the time); curve: curved bounds too, tuned (100 times and "
        "more); bab: each target by itself, up to --time-limit",
    )
    add_effort_arguments(group)
    if architecture != "rnn":
        group.add_argument(
            "--relaxation",
            choices=tuple(RELAXATIONS),
            help="bounds of the gates' products: planes with contracting slopes or of least volume, lines, constants "
            "(default: plane)",
        )
    group.add_argument("--eps0", type=positive_float, help="first eps of the search (default: from the gradient)")
    group.add_argument("--tol", type=relative_tolerance, default=1e-3, help="relative width of the final bracket")
    group.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="precision of the verdict")
    group.add_argument(
        "--batch-size", type=positive_int, help="images bounded and written at a time (default: 20, on a GPU 500)"
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
    group.add_argument(
        "--save-certificate",
        action="store_true",
        help="write a file for every radius that scripts/check_certificate.py can confirm by itself; bounds of tuned "
        "methods, alpha, curve and bab, are tuned anew for it",
    )
    add_common_arguments(parser)


def add_effort_arguments(group) -> None:
    """Flags for how much time the tuned methods may take; None where they are left out, see ``fill_in``."""
    group.add_argument(
        "--alpha-steps", type=positive_int, help=f"gradient steps of --method ball or alpha (default: {ALPHA_STEPS})"
    )
    group.add_argument(
        "--curve-steps",
        type=non_negative_int,
        help=f"gradient steps of --method curve, after alpha (default: {CURVE_STEPS})",
    )
    group.add_argument(
        "--time-limit", type=positive_float, help=f"seconds an image of --method bab (default: {TIME_LIMIT:g})"
    )


def fill_in(args: argparse.Namespace, methods: Sequence[str], flag: str = "--method") -> None:
    """Give flags that were left out their values. Raise ValueError if one was given that no method makes use of."""
    for name, (default, users) in OF_METHODS.items():
        if getattr(args, name, None) is not None and not set(methods) & set(users):
            given, wanted = name.replace("_", "-"), ", ".join(users)
            raise ValueError(f"--{given} has no effect with {flag} {' '.join(methods)}: it is for {wanted}")
        if hasattr(args, name) and getattr(args, name) is None:
            setattr(args, name, default)


def refuse_balls(methods: Sequence[str], flag: str = "--method") -> None:
    """Raise ValueError if a method is for feed-forward networks only: those of the scripts are recurrent."""
    if "ball" in methods:
        raise ValueError(f"{flag} ball is for feed-forward networks: norms of recurrent cells multiply step by step")


def target_choice(text: str) -> str | int:
    """argparse type: a way to choose the target, or a class number."""
    return text if text in TARGETS else non_negative_int(text)


def relative_tolerance(text: str) -> float:
    """argparse type: a number between 0 and 1."""
    value = positive_float(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError if flags contradict each other or the data set."""
    if args.untargeted and args.target is not None:
        raise ValueError("--untargeted contradicts --target: leave out one of them")
    if not args.untargeted and args.target is None:
        args.target = "random"
    if args.per_frame and args.frames:
        raise ValueError("--per-frame bounds every frame by itself: leave out --frames")
    if getattr(args, "ball", "frame") == "sequence" and (args.per_frame or len(set(args.frames or (0, 1))) == 1):
        raise ValueError("--ball sequence is one ball around several frames: of one frame it is the same without")
    if hasattr(args, "method"):
        refuse_balls([args.method])
        fill_in(args, [args.method])
    if args.clip and args.p != math.inf:
        raise ValueError("--clip cuts l_inf boxes: it needs --p inf")
    if args.frames:
        args.frames = sorted(set(args.frames))
        if args.frames[-1] >= args.time_step:
            raise ValueError(f"--frames must be from 0 to {args.time_step - 1}, not {args.frames[-1]}")


def result_folder_name(args: argparse.Namespace) -> str:
    """Name of the result folder: 2_norm_bound for p = 2 and all defaults, and a word for everything that differs.

    In this order: untargeted, or target_runnerup, target_least, target_K; per_frame, or frames_0_3; sequence (the
    ball); clip; the method (ibp, crown-ibp, alpha, curve, bab); the relaxation (line, constant). Number of images,
    seed, tolerance, steps, time and precision have no word: a new run with others replaces the earlier one.
    """
    words = [f"{args.p:g}_norm_bound"]
    words += ["untargeted"] * args.untargeted
    words += [f"target_{args.target}"] * (args.target not in (None, "random"))
    words += ["per_frame"] * args.per_frame
    words += ["_".join(map(str, ["frames", *args.frames]))] if args.frames else []
    words += [args.ball] * (args.ball != "frame")
    words += ["clip"] * args.clip
    words += [args.method] * (args.method != "crown")
    words += [relaxation_of(args)] * (relaxation_of(args) != "plane")
    return "_".join(words)


def relaxation_of(args: argparse.Namespace) -> str:
    """--relaxation; "plane" where it is left out or a script has no such flag."""
    return getattr(args, "relaxation", None) or "plane"
