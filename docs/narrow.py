"""A hook of mkdocs: tables that fit a narrow screen."""

import html
import itertools
import re
from typing import Any


def on_page_content(content: str, **_: Any) -> str:
    """Let names break after an underscore, and say in each cell of a card what it holds."""
    content = re.sub(r'<div class="cards">.*?</table>', _labelled, content, flags=re.DOTALL)
    return re.sub(r"<td.*?</td>", _breakable, content, flags=re.DOTALL)


def _labelled(table: re.Match[str]) -> str:
    labels = itertools.cycle(re.findall(r"<th[^>]*>(.*?)</th>", table[0]))
    return re.sub(r"<td", lambda _: f'<td data-label="{html.escape(next(labels))}"', table[0])


def _breakable(cell: re.Match[str]) -> str:
    return re.sub(r"_(?=[^<>]*</code>)", "_<wbr>", cell[0])
