"""Bounds take no shorter formats than float32, whatever torch is told or takes by itself."""

import argparse
import copy
import itertools
import os
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from utils.attack import pgd
from utils.certify import certified_margin, certified_radius, margin_problem, search_radius
from utils.precision import full_precision, products_are_full, without_cudnn
from utils.runs.cli import apply_common_arguments
from utils.weights import certified_bits, weight_problem

BACKENDS = torch.backends
KERNELS = (
    BACKENDS.cuda.matmul,
    BACKENDS.cudnn.conv,
    BACKENDS.cudnn.rnn,
    BACKENDS.mkldnn.matmul,
    BACKENDS.mkldnn.conv,
    BACKENDS.mkldnn.rnn,
)
FULL = {"ieee", "none"}
INF = float("inf")
SEEN: list[str] = []  # outside of the module: what a forward changes in it is undone when it is read


def precisions() -> list[str]:
    return [kernels.fp32_precision for kernels in KERNELS]


def older() -> list:
    """What torch's older interface says of products, which fails where it does not agree with the newer one."""
    return [torch.get_float32_matmul_precision(), BACKENDS.cuda.matmul.allow_tf32]


def back_to_the_start() -> None:
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.fp32_precision = BACKENDS.mkldnn.fp32_precision = "none"
    for kernels in KERNELS:
        kernels.fp32_precision = "none"
    BACKENDS.cudnn.allow_tf32 = True  # as torch begins


@pytest.fixture(params=("as torch begins", "high", "medium", "cuda", "all", "library", "apart"))
def shortened(request):
    back_to_the_start()
    if request.param == "all":
        BACKENDS.fp32_precision = "tf32"
    elif request.param == "library":
        BACKENDS.cudnn.fp32_precision = "tf32"
    elif request.param == "apart":
        BACKENDS.cudnn.conv.fp32_precision = "ieee"
    elif request.param == "cuda":
        BACKENDS.cuda.matmul.allow_tf32 = True
    elif request.param != "as torch begins":
        torch.set_float32_matmul_precision(request.param)
    yield request.param
    back_to_the_start()


def test_it_holds_within_and_ends(shortened):
    before = precisions()
    assert not set(before) <= FULL
    said = None if shortened in ("all", "library") else older()
    with full_precision():
        assert set(precisions()) <= FULL and products_are_full()
        with full_precision():
            assert set(precisions()) <= FULL
        assert set(precisions()) <= FULL
        assert said is None or older() == ["highest", False]
    assert precisions() == before and (said is None or older() == said)
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert precisions() == before


@pytest.mark.parametrize("later", ("all", "cudnn"))
def test_what_is_set_later_holds_as_if_there_had_been_no_call(shortened, later):
    """Kernels that followed their library follow it again."""
    found = []
    for _ in range(2):
        whole = BACKENDS if later == "all" else BACKENDS.cudnn
        before = whole.fp32_precision
        whole.fp32_precision = "ieee"
        found.append(precisions())
        whole.fp32_precision = "none" if before == BACKENDS.fp32_precision else before
        with full_precision():
            pass
    assert found[0] == found[1]


def test_where_flags_are_locked(shortened):
    before, enabled = precisions(), BACKENDS.cudnn.enabled
    try:
        BACKENDS.disable_global_flags()
        with full_precision(), without_cudnn():
            assert set(precisions()) <= FULL and not BACKENDS.cudnn.enabled
        assert precisions() == before and BACKENDS.cudnn.enabled == enabled
    finally:
        vars(sys.modules["torch.backends"].m)["__allow_nonbracketed_mutation_flag"] = True
        assert not BACKENDS.flags_frozen()


class Watched(nn.Module):
    """A classifier that says under which precisions it is run, and can set another one."""

    def __init__(self, sets: bool = False):
        super().__init__()
        self.layers, self.sets = nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 3)), sets

    def forward(self, x):
        if self.sets:
            torch.set_float32_matmul_precision("highest")
        SEEN.extend(precisions())
        out = self.layers(x.flatten(1))
        if self.sets:
            torch.set_float32_matmul_precision("high")
        return out


class Products(TorchDispatchMode):
    """Collects the precision of every product of float32 matrices."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name in ("mm", "bmm", "addmm", "baddbmm") and args[-1].dtype == torch.float32:
            self.found.append(BACKENDS.cuda.matmul.fp32_precision)
        return function(*args, **(kwargs or {}))


def questions(model, x, y):
    yield certified_margin(model, x, y, 1e-3, norm=INF)
    yield certified_radius(model, x, y, tol=0.1, dtype=torch.float32)
    yield search_radius(margin_problem(model, x, y), tol=0.1, dtype=torch.float32).radius
    yield certified_bits(weight_problem(model, x, y), most=12, dtype=torch.float32)
    yield margin_problem(model, x, y, norm=INF).margins(torch.full((len(x),), 1e-3), torch.float32)
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
        with Products() as products:
            found = next(itertools.islice(questions(own, x, y), number, None))
        torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-6, atol=1e-6)
        assert SEEN and set(SEEN) <= FULL
        assert products.found and set(products.found) <= FULL


def test_a_forward_that_sets_a_precision_does_not_set_that_of_its_bounds():
    back_to_the_start()
    torch.manual_seed(0)
    model, x = Watched(sets=True).eval(), torch.rand(4, 200)
    try:
        y = Watched.forward(model, x).argmax(dim=1)
        torch.set_float32_matmul_precision("highest")
        with Products() as products:
            certified_margin(model, x, y, 1e-3, norm=INF)
        assert len(products.found) > 5 and set(products.found) <= FULL
    finally:
        back_to_the_start()


def test_threads_take_turns(shortened):
    """A call that ends does not take the precision from one that goes on."""
    inside, ended, seen = threading.Event(), threading.Event(), []

    def first():
        with full_precision():
            inside.set()
            ended.wait(0.2)  # the other one is waiting, or is within by now
            seen.extend(precisions())

    def other():
        inside.wait()
        with full_precision():
            ended.wait(0.4)
            seen.extend(precisions())

    threads = [threading.Thread(target=function) for function in (first, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 2 * len(KERNELS) and set(seen) <= FULL
    assert not set(precisions()) <= FULL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_a_process_with_a_call_under_way_has_turns_of_its_own(shortened):
    inside, done, before = threading.Event(), threading.Event(), precisions()

    def other():
        with full_precision():
            inside.set()
            done.wait(20)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            own = precisions()
            with full_precision():
                code = 0 if own == before and set(precisions()) <= FULL else 2
        finally:
            os._exit(code)
    for _ in range(100):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
    done.set()
    thread.join()
    assert ended and os.waitstatus_to_exitcode(status) == 0


def test_scripts_set_it_for_good(shortened):
    apply_common_arguments(argparse.Namespace(cuda=False, device="cpu", threads=None, seed=0))
    assert set(precisions()) <= FULL
