"""The flags of a lipschitz script, and where its results go."""

from __future__ import annotations

import argparse

from ..choices.method import CHAINS, DIRECT_METHODS, DIRECTIONS
from ..runs.cli import add_common_arguments, finite, positive_int
from .arguments import add_folder_arguments, add_goal_arguments, add_result_arguments

IMAGES, BATCH = 10, 10


def add_lipschitz_arguments(parser: argparse.ArgumentParser, model_group, architecture: str) -> None:
    """Flags of a lipschitz script besides those that describe the model, and the common ones."""
    add_folder_arguments(model_group, architecture)
    group = parser.add_argument_group("of what (eps is in pixel values, which lie in [0, 1])")
    add_goal_arguments(group, images=IMAGES, clip=False)
    group.add_argument("--logit", action="store_true", help="the label's logit in place of margins")
    group.add_argument("--log-start", type=finite, default=-3.0, help="the smallest eps is 10 to this power")
    group.add_argument("--log-end", type=finite, default=0.0, help="the largest eps is 10 to this power")
    group.add_argument("--points", type=positive_int, default=20, help="values of eps, evenly spaced in the logarithm")
    group = parser.add_argument_group("how")
    group.add_argument(
        "--chains", choices=CHAINS, nargs="+", default=["joint", "chord", "recurjac"], help="bounds of gradients"
    )
    group.add_argument("--layer-method", choices=DIRECT_METHODS, default="crown", help="what bounds the layers")
    group.add_argument(
        "--direction",
        choices=DIRECTIONS,
        default="backward",
        help="both: gradients are followed from the input on as well (slow)",
    )
    group.add_argument("--samples", type=positive_int, default=100, help="gradients sampled in each ball")
    group.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="precision")
    group.add_argument("--batch-size", type=positive_int, default=BATCH, help="images at a time")
    add_result_arguments(group)
    add_common_arguments(parser)
    parser.set_defaults(frames=None, per_frame=False, ball="frame", clip=False)


def radii(args: argparse.Namespace) -> list[float]:
    """The values of eps. Raises ValueError if the ends are in the wrong order."""
    if not args.log_start <= args.log_end:
        raise ValueError(f"--log-start {args.log_start:g} is above --log-end {args.log_end:g}")
    step = (args.log_end - args.log_start) / max(1, args.points - 1)
    return [10.0 ** (args.log_start + k * step) for k in range(args.points)]


def describe_function(args: argparse.Namespace) -> str:
    """Of which function of the outputs the constants are, in words."""
    if args.logit:
        return "the label's logit"
    if args.target is None:
        return "the steepest of the margins"
    kinds = {"random": "a random class", "runnerup": "the class of the next logit", "least": "that of the lowest logit"}
    return f"the margin above {kinds.get(args.target, f'class {args.target}')}"


def lipschitz_folder_name(args: argparse.Namespace) -> str:
    """2_norm_lipschitz, a word for whatever is not as usual, the chains and what bounds the layers."""
    words = [f"{args.p:g}_norm_lipschitz"] + ["logit"] * args.logit + ["untargeted"] * (args.target is None)
    words += [f"target_{args.target}"] * (args.target not in (None, "random"))
    words += [*args.chains, args.layer_method] + [args.direction] * (args.direction != "backward")
    return "_".join(word for n, word in enumerate(words) if not (args.logit and word == "untargeted"))
