"""The site's first page leads to every loss, and the README's table has the terms of each."""

import inspect
import re
import runpy
from pathlib import Path

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


def test_the_readme_has_each_loss_once_with_its_terms_and_groups():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `([a-z_.]+)` \| .* \| ([\w, ]+) \| (.*) \|$", text, re.MULTILINE)
    tables = "auxiliary_k_loss", "matryoshka_auxiliary_k_loss"  # numbers, that another loss takes
    names = [name for name, _, _ in rows]
    assert len(names) == len(set(names))
    assert {one for one in LOSSES if one.partition(".")[2] not in tables} <= set(names)
    for name, terms, groups in rows:
        family, _, own = name.partition(".")
        signature = inspect.signature(getattr(getattr(termwise, family), own))
        fields = [field for field in signature.return_annotation.__annotations__ if field != "loss"]
        assert terms.split(", ") == fields, name
        assert re.findall(r"`(\w+)`", groups) == [
            group for group in signature.parameters if group.endswith("_group")
        ], name
