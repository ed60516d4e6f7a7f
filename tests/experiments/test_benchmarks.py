"""Every benchmark runs tiny, from another folder, and writes what it says."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from mnist_files import ROOT, run_script, write_mnist_folder
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


@pytest.mark.parametrize("architecture", ("rnn", pytest.param("lstm", marks=pytest.mark.full)))
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


@pytest.mark.parametrize("net", ("mlp", pytest.param("cnn", marks=pytest.mark.full)))
def test_balls_beside_planes(net, tmp_path):
    """In a process of its own, as whatever trains: optimisers import parts of torch that can be imported only once."""
    write_mnist_folder(tmp_path)
    methods = ("ibp", *["ball"] * (net == "mlp"))
    flags = ("--data-dir", tmp_path, "--dry-run", "--net", net, "--methods", *methods)
    done = run_script("benchmarks/compare_balls.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{net}, norms at 1: False" in done.stdout
    assert all(f"| {method} |" in done.stdout for method in methods)


@pytest.mark.full
def test_splits_beside_bab(tmp_path):
    write_mnist_folder(tmp_path)
    flags = ("--data-dir", tmp_path, "--dry-run", "--models", "rnn_4_32_tanh", "--eps")
    done = run_script("benchmarks/compare_splits.py", *flags, "0.05", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cells = done.stdout.splitlines()[-1].split("|")
    curve, further, parts = float(cells[4]), float(cells[5]), int(cells[7])
    assert math.isfinite(curve) and math.isfinite(further) and parts > 1
    assert_one_line(call("benchmarks/compare_splits.py", *flags, "0.05", "0.1"), "--eps takes")


def test_chains_beside_samples(tmp_path):
    write_mnist_folder(tmp_path)
    flags = ("--data-dir", tmp_path, "--dry-run", "--models", "rnn_4_32_tanh", "--N", 1, "--samples", 5)
    done = call("benchmarks/compare_chains.py", *flags)
    assert done.code == 0, done.err
    sampled, *bounds = (float(cell) for cell in done.out.splitlines()[-2].split("|")[4:8])
    assert sampled > 0 and [sampled, *bounds] == sorted([sampled, *bounds])
    assert done.out.splitlines()[-1].endswith("0 of 2 cases")


def test_training_steps_are_timed():
    tiny = ("--cells", "rnn", "--hidden-size", 3, "--time-step", 2, "--batch-size", 4, "--repetitions", 1)
    done = call("benchmarks/time_training_step.py", *tiny)
    assert done.code == 0, done.err
    assert [line.split()[:2] for line in done.out.splitlines()[2:]] == [
        ["rnn", name] for name in ("plain", "ibp", "crown-ibp", "sabr")
    ]


def test_memory_of_convolutional_networks():
    tiny = ("--width", 2, "--batch-size", 1)
    done = call("benchmarks/measure_cnn_memory.py", *tiny, "--models", "resnet", "--methods", "ibp", "crown")
    assert done.code == 0, done.err
    by_method = {cells[1]: cells for cells in (line.split(" | ") for line in done.out.splitlines()[2:])}
    assert set(by_method) == {"ibp", "crown"} and float(by_method["crown"][5]) >= 1
    assert float(by_method["ibp"][7]) <= float(by_method["crown"][7]) <= float(by_method["crown"][8])
    step = ("--training", "--tasks", "ImageNet 32", "--losses", "crown-ibp")
    done = call("benchmarks/measure_cnn_memory.py", *tiny, *step, "--models", "small")
    assert done.code == 0, done.err
    assert done.out.splitlines()[1].startswith("small | ImageNet 32 | crown-ibp | ")


def test_training_for_a_time(tmp_path):
    write_mnist_folder(tmp_path)
    tiny = ("--hidden-size", 4, "--N", 5, "--data-dir", tmp_path, "--dry-run", "--threads", 1)
    done = call("benchmarks/train_for_a_time.py", *tiny)
    assert done.code == 0, done.err
    assert "steps in 1 s; 5 images of mnist: clean" in done.out and "up to crown" in done.out


def test_times_of_readings():
    done = call("benchmarks/time_readings.py", "--steps", 2, "--hidden-size", 3, "--repetitions", 1)
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["LSTM", "GRU", "RNN", "LSTM", "MLP"]
    assert all(float(row[-3]) > float(row[-2]) > 0 for row in rows)  # the first takes longer than later ones


def test_constructs_are_read_and_attacked():
    command = [sys.executable, str(ROOT / "benchmarks" / "read_constructs.py"), "--only", "RMSNorm written"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 read; outputs outside their bounds: 0" in done.stdout
