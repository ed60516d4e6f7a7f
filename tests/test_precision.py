"""Bounds take no shorter formats than float32, whatever torch is told or takes by itself."""

import argparse
import copy
import itertools

import pytest
import torch
from torch import nn

from utils.attack import pgd
from utils.certify import certified_margin, certified_radius, margin_problem, search_radius
from utils.precision import full_precision
from utils.runs.cli import apply_common_arguments

BACKENDS = torch.backends
KERNELS = (BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.mkldnn.matmul)
FULL = {"ieee", "none"}
SEEN: list[str] = []  # outside of the module: what a forward changes in it is undone when it is read


def precisions() -> list[str]:
    return [kernels.fp32_precision for kernels in KERNELS]


def older() -> list:
    """What torch's older interface says, which fails where it does not agree with the newer one."""
    return [torch.get_float32_matmul_precision(), BACKENDS.cuda.matmul.allow_tf32, BACKENDS.cudnn.allow_tf32]


@pytest.fixture(params=("as torch begins", "high", "medium", "all", "apart"))
def shortened(request):
    before = precisions()
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True  # scripts of other tests may have changed it
    if request.param == "all":
        BACKENDS.fp32_precision = "tf32"
    elif request.param == "apart":
        BACKENDS.cudnn.conv.fp32_precision = "ieee"
    elif request.param != "as torch begins":
        torch.set_float32_matmul_precision(request.param)
    yield request.param
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for kernels, precision in zip(KERNELS, before, strict=True):
        kernels.fp32_precision = precision


def test_it_holds_within_and_ends(shortened):
    before = precisions()
    assert not set(before) <= FULL
    said = None if shortened in ("all", "apart") else older()
    with full_precision():
        assert set(precisions()) <= FULL
        with full_precision():
            assert set(precisions()) <= FULL
        assert set(precisions()) <= FULL
        assert said is None or older() == ["highest", False, False]
    assert precisions() == before and (said is None or older() == said)
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert precisions() == before


class Watched(nn.Module):
    """A classifier that says under which precisions it is run."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 3))

    def forward(self, x):
        SEEN.extend(precisions())
        return self.layers(x.flatten(1))


def questions(model, x, y):
    yield certified_margin(model, x, y, 1e-3, norm=float("inf"))
    yield certified_radius(model, x, y, tol=0.1, dtype=torch.float32)
    yield search_radius(margin_problem(model, x, y), tol=0.1, dtype=torch.float32).radius
    yield pgd(model, x, y, 1e-3, steps=2, restarts=1).margin


def test_bounds_and_attacks_do_not_depend_on_it(shortened):
    torch.manual_seed(0)
    model, x = Watched().eval(), torch.rand(4, 200)
    with full_precision():
        y = model(x).argmax(dim=1)
        expected = list(questions(model, x, y))
    for number, wanted in enumerate(expected):
        own = copy.deepcopy(model)  # a forward that has been read is not read again
        SEEN.clear()
        found = next(itertools.islice(questions(own, x, y), number, None))
        torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-6, atol=1e-6)
        assert SEEN and set(SEEN) <= FULL


def test_scripts_set_it_for_good(shortened):
    apply_common_arguments(argparse.Namespace(cuda=False, device="cpu", threads=None, seed=0))
    assert set(precisions()) <= FULL
