"""Which test images keep their class at one eps: certified, falsified by a counter-example, or unknown in time.

    python scripts/decide.py --model lstm_4_32 --p inf --eps 0.02 --N 20 --time-limit 10
    python scripts/decide.py --model lstm_4_32 --p inf --eps 0.02 --clip --targeted --resume
    python scripts/decide.py --model lstm_4_32 --p 0 --k 2                  # two pixels of every slice change
    python scripts/decide.py --dataset cifar10 --data-dir FOLDER --model cnn_small_16 --p inf --eps 0.001
    python scripts/decide.py --model my_model.py:Net --weights w.pt --data x.npy --labels y.npy --p inf --eps 0.1
    torchrun --nproc-per-node 2 scripts/decide.py --model lstm_4_32 --p 2 --eps 0.2 --N 100

Images are decided one after the other: an attack looks for a counter-example, then bounds that take longer and longer
try to exclude one, until --time-limit is up. An image that the model misclassifies is its own counter-example, whatever
its target. Counter-examples are saved beside verdicts.csv, and a row is written only after its file was read again and
evaluated anew; a file that does not hold what it should stops the script with exit code 3.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.choices import TIME_LIMIT
from utils.experiments.arguments import (
    add_clip_argument,
    add_norm_arguments,
    check_arguments,
    settle_clip,
    valid_range,
)
from utils.experiments.table_arguments import MODELS_DIR
from utils.own.arguments import add_own_data, check_own_data
from utils.runs.cli import (
    ROOT,
    ArgumentParser,
    ContradictionError,
    add_common_arguments,
    answer_early,
    apply_common_arguments,
    positive_float,
    positive_int,
    run_main,
    utc_now,
)
from utils.training.datasets import add_dataset_argument, load_images


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        required=True,
        help=f"folder in {MODELS_DIR.relative_to(ROOT)}, or the path of a checkpoint, or a model of your own",
    )
    add_dataset_argument(parser)
    group = parser.add_argument_group("what is decided")
    group.add_argument("--eps", type=positive_float, help="how far every frame may move, in the units of the input")
    add_norm_arguments(group)
    add_clip_argument(group)
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--targeted", action="store_true", help="against one random other class an image")
    kind.add_argument(
        "--untargeted", dest="targeted", action="store_false", help="against all other classes (this is the default)"
    )
    parser.set_defaults(targeted=False, together=None)
    group.add_argument(
        "--N", type=positive_int, default=20, help="test images drawn, or first inputs of --data, the misclassified too"
    )
    group = parser.add_argument_group("how")
    group.add_argument(
        "--time-limit", type=positive_float, default=TIME_LIMIT, help="seconds an image, attack and tuning included"
    )
    group.add_argument("--resume", action="store_true", help="continue an interrupted run of the same arguments")
    group.add_argument("--overwrite", action="store_true", help="replace results of another run in the folder")
    group.add_argument("--out-dir", type=Path, help="folder of the results (default: P_norm_verdicts beside the model)")
    add_own_data(parser)
    add_common_arguments(parser)
    args = parser.parse_args()
    wanted = "--k, with --p 0" if args.p == 0.0 else "--eps"
    if (args.eps is None) == (args.k is None) or (args.p == 0.0) != (args.k is not None):
        parser.error(f"a decision is at one size: give {wanted}, and nothing else")
    args.eps = float(args.k) if args.k else args.eps
    return args


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from torch import Tensor

from utils.attack.attack_file import replay_attack, save_attack
from utils.attack.pgd import VERDICT, AttackProblem, AttackResult
from utils.certify.bab import VERDICTS, decide
from utils.experiments.table_run import make_record
from utils.experiments.tables import Case, load_all_images, norm_text
from utils.experiments.wording import describe_goal, describe_threat, drawn_text, is_own, noun_of, unit_of
from utils.graph import Graph
from utils.own.case import own_case
from utils.own.run import classes_of
from utils.runs.ranks import Ranks, joined
from utils.runs.results import Record, check_writable, digest, exclusive, read_record
from utils.runs.rows import KeyedRow
from utils.runs.work import Job, find_rows

CSV_NAME, EXAMPLES_NAME = "verdicts.csv", "counterexamples"
DRY_SECONDS = 1.0  # at most, for the only image of a dry run


@dataclass(frozen=True)
class VerdictKey:
    """A test image, its class and the model's, the class to keep away from ("all" for every other), and eps."""

    index: int
    label: int
    prediction: int
    target: int | str
    eps: float

    @property
    def misclassified(self) -> bool:
        return self.prediction != self.label


@dataclass(frozen=True)
class VerdictRow(VerdictKey, KeyedRow):
    """What was found for an image.

    Attributes:
        verdict: "certified", "falsified" or "unknown".
        margin: the worst margin (label's logit less another's): of a falsified image that of the counter-example,
            otherwise a lower bound over all perturbations, -inf if time was up before there was one.
        seconds: of the clock.
    """

    KEY: ClassVar[type] = VerdictKey

    verdict: str
    margin: float
    seconds: float


