"""The images that get a radius, and the classes they must keep away from, drawn by a seed."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from data.mnist import ImageData, as_frames

from ..network.checkpoint import Classifier, Config
from ..perturbation.lp_ball import INF
from ..training.images.cnn import as_images

Form = Callable[[Tensor], Tensor]  # images, (n, 28, 28) or (n, 3, 32, 32), as a model takes them


def form_of(config: Config) -> Form:
    """How a model takes images: cut into frames, (n, T, values a frame), or whole, (n, channels, height, width)."""
    if config["architecture"] == "cnn":
        return as_images
    return partial(as_frames, num_frames=config.get("num_frames", 1))


@dataclass
class Samples:
    """The images that get a radius, (n, ...), in the order in which they were drawn.

    Attributes:
        index: their numbers in the test set.
        images: (n, 28, 28) or (n, 3, 32, 32) pixels in [0, 1].
        labels: their classes, which the model predicts.
        targets: classes to keep away from, or None for all others.
        counts: images drawn, left out because their label is the target, misclassified, and kept.
    """

    index: Tensor
    images: Tensor
    labels: Tensor
    targets: Tensor | None
    counts: dict[str, int]

    def frames(self, num_frames: int) -> Tensor:
        """(n, T, values a frame)"""
        return as_frames(self.images, num_frames)

    def as_bytes(self) -> list[bytes]:
        """The pixels of every image, by which a run knows them again."""
        pixels = (255 * self.images).round().to(torch.uint8).numpy()
        return [image.tobytes() for image in pixels]

    def where(self, chosen: Tensor) -> Samples:
        """Those for which ``chosen``, (n,) of bool, is true. Raises ValueError if there are none."""
        if not bool(chosen.any()):
            raise ValueError("nothing to certify: none of the images is chosen")
        targets = None if self.targets is None else self.targets[chosen]
        counts = self.counts | {"kept": int(chosen.sum())}
        return Samples(self.index[chosen], self.images[chosen], self.labels[chosen], targets, counts)


def draw_index(data: ImageData, args: argparse.Namespace) -> tuple[Tensor, torch.Generator]:
    """Numbers of --N test images in the order of the seed, and the generator that goes on from there.

    Raises:
        ValueError: there are too few images.
    """
    total = len(data.test_y)
    if total < args.N:
        raise ValueError(f"--N {args.N} is more than the {total} test images of {data.source}")
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randperm(total, generator=generator)[: args.N], generator


def random_targets(data: ImageData, index: Tensor, generator: torch.Generator) -> Tensor:
    """A random class besides the label for each image; ``generator`` comes from ``draw_index``."""
    # Drawn for the whole test set, so that an image's target does not depend on how many are drawn.
    offset = torch.randint(1, len(data.class_names), (len(data.test_y),), generator=generator)[index]
    return (data.test_y[index] + offset) % len(data.class_names)


def draw_samples(data: ImageData, model: Classifier, args: argparse.Namespace, form: Form | None = None) -> Samples:
    """Draw test images by the seed and keep those that have a target and are classified correctly.

    ``form`` is how the model takes images; without it they are cut into args.time_step frames.

    An image's turn and its random target depend on the seed alone, so runs with other norms, batch sizes or numbers
    of images are about the same ones.

    Raises:
        ValueError: there are too few images, no such target, or nothing is left.
    """
    index, generator = draw_index(data, args)
    num_classes = len(data.class_names)
    images, labels = data.test_x[index], data.test_y[index]
    with torch.no_grad():
        exact = copy.deepcopy(model).cpu().to(getattr(torch, args.dtype))
        x = as_frames(images, args.time_step) if form is None else form(images)
        logits = exact(x.to(next(exact.parameters()).dtype))
    if args.untargeted:
        targets = None
    elif isinstance(args.target, int):
        if args.target >= num_classes:
            raise ValueError(f"--target {args.target} is no class: there are 0 to {num_classes - 1}")
        targets = torch.full_like(labels, args.target)
    elif args.target == "random":
        targets = random_targets(data, index, generator)
    else:
        others = logits.clone()
        others[torch.arange(len(labels)), labels] = -INF if args.target == "runnerup" else INF
        targets = others.argmax(dim=1) if args.target == "runnerup" else others.argmin(dim=1)
    left_out = torch.zeros_like(labels, dtype=torch.bool) if targets is None else targets == labels
    wrong = ~left_out & (logits.argmax(dim=1) != labels)
    kept = ~left_out & ~wrong
    groups = {"left_out": left_out, "misclassified": wrong, "kept": kept}
    counts = {"drawn": args.N} | {name: int(group.sum()) for name, group in groups.items()}
    if not counts["kept"]:
        raise ValueError(f"nothing to certify: none of the {args.N} images is classified correctly and has a target")
    return Samples(index[kept], images[kept], labels[kept], None if targets is None else targets[kept], counts)
