"""The gallery shows every run of the demo, with a picture that says what the page says of it."""

from pathlib import Path

import pytest
from PIL import Image

from termwise.demo._command import RUNS

PAGES = Path(__file__).parents[2] / "docs/pages"
PAGE = (PAGES / "gallery.md").read_text()


def test_there_is_one_picture_for_each_run_and_no_other():
    pictures = {path.name for path in (PAGES / "gallery").iterdir()}
    assert pictures == {f"{run}.png" for run in RUNS}


@pytest.mark.parametrize("run", RUNS)
def test_the_page_has_each_run_s_command_its_picture_and_what_it_measured(run):
    assert f"```sh\npython -m termwise {run}\n```" in PAGE
    assert f"](gallery/{run}.png)" in PAGE
    picture = PAGES / "gallery" / f"{run}.png"
    assert picture.stat().st_size < 150_000
    with Image.open(picture) as drawn:
        assert drawn.width > 1200
        said = drawn.text["Description"]
    quoted = [
        line.removeprefix("> ") if line.startswith("> ") else "" for line in PAGE.splitlines()
    ]
    assert said in " ".join(quoted)
