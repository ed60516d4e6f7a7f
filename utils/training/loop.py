"""Training of classifiers: the loop, its schedule, the evaluation and the training curve."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from ..network.checkpoint import Config, save_checkpoint
from ..network.models import SequenceClassifier
from ..runs.cli import versions
from ..runs.ranks import ALONE, Ranks
from .narrow import narrowing_of
from .state import TrainingState

CLIP_NORM = 1.0
# Changes the images of a batch at random, (batch, ...), by random numbers of the second argument.
Change = Callable[[Tensor, torch.Generator], Tensor]
EVALUATION_BATCH = 2000


@dataclass
class History:
    """One entry per epoch: mean training loss (nats) and, as shares of what is watched, the accuracies.

    ``verified`` is that under perturbation, of certified training; empty otherwise.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    verified: list[float] = field(default_factory=list)

    def add(self, **values: float) -> None:
        for name, value in values.items():
            getattr(self, name).append(value)


class Objective:
    """What a training minimises, how its rate goes and what is watched; plain training. Others override.

    Attributes:
        betas: how much of the running means of gradients and of their squares Adam keeps at a step.
    """

    betas = (0.9, 0.999)

    def prepare(self, model: nn.Module) -> None:
        """Change an untrained model's weights to what the training had better begin with."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> Tensor:
        """Mean over the batch x, (batch, T, n), with labels y, (batch,), after a share ``progress`` of all steps."""
        return nn.functional.cross_entropy(model(x), y)

    def rate(self, step: int, total_steps: int) -> float:
        """Share of the largest learning rate."""
        return rate_factor(step, total_steps)

    def rates(self, model: nn.Module) -> dict[nn.Parameter, float]:
        """Parameters whose learning rate is a multiple of the others', and that multiple."""
        return {}

    def measure(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
        """An epoch's entries in the history besides the loss."""
        return {"accuracy": accuracy(model, x, y)}


class Loss(nn.Module):
    """An objective as a module, so that processes can share a batch: its forward is the loss."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, x: Tensor, y: Tensor, progress: float) -> Tensor:
        return self.objective.loss(self.model, x, y, progress)


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


def rehearse(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    args: argparse.Namespace,
    path: Path,
    objective: Objective | None = None,
    change: Change | None = None,
) -> None:
    """One training step, for --dry-run: the last of the schedule, with all that the loss has in the end."""
    objective = objective or Objective()
    optimizer = make_optimizer(net, args, 1, objective, change)
    train_epoch(Loss(net, objective), x[: args.batch_size], y[: args.batch_size], optimizer, progress=1.0)
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
    total_steps: int
    change: Change | None = None

    @property
    def progress(self) -> float:
        """Share of all steps that are done."""
        return self.schedule.last_epoch / self.total_steps

    def parts(self) -> dict[str, Any]:
        """What a training that is resumed goes on with."""
        return {"adam": self.adam, "schedule": self.schedule, "order": self.order}


class Order(torch.Generator):
    """Random numbers of the batches, whose state is saved like an optimiser's."""

    def state_dict(self) -> dict[str, Tensor]:
        return {"state": self.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.set_state(state["state"].cpu())


def make_optimizer(
    model: nn.Module,
    args: argparse.Namespace,
    total_steps: int,
    objective: Objective | None = None,
    change: Change | None = None,
) -> Optimizer:
    """Adam with decoupled weight decay, and the objective's rates."""
    objective = objective or Objective()
    special = objective.rates(model)
    usual = [parameter for parameter in model.parameters() if parameter not in special]
    groups = [{"params": usual}, *({"params": [one], "lr": args.lr * by} for one, by in special.items())]
    adam = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, betas=objective.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: objective.rate(step, total_steps))
    return Optimizer(adam, schedule, args.batch_size, Order().manual_seed(args.seed), total_steps, change)


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
    ranks: Ranks = ALONE,
    change: Change | None = None,
) -> History:
    """Train for all epochs under a progress bar; every epoch is kept in a file.

    ``frames`` and ``labels`` are [training, watched]: the second are what accuracies are measured on. Processes share
    every batch, and end with the same weights, those of one process but for rounding. ``change`` is done to every
    batch of the first.

    Raises:
        ValueError: the loss is NaN or infinite, or there is nothing that fits to resume.
    """
    objective = objective or Objective()
    steps = steps_of_epoch(len(labels[0]), args.batch_size, ranks)
    optimizer = make_optimizer(model, args, steps * args.epochs, objective, change)
    narrowing, parts = narrowing_of(args, model, optimizer.adam), optimizer.parts()
    if narrowing is not None:
        parts = {"narrowing": narrowing, **parts}
    history = History(**state.restore(model, parts, labels[0].device))
    finished, loss_of = len(history.loss), shared_loss(Loss(model, objective), ranks)
    try:
        # disable=None: a bar on a terminal, silence in a log file, where only errors go to stderr
        hidden = None if ranks.first else True
        with tqdm(total=args.epochs, initial=finished, unit="epoch", disable=hidden) as progress:
            for epoch in range(finished, args.epochs):
                if narrowing is not None:
                    loss_now = partial(objective.loss, model, progress=optimizer.progress)
                    if narrowing.advance(loss_now, frames[0], labels[0], (epoch + 1) / args.epochs, ranks):
                        loss_of = shared_loss(Loss(model, objective), ranks)  # of the parameters that there are now
                loss = train_epoch(loss_of, frames[0], labels[0], optimizer, ranks)
                if not math.isfinite(loss):
                    progress.leave = False
                    raise ValueError(f"the training diverged in epoch {epoch + 1}: try a smaller --lr than {args.lr:g}")
                history.add(loss=loss, **objective.measure(model, frames[1], labels[1]))
                if ranks.first:
                    state.save(model, parts, vars(history))
                watched = {name: f"{values[-1]:.4f}" for name, values in vars(history).items() if values}
                progress.set_postfix(watched, refresh=False)
                progress.update()
    except KeyboardInterrupt:
        state.say_what_is_kept(len(history.accuracy), args.epochs)
        raise
    return history


