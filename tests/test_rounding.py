"""What is tested must hold on every processor: the most sensitive tests under other kernels, real or pretended."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import normal

# A batch against its parts, two ways to compute the same, the same twice: what last bits can tell apart.
SENSITIVE = (
    "test_rounding.py::test_products_are_close_and_pretended_ones_differ",
    "attack/test_attack.py::test_a_sample_does_not_depend_on_the_batch",
    "certify/test_bab.py::test_branches_are_the_rows_of_one_sample",
    "bounds/test_bounds.py::test_a_batch_is_its_samples_and_nothing_is_kept",
    "certify/test_certify.py::test_misclassified_samples_have_radius_zero",
    "certify/test_certify.py::test_repeated_calls_agree_and_leave_the_model_alone",
    "certify/test_search.py::test_samples_do_not_affect_each_other",
    "network/test_trace.py::test_loops_and_gates_by_hand_have_the_bounds_of_the_layer",
)
SLOW = "bounds/test_wide_frames.py::test_parts_of_a_batch_give_what_the_whole_gives[alpha]"
SETTINGS = {  # arguments and environment
    "pretended": (("--other-rounding", SLOW), {}),
    "no vectors": (("--torch-threads", "2"), {"MKL_CBWR": "COMPATIBLE"}),
    "AVX2": (("--torch-threads", "2"), {"MKL_CBWR": "AVX2"}),
}
PASSIVE = {"OMP_WAIT_POLICY": "passive"}  # two threads that wait busily take minutes where another process is at work

A, B, V = normal(6, 5, 40, seed=1), normal(6, 40, 7, seed=2), normal(40, seed=3)
C, W = normal(6, 5, 7, seed=4), normal(5, seed=5)
# The same numbers by operands of two shapes.
PRODUCTS = {
    "mm": lambda: (torch.mm(A[0], B[0])[:2], torch.mm(A[0, :2], B[0])),
    "bmm": lambda: (torch.bmm(A, B)[:2], torch.bmm(A[:2], B[:2])),
    "mv": lambda: (torch.mv(A[0], V)[:2], torch.mv(A[0, :2], V)),
    "dot": lambda: (torch.dot(A[0, 0], V), torch.mv(A[0], V)[0]),
    "addmm": lambda: (torch.addmm(C[0], A[0], B[0])[:2], torch.addmm(C[0, :2], A[0, :2], B[0])),
    "baddbmm": lambda: (torch.baddbmm(C, A, B)[:2], torch.baddbmm(C[:2], A[:2], B[:2])),
    "addmv": lambda: (torch.addmv(W, A[0], V)[:2], torch.addmv(W[:2], A[0, :2], V)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_close_and_pretended_ones_differ(name, pytestconfig):
    """A processor's own may differ as well; pretended ones that do not would let every test pass."""
    whole, part = PRODUCTS[name]()
    torch.testing.assert_close(whole, part, rtol=0.0, atol=1e-13)
    if pytestconfig.getoption("--other-rounding"):
        assert not torch.equal(whole, part)
    again, _ = PRODUCTS[name]()
    assert torch.equal(whole, again)


# Real kernels give products one more order of the sums, which pretended ones change for every shape.
@pytest.mark.parametrize(
    "setting", ["pretended", *(pytest.param(name, marks=pytest.mark.full) for name in ("no vectors", "AVX2"))]
)
def test_the_most_sensitive_tests_pass_under_other_kernels(setting):
    arguments, changes = SETTINGS[setting]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *SENSITIVE, *arguments]
    where = {"cwd": Path(__file__).parent, "env": kept | PASSIVE | changes}
    result = subprocess.run(command, **where, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr  # not 0 either where no test is found
    assert re.fullmatch(r"\d+ passed in .*", result.stdout.splitlines()[-1]), result.stdout
