"""The flags of a bound script, whether they fit each other and the checkpoint, and where the results go."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ..choices.method import (
    ALPHA_STEPS,
    CERTIFIED_METHODS,
    CHAINS,
    CURVE_STEPS,
    CURVED_METHODS,
    DIRECT_METHODS,
    GRADIENT_METHODS,
    OF_ANY_SET,
    SHELLS,
    TIME_LIMIT,
    WITH_SLOPES,
    Method,
)
from ..choices.tables import BALLS, METHODS, RELAXATIONS
from ..runs.cli import (
    ROOT,
    add_common_arguments,
    finite,
    non_negative_int,
    norm_or_count,
    norm_value,
    positive_float,
    positive_int,
)

TARGETS = ("random", "runnerup", "least")
# Flags that have an effect with some methods only: their values if they are left out, and these methods.
OF_METHODS = {
    "relaxation": ("plane", tuple(name for name in METHODS if name not in ("ibp", "ball", "parabola", "spectral"))),
    "alpha_steps": (ALPHA_STEPS, WITH_SLOPES),
    "curve_steps": (CURVE_STEPS, CURVED_METHODS),
    "time_limit": (TIME_LIMIT, ("bab",)),
    "chain": (CHAINS[0], GRADIENT_METHODS),
    "layer_method": ("crown", GRADIENT_METHODS),
    "lipsteps": (SHELLS, GRADIENT_METHODS),
}


def add_bound_arguments(parser: argparse.ArgumentParser, architecture: str, hidden_size: int, time_step: int) -> None:
    """Add the flags of a bound script, with the given defaults, and the common ones; gated cells get one more."""
    group = parser.add_argument_group("model (the checkpoint must agree)")
    add_model_arguments(group, architecture, hidden_size, time_step)
    group = parser.add_argument_group("what is certified (eps and radii are in pixel values, which lie in [0, 1])")
    add_goal_arguments(group, together=("frame",))
    group.add_argument("--per-frame", action="store_true", help="a radius for every single frame, the others exact")
    group.add_argument("--frames", type=non_negative_int, nargs="+", help="perturb only these frames (0: the top one)")
    group.add_argument(
        "--ball", choices=tuple(BALLS), default="frame", help="a ball around every frame, or one around all"
    )
    group = parser.add_argument_group("how")
    add_method_arguments(group)
    if architecture != "rnn":
        group.add_argument(
            "--relaxation",
            choices=tuple(RELAXATIONS),
            help="bounds of the gates' products: planes with contracting slopes or of least volume, lines, constants "
            "(default: plane)",
        )
    add_search_arguments(group)
    group.add_argument(
        "--save-certificate",
        action="store_true",
        help="write a file for every radius that scripts/check_certificate.py can confirm by itself; bounds of tuned "
        "methods, alpha, curve and bab, are tuned anew for it",
    )
    add_common_arguments(parser)


def add_model_arguments(group, architecture: str, hidden_size: int, time_step: int) -> None:
    """Flags that say which recurrent model."""
    add_folder_arguments(group, architecture)
    add_stack_arguments(group, hidden_size, time_step)


def add_stack_arguments(group, hidden_size: int, time_step: int) -> None:
    """Flags for the size and kind of a recurrent model."""
    group.add_argument("--hidden-size", type=positive_int, default=hidden_size, help="size of the hidden state")
    group.add_argument("--time-step", type=positive_int, default=time_step, help="frames an image is cut into")
    group.add_argument("--num-layers", type=positive_int, default=1, help="recurrent layers on top of each other")
    group.add_argument("--bidirectional", action="store_true", help="frames are read in both directions")
    group.add_argument("--pooling", choices=("last", "mean"), default="last", help="what the head reads")
    add_trained_argument(group)


def add_trained_argument(group) -> None:
    """--recipe."""
    group.add_argument(
        "--recipe", metavar="NAME", help="of a model from certified training: the end of its folder's name, ibp_inf_0.1"
    )


def add_folder_arguments(group, architecture: str) -> None:
    """Where the checkpoint lies."""
    group.add_argument(
        "--work-dir", type=Path, default=ROOT / "models" / "mnist_classifier", help="folder of the model folders"
    )
    group.add_argument("--model-name", default=architecture, help="name of the checkpoint in its model folder")


def add_goal_arguments(group, images: int = 100, clip: bool = True, together: Sequence[str] = ()) -> None:
    """Flags for the images, the ball and the classes to keep away from; ``together``: what may be one change."""
    group.add_argument(
        "--N", type=positive_int, default=images, help="test images drawn; the misclassified get no radius"
    )
    add_norm_arguments(group, together) if clip else _add_norm(group, norm_value, "1, 2 or inf")
    group.add_argument("--untargeted", action="store_true", help="against all other classes instead of one target")
    group.add_argument(
        "--target",
        type=target_choice,
        metavar="{random,runnerup,least,K}",
        help="class to keep away from: a random one, the one with the highest or the lowest logit besides the label, "
        "or class K (default: random)",
    )
    if clip:
        group.add_argument("--clip", action="store_true", help="perturbed pixels stay in [0, 1]")


def _add_norm(group, kind: Callable[[str], float], known: str) -> None:
    group.add_argument("--p", type=kind, default=2.0, help=f"norm of the perturbation: {known}")


def add_norm_arguments(group, together: Sequence[str] = ()) -> None:
    """--p, 0 among the norms, and what belongs to that."""
    _add_norm(group, norm_or_count, "1, 2 or inf; 0 counts the values that change, to anything in the valid range")
    group.add_argument(
        "--k", type=positive_int, help="with --p 0: certify at this many changes, and fewer where that fails"
    )
    if together:
        what = {"pixel": "all channels of a pixel", "frame": "a whole frame, with --ball sequence"}
        listed = ", ".join(f"{name}: {what[name]}" for name in together)
        group.add_argument(
            "--together", choices=tuple(together), help=f"with --p 0: what counts as one change; {listed}"
        )


def add_method_arguments(group) -> None:
    """--method and what belongs to some methods."""
    group.add_argument(
        "--method",
        choices=tuple(METHODS),
        default="crown",
        help="bounds: backward, interval, or both; alpha: backward, slopes tuned to each image (10 times the time); "
        "curve: curved bounds too, tuned (100 times and more); bab: each target by itself, up to --time-limit; "
        "ball: layers as l_2 balls (not for recurrent networks); fastlin: parallel lines (relu); parabola: one hidden "
        "layer of relu; spectral: products of norms; jacobian: bounds of gradients, integrated; shell: these and "
        "--layer-method in turn",
    )
    add_effort_arguments(group)
    add_gradient_arguments(group)


def add_search_arguments(group) -> None:
    """How a radius is searched, and where rows go."""
    group.add_argument("--eps0", type=positive_float, help="first eps of the search (default: from the gradient)")
    group.add_argument("--tol", type=relative_tolerance, default=1e-3, help="relative width of the final bracket")
    group.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="precision of the verdict")
    group.add_argument(
        "--batch-size", type=positive_int, help="images bounded and written at a time (default: 20, on a GPU 500)"
    )
    add_result_arguments(group)


def add_result_arguments(group) -> None:
    """--out-dir, --resume and --overwrite."""
    group.add_argument(
        "--out-dir", type=Path, metavar="FOLDER", help="folder of the results (default: beside the checkpoint)"
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run of the same arguments; --N may be larger than it was",
    )
    group.add_argument("--overwrite", action="store_true", help="replace results of another run in the folder")


def method_of(args: argparse.Namespace) -> Method:
    """The method that the flags describe, once they are checked."""
    effort = {name: getattr(args, name) for name in ("alpha_steps", "curve_steps", "time_limit", "chain")}
    return Method(args.method, relaxation_of(args), layers=args.layer_method, shells=args.lipsteps, **effort)


def add_effort_arguments(group) -> None:
    """Flags for how much time the tuned methods may take; None where they are left out, see ``fill_in``."""
    group.add_argument(
        "--alpha-steps", type=positive_int, help=f"gradient steps of --method ball or alpha (default: {ALPHA_STEPS})"
    )
    group.add_argument(
        "--curve-steps",
        type=non_negative_int,
        help=f"gradient steps of --method curve (default: {CURVE_STEPS})",
    )
    group.add_argument(
        "--time-limit",
        type=positive_float,
        help=f"seconds an image of --method bab, from its start, alpha and curve included (default: {TIME_LIMIT:g})",
    )


def add_gradient_arguments(group) -> None:
    """Flags of methods that bound gradients; None where they are left out, see ``fill_in``."""
    group.add_argument("--chain", choices=CHAINS, help=f"how --method jacobian bounds gradients (default: {CHAINS[0]})")
    group.add_argument(
        "--layer-method", choices=DIRECT_METHODS, help="what bounds layers for --method jacobian (default: crown)"
    )
    group.add_argument(
        "--lipsteps",
        type=positive_int,
        help=f"shells of a ball in which --method jacobian bounds gradients (default: {SHELLS})",
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
    if getattr(args, "per_frame", False) and args.frames:
        raise ValueError("--per-frame bounds every frame by itself: leave out --frames")
    if getattr(args, "ball", "frame") == "sequence" and (args.per_frame or len(set(args.frames or (0, 1))) == 1):
        raise ValueError("--ball sequence is one ball around several frames: of one frame it is the same without")
    if hasattr(args, "method"):
        if hasattr(args, "hidden_size"):
            refuse_balls([args.method])
        fill_in(args, [args.method])
    if getattr(args, "save_certificate", False) and args.method not in CERTIFIED_METHODS:
        raise ValueError(f"--save-certificate is for --method {', '.join(CERTIFIED_METHODS)}, not {args.method}")
    check_norm(args)
    if getattr(args, "frames", None):
        args.frames = sorted(set(args.frames))
        if args.frames[-1] >= args.time_step:
            raise ValueError(f"--frames must be from 0 to {args.time_step - 1}, not {args.frames[-1]}")


def check_norm(args: argparse.Namespace) -> None:
    """Raise ValueError if --p, --clip and what belongs to --p 0 contradict each other or the method."""
    given = {"--k": getattr(args, "k", None), "--together": getattr(args, "together", None)}
    if args.p == 0.0:
        if args.clip is True:
            raise ValueError("--p 0 lets values change to anything in [0, 1] as it is: leave out --clip")
        if getattr(args, "method", "crown") not in OF_ANY_SET:
            raise ValueError(f"--p 0 is for --method {', '.join(OF_ANY_SET)}, not {args.method}")
        if getattr(args, "eps0", None) is not None:
            raise ValueError("--eps0 is a radius: with --p 0 give --k")
        if given["--together"] == "frame" and args.ball != "sequence":
            raise ValueError("--together frame counts frames of the whole sequence: it needs --ball sequence")
    elif any(given.values()):
        flag = next(flag for flag, value in given.items() if value)
        raise ValueError(f"{flag} is about numbers of changes: it needs --p 0")
    if getattr(args, "save_certificate", False) and (args.p == 0.0 or (args.clip and args.p != math.inf)):
        raise ValueError("--save-certificate knows balls and, with --p inf, cut boxes: leave out --p 0 and --clip")


def valid_range(args: argparse.Namespace) -> tuple[float, float] | None:
    """The range in which perturbed pixels stay: [0, 1] with --clip, and where they change to anything; else None."""
    if isinstance(args.clip, (tuple, list)):
        return tuple(args.clip)
    return (0.0, 1.0) if args.clip or args.p == 0.0 else None


def add_clip_argument(group) -> None:
    """Add --clip for pixels, or --clip LOW HIGH for a user's own data; ``settle_clip`` makes it what others have."""
    group.add_argument(
        "--clip",
        type=finite,
        nargs="*",
        metavar="LOW HIGH",
        help="perturbed pixels stay in [0, 1], values of your own --data in [LOW, HIGH]",
    )


