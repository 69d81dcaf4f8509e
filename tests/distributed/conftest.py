import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    running = Ranks(tmp_path_factory.mktemp("ranks"))
    yield running
    running.close()
