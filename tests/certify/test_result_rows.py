"""Results as arrays, rows and JSON, and how far a call has come."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from utils.certify import OutputBounds, RadiusResult, certified_radius, output_bounds
from utils.certify.results import to_arrays, to_json, to_rows


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.steps = nn.Linear(4, 1), nn.Linear(2, 3)

    def forward(self, x):
        return {"one": self.one(x.flatten(1)), "steps": self.steps(x.tanh())}


def test_arrays_have_the_parts_of_the_result():
    bounds = output_bounds(Two(), torch.rand(5, 2, 2), 0.1)
    arrays = to_arrays(bounds)
    assert arrays["steps"]["upper"].shape == (5, 2, 3) and isinstance(arrays["one"]["lower"], np.ndarray)
    np.testing.assert_array_equal(arrays["one"]["lower"], bounds["one"].lower.detach().numpy())
    assert to_arrays((bounds["one"], None))[0]["lower"].shape == (5, 1)
    assert to_arrays(torch.ones(3, requires_grad=True)).tolist() == [1.0, 1.0, 1.0]


def test_rows_are_plain_numbers_that_a_csv_file_takes():
    radius, labels = torch.tensor([0.5, 0.0]), [1, 0]
    bounds = OutputBounds(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    rows = to_rows(label=labels, radius=radius, y=bounds)
    assert rows[1] == {
        "label": 0,
        "radius": 0.0,
        "y.lower[0]": 3.0,
        "y.lower[1]": 4.0,
        "y.upper[0]": 7.0,
        "y.upper[1]": 8.0,
    }
    assert [type(value) for value in rows[0].values()] == [int] + [float] * 5
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    assert file.getvalue().splitlines()[1] == "1,0.5,1.0,2.0,5.0,6.0"
    steps = to_rows(steps=torch.arange(12).reshape(2, 2, 3))
    assert steps[1]["steps[1,2]"] == 11 and len(steps[0]) == 6


def test_rows_must_be_of_the_same_samples():
    with pytest.raises(ValueError, match="as many samples"):
        to_rows(a=torch.ones(2), b=torch.ones(3))
    with pytest.raises(ValueError, match="no axis"):
        to_rows(a=torch.tensor(1.0))


def test_json_has_no_numbers_that_others_cannot_read():
    result = RadiusResult(*(torch.tensor([value, 1.5]) for value in (0.5, math.inf, -math.inf, 3.0, math.nan)))
    text = to_json({"search": result, "rows": to_rows(failed=result.failed)}, indent=1)
    back = json.loads(text, parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    assert back["search"]["failed"] == ["inf", 1.5] and back["search"]["start"] == ["nan", 1.5]
    assert float(back["search"]["margin"][0]) == -math.inf and back["rows"][1] == {"failed": 1.5}


# --- progress ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def case():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().requires_grad_(False)
    x = torch.rand(5, 3, dtype=torch.float64)
    return net, x, net(x).argmax(dim=1)


def test_a_function_hears_of_every_batch(case):
    net, x, labels = case
    heard = []
    radius = certified_radius(net, x, labels, tol=0.05, batch_size=2, progress=lambda *told: heard.append(told))
    assert heard == [(2, 5), (4, 5), (5, 5)]
    torch.testing.assert_close(radius, certified_radius(net, x, labels, tol=0.05, batch_size=2), rtol=0, atol=0)
    heard.clear()
    bounds = output_bounds(net, x, 0.1, batch_size=3, progress=lambda *told: heard.append(told))
    assert heard == [(3, 5), (5, 5)]
    whole = output_bounds(net, x, 0.1)
    torch.testing.assert_close(bounds.lower, whole.lower, rtol=1e-9, atol=1e-12)
    C = torch.rand(5, 3, 2, generator=torch.Generator().manual_seed(1))
    eps = torch.linspace(0.01, 0.2, 5)
    rows = output_bounds(net, x, eps, C=C, method="alpha", alpha_steps=2, batch_size=2)
    for k in range(5):
        alone = output_bounds(net, x[k : k + 1], eps[k : k + 1], C=C[k], method="alpha", alpha_steps=2)
        torch.testing.assert_close(rows.upper[k], alone.upper[0], rtol=1e-2, atol=1e-4)


def test_what_the_function_raises_ends_the_call(case):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certified_radius(*case, tol=0.05, batch_size=1, progress=stop)


def test_a_bar_is_for_terminals(case, capsys):
    certified_radius(*case, tol=0.05, progress=True)
    output_bounds(case[0], case[1], 0.1, progress=True)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="batch_size"):
        output_bounds(case[0], case[1], 0.1, batch_size=0)
