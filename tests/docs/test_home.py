"""The site's first page leads to every loss."""

from pathlib import Path

import termwise

PAGE = (Path(__file__).parents[2] / "docs/pages/index.md").read_text()


def test_home_links_every_loss():
    losses = {
        f"termwise.{family}.{name}"
        for family in ("joint_embedding", "sae", "energy", "lm")
        for name in vars(getattr(termwise, family))
        if name.endswith("_loss") and name != "create_loss"
    }
    assert len(losses) > 25
    assert {one for one in losses if f"][{one}]" not in PAGE} == set()
