"""Notebooks of the docs: run one and write its outputs into it, and show one on a page.

    python docs/notebook.py docs/pages/examples/terms.ipynb

The cells run in order in one namespace, without Jupyter. As there, the value of a cell's last line
is shown unless it ends in a semicolon, and so is each figure of pyplot. As a hook of mkdocs it
writes the cells with their outputs where a page has `<!-- notebook PATH -->`, a path in docs/pages.
"""

import ast
import base64
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parent / "pages"


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return a notebook with the outputs of its cells, which run here."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells: list[dict[str, Any]] = []
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            raises = "raises-exception" in cell["metadata"].get("tags", [])
            outputs = [*_outputs("".join(cell["source"]), namespace, count, raises=raises)]
            cell = {**cell, "execution_count": count, "outputs": outputs}
        cells.append(cell)
    return {**notebook, "cells": cells}


def _outputs(source: str, namespace: dict[str, Any], count: int, *, raises: bool) -> list[Any]:
    """Run the source of a cell, and return what it printed, raised, returned and drew."""
    outputs: list[dict[str, Any]] = []
    value: Any = None
    body, printed = ast.parse(source).body, io.StringIO()
    last = body[-1] if isinstance(body[-1], ast.Expr) else None
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module(body[:-1] if last else body, []), "cell", "exec"), namespace)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)
    except Exception as error:
        if not raises:
            raise
        said = f"{type(error).__name__}: {error}"
        about = {"ename": type(error).__name__, "evalue": str(error), "traceback": [said]}
        outputs.append({"output_type": "error", **about})
    if text := printed.getvalue():
        outputs.insert(0, {"output_type": "stream", "name": "stdout", "text": text})
    if value is not None and not source.rstrip().endswith(";"):
        data = {"text/plain": repr(value)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_()
        result = {"output_type": "execute_result", "execution_count": count}
        outputs.append({**result, "data": data, "metadata": {}})
    for picture in _pictures():
        data = {"image/png": base64.b64encode(picture).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    return outputs


def _pictures() -> list[bytes]:
    """Return pyplot's figures as PNGs, and close them."""
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is None:
        return []
    found: list[bytes] = []
    for number in pyplot.get_fignums():
        file = io.BytesIO()
        pyplot.figure(number).savefig(file, format="png", dpi=80)
        found.append(file.getvalue())
    pyplot.close("all")
    return found


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write a notebook's cells and outputs where a page asks for them."""
    return re.sub(
        r"<!-- notebook (\S+) -->",
        lambda found: "\n\n".join(_blocks(json.loads((PAGES / found[1]).read_text()))),
        markdown,
    )


def _blocks(notebook: dict[str, Any]) -> list[str]:
    blocks: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source)
            continue
        blocks.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                alt = cell["metadata"]["alt"]
                blocks.append(f'<img alt="{alt}" src="data:image/png;base64,{data["image/png"]}">')
            elif "text/html" in data:
                blocks.append(data["text/html"])
            else:
                said = [output.get("text"), data.get("text/plain"), *output.get("traceback", [])]
                blocks.append("```text\n" + "".join(filter(None, said)).rstrip() + "\n```")
    return blocks


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(json.dumps(executed(json.loads(path.read_text())), indent=1) + "\n")
