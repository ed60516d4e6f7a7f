"""Runs a bound script again and again, each time killed at a random point, and compares what the runs leave.

    python tests/kill_runs.py KILLS SEED SCRIPT FLAGS...

The script's modules are imported once; every run is a fork of this process, which kills it by SIGKILL: half of the runs
after a random time, the others before a random one of their own changes to files. Every run resumes the one before.
Exits with an error unless every run that came to its end left the same rows.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.mnist import load_mnist
from data.strokes import load_strokes
from utils.experiments import mnist as bounding
from utils.runs.cli import run_main
from utils.runs.results import FIGURES, replacing
from utils.runs.rows import split_row
from utils.steps import stroke_bounds, word_bounds

CHANGES = ("open", "os.remove", "os.rename", "os.mkdir", "os.rmdir")


def start(main, change: int | None) -> int:
    """Fork a run, which kills itself before its ``change``-th change to files."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        left = [change]

        def watch(event: str, arguments: tuple) -> None:
            writes = event in CHANGES and (event != "open" or (isinstance(arguments[1], str) and arguments[1] != "r"))
            if writes and left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        run_main(main)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        os._exit(code)


def write_figures(folder: Path) -> list[str]:
    """In place of drawing, which takes longer than the rest of a tiny run."""
    for name in FIGURES[:2]:
        with replacing(folder / name) as path:
            path.write_bytes(b"figure")
    return list(FIGURES[:2])


def rows_of(folder: Path) -> list[list[str]]:
    """What the CSV files hold, but for times."""
    rows = []
    for path in sorted(folder.rglob("*.csv")):
        lines = [split_row(line) for line in path.read_text(encoding="utf-8").splitlines()]
        kept = [n for n, name in enumerate(lines[0]) if not name.endswith("seconds")]
        rows += [[line[n] for n in kept] for line in lines]
    return rows


def main() -> None:
    kills, seed, script, *flags = sys.argv[1:]
    generator = random.Random(int(seed))
    spec = importlib.util.spec_from_file_location("bound_script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    bounding.plot_results = word_bounds.write_reports = stroke_bounds.write_figures = write_figures
    if "--data-dir" in flags:  # imports what reads it
        load = load_strokes if "stroke" in Path(script).name else load_mnist
        load(flags[flags.index("--data-dir") + 1])
    work = Path(flags[flags.index("--work-dir") + 1])
    sys.argv = [script, *flags]
    started = time.perf_counter()
    _, status = os.waitpid(start(module.main, None), 0)
    assert status == 0, "the run without a kill failed"
    duration = time.perf_counter() - started
    reference = rows_of(work)
    sys.argv = [script, *flags, "--resume"]
    killed = finished = resumed = 0
    fresh = True
    while killed < int(kills) or not finished:
        if fresh:
            for path in (path.parent for path in list(work.rglob("run.json"))):
                for file in path.iterdir():
                    file.unlink()
        enough = killed >= int(kills)
        by_time = generator.random() < 0.5 or enough
        child = start(module.main, None if by_time else generator.randrange(20))
        if by_time and not enough:
            time.sleep(generator.random() * duration)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        fresh = status == 0
        if os.WIFSIGNALED(status):
            killed += 1
            resumed += any(path.stat().st_size > 100 for path in work.rglob("certified_bound.csv"))
        else:
            assert status == 0, f"a resumed run ended with status {status}"
            finished += 1
            assert rows_of(work) == reference, "a resumed run gave other rows"
            left = [path.name for path in work.rglob("*") if path.name.startswith(".") or "part-" in path.name]
            assert not left, f"a finished run left {left}"
    print(f"killed {killed} times, {resumed} times with rows written, finished {finished} times")


if __name__ == "__main__":
    main()
