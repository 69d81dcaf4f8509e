"""What every test shares: hypothesis profiles, one thread, no leftover compiler caches."""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=300)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.compiler.reset()
