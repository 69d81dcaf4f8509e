"""The notebooks of the docs hold what their cells give, and run in order."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs/pages/examples").glob("*.ipynb"))
NUMBER = r"-?\d+\.?\d*(?:e-?\d+)?"


@pytest.fixture(scope="module")
def hook():
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "docs/notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(notebook):
    """Return the text of all outputs, in order, with a word for each picture."""
    texts = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            texts += [output.get("text", ""), *output.get("traceback", [])]
            texts += [text for kind, text in data.items() if kind != "image/png"]
            texts += ["picture"] * ("image/png" in data)
    return " ".join(" ".join(texts).split())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_its_cells_give(path, hook, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    stored = json.loads(path.read_text())
    there, found = said(stored), said(hook.executed(stored))
    assert there.count("picture") >= 1
    assert "<table>" in there
    assert re.sub(NUMBER, "#", found) == re.sub(NUMBER, "#", there)
    # Numbers after a few hundred steps, which another processor rounds otherwise.
    numbers = [[float(x) for x in re.findall(NUMBER, text)] for text in (found, there)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.1, abs=0.02)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_of_no_machine(path):
    text = path.read_text()
    assert len(text) < 300_000
    assert not re.search(r"/(home|root|tmp|work|usr|Users)/", text)
    notebook = json.loads(text)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_shows_each_notebook(path, hook):
    place = path.relative_to(hook.PAGES)
    marker = f"<!-- notebook {place} -->"
    (page,) = [page for page in hook.PAGES.glob("*.md") if marker in page.read_text()]
    shown = hook.on_page_markdown(page.read_text())
    assert marker not in shown
    assert f"]({place})" in page.read_text()
    for cell in json.loads(path.read_text())["cells"]:
        assert "".join(cell["source"]) in shown
    assert shown.count("<img ") == path.read_text().count('"image/png"')
