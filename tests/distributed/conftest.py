import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    running = Ranks(tmp_path_factory.mktemp("ranks"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def eight_ranks(tmp_path_factory):
    running = Ranks(tmp_path_factory.mktemp("eight"), 8)
    yield running
    running.close()
