"""What every test of `termwise.lm` shares."""

import pytest

from termwise import _numbers
from termwise.lm import _linear_rows, _rows


@pytest.fixture(scope="module", autouse=True)
def no_size_is_small():
    """Take the path of large logits at any size; `tests/core` takes that of small ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_numbers, "FEW", 0)
        patch.setattr(_rows, "FUSED", 0)
        yield


@pytest.fixture(params=["few", "host", "device"], scope="module")
def path_of_a_head(request):
    """Take the path of few logits, then that of the CPU and of other devices in blocks of 3."""
    if request.param == "few":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_linear_rows, "FEW", 0)
        patch.setattr(_linear_rows, "HOST_ROWS", 3)
        patch.setattr(_linear_rows, "ON_HOST", 1)
        patch.setattr(_linear_rows, "ON_DEVICE", 16)
        if request.param == "device":
            patch.setattr(_linear_rows, "on_host", lambda x: False)
        yield