def shared_loss(loss: Loss, ranks: Ranks) -> nn.Module:
    """The loss, whose gradients are the means of all processes'; they begin with the first one's weights."""
    if ranks.world == 1:
        return loss
    devices = None if ranks.device is None or ranks.device.type == "cpu" else [ranks.device]
    return nn.parallel.DistributedDataParallel(loss, device_ids=devices)


def steps_of_epoch(samples: int, batch_size: int, ranks: Ranks = ALONE) -> int:
    """Batches of an epoch; a last one with fewer samples than there are processes is left out."""
    full, rest = divmod(samples, batch_size)
    return full + (rest >= ranks.world)


def train_epoch(
    loss_of: nn.Module,
    x: Tensor,
    y: Tensor,
    optimizer: Optimizer,
    ranks: Ranks = ALONE,
    progress: float | None = None,
) -> float:
    """One pass over x, (N, T, n), and y, (N,), in random order; returns the mean loss.

    ``loss_of`` is a ``Loss``, shared by the processes or not; ``progress`` fixes the share of steps that are done.
    """
    loss_of.train()
    total = torch.zeros((), device=x.device)
    order = torch.randperm(len(y), generator=optimizer.order).to(x.device)
    for batch in order.split(optimizer.batch_size)[: steps_of_epoch(len(y), optimizer.batch_size, ranks)]:
        share = slice(ranks.rank, None, ranks.world)
        images, classes = x[batch], y[batch][share]
        if optimizer.change is not None:
            images = optimizer.change(images, optimizer.order)  # of the whole batch: all processes draw the same
        # The mean over processes of shares so weighted is the mean over the batch.
        weight = len(classes) * ranks.world / len(batch)
        done = optimizer.progress if progress is None else progress
        loss = weight * loss_of(images[share], classes, done)
        optimizer.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(loss_of.parameters(), CLIP_NORM)
        optimizer.adam.step()
        optimizer.schedule.step()
        total += loss.detach() * len(batch) / ranks.world
    return float(ranks.sum(total)) / len(y)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of x, (N, T, n), that the model gives the label y, (N,)."""
    model.eval()
    batches = zip(x.split(EVALUATION_BATCH), y.split(EVALUATION_BATCH), strict=True)
    return sum(int((model(xb).argmax(dim=1) == yb).sum()) for xb, yb in batches) / len(y)


def plot_history(history: History, path: Path, title: str, watched: str = "test") -> None:
    """Write training loss and accuracies over the epochs as a PNG, whole or not at all.

    ``watched`` says which images the accuracies are of.
    """
    epochs = range(1, len(history.loss) + 1)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    left = figure.add_subplot()
    left.plot(epochs, history.loss, color="tab:blue", marker=".")
    left.set(xlabel="epoch", ylabel="training loss (nats)", yscale="log", title=title)
    left.yaxis.label.set_color("tab:blue")
    left.grid(alpha=0.3)
    right = left.twinx()
    right.plot(epochs, [100 * value for value in history.accuracy], color="tab:red", marker=".", label="clean")
    if history.verified:
        right.plot(epochs, [100 * value for value in history.verified], color="tab:green", marker=".", label="verified")
        right.legend(loc="lower right")
    right.set_ylabel(f"{watched} accuracy (%)", color="tab:red")
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        figure.savefig(temporary, dpi=100)
        os.replace(temporary, path)
