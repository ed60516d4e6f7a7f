"""Processor time of the bounds of one sentence, all budgets together, by method.

    python benchmarks/time_sentences.py
    python benchmarks/time_sentences.py --model transformer_1_64_ibp --words 20

The model is one of models/sentiment_classifier/; words and their substitutes are drawn from its vocabulary, which makes
no sense and takes as long. One thread; the least of some repetitions, so that other work counts little.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ROOT, ArgumentParser, answer_early, positive_int, run_main


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--model", default="lstm_64_ibp", help="folder in models/sentiment_classifier/")
    parser.add_argument("--words", type=positive_int, default=30, help="words of the sentence")
    parser.add_argument("--replaceable", type=positive_int, default=10, help="words that have substitutes")
    parser.add_argument("--substitutes", type=positive_int, default=8, help="substitutes of each of these")
    parser.add_argument("--budgets", type=positive_int, nargs="+", default=[1, 2, 3, 4, 5, 6], help="words that change")
    parser.add_argument("--repetitions", type=positive_int, default=5, help="runs of each method")
    parser.add_argument("--seed", type=int, default=0, help="of the words")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch

from utils.certify import Substitutes, substitution_margins
from utils.training.text_models import load_text_model

METHODS = ("ibp", "crown-ibp", "crown")


def main() -> None:
    args = get_args()
    torch.set_num_threads(1)
    architecture = args.model.partition("_")[0]
    model = load_text_model(ROOT / "models" / "sentiment_classifier" / args.model / architecture, torch.device("cpu"))
    numbers = torch.Generator().manual_seed(args.seed)
    size = (1, args.words, args.substitutes)
    words = torch.randint(2, len(model.vocabulary), size[:2], generator=numbers)
    others = torch.randint(2, len(model.vocabulary), size, generator=numbers)
    valid = torch.zeros(size, dtype=torch.bool)
    valid[0, torch.randperm(args.words, generator=numbers)[: args.replaceable]] = True
    x, substitutes = model.embeddings[words], Substitutes(model.embeddings[others], valid)
    label = model.classifier(x).argmax(dim=1).detach()
    print(f"processor s a sentence of {args.words} words, budgets {args.budgets}, {args.model}, one thread")
    for method in METHODS:
        least = float("inf")
        for _ in range(args.repetitions):
            started = time.process_time()
            with torch.no_grad():
                substitution_margins(model.classifier, x, label, substitutes, args.budgets, method=method)
            least = min(least, time.process_time() - started)
        print(f"{method:10} {least:.3f}", flush=True)


if __name__ == "__main__":
    run_main(main)
