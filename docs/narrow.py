"""A hook of mkdocs: what does not fit a narrow screen as it is."""

import html
import itertools
import re
from typing import Any

# Pages whose tables hold sentences: on a phone each row is a card. Tables of numbers scroll.
SENTENCES = (
    *("api/", "changelog.md", "coming_from/", "distillation.md", "energy.md", "sae.md"),
    *("which_loss.md", "your_own.md"),
)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Let names and formulas break, label the cells of cards, link figures to files."""
    if page.file.src_uri.startswith(SENTENCES):
        content = re.sub(r"<table>.*?</table>", _cards, content, flags=re.DOTALL)
    content = re.sub(r"<td.*?</td>", _breakable, content, flags=re.DOTALL)
    content = re.sub(r'<math display="block".*?</math>', _parts, content, flags=re.DOTALL)
    # A figure of several panels can be opened by itself, to be enlarged.
    return re.sub(r'<img [^>]*src="([^"]+\.png)"[^>]*>', r'<a href="\1">\g<0></a>', content)


def _cards(table: re.Match[str]) -> str:
    heads = re.findall(r"<th[^>]*>(.*?)</th>", table[0])
    if len(heads) < 3:
        return table[0]
    labels = itertools.cycle(heads)
    cells = re.sub(r"<td", lambda _: f'<td data-label="{html.escape(next(labels))}"', table[0])
    return f'<div class="cards">{cells}</div>'


def _breakable(cell: re.Match[str]) -> str:
    return re.sub(r"(_|\.(?=[a-z]))(?=[^<>]*</code>)", r"\1<wbr>", cell[0])


def _parts(formula: re.Match[str]) -> str:
    """Make one formula of each that stands on the line: they are beside or below each other."""
    start, body, end = re.fullmatch(r"(<math.*?><mrow>)(.*)(</mrow></math>)", formula[0]).groups()
    parts = [""]
    for part in re.split(r'(<mspace width="[12]em"></mspace>)', body):
        if part.startswith("<mspace") and parts[-1].count("<mrow>") == parts[-1].count("</mrow>"):
            parts.append("")
        else:
            parts[-1] += part
    return f'<span class="formula">{"".join(start + part + end for part in parts)}</span>'
