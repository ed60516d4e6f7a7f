"""Small MNIST folders and a way to run scripts, for the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write unsigned bytes in the IDX format of MNIST."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def write_mnist_folder(folder: Path, train: int = 200, test: int = 50) -> Path:
    """Make folder/MNIST/raw with random images whose label shows as a bright row; returns folder."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, size in (("train", train), ("t10k", test)):
        labels = np.arange(size) % 10
        images = generator.integers(0, 60, (size, 28, 28))
        images[np.arange(size), 2 * labels] = 255
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
    return folder


def run_script(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script of the repository, named relative to its root, from the folder cwd on one thread."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def assert_one_line_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and exactly one line on stderr, which contains the words."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    for word in words:
        assert word in result.stderr
