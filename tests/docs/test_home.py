"""The site's first page leads to every loss, and the README's table has the terms of each."""

import inspect
import re
import runpy
from pathlib import Path

import pytest

import termwise

ROOT = Path(__file__).parents[2]
WRITTEN = runpy.run_path(str(ROOT / "docs/names.py"))["written"]
PAGE = WRITTEN((ROOT / "docs/pages/index.md").read_text(), "index.md")
LOSSES = {
    f"{family}.{name}"
    for family in ("joint_embedding", "sae", "energy", "lm")
    for name in vars(getattr(termwise, family))
    if name.endswith("_loss") and name != "create_loss"
}


def test_home_links_every_loss():
    assert len(LOSSES) > 25
    assert {one for one in LOSSES if f"][termwise.{one}]" not in PAGE} == set()


ROWS = re.findall(
    r"^\| `([a-z_.]+)` \| .* \| ([\w, ]+) \| (.*) \|$",
    (ROOT / "README.md").read_text(),
    re.MULTILINE,
)
# They return a number, which another loss takes.
WITHOUT_TERMS = {"sae.auxiliary_k_loss", "sae.matryoshka_auxiliary_k_loss"}


@pytest.mark.parametrize("name", sorted(LOSSES - WITHOUT_TERMS | {name for name, _, _ in ROWS}))
def test_the_readme_has_each_loss_once_with_its_terms_and_groups(name):
    family, _, own = name.partition(".")
    signature = inspect.signature(getattr(getattr(termwise, family), own))
    terms = [field for field in signature.return_annotation.__annotations__ if field != "loss"]
    groups = [f"`{group}`" for group in signature.parameters if group.endswith("_group")]
    row = name, ", ".join(terms), ", ".join(groups)
    said = f"README.md needs one row | `{name}` | [paper](address) | {row[1]} | {row[2]} |"
    assert [one for one in ROWS if one[0] == name] == [row], said
