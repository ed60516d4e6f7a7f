"""The tutorial's code blocks run in order, its ten lines are ten, and the template script works."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from mnist_files import ROOT, assert_one_line_error, run_script
from torch import nn

from utils.network.models import SequenceClassifier

TEMPLATE = "scripts/certify_my_model.py"


def blocks(name: str, language: str) -> list[str]:
    """The fenced code blocks of a page in docs/, or of README.md, in one language."""
    path = ROOT / name if name == "README.md" else ROOT / "docs" / name
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def test_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in blocks("tutorial.md", "python"):
        exec(compile(code, "tutorial.md", "exec"), names)
    assert names["accuracy"] > 0.9
    radius = names["radius"]
    assert (radius > 0).float().mean() > 0.9
    assert len(names["paths"]) == int((radius[:10] > 0).sum())
    assert "mean certified" in capsys.readouterr().out
    (command,) = blocks("tutorial.md", "bash")
    words = command.split()
    assert words[0] == "python"
    result = subprocess.run(
        [sys.executable, ROOT / words[1], *words[2:]], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("confirmed: ") == len(names["paths"])


@pytest.mark.parametrize("page", ["tutorial.md", "README.md"])
def test_ten_lines_are_enough(page):
    code = blocks(page, "python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, page, "exec"), {})


def table(result) -> list[str]:
    """The lines of the template's table: sequence, label, radius."""
    return re.findall(r"^ *\d+ +\d+ +[\d.]+$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_template_trains_and_certifies(cell, tmp_path):
    flags = ("--cell", cell, "--epochs", 5, "--samples", 6, "--save-certificates", "proofs", "--threads", 1)
    result = run_script(TEMPLATE, *flags, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    radii = [float(line.split()[-1]) for line in table(result)]
    assert len(radii) == 6 and max(radii) > 0
    checked = run_script("scripts/check_certificate.py", "proofs", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_template_saves_and_loads_weights(tmp_path):
    saved = run_script(TEMPLATE, "--epochs", 3, "--samples", 3, "--save-weights", "wave.pt", cwd=tmp_path)
    assert saved.returncode == 0, saved.stderr
    loaded = run_script(TEMPLATE, "--weights", "wave.pt", "--samples", 3, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    assert table(loaded) == table(saved) != []
    assert_one_line_error(run_script(TEMPLATE, "--weights", "none.pt", cwd=tmp_path), "none.pt")
    assert_one_line_error(run_script(TEMPLATE, "--weights", "wave.pt", "--cell", "gru", cwd=tmp_path), "wave.pt")
    assert_one_line_error(run_script(TEMPLATE, "--p", "3", cwd=tmp_path), "norm")


def test_template_dry_run_writes_nothing(tmp_path):
    result = run_script(TEMPLATE, "--dry-run", "--save-certificates", "proofs", "--save-weights", "w.pt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_howto_runs():
    torch.manual_seed(0)
    model = SequenceClassifier(nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3))
    x = torch.rand(3, 4, 4)
    names = {"model": model, "x": x, "labels": model(x).argmax(dim=1)}
    for code in blocks("howto.md", "python"):
        exec(compile(code, "howto.md", "exec"), names)
    assert names["margins"].shape == (3, 2)
    for name in ("first", "some", "masked", "clipped", "l1", "together", "targeted", "padded"):
        assert bool((names[name] > 0).any()), name


def test_pages_link_to_files_that_exist():
    for page in ("tutorial.md", "howto.md", "extending.md", "certificates.md"):
        text = (ROOT / "docs" / page).read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (ROOT / "docs" / target).exists(), (page, target)
        for path in re.findall(r"(?:scripts|utils|tests|lstm|gru|vanilla_rnn)/[\w/]+\.(?:py|sh)", text):
            assert (ROOT / path).exists(), (page, path)
