import pytest

from termwise.testing import Ranks


@pytest.fixture(scope="session")
def ranks():
    with Ranks(3) as running:
        yield running


@pytest.fixture(scope="session")
def eight_ranks():
    with Ranks(8) as running:
        yield running
