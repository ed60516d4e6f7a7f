"""Settings for the whole suite."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The nets are tiny: threads only get in each other's way."""
    torch.set_num_threads(1)
