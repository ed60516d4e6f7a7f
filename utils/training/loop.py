"""Training of classifiers: the loop, its schedule, the evaluation and the training curve."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from ..network.checkpoint import Config, save_checkpoint
from ..network.models import SequenceClassifier
from ..runs.cli import versions
from .state import TrainingState

CLIP_NORM = 1.0
EVALUATION_BATCH = 2000

# The loss of a batch: of a model, its inputs and their labels.
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass
class History:
    """One entry per epoch: mean training loss (cross entropy, nats) and test accuracy (0 to 1)."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


def train_and_save(
    net: nn.Module,
    classifier: SequenceClassifier,
    inputs: list[Tensor],
    labels: list[Tensor],
    args: argparse.Namespace,
    config: Config,
    path: Path,
    title: str,
    items: str,
) -> None:
    """Train a network and save its classifier at ``path``, with training_curve.png beside it; one step for --dry-run.

    Args:
        net: what is trained; ``classifier`` is the network itself or a part of it.
        inputs, labels: [training, test].
        config: the checkpoint's; gets the accuracies.
        title: of the curve; ``items`` says what the test set holds.
    """
    if args.dry_run:
        rehearse(net, inputs[0], labels[0], args, path)
        return
    state = TrainingState(path, args, labels[0])
    history = train(net, inputs, labels, args, state)
    config["train_accuracy"] = accuracy(net, inputs[0], labels[0])
    config["test_accuracy"] = history.accuracy[-1]
    save_checkpoint(path, classifier, config)
    state.discard()
    plot_history(history, path.parent / "training_curve.png", title)
    print(f"test accuracy {config['test_accuracy']:.4f} ({len(labels[1])} {items}), ", end="")
    print(f"training accuracy {config['train_accuracy']:.4f}; saved {path}")


def rehearse(net: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace, path: Path) -> None:
    """One training step, for --dry-run."""
    train_epoch(net, x[: args.batch_size], y[: args.batch_size], make_optimizer(net, args, 1))
    print(f"dry run: one step done, nothing written; the model would go to {path}")


def training_facts(args: argparse.Namespace) -> Config:
    """The part of a checkpoint's config that says how it is trained."""
    flags = ("seed", "epochs", "batch_size", "lr", "weight_decay")
    return {name: getattr(args, name) for name in flags} | {"versions": versions()}


@dataclass
class Optimizer:
    """Adam with its schedule, and the batches: what one epoch needs besides model and data."""

    adam: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    batch_size: int
    order: Order

    def parts(self) -> dict[str, Any]:
        """What a training that is resumed goes on with."""
        return {"adam": self.adam, "schedule": self.schedule, "order": self.order}


class Order(torch.Generator):
    """Random numbers of the batches, whose state is saved like an optimiser's."""

    def state_dict(self) -> dict[str, Tensor]:
        return {"state": self.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.set_state(state["state"].cpu())


def make_optimizer(model: nn.Module, args: argparse.Namespace, total_steps: int) -> Optimizer:
    """Adam with decoupled weight decay; the rate rises for a tenth of the steps, then falls to zero."""
    adam = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: rate_factor(step, total_steps))
    return Optimizer(adam, schedule, args.batch_size, Order().manual_seed(args.seed))


def rate_factor(step: int, total_steps: int) -> float:
    """Share of the largest learning rate at a step: linear warm-up, then half a cosine down to zero."""
    warm_up = max(1, total_steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, total_steps - warm_up))))


def train(
    model: nn.Module,
    frames: list[Tensor],
    labels: list[Tensor],
    args: argparse.Namespace,
    state: TrainingState,
    objective: Objective | None = None,
) -> History:
    """Train for all epochs under a progress bar; frames and labels are [training, test]. Every epoch is kept in a file.

    ``objective`` is the loss, the cross entropy if left out.

    Raises:
        ValueError: the loss is NaN or infinite, or there is nothing that fits to resume.
    """
    steps = math.ceil(len(labels[0]) / args.batch_size)
    optimizer = make_optimizer(model, args, steps * args.epochs)
    history = History(**state.restore(model, optimizer.parts(), labels[0].device))
    finished = len(history.loss)
    try:
        # disable=None: a bar on a terminal, silence in a log file, where only errors go to stderr
        with tqdm(total=args.epochs, initial=finished, unit="epoch", disable=None) as progress:
            for epoch in range(finished, args.epochs):
                loss = train_epoch(model, frames[0], labels[0], optimizer, objective)
                if not math.isfinite(loss):
                    progress.leave = False
                    raise ValueError(f"the training diverged in epoch {epoch + 1}: try a smaller --lr than {args.lr:g}")
                history.loss.append(loss)
                history.accuracy.append(accuracy(model, frames[1], labels[1]))
                state.save(model, optimizer.parts(), vars(history))
                progress.set_postfix(loss=f"{loss:.4f}", test_accuracy=f"{history.accuracy[-1]:.4f}", refresh=False)
                progress.update()
    except KeyboardInterrupt:
        state.say_what_is_kept(len(history.accuracy), args.epochs)
        raise
    return history


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of the logits of x, (batch, T, n), for the labels y, (batch,), in nats."""
    return nn.functional.cross_entropy(model(x), y)


def train_epoch(
    model: nn.Module, x: Tensor, y: Tensor, optimizer: Optimizer, objective: Objective | None = None
) -> float:
    """One pass over x, (N, T, n), and y, (N,), in random order; returns the mean loss."""
    objective = objective or cross_entropy
    model.train()
    total = torch.zeros((), device=x.device)
    order = torch.randperm(len(y), generator=optimizer.order).to(x.device)
    for batch in order.split(optimizer.batch_size):
        loss = objective(model, x[batch], y[batch])
        optimizer.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.adam.step()
        optimizer.schedule.step()
        total += loss.detach() * len(batch)
    return float(total) / len(y)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of x, (N, T, n), that the model gives the label y, (N,)."""
    model.eval()
    batches = zip(x.split(EVALUATION_BATCH), y.split(EVALUATION_BATCH), strict=True)
    return sum(int((model(xb).argmax(dim=1) == yb).sum()) for xb, yb in batches) / len(y)


def plot_history(history: History, path: Path, title: str) -> None:
    """Write training loss and test accuracy over the epochs as a PNG, whole or not at all."""
    epochs = range(1, len(history.loss) + 1)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    left = figure.add_subplot()
    left.plot(epochs, history.loss, color="tab:blue", marker=".")
    left.set(xlabel="epoch", ylabel="training loss (cross entropy)", yscale="log", title=title)
    left.yaxis.label.set_color("tab:blue")
    left.grid(alpha=0.3)
    right = left.twinx()
    right.plot(epochs, [100 * value for value in history.accuracy], color="tab:red", marker=".")
    right.set_ylabel("test accuracy (%)", color="tab:red")
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        figure.savefig(temporary, dpi=100)
        os.replace(temporary, path)
