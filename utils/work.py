"""The loop of a run: jobs whose rows are missing are shared among the processes, and rows written as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from utils.results import ResultFolder
from utils.rows import KeyedRow


@dataclass(frozen=True)
class Job:
    """A piece of work that gives the rows of some keys, in their order.

    A job is always done as a whole, whichever of its rows are there already: samples that are bounded together move
    the last digits of each other's radii.
    """

    keys: Sequence[Hashable]
    compute: Callable[[], Sequence[KeyedRow]]


def work_through(
    results: ResultFolder, jobs: Sequence[Job], before_writing: Callable[[Sequence[KeyedRow]], None] | None = None
) -> None:
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
