"""The page on padded text: its code runs in order."""

from __future__ import annotations

import torch
from test_tutorial import blocks


def test_the_page_runs(capsys):
    names: dict = {}
    for code in blocks("padded_text.md", "python"):
        exec(compile(code, "padded_text.md", "exec"), names)
    model, text, labels = (names[name] for name in ("model", "text", "labels"))
    assert (model(text).argmax(dim=1) == labels).all() and (names["radius"] > 0).all()
    assert [one.verdict for one in names["verdicts"]] == ["certified"] * 3
    assert len(set((text != 0).sum(dim=1).tolist())) > 1
    assert torch.isfinite(names["margin"]).all()
    assert "3 3" in capsys.readouterr().out
