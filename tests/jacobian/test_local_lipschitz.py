"""Lipschitz constants of rows that a user gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils.certify.lipschitz import local_lipschitz, sampled_lipschitz

FINE = 1.0 + 2.0**-30  # float32 has no such number


@pytest.mark.parametrize("constants", [local_lipschitz, sampled_lipschitz])
def test_rows_are_as_fine_as_they_are_given(constants):
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False)).double()
    nn.init.ones_(model[1].weight)
    rows = torch.tensor([[FINE]], dtype=torch.float64)
    found = constants(model, torch.zeros(1, 1, 1, dtype=torch.float64), 0.5, rows)
    assert FINE * (1.0 - 1e-15) <= found.constant.item() <= FINE * (1.0 + 1e-12)
