"""Radii that get no certificate are counted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from utils.experiments.mnist import Run


@pytest.mark.parametrize(("written", "said"), [(2, ""), (1, "1 of 3 radii have no certificate"), (0, "2 of 3 radii")])
def test_radii_without_a_certificate_are_counted(written, said, tmp_path, monkeypatch, capsys):
    """But for those of 0, which have none."""
    monkeypatch.setattr("utils.experiments.mnist.write_certificates", lambda *given: [tmp_path] * written)
    samples = SimpleNamespace(index=torch.tensor([4, 7, 9]))
    run = SimpleNamespace(
        samples=samples, frames=[None], problem_of=lambda rows, frame: SimpleNamespace(x=torch.zeros(3))
    )
    rows = [SimpleNamespace(index=index, frame=None, radius=radius) for index, radius in ((4, 0.1), (7, 0.0), (9, 0.2))]
    Run.save_certificates(run, rows, tmp_path)
    out = capsys.readouterr().out
    assert (said in out and out.count("\n") == 1) if said else out == ""
