"""Verify a VNN-LIB property of an ONNX network, or all instances of a list, by the conventions of VNN-COMP.

    python scripts/verify.py --onnx net.onnx --vnnlib robust.vnnlib --timeout 60 --out result.txt
    python scripts/verify.py --instances benchmark/instances.csv --results results.csv

Prints sat (with a counter-example, checked in float64 and by onnxruntime), unsat (proved), unknown or timeout. --out
gets the same, followed by the counter-example. A list has rows onnx,vnnlib,timeout, with paths from its own folder;
every row of the results is written as soon as it is known. What fails in a row is that row's error; the exit code is 2
then.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import (
    ArgumentParser,
    answer_early,
    describe_error,
    non_negative_int,
    positive_float,
    positive_int,
    run_main,
)


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="the network")
    parser.add_argument("--vnnlib", type=Path, metavar="FILE", help="the property")
    parser.add_argument(
        "--timeout",
        type=positive_float,
        help="seconds per instance, from the reading of its files on (default: 60, or the list's own)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the result and counter-example are written")
    parser.add_argument("--instances", type=Path, metavar="CSV", help="a list of instances, in place of a single one")
    parser.add_argument(
        "--results", type=Path, metavar="CSV", help="results of the list; counter-examples lie beside it"
    )
    parser.add_argument("--resume", action="store_true", help="go on with results that are there already")
    parser.add_argument(
        "--input-shape", type=positive_int, nargs="+", metavar="N", help="of the network, if the file leaves axes open"
    )
    parser.add_argument("--no-split", action="store_true", help="split neither neurons nor boxes")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of the attack's starts")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--dry-run", action="store_true", help="read the files and write nothing")
    args = parser.parse_args()
    single, listed = (args.onnx, args.vnnlib), (args.instances, args.results)
    if not (all(single) and not any(listed)) and not (all(listed) and not any((*single, args.out))):
        parser.error("give --onnx and --vnnlib (and --out), or --instances and --results")
    return args


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch

from utils.bounds.memory import layer_table
from utils.certify.verify import Verdict, Verifier
from utils.certify.vnnlib import counter_example, read_vnnlib
from utils.clock import now
from utils.network.onnx_graph import OnnxNetwork, import_onnx, read_onnx
from utils.runs.results import replacing

COLUMNS = ("onnx", "vnnlib", "timeout", "result", "seconds", "boxes", "message")
DEFAULT_TIMEOUT = 60.0


def verify(args: argparse.Namespace, onnx: Path, vnnlib: Path, timeout: float, networks: dict) -> Verdict:
    """Read and verify one instance; reading counts towards its time."""
    deadline = now() + timeout
    try:
        prop = read_vnnlib(vnnlib, deadline)
        key = (onnx, prop.num_inputs)
        if key not in networks:
            networks.clear()  # lists are ordered by network as a rule
            shape, count = args.input_shape, prop.num_inputs
            networks[key] = read_onnx(onnx, shape=shape, num_inputs=count, deadline=deadline)
        verifier = Verifier(networks[key], prop, deadline, split=not args.no_split, seed=args.seed)
    except TimeoutError:
        return Verdict("timeout")
    if args.dry_run:
        rows = max((sum(len(limits) for _, limits in case.conjunctions) for case in prop.cases), default=1)
        print(*layer_table(networks[key].graph, max(rows, 1), torch.float64), sep="\n")
        return Verdict("unknown")
    return verifier.run()


def write_result(path: Path, verdict: Verdict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = verdict.result + "\n"
    if verdict.x is not None:
        text += counter_example(verdict.x, verdict.y)
    with replacing(path) as temporary:
        temporary.write_text(text)


def read_instances(path: Path) -> list[tuple[str, str, float]]:
    """Rows of a list. Raises ValueError if one is not onnx,vnnlib,timeout."""
    instances = []
    with path.open(newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if not row:
                continue
            try:
                onnx, vnnlib, timeout = (cell.strip() for cell in row)
                instances.append((onnx, vnnlib, positive_float(timeout)))
            except (ValueError, argparse.ArgumentTypeError):
                raise ValueError(f"{path}: row {number} is not onnx,vnnlib,timeout") from None
    if not instances:
        raise ValueError(f"{path} holds no instances")
    return instances


def finished_rows(path: Path, resume: bool) -> list[dict]:
    """Rows of results that are there already; what an interruption left of a row is cut off."""
    if not path.exists() or path.stat().st_size == 0:
        return []
    if not resume:
        raise ValueError(f"{path} exists: go on with it by --resume, or name another file")
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.DictReader(whole.splitlines()))
    if whole and whole.splitlines()[0] != ",".join(COLUMNS):
        raise ValueError(f"{path} holds no results of this script")
    if whole != text:
        with replacing(path) as temporary:
            temporary.write_text(whole)
    return rows


def run_list(args: argparse.Namespace) -> bool:
    """Verify every instance that has no result yet. Returns whether all could be read."""
    instances, root = read_instances(args.instances), args.instances.resolve().parent
    done = finished_rows(args.results, args.resume)
    keys = [(onnx, vnnlib, f"{args.timeout or timeout:g}") for onnx, vnnlib, timeout in instances]
    if [(row["onnx"], row["vnnlib"], row["timeout"]) for row in done] != keys[: len(done)]:
        raise ValueError(f"{args.results} holds results of another list, or with other timeouts")
    if args.dry_run:
        print(f"{len(instances)} instances, {len(done)} of them finished")
        return True
    args.results.parent.mkdir(parents=True, exist_ok=True)
    networks: dict[tuple[Path, int], OnnxNetwork] = {}
    counts: dict[str, int] = {}
    for row in done:
        counts[row["result"]] = counts.get(row["result"], 0) + 1
    with args.results.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if args.results.stat().st_size == 0:
            writer.writeheader()
        for number, (onnx, vnnlib, timeout) in list(enumerate(keys))[len(done) :]:
            started = now()
            try:
                verdict = verify(args, root / onnx, root / vnnlib, float(timeout), networks)
            except Exception as error:  # whatever it is, the rows that follow have a right to their own verdicts
                verdict = Verdict("error", note=describe_error(error))
            seconds = now() - started
            if verdict.x is not None:
                write_result(args.results.with_name(f"{args.results.stem}_counterexamples") / f"{number}.txt", verdict)
            cells = (onnx, vnnlib, timeout, verdict.result, f"{seconds:.3f}", verdict.boxes, verdict.note)
            writer.writerow(dict(zip(COLUMNS, cells, strict=True)))
            file.flush()
            os.fsync(file.fileno())
            counts[verdict.result] = counts.get(verdict.result, 0) + 1
            print(
                f"{number + 1}/{len(keys)} {onnx} {vnnlib}: {verdict.result} ({seconds:.2f} s) {verdict.note}".rstrip(),
                flush=True,
            )
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    return "error" not in counts


def main() -> None:
    args = get_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    import_onnx()  # which takes seconds: before the clock of the first row
    if args.instances is not None:
        if not run_list(args):
            sys.exit(2)
        return
    started = now()
    verdict = verify(args, args.onnx, args.vnnlib, args.timeout or DEFAULT_TIMEOUT, {})
    if args.dry_run:
        print("network and property can be read")
        return
    if args.out is not None:
        write_result(args.out, verdict)
    print(verdict.result)
    if verdict.x is not None:
        print(counter_example(verdict.x, verdict.y), end="")
    if verdict.note:
        print(f"note: {verdict.note}", file=sys.stderr)
    print(f"{now() - started:.2f} s, {verdict.boxes} boxes bounded", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
