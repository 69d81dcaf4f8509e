"""Check a built site: `python docs/check_site.py SITE`.

Formulas are rendered, shapes stand as in the source, pages of losses have their sections, and every
link within the site leads to a page and a place on it.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SECTIONS = ("formula", "terms", "gradient", "cost", "module", "references")
CODE = {"code", "pre", "script", "style", "annotation"}
UNCLOSED = {"area", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Page(HTMLParser):
    """What is checked of a page: its text in and out of code, its formulas, places and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.code: list[str] = []
        self.prose: list[str] = []
        self.places: set[str] = set()
        self.links: list[str] = []
        self.formulas = 0
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take down an element's id and where it leads."""
        values = dict(attrs)
        self.formulas += tag == "math"
        self.places.update(value for key in ("id", "name") if (value := values.get(key)))
        self.links += [value for key in ("href", "src") if (value := values.get(key))]
        if tag not in UNCLOSED:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Leave an element, and what was left open within it."""
        while tag in self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        """Tell code from prose."""
        (self.code if CODE & set(self._open) else self.prose).append(data)


def faults_of(path: Path, page: Page) -> list[str]:
    """Return what is wrong on a page by itself."""
    code, prose = "".join(page.code), "".join(page.prose)
    faults = [
        f"a formula is not rendered: {found}"
        for found in re.findall(r"\$\$.{0,60}|\\[a-zA-Z]+\b.{0,60}", prose)
    ]
    for text in (code, prose):
        faults += [
            f"a shape is not as in the source: {found}"
            for found in re.findall(r"\w+\[Tensor, [^\"].{0,40}|batch \* event", text)
        ]
    # A loss is what shows its formula and its terms under headings.
    if path.parent.parent.parent.name == "api":
        missing = [section for section in SECTIONS if section not in page.places]
        faults += [f"there is no section {section}" for section in missing]
        if not page.formulas:
            faults.append("there is no formula")
    return faults


def broken_links(site: Path, path: Path, pages: dict[Path, Page]) -> list[str]:
    """Return which links of a page lead nowhere in the site."""
    broken: list[str] = []
    for link in pages[path].links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = path
        if parts.path:
            start = site if parts.path.startswith("/") else path.parent
            target = (start / unquote(parts.path).lstrip("/")).resolve()
            target = target / "index.html" if target.is_dir() else target
        place = unquote(parts.fragment)
        known = pages[target].places if target in pages else set[str]()
        if not target.exists() or (place and not place.startswith("__") and place not in known):
            broken.append(f"a link leads nowhere: {link}")
    return broken


def main() -> None:
    """Print each fault with its page, and fail if there is one."""
    site = Path(sys.argv[1]).resolve()
    pages = {path: Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    losses = [path for path in pages if path.parent.parent.parent.name == "api"]
    if len(losses) < 31:
        sys.exit(f"{site} has the pages of {len(losses)} losses")
    faults = [
        f"{path.relative_to(site)}: {fault}"
        for path, page in pages.items()
        for fault in [*faults_of(path, page), *broken_links(site, path, pages)]
    ]
    print("\n".join(faults) or f"{len(pages)} pages of {site} are whole")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
