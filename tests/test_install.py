"""`pip install .` and `-e`: the same modules under a name of their own, beside a user's own utils and data."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig

import pytest
from mnist_files import ROOT

USER = """
import utils
import data
import torch
from torch import nn
from seqcert.certify import certified_radius, save_certificates
from seqcert.models import SequenceClassifier
import seqcert.attack, seqcert.bounds, seqcert.network, seqcert.certify.verify

assert utils.MINE and data.MINE
torch.manual_seed(0)
model = SequenceClassifier(nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2))
x = torch.rand(2, 3, 3)
print(certified_radius(model, x, model(x).argmax(dim=1)).tolist())
"""


@pytest.mark.parametrize("flags", [(), ("-e",)], ids=["installed", "editable"])
def test_installed_beside_a_users_own_utils(tmp_path, flags):
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(ROOT / "utils", clone / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    # What the tests run with lies on the path: torch need not be installed once more.
    environment = {"PATH": "", "PYTHONPATH": sysconfig.get_paths()["purelib"], "HOME": str(tmp_path)}
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", *flags, clone]
    done = subprocess.run(install, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    user = tmp_path / "user"
    user.mkdir()
    for name in ("utils", "data"):
        (user / f"{name}.py").write_text("MINE = True\n")
    (user / "main.py").write_text(USER)
    done = subprocess.run([python, user / "main.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split(",")) == 2 and "0.0" not in done.stdout.split(",")


def test_dependencies_are_those_of_the_requirements():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted, name in (("dependencies", "requirements.txt"), ("onnx", "requirements-onnx.txt")):
        lines = {line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()}
        assert set(project.get(wanted) or project["optional-dependencies"][wanted]) <= lines
