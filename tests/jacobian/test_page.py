"""The page on gradients runs as it stands, and says what holds."""

from __future__ import annotations

import re

import torch
from mnist_files import ROOT

from utils.certify import sampled_lipschitz


def test_the_snippet_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "lipschitz.md").read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(compile(code, "lipschitz.md", "exec"), names)
    assert len(capsys.readouterr().out.split("tensor(")) == 6  # all five that are printed
    below = sampled_lipschitz(names["model"], names["x"], 0.1, names["rows"], norm=2)
    assert bool((below.constant <= names["found"].constant * (1 + 1e-9)).all())
    assert bool((below.frames <= names["found"].frames * (1 + 1e-9)).all())
    assert torch.isfinite(names["found"].constant).all()
