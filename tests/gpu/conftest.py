"""Fixtures of the tests that run on a GPU where there is one."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed_and_threads(threads):
    """Without a GPU the tensors are tiny: threads would only wait for one another."""
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        threads(1)
