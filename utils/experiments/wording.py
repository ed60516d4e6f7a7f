"""What a bound script's arguments certify, in words."""

from __future__ import annotations

import argparse

from data.mnist import SIDE

from ..choices.method import GRADIENT_METHODS
from .arguments import relaxation_of, relaxes_products

UNIT = "pixel values, which lie in [0, 1]"
OWN_UNIT = "units of the data"
CHANGES = "numbers of changes"
RELAXED = {"plane": "planes", "volume": "planes of least volume", "line": "lines", "constant": "constants"}


def describe_threat(args: argparse.Namespace) -> str:
    """What may be done to an image, in words."""
    if args.p == 0.0:
        return _describe_changes(args)
    rows, norm = SIDE // args.time_step, f"l_{args.p:g}"
    band, each = f" ({rows} rows, {rows * SIDE} pixels)", f" ({rows} rows, {rows * SIDE} pixels each)"
    band, each = ("", "") if is_own(args) else (band, each)
    moved = args.time_step if args.frames is None else len(args.frames)
    listed = f"all {args.time_step} frames"
    if args.frames is not None:
        listed = f"frames {', '.join(map(str, args.frames))} of {args.time_step}"
    if args.time_step == 1:
        text = f"the {'input' if is_own(args) else 'image'} moves by at most eps in the {norm} norm"
    elif args.per_frame:
        text = f"one of {args.time_step} frames{band} moves by at most eps in the {norm} norm, the others are exact"
    elif args.ball == "sequence":
        text = f"{listed}{each} together move by at most eps in the {norm} norm"
    else:
        every = "at most the same eps" if moved > 1 else "at most eps"
        text = f"{listed}{each} move, each by {every} in the {norm} norm"
    return text + (f"; {clip_text(args)}" if args.clip else "")


def is_own(args: argparse.Namespace) -> bool:
    """Whether a run is about a user's own data."""
    return bool(getattr(args, "data", None))


def clip_text(args: argparse.Namespace) -> str:
    """Where perturbed values stay; "" where nothing keeps them."""
    if not args.clip:
        return ""
    low, high = (0, 1) if args.clip is True else args.clip
    return f"{'values' if is_own(args) else 'pixels'} stay in [{low:g}, {high:g}]"


def noun_of(args: argparse.Namespace) -> str:
    """What a run is about."""
    return "inputs" if is_own(args) else "images"


def short_unit(args: argparse.Namespace) -> str:
    """What radii are in, for the axis of a figure."""
    return OWN_UNIT if is_own(args) else "pixel values"


def drawn_text(arguments: dict, source: str) -> str:
    """Which inputs a run is about, by its arguments."""
    if arguments.get("data"):
        return f"the first {arguments['N']} inputs of {source}"
    return f"test images of {source}: {arguments['N']} drawn with seed {arguments['seed']}"


def unit_of(args: argparse.Namespace) -> str:
    """What eps and radii are in."""
    return CHANGES if args.p == 0.0 else OWN_UNIT if is_own(args) else UNIT


def _describe_changes(args: argparse.Namespace) -> str:
    """What may be done to an image where p = 0, in words."""
    what = {None: "values", "pixel": "pixels, with all their channels,", "frame": "whole frames"}
    changed = what[getattr(args, "together", None)]
    if args.time_step == 1:
        place = "of the input" if is_own(args) else "of the image"
    elif args.per_frame:
        place = f"of one of {args.time_step} frames, the others are exact"
    else:
        listed = "" if args.frames is None else f" {', '.join(map(str, args.frames))}"
        moved = f"frames{listed} of {args.time_step}" if listed else f"all {args.time_step} frames"
        place = f"of {moved} together" if args.ball == "sequence" else f"of each of {moved}"
    low, high = args.clip if isinstance(args.clip, (tuple, list)) else (0, 1)
    return f"at most k {changed} {place} change to anything in [{low:g}, {high:g}]"


def describe_goal(args: argparse.Namespace) -> str:
    """What is certified, in words."""
    what = "input" if is_own(args) else "image"
    if args.untargeted:
        return f"no such {what} is classified differently"
    if isinstance(args.target, int):
        return f"no such {what} is classified as {args.target}"
    kind = {"random": "random", "runnerup": "highest logit besides the label", "least": "lowest logit"}[args.target]
    return f"no such {what} is classified as its target class ({kind})"


def describe_method(args: argparse.Namespace) -> str:
    """How it is bounded, in words: the method and the relaxation of gate products, where there are any."""
    planes = f", {RELAXED[relaxation_of(args)]}" if relaxes_products(args) else ""
    if args.method in GRADIENT_METHODS:
        kind = "bounds of gradients, integrated" if args.method == "jacobian" else "the shell rule"
        return f"{args.method}, {kind}: {args.chain} over {args.layer_method}, {args.lipsteps} shells{planes}"
    steps = {"alpha": f"{args.alpha_steps} steps", "curve": f"{args.curve_steps} steps"}
    steps["bab"] = f"up to {args.time_limit:g} s an image"
    effort = f" ({steps[args.method]})" if args.method in steps else ""
    return f"{args.method}{effort}{planes}"


def short_title(args: argparse.Namespace) -> str:
    """The threat model in a few words, for figures."""
    if args.untargeted:
        goal = "untargeted"
    else:
        goal = f"{args.target} target" if isinstance(args.target, str) else f"target {args.target}"
    if args.time_step == 1:
        return f"{goal}{', clipped' * args.clip}; {describe_method(args)}"
    if args.per_frame:
        place = "one frame at a time"
    else:
        place = "every frame" if args.frames is None else "frames " + ", ".join(map(str, args.frames))
        place = f"one ball around {place}" if args.ball == "sequence" else place
    return ", ".join([goal, place, *["clipped"] * args.clip]) + f"; {describe_method(args)}"
