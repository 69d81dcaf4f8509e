"""Each operator and backward pass written by hand has a row: what it saves, or why it is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = "\n".join(path.read_text() for path in (ROOT / "src/termwise").rglob("*.py"))
PATTERNS = (
    r"^class (\w+)\(Function\)",
    r"\bOperator\(\"(\w+)\"",
    r"custom_op\(\s*\"termwise::(\w+)\"",
)
NAMES = [name for pattern in PATTERNS for name in re.findall(pattern, SOURCE, re.MULTILINE)]


@pytest.mark.parametrize("name", dict.fromkeys(NAMES))
def test_it_has_a_row(name):
    page = (ROOT / "docs/pages/numbers.md").read_text()
    table = page.partition("<!-- measured by tests/bench/operators.py -->")[2]
    rows = [row.split("|")[1] for row in table.partition("<!-- end -->")[0].splitlines() if row]
    assert any(name in re.findall(r"\w+", row) for row in rows), (
        f"add {name} to tests/bench/operators.py, with what it saves, and run that"
    )


def test_there_is_no_row_of_another():
    bench = (ROOT / "tests/bench/operators.py").read_text()
    tables = re.findall(
        r"^(?:LOSSES|ONLY_WAY|PARTS) = \{\n(.*?)^\}", bench, re.MULTILINE | re.DOTALL
    )
    listed = re.findall(r"^    \"([\w, ]+)\":", "".join(tables), re.MULTILINE)
    assert {name for names in listed for name in names.split(", ")} <= set(NAMES)
