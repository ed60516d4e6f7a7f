"""Training of classifiers of spoken digits: waveforms, whose features are the model's first layers."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from data.speech import RATE, SpeechData, as_chunks, chunk_lengths, load_speech

from ..network.checkpoint import Config, build_model, save_checkpoint
from ..network.speech import MelFeatures, SpeechClassifier
from ..runs.cli import apply_common_arguments
from ..runs.results import check_writable
from .certified.recipe import Recipe
from .certified.speech import CertifiedSpeech, speech_recipe, speech_recipe_facts
from .held_back import accuracies, evaluate, hold_back
from .loop import plot_history, rehearse, train, train_and_save, training_facts
from .state import TrainingState
from .tasks import speech_model_name

PART = 200  # utterances whose features are found at once
LEAST_STD = 0.1  # of a feature


class SpeechNet(nn.Module):
    """The classifier as it is trained: takes padded chunks, (N, C, hop), and in training adds white noise to them.

    Levels of the noise are even in dB below the peak of 1 between ``quietest`` and ``loudest``; None for no noise.
    """

    def __init__(self, classifier: SpeechClassifier, noise: tuple[float, float] | None = None):
        super().__init__()
        self.classifier, self.noise = classifier, noise

    def forward(self, x: Tensor) -> Tensor:
        lengths = chunk_lengths(x)
        x = x[:, : int(lengths.max())]
        if self.training and self.noise is not None:
            quietest, loudest = self.noise
            level = quietest + (loudest - quietest) * torch.rand(len(x), 1, 1, device=x.device)
            x = x + 10.0 ** (level / 20.0) * torch.randn_like(x)
        return self.classifier(x, lengths)


def train_speech_classifier(args: argparse.Namespace, architecture: str) -> None:
    """Train and save the classifier that a script's arguments ask for.

    Writes SAVE_DIR/lstm_32/lstm (after architecture, size and recipe) and training_curve.png beside it.

    Raises:
        ValueError: there are no recordings, they are damaged, or the training diverges.
        OSError: the folder cannot be written.
    """
    device = apply_common_arguments(args)
    data = load_speech(args.data_dir, args.sample)
    parts = (data.train, data.test)
    chunks = [as_chunks(part, args.hop)[0].to(device) for part in parts]
    recipe = speech_recipe(args, len(data.train), min(part.shape[1] for part in chunks))
    config = {} if recipe is None else speech_recipe_facts(args, recipe) | {"held_back": args.held_back}
    folder = args.save_dir / speech_model_name(architecture, args.hidden_size, config.get("recipe"))
    if not args.dry_run:
        check_writable(folder)
    labels = [torch.tensor([one.label for one in part], device=device) for part in parts]
    config |= make_speech_config(args, architecture, data, chunks[0])
    classifier = build_model(config)
    net = SpeechNet(classifier, None if args.noise is None else tuple(args.noise)).to(device)
    title, items = f"spoken digits {folder.name}", f"utterances of {data.source}"
    if recipe is None:
        return train_and_save(net, classifier, chunks, labels, args, config, folder / architecture, title, items)
    train_certified(net, chunks, labels, args, config, folder / architecture, recipe)


def train_certified(
    net: SpeechNet,
    chunks: list[Tensor],
    labels: list[Tensor],
    args: argparse.Namespace,
    config: Config,
    path: Path,
    recipe: Recipe,
) -> None:
    """Train for a recipe's bounds and save; chunks and labels are [training, test], of which the second is not watched.

    What is watched are utterances of the training set that are held back.
    """
    objective = CertifiedSpeech(recipe, args.train_threat)
    objective.prepare(net)
    if args.dry_run:
        return rehearse(net, chunks[0], labels[0], args, path, objective)
    state = TrainingState(path, args, labels[0])
    history = train(net, *hold_back(chunks, labels, args.held_back), args, state, objective)
    config |= evaluate(net, chunks, labels, objective, history)
    save_checkpoint(path, net.classifier, config)
    state.discard()
    plot_history(history, path.parent / "training_curve.png", f"spoken digits {path.parent.name}", "held-back")
    print(f"{accuracies(config)} ({len(labels[1])} test utterances of {config['data_source']}); saved {path}")


def make_speech_config(args: argparse.Namespace, architecture: str, data: SpeechData, x: Tensor) -> Config:
    """The checkpoint's config, still without accuracies; features are normalised by those of the training set, x."""
    features = {"hop": args.hop, "bands": args.bands, "floor": args.floor, "rate": RATE}
    mean, std = feature_statistics(MelFeatures(**features), x)
    return {
        "architecture": architecture,
        "features": features,
        "input_size": args.bands,
        "num_frames": x.shape[1],  # utterances of any length can be read
        "hidden_size": args.hidden_size,
        "num_layers": 1,
        "bidirectional": False,
        "bias": True,
        "activation": None,
        "pooling": args.pooling,
        "num_classes": len(data.class_names),
        "input_mean": mean,
        "input_std": std,
        "dataset": data.name,
        "data_source": data.source,
        "class_names": list(data.class_names),
        "train_size": len(data.train),
        "test_size": len(data.test),
        "noise": args.noise,
        **training_facts(args),
    }


@torch.no_grad()
def feature_statistics(features: MelFeatures, x: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every feature over all windows of padded chunks, (N, C, hop)."""
    features = features.to(x)
    found = []
    for part in x.split(PART):
        lengths = chunk_lengths(part)
        values = features(part[:, : int(lengths.max())])
        found.append(values[torch.arange(values.shape[1], device=x.device) < lengths[:, None] - 1])
    std, mean = torch.std_mean(torch.cat(found).double(), dim=0)
    return mean.tolist(), std.clamp(min=LEAST_STD).tolist()
