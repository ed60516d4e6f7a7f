"""The loop of a run: jobs whose rows are missing are shared among the processes, and rows written as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .bound_rows import Row
from .results import Record, ResultFolder, read_record
from .rows import KeyedRow

BeforeWriting = Callable[[Sequence[KeyedRow]], None]


@dataclass(frozen=True)
class Job:
    """A piece of work that gives the rows of some keys, in their order.

    A job is always done as a whole, whichever of its rows are there already: samples that are bounded together move
    the last digits of each other's radii.
    """

    keys: Sequence[Hashable]
    compute: Callable[[], Sequence[KeyedRow]]


def batches(total: int, size: int) -> list[list[int]]:
    """The numbers 0 ... total - 1 in groups of ``size`` that follow each other."""
    return [list(range(start, min(start + size, total))) for start in range(0, total, size)]


@contextmanager
def explained(where: str, size: int) -> Iterator[None]:
    """Make what a user can do something about a ValueError that says so; ``size`` is the --batch-size."""
    try:
        yield
    except ArithmeticError as error:
        raise ValueError(f"{where}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the device is out of memory: try a smaller --batch-size than {size}") from error


def find_rows(
    folder: Path,
    record: Record,
    jobs: Sequence[Job],
    *,
    kind: type[KeyedRow] = Row,
    resume: bool = False,
    overwrite: bool = False,
    before_writing: BeforeWriting | None = None,
    **layout,
) -> ResultFolder:
    """Do the jobs of a bound run whose rows are not in its folder yet, and say how many there were.

    ``layout`` goes to ``ResultFolder``, as do the others. In the end the first process has all rows.

    Raises:
        ResultError: the folder holds rows that this run will not make anew, and ``overwrite`` is not set.
    """
    keys = [key for job in jobs for key in job.keys]
    results = ResultFolder(folder, record, keys, kind=kind, resume=resume, **layout)
    if resume:
        print(f"resuming: {len(results.found)} of {len(keys)} rows are there", flush=True)
    elif not overwrite:
        say_what_is_replaced(results)
    work_through(results, jobs, before_writing)
    return results


def say_what_is_replaced(results: ResultFolder) -> None:
    """A line if rows lie in the folder. Raises ResultError if they must not be replaced without being asked for."""
    earlier, changes = results.replaced()
    if earlier and read_record(results.folder).get("status") == "running":
        print(f"note: this replaces {earlier} rows of an interrupted run (--resume would continue it)", flush=True)
    elif earlier:
        why = f" ({'; '.join(changes)})" if changes else ""
        print(f"note: this replaces {earlier} rows of an earlier run{why}", flush=True)


def work_through(results: ResultFolder, jobs: Sequence[Job], before_writing: BeforeWriting | None = None) -> None:
    """Do this process's share of the jobs that have missing rows, and merge what all have done.

    ``before_writing`` gets each job's new rows, after the folder is ready for them.
    """
    missing = set(results.missing)
    unfinished = [job for job in jobs if not missing.isdisjoint(job.keys)]
    share = results.ranks.share(unfinished)
    try:
        # disable=None: a bar on a terminal, silence in a log file, where only errors go to stderr
        off = None if results.ranks.first else True
        with tqdm(total=len(results.keys), initial=len(results.found), unit="row", disable=off) as progress:
            for job in share:
                rows = [row for row in job.compute() if row.key in missing]
                results.begin()
                if before_writing is not None:
                    before_writing(rows)
                results.append(rows)
                progress.update(len(rows) * results.ranks.world)
        if unfinished:
            results.begin()
    except KeyboardInterrupt:
        found = f"{len(results.found)} of {len(results.keys)} rows"
        print(f"{found} lie in {results.folder}; --resume continues", file=sys.stderr)
        raise
    results.merge()
