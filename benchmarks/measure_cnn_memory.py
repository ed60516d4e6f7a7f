"""Memory and time of bounds of large convolutional networks, and of training steps over many classes.

    python benchmarks/measure_cnn_memory.py                        # CROWN-IBP of 8 images of CIFAR-10's size
    python benchmarks/measure_cnn_memory.py --models resnet --width 4 --methods ibp crown-ibp crown
    python benchmarks/measure_cnn_memory.py --training             # loss fusion over 200 and 1,000 classes

Weights are random, images noise; normalisation has the statistics of the noise. "tensors" is the most that the tensors
of a call hold at once, beside weights and inputs, counted operation by operation: the same on every machine. "process"
is how much the process grew, which takes what its allocator keeps. A bound above the margin at a point that an attack
finds would stop the script. Of a training step the memory of one image is the difference between two batch sizes; the
rest, "fixed", is that of the weights: their gradients, and what is made of them alone. Its time is that of the larger
step, divided.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.choices.tables import CNN_WIDTHS
from utils.runs.cli import ArgumentParser, ContradictionError, answer_early, positive_float, positive_int, run_main

METHODS = ("ibp", "crown-ibp", "crown")
LOSSES = ("ibp", "crown-ibp")  # the second with one row for all classes
TASKS = {"TinyImageNet": (64, 200), "ImageNet 64": (64, 1000), "ImageNet 32": (32, 1000)}


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=tuple(CNN_WIDTHS), help="kinds of networks")
    parser.add_argument("--width", type=positive_int, help="channels of the first layers (default: the kind's own)")
    parser.add_argument("--batch-size", type=positive_int, help="images (default: 8, of a step 2 and twice as many)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["crown-ibp"], help="bounds")
    parser.add_argument("--eps", type=positive_float, default=1e-5, help="l_inf radius, in pixel values")
    parser.add_argument("--training", action="store_true", help="training steps in place of bounds")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="of training steps")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), help="images and classes")
    args = parser.parse_args()
    args.models = args.models or (["cnn7"] if args.training else ["densenet", "resnext", "wide_resnet"])
    args.batch_size = args.batch_size or (2 if args.training else 8)
    return args


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from torch import Tensor, nn

from utils.attack.pgd import pgd
from utils.certify import MarginProblem
from utils.choices.method import Method
from utils.network.cnn import make_cnn
from utils.peak import Peak
from utils.question import Question, Threat
from utils.training.certified.objective import Certified
from utils.training.certified.recipe import Recipe
from utils.training.loop import Objective

MIB = 2**20


def network(kind: str, size: int, classes: int, width: int | None) -> nn.Module:
    """Random weights, statistics of noise."""
    torch.manual_seed(0)
    model = make_cnn(kind, 3, size, classes, width, mean=0.5, std=0.25)
    with torch.no_grad():
        model.train()(torch.rand(16, 3, size, size))
    return model.eval()


def measured(call: Callable[[], object]) -> tuple[object, float, float, float]:
    """What a call gives, its processor seconds, and MiB of its tensors and by which the process grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    found = call()
    seconds = time.process_time() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    with Peak() as peak:
        call()
    return found, seconds, peak.most / MIB, grown


def bound_line(kind: str, method: str, args: argparse.Namespace) -> str:
    """All margins of images bounded, and attacked. Raises ContradictionError if a margin is below its bound."""
    model = network(kind, 32, 10, args.width).requires_grad_(False)
    x = torch.rand(args.batch_size, 3, 32, 32)
    labels = model(x).argmax(dim=1)
    problem = MarginProblem(Question(model, x, labels, None, Threat(float("inf"))), Method(method))
    eps = torch.full((len(x),), args.eps)
    with torch.no_grad():
        margins, seconds, tensors, grown = measured(lambda: problem.margins(eps, torch.float32))
    worst, row = margins.min(dim=1)  # the class of the least bound is the one that is attacked
    targets = problem.rows.argmin(dim=2).gather(1, row[:, None])
    found = pgd(model, x, labels, args.eps, norm=float("inf"), targets=targets, steps=5, restarts=1, batch_size=4)
    if bool((worst > found.margin).any()) or not bool(margins.isfinite().all()):
        raise ContradictionError(f"{kind}, {method}: a bound of {worst.tolist()} above {found.margin.tolist()}")
    neurons = sum(node.size for node in problem.graph(torch.float32).nodes)
    cells = [kind, method, f"{sum(p.numel() for p in model.parameters())}", f"{neurons}", f"{seconds:.2f}"]
    cells += [f"{tensors:.0f}", f"{grown:.0f}", f"{worst.mean():.3g}", f"{found.margin.mean():.3g}"]
    return " | ".join(cells)


def step(model: nn.Module, objective: Objective, x: Tensor, y: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    objective.loss(model, x, y, 1.0).backward()


def step_line(kind: str, task: str, loss: str, args: argparse.Namespace) -> str:
    """A step of loss fusion, and a plain one, for an image and for the weights."""
    size, classes = TASKS[task]
    model = network(kind, size, classes, args.width).train()
    recipe = Recipe(loss, eps=1 / 255, fusion=loss != "ibp", beta=(1.0, 1.0), input_penalty=0.0)
    objectives, found = {"plain": Objective(), loss: Certified(recipe)}, {}
    for name, objective in objectives.items():
        for count in (args.batch_size, 2 * args.batch_size):
            x, y = torch.rand(count, 3, size, size), torch.randint(classes, (count,))
            step(model, objective, x, y)
            found[name, count] = measured(lambda objective=objective, x=x, y=y: step(model, objective, x, y))[1:3]
    few, many = args.batch_size, 2 * args.batch_size
    seconds, memory = {}, {}
    for name in objectives:
        (_, less), (duration, more) = found[name, few], found[name, many]
        seconds[name], memory[name] = duration / many, (more - less) / few
    fixed = found[loss, few][1] - few * memory[loss]
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
    cells = [kind, task, loss, f"{weights:.0f}", f"{fixed:.0f}", f"{memory['plain']:.1f}", f"{memory[loss]:.1f}"]
    cells += [f"{seconds['plain']:.3f}", f"{seconds[loss]:.3f}", f"{seconds[loss] / seconds['plain']:.1f}"]
    return " | ".join(cells)


def main() -> None:
    args = get_args()
    torch.set_num_threads(1)
    if args.training:
        print("model | images | loss | weights, MiB | fixed, MiB | an image: plain, MiB | certified, MiB", end="")
        print(" | plain, s | certified, s | ratio", flush=True)
        for kind in args.models:
            for task in args.tasks:
                for loss in args.losses:
                    print(step_line(kind, task, loss, args), flush=True)
        return
    print(f"{args.batch_size} images of 3 x 32 x 32, l_inf {args.eps:g}, float32, one thread")
    print("model | bound | weights | values | seconds | tensors, MiB | process, MiB | mean bound | mean under attack")
    for kind in args.models:
        for method in args.methods:
            print(bound_line(kind, method, args), flush=True)


if __name__ == "__main__":
    run_main(main)
