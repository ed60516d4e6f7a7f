"""A template to copy: train or load a recurrent classifier of your own, and certify radii of its inputs.

    python scripts/certify_my_model.py                                   # train, then certify 20 test sequences
    python scripts/certify_my_model.py --cell gru --p inf --save-certificates proofs
    python scripts/certify_my_model.py --weights my.pt                   # a state dict instead of training

Replace ``load_data`` and ``build`` by your own; the rest may stay. docs/tutorial.md goes through it step by step.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.own.arguments import add_question, check_arguments
from utils.runs.cli import (
    ArgumentParser,
    answer_early,
    apply_common_arguments,
    non_negative_int,
    positive_int,
    run_main,
)

UNIT = "amplitude of the wave"  # in which eps and radius are: that of the input
CELLS = ("lstm", "gru", "rnn")
EPOCHS = 20  # unless told otherwise


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--cell", choices=CELLS, default="lstm", help="recurrent layer")
    parser.add_argument("--epochs", type=non_negative_int, help=f"passes over the training data (default: {EPOCHS})")
    parser.add_argument("--weights", type=Path, help="load this state dict (torch, safetensors) instead of training")
    parser.add_argument("--save-weights", type=Path, help="write the state dict after training")
    add_question(parser)
    parser.add_argument("--samples", type=positive_int, default=20, help="test sequences to certify")
    parser.add_argument("--save-certificates", type=Path, metavar="FOLDER", help="for scripts/check_certificate.py")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of every random choice")
    parser.add_argument("--device", default="cpu", help="torch device: cpu, cuda or cuda:K")
    parser.add_argument("--cuda", action="store_true", help="short for --device cuda")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--dry-run", action="store_true", help="go through one tiny step and write nothing")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from torch import Tensor, nn

from utils.certify.certificate import save_certificates
from utils.network.checkpoint import load_weights
from utils.network.models import SequenceClassifier
from utils.own.loading import load_array
from utils.own.run import OwnRun
from utils.runs.ranks import ALONE
from utils.runs.work import batches

NUM_FRAMES, FRAME_SIZE, NUM_CLASSES, HIDDEN_SIZE = 8, 4, 3, 16


def load_data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """YOUR DATA: sequences (count, T, n) of floats, labels (count,) of integers. Here: sine, square, saw-tooth."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    phase = torch.rand(count, 1, generator=generator)
    time = (2 * torch.linspace(0, 1, NUM_FRAMES * FRAME_SIZE) + phase) % 1
    shapes = torch.stack(((2 * math.pi * time).sin(), (time < 0.5) * 2.0 - 1.0, 2 * time - 1), dim=1)
    waves = shapes[torch.arange(count), labels] + 0.1 * torch.randn(time.shape, generator=generator)
    return waves.reshape(count, NUM_FRAMES, FRAME_SIZE), labels


def build(cell: str) -> SequenceClassifier:
    """YOUR MODEL: any nn.LSTM, nn.GRU or nn.RNN with batch_first=True under an nn.Linear.

    If your inputs are normalised, give mean= and std= here and raw inputs in load_data: eps is in raw units then.
    """
    rnn = getattr(nn, cell.upper())(FRAME_SIZE, HIDDEN_SIZE, num_layers=1, batch_first=True)
    return SequenceClassifier(rnn, nn.Linear(HIDDEN_SIZE, NUM_CLASSES))


def train(model: nn.Module, x: Tensor, labels: Tensor, epochs: int) -> None:
    """A plain training loop. Weight decay makes weights smaller and radii larger."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(50):
            loss = nn.functional.cross_entropy(model(x[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main() -> None:
    args = get_args()
    check_arguments(args)
    if args.save_certificates and args.target is not None:
        raise ValueError("--save-certificates is against all other classes: leave out --target")
    device = apply_common_arguments(args)
    if args.weights and args.epochs is not None:
        raise ValueError("--epochs is for training, and --weights is loaded instead: leave out one of them")
    model = build(args.cell)
    if args.weights:
        load_weights(model, args.weights)
    model = model.to(device)
    if not args.weights:
        x, labels = load_data(600, seed=args.seed + 1)
        train(
            model,
            x.to(device),
            labels.to(device),
            1 if args.dry_run else EPOCHS if args.epochs is None else args.epochs,
        )
    if args.save_weights and not args.dry_run:
        torch.save({name: value.cpu() for name, value in model.state_dict().items()}, args.save_weights)
    x, labels = (part.to(device) for part in load_data(1 if args.dry_run else args.samples, seed=args.seed + 2))
    model.eval()
    with torch.no_grad():
        correct = model(x).argmax(dim=1) == labels
    args.model, args.data, args.N = Path(__file__).name, "load_data", len(x)
    args.batch_size = args.batch_size or 20
    run = OwnRun(args, model, x, labels, None if args.scales is None else load_array(args.scales, "--scales"))
    rows = [row for batch in batches(len(run.keys), args.batch_size) for row in run.search(batch)]
    radius = torch.zeros(len(x), dtype=torch.float64, device=device)
    for row in rows:
        radius[row.index] = row.radius
    print(f"{int(correct.sum())} of {len(x)} classified correctly; certified radii in l_{args.p:g}, {UNIT}:")
    print("sequence  label      radius")
    for number, (label, value) in enumerate(zip(labels.tolist(), radius.tolist(), strict=True)):
        print(f"{number:8d}  {label:5d}  {value:10.6f}")
    print(f"mean {radius.mean().item():.6f}, least {radius.min().item():.6f}; 0 means that nothing was proved")
    if args.save_certificates and not args.dry_run:
        threat = {"norm": args.p, "ball": args.ball, "frames": args.frames, "clip": args.clip}
        paths = save_certificates(args.save_certificates, model, x, labels, radius, method=args.method, **threat)
        print(f"{len(paths)} certificates: check them by python scripts/check_certificate.py {args.save_certificates}")
    if args.out_dir and run.keys and not args.dry_run:  # the rows as certified_bound.csv, with figures
        run.write(args.out_dir, run.record(device, {}), ALONE)


if __name__ == "__main__":
    run_main(main)
