"""What every test of `termwise.lm` shares."""

import pytest

from termwise.lm import _rows


@pytest.fixture(scope="module", autouse=True)
def no_size_is_small():
    """Take the path of large logits at any size; `tests/core` takes that of small ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rows, "SMALL", 0)
        yield
