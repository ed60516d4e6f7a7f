"""Training of classifiers of sentences: data, loop and checkpoint. Choices are made on the development set."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from data.sst import CLASS_NAMES, SentimentData, load_sst
from data.text import MAX_WORDS, Vocabulary, build_vocabulary

from ...network.checkpoint import Config, build_model, save_checkpoint
from ...runs.cli import apply_common_arguments, json_value
from ...runs.results import check_writable
from ...training.loop import CLIP_NORM, History, Optimizer, make_optimizer, plot_history, training_facts
from ...training.state import TrainingState
from ...training.text import first_embeddings
from ..arguments import recipe_of
from ..naming import model_name
from ..recipe import Recipe
from ..words import Group, group_by_length
from .net import SentimentNet
from .objective import Plain, accuracy


def train_sentiment_classifier(args: argparse.Namespace, architecture: str) -> None:
    """Train and save the classifier that a script's arguments ask for.

    Writes SAVE_DIR/lstm_64/lstm (after architecture, sizes and recipe) and training_curve.png beside it.

    Raises:
        ValueError: data, word vectors or flags do not fit, or the training diverges.
        OSError: a file cannot be read or the folder cannot be written.
    """
    recipe = recipe_of(args)
    device = apply_common_arguments(args)
    data = load_sst(args.data_dir, args.sample, args.synonyms)
    vocabulary = build_vocabulary([sentence.words for sentence in data.train], args.min_count)
    embeddings = first_embeddings(vocabulary, args)
    config = make_config(args, architecture, data, vocabulary, recipe)
    folder = args.save_dir / model_name(config)
    if not args.dry_run:
        check_writable(folder)
    classifier = build_model(config)
    net = SentimentNet(embeddings, classifier, args.dropout, args.word_dropout).to(device)
    objective = objective_of(recipe)
    objective.prepare(classifier)
    given = {"train": data.train, "dev": data.dev, "test": data.test}
    parts = {name: group_by_length(sentences, vocabulary, data.synonyms) for name, sentences in given.items()}
    parts["phrases"] = group_by_length(data.phrases or data.train, vocabulary, data.synonyms, args.phrase_words)
    if args.epochs and not parts["phrases"]:
        raise ValueError(f"no phrase has at most {args.phrase_words} words")
    parts = {name: [group.to(device) for group in groups] for name, groups in parts.items()}
    if args.dry_run:
        rehearse(net, parts["train"], args, objective)
        print(f"dry run: one step done, nothing written; the model would go to {folder / architecture}")
        return
    state = TrainingState(folder / architecture, args, torch.cat([group.labels for group in parts["train"]]))
    history = Training(net, parts, args, objective).run(state)
    finish(net, parts, config, folder / architecture)
    state.discard()
    plot_history(history, folder / "training_curve.png", f"sentiment classifier {folder.name}", watched="development")
    print(f"accuracy {config['test_accuracy']:.4f} ({len(data.test)} test sentences of {data.source}), ", end="")
    print(f"{config['dev_accuracy']:.4f} (development), {config['train_accuracy']:.4f} (training)")
    print(f"{len(vocabulary)} words; saved {folder / architecture}")


def objective_of(recipe: Recipe | None) -> Plain:
    if recipe is None:
        return Plain()
    from .certified import CertifiedWords  # only now: bounds take a while to import

    return CertifiedWords(recipe)


def rehearse(net: SentimentNet, groups: list[Group], args: argparse.Namespace, objective: Plain) -> None:
    """One training step, the last of the schedule."""
    optimizer = make_optimizer(net, args, 1, objective)
    step(net, next(groups[len(groups) // 2].batches(args.batch_size)), optimizer, objective, progress=1.0)


class Training:
    """All epochs: the first on phrases, the last on whole sentences; each is kept in a file."""

    def __init__(self, net: SentimentNet, parts: dict[str, list[Group]], args: argparse.Namespace, objective: Plain):
        self.net, self.parts, self.args, self.objective = net, parts, args, objective
        self.best = Best(net)

    def run(self, state: TrainingState) -> History:
        """Train; in the end the network has the weights of its best epoch on the development set.

        Raises:
            ValueError: the loss is NaN or infinite, or there is nothing that fits to resume.
        """
        args, objective = self.args, self.objective
        epochs = [self.parts["phrases"]] * args.epochs + [self.parts["train"]] * args.sentence_epochs
        steps = sum(len(split(groups, args.batch_size)) for groups in epochs)
        optimizer = make_optimizer(self.net, args, steps, objective)
        kept = optimizer.parts() | {"best": self.best}
        device = epochs[0][0].labels.device
        history = History(**state.restore(self.net, kept, device))
        done = len(history.loss)
        try:
            # disable=None: a bar on a terminal, silence in a log file, where only errors go to stderr
            with tqdm(total=len(epochs), initial=done, unit="epoch", disable=None) as bar:
                for epoch, groups in enumerate(epochs[done:], start=done):
                    loss = train_epoch(self.net, groups, optimizer, objective)
                    if not math.isfinite(loss):
                        bar.leave = False
                        raise ValueError(f"the training diverged in epoch {epoch + 1}: try a smaller --lr")
                    seen = objective.watch(self.net, self.parts["dev"])
                    history.add(loss=loss, **seen)
                    if objective.settled(optimizer.progress):
                        self.best.offer(seen[objective.selects])
                    state.save(self.net, kept, vars(history))
                    bar.set_postfix({name: f"{value:.4f}" for name, value in seen.items()}, refresh=False)
                    bar.update()
        except KeyboardInterrupt:
            state.say_what_is_kept(len(history.loss), len(epochs))
            raise
        self.best.take()
        return history


class Best:
    """The weights of the epoch with the highest score so far; the later of equal ones."""

    def __init__(self, net: nn.Module):
        self.net, self.score, self.weights = net, -math.inf, {}

    def offer(self, score: float) -> None:
        if score >= self.score:
            self.score = score
            self.weights = {name: value.detach().clone() for name, value in self.net.state_dict().items()}

    def take(self) -> None:
        self.net.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.score, self.weights = state["score"], state["weights"]


def split(groups: Sequence[Group], size: int) -> list[tuple[int, int]]:
    """(group, first sentence) of every batch: no more than ``size`` sentences, of one length."""
    return [(place, start) for place, group in enumerate(groups) for start in range(0, len(group), size)]


def train_epoch(net: SentimentNet, groups: Sequence[Group], optimizer: Optimizer, objective: Plain) -> float:
    """One pass over all groups in random order; returns the mean loss."""
    orders = [torch.randperm(len(group), generator=optimizer.order) for group in groups]
    batches = split(groups, optimizer.batch_size)
    total = 0.0
    for number in torch.randperm(len(batches), generator=optimizer.order).tolist():
        place, start = batches[number]
        rows = orders[place][start : start + optimizer.batch_size]
        total += len(rows) * step(net, groups[place].part(rows), optimizer, objective)
    return total / sum(map(len, groups))


def step(
    net: SentimentNet, batch: Group, optimizer: Optimizer, objective: Plain, progress: float | None = None
) -> float:
    """One step; returns the loss."""
    net.train()
    loss = objective.group_loss(net, batch, optimizer.progress if progress is None else progress)
    optimizer.adam.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), CLIP_NORM)
    optimizer.adam.step()
    optimizer.schedule.step()
    return float(loss.detach())


def finish(net: SentimentNet, parts: dict[str, list[Group]], config: Config, path: Path) -> None:
    """Round the word vectors as they are stored, measure, and save."""
    rounded = net.embedding.weight.detach().half()
    net.embedding.weight.data = rounded.float()
    for name in ("train", "dev", "test"):
        config[f"{name}_accuracy"] = accuracy(net, parts[name])
    config["embeddings"] = rounded.cpu().clone()
    save_checkpoint(path, net.classifier, config)


def make_config(
    args: argparse.Namespace, architecture: str, data: SentimentData, vocabulary: Vocabulary, recipe: Recipe | None
) -> Config:
    """The checkpoint's config, still without accuracies and embeddings."""
    longest = max(len(sentence.words) for sentence in data.train)
    return {
        **(_transformer(args) if architecture == "transformer" else _recurrent(args, architecture, longest)),
        "input_size": args.embedding_size,
        "num_classes": len(CLASS_NAMES),
        "dataset": "sst2",
        "data_source": data.source,
        "data_sha256": data.sha256,
        "class_names": list(CLASS_NAMES),
        "vocabulary": vocabulary.words,
        "min_count": args.min_count,
        "embeddings_from": None if args.embeddings is None else args.embeddings.name,
        **{f"{name}_size": len(getattr(data, name)) for name in ("train", "dev", "test", "phrases")},
        "sentence_epochs": args.sentence_epochs,
        "phrase_words": args.phrase_words,
        "dropout": args.dropout,
        "word_dropout": args.word_dropout,
        **training_facts(args),
        **({} if recipe is None else {"recipe": recipe.loss, "certified": _plain_values(recipe)}),
    }


def _plain_values(recipe: Recipe) -> dict[str, object]:
    return {name: json_value(value) for name, value in asdict(recipe).items()}


def _recurrent(args: argparse.Namespace, architecture: str, longest: int) -> Config:
    return {
        "architecture": architecture,
        "num_frames": longest,  # of the training set; sentences of any length can be read
        "hidden_size": args.hidden_size,
        "num_layers": 1,
        "bidirectional": True,
        "bias": True,
        "activation": None,
        "pooling": "mean",
        "input_mean": 0.0,
        "input_std": 1.0,
    }


def _transformer(args: argparse.Namespace) -> Config:
    return {
        "architecture": "transformer",
        "width": args.hidden_size,
        "heads": args.heads,
        "inner": args.inner_size,
        "num_layers": args.num_layers,
        "layer_norm": args.layer_norm,
        "max_frames": MAX_WORDS if args.positions else None,
    }
