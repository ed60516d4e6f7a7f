"""The tutorial's code blocks run in order, its ten lines are ten, and the template script works."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from mnist_files import ROOT, run_script
from test_bound_scripts import assert_one_line, call
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


def table(text: str) -> list[str]:
    """The lines of the template's table: sequence, label, radius."""
    return re.findall(r"^ *\d+ +\d+ +[\d.]+$", text, re.MULTILINE)


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_template_trains_and_certifies(cell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--cell", cell, "--epochs", 5, "--samples", 6, "--save-certificates", "proofs", "--threads", 1)
    if cell == "gru":
        result = run_script(TEMPLATE, *flags, cwd=tmp_path)
        code, out, err = result.returncode, result.stdout, result.stderr
    else:
        outcome = call(TEMPLATE, *flags)
        code, out, err = outcome.code, outcome.out, outcome.err
    assert code == 0 and err == "", err
    radii = [float(line.split()[-1]) for line in table(out)]
    assert len(radii) == 6 and max(radii) > 0
    checked = call("scripts/check_certificate.py", "proofs")
    assert checked.code == 0, checked


def test_template_saves_and_loads_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = call(TEMPLATE, "--epochs", 3, "--samples", 3, "--save-weights", "wave.pt")
    assert saved.code == 0, saved.err
    loaded = call(TEMPLATE, "--weights", "wave.pt", "--samples", 3)
    assert loaded.code == 0, loaded.err
    assert table(loaded.out) == table(saved.out) != []
    assert_one_line(call(TEMPLATE, "--weights", "none.pt"), "none.pt")
    assert_one_line(call(TEMPLATE, "--weights", "wave.pt", "--cell", "gru"), "wave.pt")
    assert_one_line(call(TEMPLATE, "--p", "3"), "norm")


def test_template_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = call(TEMPLATE, "--dry-run", "--save-certificates", "proofs", "--save-weights", "w.pt")
    assert outcome.code == 0, outcome.err
    assert list(tmp_path.iterdir()) == []


def test_howto_runs():
    torch.manual_seed(0)
    model = SequenceClassifier(nn.RNN(4, 5, batch_first=True), nn.Linear(5, 3))
    x = torch.rand(3, 3, 4)
    names = {"model": model, "x": x, "labels": model(x).argmax(dim=1)}
    for code in blocks("howto.md", "python"):
        exec(compile(code, "howto.md", "exec"), names)
    assert names["margins"].shape == (3, 2)
    for name in ("first", "some", "masked", "clipped", "l1", "together", "targeted", "padded"):
        assert bool((names[name] > 0).any()), name
    assert names["objective"].measure(names["mlp"], names["inputs"], names["classes"])["verified"] > 0.2


def test_pages_link_to_files_that_exist():
    for page in ("tutorial.md", "howto.md", "extending.md", "certificates.md"):
        text = (ROOT / "docs" / page).read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (ROOT / "docs" / target).exists(), (page, target)
        for path in re.findall(r"(?:scripts|utils|tests|lstm|gru|vanilla_rnn)/[\w/]+\.(?:py|sh)", text):
            assert (ROOT / path).exists(), (page, path)
