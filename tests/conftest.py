"""Settings for the whole suite."""

import pytest
import torch
from rounding import round_otherwise


def pytest_addoption(parser):
    parser.addoption("--torch-threads", type=int, default=1, help="threads of PyTorch in the tests' own process")
    parser.addoption("--full", action="store_true", help="with the repetitions that are only insurance")
    parser.addoption("--other-rounding", action="store_true", help="matrix products have other last bits, by chance")
    parser.addoption("--device", default=None, help="cuda or pretended: run public functions and scripts there")


def pytest_configure(config):
    config.addinivalue_line("markers", "real_rounding: rows of this process against those of another one, bit by bit")
    if config.getoption("--other-rounding"):
        round_otherwise()
    if config.getoption("--device"):
        from on_device import run_on

        run_on(torch.device(config.getoption("--device"), 0))


def pytest_runtest_setup(item):
    if item.config.getoption("--other-rounding") and item.get_closest_marker("real_rounding"):
        pytest.skip("pretended kernels do not reach other processes")
    if item.get_closest_marker("full") and not item.config.getoption("--full"):
        pytest.skip("a longer repetition of a test that is run: bash scripts/test.sh --full")


@pytest.fixture(autouse=True, scope="session")
def threads(request):
    """One unless told otherwise: the nets are tiny, threads only get in each other's way."""
    torch.set_num_threads(request.config.getoption("--torch-threads"))
