"""A hook of mkdocs: each loss's page names the same loss in other libraries.

Read from the tables of the pages on other libraries, so that a row there is all there is to write.
"""

import re
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parent / "pages"
_NONE = (
    "No counterpart in the libraries [compared here](../../coming_from/index.md) is known to us."
)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Write the section above the references."""
    if not re.fullmatch(r"api/\w+/(?!index)\w+\.md", page.file.src_uri):
        return markdown
    names = NAMES.get(Path(page.file.src_uri).stem, [_NONE])
    section = "\n".join(["## In other libraries", "", *names, "", "## References"])
    return markdown.replace("## References", section)


def _names() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted((PAGES / "coming_from").glob("*.md")):
        text = path.read_text()
        table = re.search(r"^\|.*\| here \| differs \|\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
        if table is None:
            continue
        library = text.partition("\n")[0].removeprefix("# From ")
        for row in table[1].splitlines():
            row = row.replace("](#", f"](../../coming_from/{path.name}#")
            theirs, here, differs = (cell.strip() for cell in row[1:-1].split(" | "))
            same = re.match("(nothing|none|nothing else)\\b", differs)
            what = f"No difference{differs[same.end() :]}" if same else f"Differs: {differs}"
            for name in dict.fromkeys(re.findall(r"\b(\w+?)(?:_loss)?\b(?=[`(])", here)):
                found.setdefault(name, []).append(
                    f"- [{library}](../../coming_from/{path.name}): {theirs}. {what}."
                )
    return found


NAMES = _names()
