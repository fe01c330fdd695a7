"""Fixtures of the tests on the functional model."""

import pytest

from chip import build


@pytest.fixture(scope="module")
def chip():
    """The model, built when it is needed."""
    return build.load()
