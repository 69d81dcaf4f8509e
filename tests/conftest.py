"""What every test shares: hypothesis profiles, one thread, fresh compiler caches, ranks.

torch is imported inside functions: xdist's controller, which loads this file before its workers
start, runs no test.
"""

import gc
import os

import hypothesis
import pytest

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=300)
hypothesis.settings.register_profile(
    "unshrunk", parent=hypothesis.settings.get_profile("ci"), phases=[hypothesis.Phase.generate]
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Dynamo looks for garbage after it compiles, and computes the shapes of each operator twice, to see
# whether it may look them up later: a quarter of the time of a test that compiles once. It reads
# both variables as it is imported.
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

# To look for garbage takes a twentieth of the time; left alone it is 2 GB at the end.
gc.set_threshold(10_000_000, 5, 5)


def pytest_collection_finish():
    gc.freeze()


def pytest_sessionfinish():
    gc.freeze()  # pytest searches five times as it ends


@pytest.fixture(scope="session", autouse=True)
def _unmeasured_guards():
    """Dynamo empties the processor's cache, in 17 ms, to see how long a graph's guards take."""
    from torch._dynamo import guards

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guards, "profile_guard_manager", lambda *_: 0.0, raising=False)
        yield


@pytest.fixture(autouse=True)
def _fresh_compiler():
    import torch

    torch.set_num_threads(1)
    # torch.manual_seed writes a stack trace down on a machine without a GPU: 1 to 4 ms a test.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def ranks():
    from termwise.testing import Ranks

    with Ranks(3) as running:
        yield running


@pytest.fixture(scope="session")
def eight_ranks():
    from termwise.testing import Ranks

    with Ranks(8) as running:
        yield running
