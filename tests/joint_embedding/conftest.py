"""Both paths of contrastive losses."""

import pytest

from termwise.joint_embedding import _contrast


@pytest.fixture(params=["written", "strips"])
def path(request, monkeypatch):
    """Take the formula as written, or strips of 4 rows."""
    if request.param == "strips":
        monkeypatch.setattr(_contrast, "_SMALL", 0)
        monkeypatch.setattr(_contrast, "_rows_at_once", lambda rows, width: 4)
    return request.param
