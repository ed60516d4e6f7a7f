"""docs/extending.md: a toy of every kind, added from outside; the bounds that come out are attacked by sampling."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from mnist_files import ROOT
from torch import Tensor

from utils.choices import ATTACKS, BALLS, METHODS, RELAXATIONS
from utils.network.trace import OPERATIONS
from utils.network.unroll import CELLS
from utils.question import margin_rows
from utils.relaxation import ACTIVATIONS

TABLES = (ACTIVATIONS, ATTACKS, BALLS, CELLS, METHODS, OPERATIONS, RELAXATIONS)


@pytest.fixture(scope="module")
def page():
    """What the page's snippets leave behind; the tables are as before in the end."""
    text = (ROOT / "docs" / "extending.md").read_text()
    names: dict = {}
    with mock.patch.dict(TABLES[0]):
        patches = [mock.patch.dict(table) for table in TABLES[1:]]
        for patch in patches:
            patch.start()
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(code, "extending.md", "exec"), names)
        yield names
        for patch in patches:
            patch.stop()


def sampled(forward, x: Tensor, labels: Tensor, eps: float, move, count: int = 300) -> Tensor:
    """Least margins at random points of a set of size eps, (batch, n_specs); ``move`` gives perturbations of size 1."""
    rows = margin_rows(labels, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found = [
            (rows @ forward(x + eps * move(torch.randn(x.shape, generator=generator)))[..., None]).squeeze(-1)
            for _ in range(count)
        ]
    return torch.stack(found).amin(dim=0)


def whole(delta: Tensor) -> Tensor:
    """One ball around the last dimension."""
    return delta / torch.linalg.vector_norm(delta, dim=-1, keepdim=True)


def one_frame(delta: Tensor) -> Tensor:
    chosen = torch.nn.functional.one_hot(delta[..., 0].argmax(dim=1), delta.shape[1])
    return whole(delta) * chosen[..., None]


@pytest.mark.parametrize(
    ("margins", "model", "x", "eps"),
    [
        ("softsign_margins", "net", "points", 0.02),
        ("halved_margins", "lstm", "x", 0.05),
        ("leaky_margins", "leaky", "x", 0.05),
        ("reversed_margins", "graph", "inputs", 0.05),
        ("best_margins", "lstm", "x", 0.05),
    ],
)
def test_bounds_of_added_things_hold(page, margins, model, x, eps):
    network, points, bounds = page[model], page[x], page[margins]
    forward = network.evaluate if hasattr(network, "evaluate") else network
    labels = forward(points).argmax(dim=1)
    least = sampled(forward, points, labels, eps, whole)
    assert bounds.isfinite().all() and (bounds <= least + 1e-6).all()
    assert (bounds > least - 0.5).all(), "so loose that it tells nothing"


def test_a_wrong_relaxation_would_be_noticed(page):
    """The same with an upper line for the lower one."""
    relax = page["relax_softsign"]
    swapped = page["Activation"](torch.nn.functional.softsign, lambda *box, **how: relax(*box, **how)[::-1])
    with mock.patch.dict(ACTIVATIONS, {"softsign": swapped}):
        labels = page["net"](page["points"]).argmax(dim=1)
        wrong = page["certified_margin"](page["net"], page["points"], labels, 0.5, method="crown-ibp")
        assert not (wrong <= sampled(page["net"], page["points"], labels, 0.5, whole) + 1e-6).all()


def test_the_added_set_is_between_one_frame_and_all(page):
    lstm, x, labels, radii = (page[name] for name in ("lstm", "x", "labels", "any_frame_radii"))
    assert (radii >= page["certified_radius"](lstm, x, labels) * 0.999).all() and (radii > 0).any()
    single = torch.stack([page["certified_radius"](lstm, x, labels, frames=t) for t in range(x.shape[1])])
    assert (radii <= single.amin(dim=0) * 1.01).all()
    for n in range(len(x)):
        own = slice(n, n + 1)
        least = sampled(lstm, x[own], labels[own], float(radii[n]), one_frame)
        assert (least > 0).all()


def test_what_attacks_find_in_the_added_set_lies_in_it(page):
    (decision,) = page["any_frame_verdicts"]
    assert decision.verdict in ("certified", "falsified", "unknown")
    found = page["decide"](page["lstm"], page["x"], page["labels"], 50.0, ball="any frame", time_limit=1)
    broken = [(n, one) for n, one in enumerate(found) if one.verdict == "falsified"]
    assert broken, "no attack succeeded in a set as large as that"
    for n, one in broken:
        moved = (one.counterexample - page["x"][n].double()).norm(dim=-1)
        assert int((moved > 0).sum()) == 1 and moved.max() <= 50.0


def test_verdicts_by_the_added_attack(page):
    assert {one.verdict for one in page["random_verdicts"]} <= {"certified", "falsified", "unknown"}
    for n, one in enumerate(page["random_verdicts"]):
        if one.verdict == "falsified":
            moved = (one.counterexample - page["x"][n].double()).norm(dim=-1)
            assert (moved <= 2.0).all()
            assert int(page["lstm"](one.counterexample[None].float()).argmax()) != int(page["labels"][n])


def test_unknown_names_are_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="ball must be one of frame, sequence.*, not 'cube'"):
        BALLS["cube"]