def described(args: argparse.Namespace, num_frames: int) -> argparse.Namespace:
    """The flags as those of a bound script, for its checks and words. Raises ValueError if they contradict."""
    flags = {"per_frame": False, "frames": None, "ball": "frame", "save_certificate": False, "together": None}
    flags |= {"untargeted": not args.targeted, "target": None, "p": args.p, "clip": args.clip, "k": args.k}
    flags |= {"data": args.data}
    flags["method"] = "alpha" if args.p == 0.0 else "bab"
    threat = argparse.Namespace(**flags, time_step=num_frames)
    check_arguments(threat)
    return threat


def result_folder(case: Case, args: argparse.Namespace) -> Path:
    """--out-dir, or beside the checkpoint inf_norm_verdicts, inf_norm_verdicts_targeted_clip ..."""
    words = [f"{args.p:g}_norm_verdicts", *["targeted"] * args.targeted, *["clip"] * bool(args.clip)]
    return args.out_dir or case.path.parent / "_".join(words)


class Run:
    """The rows of a run, how they are found, and the counter-examples that belong to them."""

    def __init__(self, case: Case, args: argparse.Namespace):
        self.case, self.args = case, args
        self.threat: dict[str, Any] = {"norm": args.p, "clip": valid_range(args)}
        # Files hold CPU tensors, so that they can be read anywhere.
        self.replica = case.model if isinstance(case.model, Graph) else copy.deepcopy(case.model).cpu()
        self.examples: dict[int, AttackResult] = {}  # found and not saved yet, by sample
        attacked = AttackProblem(case.model, case.x, case.labels, extra=case.extra)
        self.frames = attacked.balls.x  # (n, T, values a frame), float64
        predictions = classes_of(attacked.logits(self.frames)).tolist()
        targets = ["all"] * len(case) if case.targets is None else case.targets.tolist()
        facts = zip(case.index.tolist(), case.labels.tolist(), predictions, targets, strict=True)
        self.keys = [VerdictKey(*values, args.eps) for values in facts]

    def jobs(self) -> list[Job]:
        return [Job([key], partial(self.rows, sample)) for sample, key in enumerate(self.keys)]

    def targets(self, sample: int) -> Tensor | None:
        """Against whom a sample is decided: a misclassified one has failed against some class, if not its target."""
        untargeted = self.case.targets is None or self.keys[sample].misclassified
        return None if untargeted else self.case.targets[sample : sample + 1]

    def rows(self, sample: int, most_seconds: float = math.inf) -> list[VerdictRow]:
        """The row of one sample; its counter-example waits in ``examples``."""
        started = time.perf_counter()
        key, own = self.keys[sample], slice(sample, sample + 1)
        inputs, targets = (self.case.model, self.case.x[own], self.case.labels[own]), self.targets(sample)
        verdict, margin, example = "falsified", math.nan, self.frames[sample]
        extra = self.case.extra.part(own)
        if not key.misclassified:
            effort = {"time_limit": min(self.args.time_limit, most_seconds), "seed": self.args.seed}
            (found,) = decide(*inputs, self.args.eps, targets=targets, extra=extra, **effort, **self.threat)
            verdict, margin, example = found.verdict, float(found.margins.min()), found.counterexample
        if example is not None:
            example = example[None].to(VERDICT)
            worst = AttackProblem(*inputs, targets=targets, extra=extra).worst_margin(example)
            self.examples[sample] = AttackResult(example.cpu(), worst.cpu())
            margin = worst.item()
        return [VerdictRow(**vars(key), verdict=verdict, margin=margin, seconds=time.perf_counter() - started)]

    def save_examples(self, rows: Sequence[VerdictRow], folder: Path) -> None:
        """Write the rows' counter-examples to a folder and check the files. Raises ContradictionError."""
        for row in rows:
            sample = self.keys.index(row.key)
            if row.verdict == "falsified":
                folder.mkdir(exist_ok=True)
                path = folder / f"{row.index:05d}.pt"
                x, labels = (values[sample : sample + 1].cpu() for values in (self.case.x, self.case.labels))
                targets = self.targets(sample)
                targets = None if targets is None else targets.cpu()
                extra = self.case.extra.part(slice(sample, sample + 1)).to("cpu")
                save_attack(path, self.examples.pop(sample), x, labels, targets=targets, extra=extra, **self.threat)
                self.check_example(path)

    def check_example(self, path: Path) -> None:
        """Replay a saved counter-example. Raises ContradictionError if it does not break its image."""
        replay = replay_attack(path, self.replica)
        margin, size = replay.margin.item(), replay.size.item()
        if not (margin <= 0 and size <= self.args.eps and replay.valid.item()):
            facts = f"margin {margin:.6g}, size {size:.6g} at eps {self.args.eps:g}, valid: {replay.valid.item()}"
            raise ContradictionError(f"the counter-example {path} does not hold when it is replayed ({facts})")