def settle_clip(args: argparse.Namespace) -> None:
    """True for --clip alone, False without, (LOW, HIGH) if given. Raises ValueError if they do not fit."""
    given = args.clip
    args.clip = given is not None if not given else tuple(given)
    if given and (len(given) != 2 or not given[0] < given[1]):
        raise ValueError(f"--clip takes LOW and HIGH, or nothing for [0, 1], not {' '.join(f'{v:g}' for v in given)}")
    if given and not getattr(args, "data", None):
        raise ValueError("--clip LOW HIGH is for your own --data: pixels lie in [0, 1], so --clip is enough")
    if getattr(args, "p", None) == 0.0 and getattr(args, "data", None) and not given:
        raise ValueError("--p 0 lets values of your --data change to anything in a range: give --clip LOW HIGH")


def result_folder_name(args: argparse.Namespace) -> str:
    """Name of the result folder: 2_norm_bound_crown for p = 2 and all defaults, and a word for all that differs.

    In this order: untargeted, or target_runnerup, target_least, target_K; per_frame, or frames_0_3; sequence (the
    ball); clip; k_5; pixels or frames, where these change together; always the method (crown, ibp, jacobian, ...) and,
    of gradients, what bounds them and the layers; the relaxation (plane, line, constant) of cells with gates. Number of
    images, seed, tolerance, steps, time and precision have no word: a new run with others replaces the earlier one.
    """
    words = [f"{args.p:g}_norm_bound"]
    words += ["untargeted"] * args.untargeted
    words += [f"target_{args.target}"] * (args.target not in (None, "random"))
    words += ["per_frame"] * args.per_frame
    words += ["_".join(map(str, ["frames", *args.frames]))] if args.frames else []
    words += [args.ball] * (args.ball != "frame")
    words += ["clip"] * args.clip
    words += [f"k_{args.k}"] if getattr(args, "k", None) else []
    words += [f"{args.together}s"] if getattr(args, "together", None) else []
    words += [args.method]
    words += [args.chain, args.layer_method] if args.method in GRADIENT_METHODS else []
    words += [relaxation_of(args)] if relaxes_products(args) else []
    return "_".join(words)


def result_folder(args: argparse.Namespace, beside: Path, name: str) -> Path:
    """--out-dir, or the folder of that name beside a checkpoint.

    Folders had no words for the defaults once: --resume goes on in such a one if there is none of the new name.
    """
    former = beside / "_".join(word for word in name.split("_") if word not in FORMERLY_UNNAMED)
    is_former = args.resume and former.exists() and not (beside / name).exists()
    return args.out_dir or (former if is_former else beside / name)


FORMERLY_UNNAMED = {"crown", "plane", "chord"}


def relaxes_products(args: argparse.Namespace) -> bool:
    """Whether there are products of gates, and the method bounds them by planes, lines or constants."""
    return hasattr(args, "relaxation") and args.method in OF_METHODS["relaxation"][1]


def relaxation_of(args: argparse.Namespace) -> str:
    """--relaxation; "plane" where it is left out or a script has no such flag."""
    return getattr(args, "relaxation", None) or "plane"
