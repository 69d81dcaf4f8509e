"""A hook of mkdocs: what does not fit a narrow screen as it is."""

import html
import itertools
import re
from typing import Any


def on_page_content(content: str, **_: Any) -> str:
    """Let names break after an underscore, label the cells of cards, link figures to files."""
    content = re.sub(r'<div class="cards">.*?</table>', _labelled, content, flags=re.DOTALL)
    content = re.sub(r"<td.*?</td>", _breakable, content, flags=re.DOTALL)
    # A figure of several panels can be opened by itself, to be enlarged.
    return re.sub(r'<img [^>]*src="([^"]+\.png)"[^>]*>', r'<a href="\1">\g<0></a>', content)


def _labelled(table: re.Match[str]) -> str:
    labels = itertools.cycle(re.findall(r"<th[^>]*>(.*?)</th>", table[0]))
    return re.sub(r"<td", lambda _: f'<td data-label="{html.escape(next(labels))}"', table[0])


def _breakable(cell: re.Match[str]) -> str:
    return re.sub(r"_(?=[^<>]*</code>)", "_<wbr>", cell[0])