def describe_run(args: argparse.Namespace, case: Case, source: str) -> Record:
    """What run.json says about the run."""
    threat = described(args, case.num_frames)
    record = make_record(args, [case], source, case.x.device)
    if not case.is_own:
        pixels = (255 * case.x).round().to(torch.uint8).cpu().numpy()
        record["data"]["drawn_sha256"] = digest([pixels.tobytes(), case.labels.cpu().numpy().tobytes()])
    return {"threat_model": describe_threat(threat), "goal": describe_goal(threat), "unit": unit_of(args)} | record


def summarize(rows: Sequence[VerdictRow]) -> Record:
    """How many images have each verdict; the misclassified are among the falsified."""
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS}
    misclassified = sum(row.misclassified for row in rows)
    seconds = math.fsum(row.seconds for row in rows) / len(rows)
    return {"images": len(rows)} | counts | {"misclassified": misclassified, "seconds_per_image": seconds}


def result_lines(rows: Sequence[VerdictRow], args: argparse.Namespace) -> list[str]:
    """A table of all images, and the verdicts counted."""
    line = "{:>6}{:>7}{:>12}{:>8}  {:<11}{:>13}{:>10}  {}"
    lines = [
        line.format(
            noun_of(args)[:-1], "label", "prediction", "target", "verdict", "worst margin", "seconds", ""
        ).rstrip()
    ]
    for row in rows:
        note = "misclassified without any perturbation" if row.misclassified else ""
        cells = (row.index, row.label, row.prediction, row.target, row.verdict)
        lines.append(line.format(*cells, f"{row.margin:.4g}", f"{row.seconds:.2f}", note).rstrip())
    return [*lines, summary_line(summarize(rows), args)]


def summary_line(summary: Record, args: argparse.Namespace) -> str:
    own = f" ({summary['misclassified']} of them misclassified as they are)" if summary["misclassified"] else ""
    unit, what = (unit_of(args), "inputs") if is_own(args) else ("pixel values in [0, 1]", "test images")
    size = f"eps {args.eps:g} ({unit}, a ball of this radius in {norm_text(args.p)} around every frame)"
    if args.p == 0.0:
        low, high = valid_range(args)
        size = f"{args.k} changed values (of every frame, to anything in [{low:g}, {high:g}])"
    return (
        f"{summary['certified']} certified, {summary['falsified']} falsified{own}, {summary['unknown']} unknown of "
        f"{summary['images']} {what} at {size}; {summary['seconds_per_image']:.2g} s per image, limit "
        f"{args.time_limit:g} s"
    )


def print_introduction(record: Record, case: Case, args: argparse.Namespace) -> None:
    print(f"{case.name} on {drawn_text(record['arguments'], record['data']['source'])}")
    print(f"perturbation: {record['threat_model']}")
    print(f"certified: {record['goal']}; eps is {args.eps:g} in {record['unit']}", flush=True)


def main() -> None:
    args = get_args()
    check_own_data(args, [args.model])
    settle_clip(args)
    device = apply_common_arguments(args)
    with joined(device) as ranks:
        if args.data:
            case, source = own_case(args.model, args, device, args.targeted), args.data
        else:
            data = load_images(args, train=False)
            case, source = load_all_images(args.model, data, args, device, targeted=args.targeted), data.source
        record = describe_run(args, case, source)
        run = Run(case, args)
        print_introduction(record, case, args)
        if args.dry_run:
            (row,) = run.rows(0, DRY_SECONDS)
            what = "input" if args.data else "image"
            print(f"dry run: {what} {row.index} is {row.verdict} within {DRY_SECONDS:g} s, nothing written")
            return
        folder = result_folder(case, args)
        check_writable(folder)
        with exclusive(folder, ranks):
            run_and_write(run, folder, record, ranks)


def run_and_write(run: Run, folder: Path, record: Record, ranks: Ranks) -> None:
    """Decide image by image, then count."""
    layout = {"csv_name": CSV_NAME, "derived": (), "attached": (EXAMPLES_NAME,), "ranks": ranks}
    save = partial(run.save_examples, folder=folder / EXAMPLES_NAME)
    layout |= {"resume": run.args.resume, "overwrite": run.args.overwrite}
    results = find_rows(folder, record, run.jobs(), kind=VerdictRow, before_writing=save, **layout)
    if ranks.first:
        results.finish(summarize(results.rows), utc_now())
        print("\n".join(result_lines(results.rows, run.args)))
        summary = read_record(folder)["summary"]
        also = f", {EXAMPLES_NAME}/ (replayed from their files)" if summary["falsified"] else ""
        print(f"results in {folder}: {CSV_NAME}, run.json{also}")


if __name__ == "__main__":
    run_main(main)
