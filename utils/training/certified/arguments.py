"""The flags of certified training, and the recipe that they make."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields

from ...choices.tables import BALLS
from ...runs.cli import json_value, non_negative_float, non_negative_int, norm_or_count, positive_float, positive_int
from ..arguments import PLAIN_DECAY, probability
from .recipe import LOSSES, Recipe

# Flags, by field of a recipe, that have an effect with some losses only.
OF_LOSSES = {
    "beta": ("crown-ibp",),
    "fusion": ("crown-ibp", "crown"),
    "box": ("sabr",),
    "alpha": ("mtl-ibp",),
    "attack_steps": ("sabr", "mtl-ibp"),
}
FLAGS = {"eps": "train-eps", "clean": "clean-share", "ramp": "ramp-share", "smooth": "smooth-ramp"}
FLAGS |= {"fusion": "loss-fusion", "box": "small-box", "alpha": "mtl-alpha"}


def add_certified_arguments(parser: argparse.ArgumentParser, of_sequences: bool = True) -> None:
    """Add --certified and what belongs to it, frames only of sequences; None where a flag is left out."""
    group = parser.add_argument_group("certified training (eps is in the units of the inputs)")
    group.add_argument(
        "--certified",
        choices=LOSSES,
        help="train for a bound of the worst loss in a ball: intervals (ibp), backward bounds (crown-ibp, crown), "
        "intervals over a small box around an attack's point (sabr), or mixed with an attack's loss (mtl-ibp)",
    )
    group.add_argument("--train-eps", type=positive_float, help="radius of the balls to be certified")
    group.add_argument(
        "--p", type=norm_or_count, help="norm of the balls: 1, 2 or inf; 0: --train-eps values change (default: inf)"
    )
    if of_sequences:
        _add_sequence_arguments(group)
    group.add_argument("--clip", action="store_true", default=None, help="balls are cut to [0, 1]")
    group.add_argument("--overshoot", type=positive_float, help="the balls grow to this times --train-eps")
    group.add_argument("--clean-share", type=probability, help="share of the steps before the balls begin to grow")
    group.add_argument("--ramp-share", type=non_negative_float, help="share of the steps after which they are full")
    group.add_argument("--falls", type=positive_int, help="how often the learning rate falls after that (default: 1)")
    group.add_argument("--smooth-ramp", action="store_true", default=None, help="they begin to grow slowly")
    pair = {"type": non_negative_float, "nargs": 2, "metavar": ("FIRST", "LAST")}
    group.add_argument("--kappa", help="share of the clean loss when the ramp begins, and once it is over", **pair)
    group.add_argument("--beta", help="likewise of backward bounds against intervals, of crown-ibp", **pair)
    group.add_argument("--loss-fusion", action="store_true", default=None, help="one row bounds the whole loss")
    group.add_argument("--small-box", type=positive_float, help="radius of sabr's boxes, as a share of the ball's")
    group.add_argument("--mtl-alpha", type=positive_float, help="share of the interval loss in mtl-ibp")
    group.add_argument("--attack-steps", type=positive_int, help="gradient steps to the points of sabr and mtl-ibp")
    group.add_argument("--tightness", type=non_negative_float, help="weight of a penalty on boxes that grow")
    group.add_argument(
        "--hidden-shift",
        type=non_negative_float,
        help="what every unit of a recurrent layer hands on to the next one, at the start (0: nothing)",
    )
    group.add_argument(
        "--input-rate",
        type=positive_float,
        help="learning rate of recurrent weights that meet the input, as a multiple of --lr",
    )
    group.add_argument("--adam-beta2", type=probability, help="share of the mean of squared gradients that Adam keeps")
    group.add_argument(
        "--held-back",
        type=positive_int,
        help="training images kept for the training curve, on which choices can be made (default: 5000)",
    )


def _add_sequence_arguments(group) -> None:
    group.add_argument(
        "--ball", choices=tuple(BALLS), help="a ball around every frame (the default), or one around all"
    )
    group.add_argument("--frames", type=non_negative_int, nargs="+", help="frames that are perturbed (default: all)")
    group.add_argument(
        "--input-penalty",
        type=non_negative_float,
        help="weight of the sum of the dual norms of all rows of weights that meet the input",
    )
    group.add_argument("--hidden-scale", type=non_negative_float, help="factor of the initial W_hh of recurrent layers")


def recipe_of(args: argparse.Namespace, frames: int, **defaults: object) -> Recipe | None:
    """The recipe of the flags, None for plain training of sequences of so many frames.

    What no flag says is as in ``defaults``, else the recipe's own.

    Raises:
        ValueError: flags contradict each other, or have no effect.
    """
    given = {field.name: getattr(args, _dest(field.name), None) for field in fields(Recipe) if field.name != "loss"}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    told = {name: value for name, value in given.items() if value is not None}
    if args.weight_decay is None:
        args.weight_decay = PLAIN_DECAY if args.certified is None else 0.0
    if args.certified is None:
        wanted = [*told, *(["held_back"] if args.held_back else [])]
        if wanted:
            raise ValueError(f"{_flag(wanted[0])} is for certified training: give --certified too")
        return None
    if "eps" not in told:
        raise ValueError("--certified needs --train-eps, the radius of the balls to be certified")
    for name, losses in OF_LOSSES.items():
        if name in told and args.certified not in losses:
            raise ValueError(f"{_flag(name)} has no effect with --certified {args.certified}: it is for {losses[0]}")
    recipe = Recipe(args.certified, **defaults | told)
    if recipe.p == 0.0 and (recipe.clip or recipe.loss in OF_LOSSES["attack_steps"]):
        reason = "is for other losses" if recipe.loss in OF_LOSSES["attack_steps"] else "lets values change as it is"
        raise ValueError(f"--p 0 {reason}: leave out --clip, and take --certified ibp, crown-ibp or crown")
    if recipe.p == 0.0 and recipe.eps != round(recipe.eps):
        raise ValueError(f"--p 0 counts the values that change: --train-eps must be a whole number, not {recipe.eps:g}")
    if recipe.frames is not None and max(recipe.frames) >= frames:
        raise ValueError(f"--frames must be from 0 to {frames - 1}, not {max(recipe.frames)}")
    args.held_back = args.held_back or 5000
    return recipe


def recipe_facts(recipe: Recipe) -> dict[str, object]:
    """What a checkpoint's config says of a recipe: its name in folders, and all of it."""
    facts = {name: json_value(value) for name, value in asdict(recipe).items()}
    facts["train_eps"] = facts.pop("eps")
    return {"recipe": recipe_name(recipe), "certified": facts}


def recipe_name(recipe: Recipe) -> str:
    """ibp_inf_0.1, and a word for another ball, for frames and for cut boxes."""
    words = [recipe.loss, f"{recipe.p:g}", f"{recipe.eps:g}"]
    words += [recipe.ball] * (recipe.ball != "frame")
    words += ["_".join(map(str, ("frames", *recipe.frames)))] if recipe.frames else []
    return "_".join([*words, *["clip"] * recipe.clip])


def _flag(field: str) -> str:
    return "--" + FLAGS.get(field, field).replace("_", "-")


def _dest(field: str) -> str:
    return FLAGS.get(field, field).replace("-", "_")
