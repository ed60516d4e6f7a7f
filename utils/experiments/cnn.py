"""What the bound script of convolutional networks needs besides what all share: its model, and an attack."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ..attack.attack_file import save_attack
from ..attack.pgd import attack_radius
from ..certify.problem import MarginProblem
from ..choices.tables import CNN_WIDTHS
from ..network.checkpoint import CheckpointError, Config, load_checkpoint, model_name
from ..network.cnn import ALWAYS_NORMALISED, ImageClassifier
from ..runs.cli import ContradictionError
from ..training.datasets import SHAPES, settle_folder


def load_cnn(args: argparse.Namespace, device: torch.device) -> tuple[ImageClassifier, Config, Path]:
    """The model that the flags describe, its config and its path. Raises CheckpointError if there is none like it."""
    settle_folder(args, "work_dir")
    described = {"architecture": "cnn", "kind": args.model, "width": args.width or CNN_WIDTHS[args.model]}
    described["batch_norm"] = args.batch_norm
    path = args.work_dir / model_name(described | {"recipe": args.recipe}) / args.model_name
    model, config = load_checkpoint(path, device)
    for key, value in described.items():
        always = key == "batch_norm" and args.model in ALWAYS_NORMALISED
        if config.get(key) != value and not always:
            raise CheckpointError(f"{path} holds a model with {key} = {config.get(key)}, not {value}")
    if (config["channels"], config["size"]) != SHAPES[args.dataset][:2] or config["num_classes"] != 10:
        size = f"{config['channels']} x {config['size']} x {config['size']} values, {config['num_classes']} classes"
        raise CheckpointError(f"{path} is no classifier of {args.dataset}: it takes {size}")
    return model, config, path


def attacked(problem: MarginProblem, images: Tensor, certified: Tensor, seed: int, evidence: Path) -> Tensor:
    """Sizes of the smallest perturbations that PGD finds for a problem's images, (batch,), inf where it finds none.

    Raises:
        ContradictionError: one is smaller than a certified radius, (batch,); it is saved at ``evidence``.
    """
    labels, targets = problem.rows[:, 0].argmax(dim=1), problem.rows.argmin(dim=2)
    threat = problem.threat
    told = {"norm": threat.norm, "clip": threat.clip, "together": threat.together, "targets": targets}
    asked = (problem.graph(torch.float32), problem.x, labels)
    found = attack_radius(*asked, seed=seed, **told)
    # So many changes as are certified may not break an image; at a radius itself rounding may decide.
    broken = found.radius <= certified if threat.norm == 0.0 else found.radius < certified
    if bool(broken.any()):
        evidence.parent.mkdir(parents=True, exist_ok=True)
        save_attack(evidence, found, images, labels, **told)
        raise ContradictionError(f"a certified radius is contradicted by an attack, which is saved as {evidence}")
    return found.radius
