"""Every benchmark runs tiny, from another folder, and writes what it says."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from mnist_files import ROOT
from test_bound_scripts import Outcome, assert_one_line, call

SCRIPT = ROOT / "benchmarks" / "benchmark_bounds.py"
TINY = ["--time-step", "2", "--hidden-size", "3", "--input-size", "3", "--batch-sizes", "2", "--frames-sweep", "1"]
TINY += ["--hidden-sweep", "2", "--sweep-batch", "2", "--repeats", "1"]


def run(folder: Path, *arguments: str, process: bool = False) -> Outcome:
    """In a process of its own, or in this one."""
    arguments = ("--results-dir", str(folder / "results"), *arguments)
    if not process:
        return call(str(SCRIPT), *arguments)
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("architecture", ("rnn", "lstm"))
def test_bounds_benchmark(tmp_path, architecture):
    done = run(tmp_path, "--architecture", architecture, *TINY, process=architecture == "rnn")
    assert done.code == 0, done.err
    (table,) = (tmp_path / "results").glob("*.csv")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + 1 + 1)
    shares = ("slope set-up", "intervals", "concretization", "matrix products", "element-wise", "python")
    for row in rows:
        assert float(row["bound_ms_per_sample"]) > 0 and float(row["search_ms_per_sample"]) > 0
        assert abs(sum(float(row[share]) for share in shares) - 1) < 1e-6
        assert float(row["slope set-up"]) > 0 and float(row["concretization"]) > 0 and float(row["peak_mib"]) > 0
    assert len(json.loads(table.with_suffix(".json").read_text())["rows"]) == len(rows)
    assert table.with_suffix(".png").stat().st_size > 1000
    assert table.stem in done.out


def test_bad_checkpoint_is_one_line(tmp_path):
    done = run(tmp_path, "--checkpoint", "nothing", *TINY)
    assert_one_line(done, "nothing")
    assert not (tmp_path / "results").exists()
