"""Training of text classifiers: the arguments, the data as word numbers, and the checkpoint with its vocabulary."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from data.text import PADDING, UNKNOWN, TextData, Vocabulary, build_vocabulary, pad, read_embeddings, tokenize

from ..network.checkpoint import Config, build_model, save_checkpoint
from ..runs.cli import (
    apply_common_arguments,
)
from ..runs.results import check_writable
from .loop import accuracy, plot_history, rehearse, train, training_facts
from .state import TrainingState
from .tasks import TextTask, text_model_name
from .text_models import TextNet

EMBEDDING_SCALE = 0.1  # standard deviation of the first random vectors


def train_text_classifier(args: argparse.Namespace, architecture: str, task: TextTask) -> None:
    """Train and save the text classifier that a script's arguments ask for.

    Writes SAVE_DIR/lstm_32/lstm (after architecture and size) and training_curve.png beside it.

    Raises:
        ValueError: the data or word vectors are damaged, or the training diverges.
        OSError: a file cannot be read or the folder cannot be written.
    """
    device = apply_common_arguments(args)
    data = task.load(args.data_dir, args.sample)
    vocabulary = build_vocabulary(map(tokenize, data.train_texts), args.min_count)
    embeddings = first_embeddings(vocabulary, args)
    config = make_text_config(args, architecture, data, vocabulary)
    folder = args.save_dir / text_model_name(architecture, args.hidden_size, args.embedding_size)
    if not args.dry_run:
        check_writable(folder)
    classifier = build_model(config)
    net = TextNet(embeddings, classifier, args.dropout, args.word_dropout).to(device)
    numbers = [encode(texts, vocabulary).to(device) for texts in (data.train_texts, data.test_texts)]
    labels = [y.to(device) for y in (data.train_labels, data.test_labels)]
    if args.dry_run:
        rehearse(net, numbers[0], labels[0], args, folder / architecture)
        return
    state = TrainingState(folder / architecture, args, labels[0])
    history = train(net, numbers, labels, args, state)
    rounded = net.embedding.weight.detach().half()
    net.embedding.weight.data = rounded.float()
    config["train_accuracy"], config["test_accuracy"] = (
        accuracy(net, x, y) for x, y in zip(numbers, labels, strict=True)
    )
    config["embeddings"] = rounded.cpu().clone()
    save_checkpoint(folder / architecture, classifier, config)
    state.discard()
    plot_history(history, folder / "training_curve.png", f"{task.name} classifier {folder.name}")
    counts = f"{len(data.test_texts)} {task.item}s of {data.source}"
    print(f"test accuracy {config['test_accuracy']:.4f} ({counts}), training accuracy {config['train_accuracy']:.4f}")
    print(f"{len(vocabulary)} words; saved {folder / architecture}")


def encode(texts: list[str], vocabulary: Vocabulary) -> Tensor:
    """Word numbers (N, longest) of texts, padded."""
    return pad([vocabulary.encode(tokenize(text)) for text in texts])[0]


def first_embeddings(vocabulary: Vocabulary, args: argparse.Namespace) -> Tensor:
    """Vectors (V, n) to start from: random, or those of --embeddings for the words that it has."""
    generator = torch.Generator().manual_seed(args.seed)
    if args.embeddings is None:
        vectors = EMBEDDING_SCALE * torch.randn(len(vocabulary), args.embedding_size, generator=generator)
    else:
        given, known = read_embeddings(args.embeddings, vocabulary)
        args.embedding_size = given.shape[1]
        scale = given[known].std() if int(known.sum()) > 1 else EMBEDDING_SCALE
        random = scale * torch.randn(given.shape, generator=generator)
        vectors = torch.where(known[:, None], given, random)
        print(f"{int(known.sum())} of {len(vocabulary) - UNKNOWN - 1} words have vectors in {args.embeddings}")
    vectors[PADDING] = 0.0
    return vectors


def make_text_config(args: argparse.Namespace, architecture: str, data: TextData, vocabulary: Vocabulary) -> Config:
    """The checkpoint's config, still without accuracies and embeddings."""
    longest = max(len(tokenize(text)) for text in data.train_texts)
    return {
        "architecture": architecture,
        "input_size": args.embedding_size,
        "num_frames": longest,  # of the training set; texts of any length can be read
        "hidden_size": args.hidden_size,
        "num_layers": 1,
        "bidirectional": False,
        "bias": True,
        "activation": None,
        "pooling": "last",
        "num_classes": len(data.class_names),
        "input_mean": 0.0,
        "input_std": 1.0,
        "dataset": data.name,
        "data_source": data.source,
        "data_sha256": data.sha256,
        "class_names": list(data.class_names),
        "vocabulary": vocabulary.words,
        "min_count": args.min_count,
        "embeddings_from": None if args.embeddings is None else args.embeddings.name,
        "train_size": len(data.train_texts),
        "test_size": len(data.test_texts),
        "dropout": args.dropout,
        "word_dropout": args.word_dropout,
        **training_facts(args),
    }
