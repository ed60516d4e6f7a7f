"""The run behind a table: rows found by one or several processes, resumed if need be, and what is drawn from them.

A table's folder holds rows.csv (a row for every sample), summary.csv, table.md and figure.png, which are made of the
rows, and run.json, which says what made them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ..attack.attack_file import save_attack
from ..attack.pgd import AttackResult
from ..runs.cli import ContradictionError, apply_common_arguments, git_commit, json_value, utc_now, versions
from ..runs.ranks import joined, world_size
from ..runs.results import (
    FREE_ARGUMENTS,
    Record,
    ResultFolder,
    check_writable,
    digest,
    exclusive,
    read_record,
    replacing,
)
from ..runs.rows import KeyedRow
from ..runs.work import Job, work_through
from ..training.datasets import load_images
from .plots import DPI
from .tables import Case, load_case, script_name, write_csv, write_lines
from .wording import drawn_text

ROWS_NAME, SUMMARY_NAME, TABLE_NAME, FIGURE_NAME = "rows.csv", "summary.csv", "table.md", "figure.png"
PATH_FLAGS = ("--data-dir", "--out-dir")


@dataclass(frozen=True)
class Report:
    """What is made of a table's rows: records of summary.csv, lines of table.md, and the figure."""

    summary: list[dict]
    lines: list[str]
    figure: Figure


@dataclass(frozen=True)
class Table:
    """A table's name (of its folder), the class of its rows, how they are found, and what is made of them."""

    name: str
    kind: type[KeyedRow]
    jobs: list[Job]
    report: Callable[[list[KeyedRow]], Report]


def run_table(args: argparse.Namespace, plan: Callable[[list[Case]], Table], load: Callable = load_case) -> None:
    """Find the rows of the table that ``plan`` makes of the cases that ``load`` reads, and write it.

    Raises:
        ValueError: arguments, checkpoints, data or earlier results do not fit; the message says which.
        OSError: a file cannot be read or the folder cannot be written.
        ContradictionError: two results cannot both be true; the evidence is in the folder.
    """
    device = apply_common_arguments(args)
    with joined(device) as ranks:
        own = getattr(args, "data", None)  # where a user's inputs lie
        data = None if own else load_images(args, train=False)
        cases = [load(name, data, args, device) for name in args.models]
        names = [case.name for case in cases]
        if len(set(names)) < len(names):
            raise ValueError("--models names two models of the same name")
        table = plan(cases)
        keys = [key for job in table.jobs for key in job.keys]
        if args.dry_run:
            print(f"dry run: {len(keys)} rows of {len(cases)} models would be found, nothing written")
            return
        folder = args.out_dir / table.name
        check_writable(folder)
        with exclusive(folder, ranks):
            results = ResultFolder(
                folder,
                make_record(args, cases, own or data.source, device),
                keys,
                kind=table.kind,
                csv_name=ROWS_NAME,
                derived=(SUMMARY_NAME, TABLE_NAME, FIGURE_NAME),
                resume=args.resume,
                ranks=ranks,
            )
            print(f"{len(keys)} rows, {len(results.found)} of them there already", flush=True)
            work_through(results, table.jobs)
            if ranks.first:
                results.finish({"rows": len(keys)}, utc_now())
                write_report(folder, table.report(results.rows))


def make_record(args: argparse.Namespace, cases: list[Case], source: str, device: torch.device) -> Record:
    """What run.json says about the run. Where data and output lie on this machine does not belong there."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    files = {case.name: case.path for case in cases}
    files |= {f"{case.name}, {file.name}": file for case in cases for file in case.files}
    own = {"drawn_sha256": digest(case.as_bytes() for case in cases)} if any(case.is_own for case in cases) else {}
    return {
        "command": command_line(),
        "arguments": {k: json_value(v) for k, v in sorted(vars(args).items()) if k not in FREE_ARGUMENTS},
        "checkpoints": {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()},
        "data": {"source": source} | own,
        "device": str(device),
        "machine": kind,
        "processes": world_size(),
        "versions": versions(),
        "commit": git_commit(),
        "started": utc_now(),
    }


def command_line() -> str:
    """The command that makes the table, with DATA for the data's folder."""
    words = [script_name(), *sys.argv[1:]]
    for flag, replacement in (("--data-dir", ["--data-dir", "DATA"]), ("--out-dir", [])):
        if flag in words:
            place = words.index(flag)
            words[place : place + 2] = replacement
    words = [word for word in words if word != "--resume"]
    start = "python" if world_size() == 1 else f"torchrun --nproc-per-node {world_size()}"
    return " ".join([start, *words])


def write_report(folder: Path, report: Report) -> None:
    record = read_record(folder)
    lines = [*report.lines, "", *origin(record)]
    write_csv(folder / SUMMARY_NAME, report.summary)
    write_lines(folder / TABLE_NAME, lines)
    with replacing(folder / FIGURE_NAME) as path:
        report.figure.savefig(path, dpi=DPI)
    print("\n".join(lines))


def origin(record: Record) -> list[str]:
    """Markdown lines that say what made the rows."""
    shared = f", {record['processes']} processes" if record["processes"] > 1 else ""
    arguments = record["arguments"]
    return [
        f"- command: `{record['command']}`",
        f"- made {record['finished'][:10]} at commit {(record['commit'] or 'unknown')[:10]}, torch "
        f"{record['versions']['torch']}, {record['machine']}{shared}",
        f"- {drawn_text(arguments, record['data']['source'])}",
    ]


def batch_jobs(
    cases: Sequence[Case],
    norms: Sequence[float],
    size: int,
    keys_of: Callable[[Case, float, int], Sequence[Hashable]],
    compute: Callable[[Case, float, list[int]], list[KeyedRow]],
) -> list[Job]:
    """A job for every model, norm and batch of ``size`` samples, in this order.

    ``keys_of`` gives the keys of one sample, ``compute`` finds the rows of a batch of them, in the same order.
    """
    jobs = []
    for case, norm in itertools.product(cases, norms):
        for start in range(0, len(case), size):
            batch = list(range(start, min(start + size, len(case))))
            keys = [key for sample in batch for key in keys_of(case, norm, sample)]
            jobs.append(Job(keys, partial(compute, case, norm, batch)))
    return jobs


def stop_by_contradiction(
    folder: Path, case: Case, sample: int, norm: float, attack: AttackResult, targeted: bool, facts: dict, **threat: Any
) -> None:
    """Save the attack on a sample, and what contradicts it, beside the rows, and raise ContradictionError.

    ``threat``: what differs from a ball around every frame, see ``save_attack``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"contradiction_{case.name}_l{norm:g}_{case.index[sample]}.pt"
    own = slice(sample, sample + 1)
    save_attack(
        path,
        attack,
        case.x[own],
        case.labels[own],
        norm=norm,
        targets=case.targets[own] if targeted else None,
        **threat,
    )
    facts = {"model": case.name, "index": int(case.index[sample]), "norm": f"{norm:g}"} | facts
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    words = ", ".join(f"{name} {value}" for name, value in facts.items())
    raise ContradictionError(f"a certificate is contradicted by an attack ({words}); both are saved as {path}")
