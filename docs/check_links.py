"""Checks the links and pictures of a built site, without a network: python docs/check_links.py build/docs.

Sphinx checks the links in the pages' sources. This checks those in the HTML, where Sphinx, the theme and the notebook
add some. Links to other hosts are not followed.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links of a page and the names that a link may point to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attributes if value}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        self.links += [values[name] for name in ("href", "src") if name in values]


def broken(site: Path) -> list[str]:
    """A line for each link to a file or an anchor that is not there."""
    pages = {file.resolve(): Page(file.read_text()) for file in site.rglob("*.html")}
    found = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not target.is_file():
                found.append(f"{file.relative_to(site.resolve())}: no file {link}")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{file.relative_to(site.resolve())}: no anchor {link}")
    return found


if __name__ == "__main__":
    site = Path(sys.argv[1])
    problems = broken(site)
    print("\n".join(problems) or f"all links of {len(list(site.rglob('*.html')))} pages lead somewhere")
    sys.exit(bool(problems))
