"""Train on from the best of several short certified trainings: what they come to differs by their seeds, and stays so.

    python scripts/train_from_best.py --starts 8 --start-epochs 40 --epochs 60 -- \\
        vanilla_rnn/train_rnn_mnist_classifier.py --time-step 7 --hidden-size 64 --certified ibp --train-eps 0.1

What follows a lone -- is a training script and its flags, those of all of them. Short trainings go through the whole
schedule; the one with most images verified of those held back goes on with balls that are full from the first step.
It can go on with fewer units: --first "--hidden-size 256" --last "--start-size 256". Seeds are those from
``seed * starts`` on. The same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.experiments.table_arguments import MODELS_DIR
from utils.runs.cli import ROOT, ArgumentParser, answer_early, non_negative_int, positive_int, run_main

Command = list[str]
FULL = ("--clean-share", "0", "--ramp-share", "0")


def get_args(given: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--starts", type=positive_int, default=8, help="short trainings, of which one goes on")
    parser.add_argument("--start-epochs", type=positive_int, default=40, help="epochs of each")
    parser.add_argument("--epochs", type=positive_int, default=60, help="epochs of the one that goes on")
    parser.add_argument(
        "--first", type=shlex.split, default=[], metavar="FLAGS", help="more flags of the short ones, quoted"
    )
    parser.add_argument("--last", type=shlex.split, default=[], metavar="FLAGS", help="more flags of that one, quoted")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of all: others have other starts")
    parser.add_argument("--jobs", type=positive_int, default=1, help="short trainings at once; give them --threads too")
    parser.add_argument("--save-dir", type=Path, default=MODELS_DIR, help="folder of the model's folder")
    parser.add_argument("--starts-dir", type=Path, default=ROOT / "models" / "starts", help="folder of the short ones")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    parser.add_argument("training", nargs="+", help="a training script and its flags, after --")
    return parser.parse_args(given)


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from utils.network.checkpoint import load_checkpoint
from utils.runs.results import digest


def start_commands(args: argparse.Namespace) -> list[tuple[Path, Command]]:
    """The short trainings, each with the folder that it saves in: other flags have others."""
    training = [*args.training, *args.first]
    folder = args.starts_dir / digest(["\0".join([*training, str(args.start_epochs)]).encode()])[:12]
    found = []
    for seed in range(args.seed * args.starts, (args.seed + 1) * args.starts):
        own = folder / f"seed_{seed}"
        flags = ["--epochs", str(args.start_epochs), "--seed", str(seed), "--save-dir", str(own), "--resume"]
        found.append((own, [*training, *flags]))
    return found


def last_command(args: argparse.Namespace, start: str) -> Command:
    """The training that goes on from a checkpoint."""
    flags = ["--epochs", str(args.epochs), "--seed", str(args.seed), "--save-dir", str(args.save_dir), "--resume"]
    return [*args.training, *FULL, *args.last, "--start-from", start, *flags]


def run(command: Command, quiet: bool = False) -> None:
    """Run a training script in a process of its own; ``quiet`` leaves out what it prints, but not its errors."""
    out = subprocess.DEVNULL if quiet else None
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], stdout=out)
    if done.returncode != 0:
        raise ValueError("training failed: see above")


def checkpoint_in(folder: Path) -> Path | None:
    """The finished model of a short training, if there is one."""
    found = [path for path in folder.glob("*/*") if path.suffix == "" and path.is_file()]
    return found[0] if found else None


def finished(start: tuple[Path, Command]) -> tuple[float, Path]:
    """Share of the images held back that a short training's model is verified on, and its path; trained if need be."""
    folder, command = start
    if checkpoint_in(folder) is None:
        run(command, quiet=True)
    path = checkpoint_in(folder)
    if path is None:
        raise ValueError(f"the training left no model in {folder}: give --dry-run before the lone --")
    _, config = load_checkpoint(path)
    if "held_back_verified" not in config:
        raise ValueError(f"{path} comes from a training without --certified: there is nothing to choose by")
    verified = config["held_back_verified"]
    print(f"{folder.name}: {100 * verified:.1f} % of {config['held_back']} images held back are verified", flush=True)
    return verified, path


def all_finished(starts: list[tuple[Path, Command]], jobs: int) -> list[tuple[float, Path]]:
    """The short trainings, so many at once; none is begun after one has failed or was interrupted."""
    stop = threading.Event()

    def one(start: tuple[Path, Command]) -> tuple[float, Path] | None:
        if stop.is_set():
            return None
        try:
            return finished(start)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(one, starts))
        except BaseException:
            stop.set()
            raise


def main() -> None:
    args = get_args()
    starts = start_commands(args)
    if args.dry_run:
        for command in (*(command for _, command in starts), last_command(args, "THE_BEST_OF_THESE")):
            print(shlex.join(["python", *command]))
        return
    verified, best = max(all_finished(starts, args.jobs), key=lambda found: found[0])
    print(f"the best has {100 * verified:.1f} %: going on from {best}", flush=True)
    run(last_command(args, str(best)))


if __name__ == "__main__":
    run_main(main)
