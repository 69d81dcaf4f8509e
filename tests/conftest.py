"""What every test shares: hypothesis profiles, one thread, fresh compiler caches, ranks."""

import gc
import os

import hypothesis
import pytest
import torch

from termwise.testing import Ranks

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=300)
hypothesis.settings.register_profile(
    "unshrunk", parent=hypothesis.settings.get_profile("ci"), phases=[hypothesis.Phase.generate]
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# A fifth of the time to compile goes to looking for garbage among torch's modules, which stay.
# Dynamo is not imported for it: it imports triton, which tests/peers runs in its interpreter.
gc.collect()
gc.freeze()
gc.set_threshold(1_000_000, 5, 5)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.set_num_threads(1)
    # torch.manual_seed writes a stack trace down on a machine without a GPU: 1 to 4 ms a test.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def ranks():
    with Ranks(3) as running:
        yield running


@pytest.fixture(scope="session")
def eight_ranks():
    with Ranks(8) as running:
        yield running
