"""Check that a built site needs no network: ``python tools/check_site.py docs/_build/html``."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data", "link": "href"}
"""Attributes whose links a browser loads by itself."""
NOT_LOADED = {"canonical", "index", "search", "next", "prev", "author", "help", "copyright", "top", "up"}
MATHS = "mathjax"
STYLE = "_static/pages.css"


class Page(HTMLParser):
    """Parser that collects the files a page loads, and whether the page has equations."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.maths = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.maths |= "math" in (given.get("class") or "").split()
        if tag == "link" and NOT_LOADED & set((given.get("rel") or "").split()):
            return
        if target := given.get(LOADED.get(tag, "")):
            self.loads.append(target)


def faults(site: Path) -> list[str]:
    """Return the faults of the pages in ``site``, one sentence per fault."""
    found = []
    pages = sorted(site.rglob("*.html"))
    if not pages:
        return [f"no pages in {site}"]
    for path in pages:
        page, name = Page(), path.relative_to(site).as_posix()
        page.feed(path.read_text(encoding="utf-8"))
        local = [target for target in page.loads if not (urlsplit(target).scheme or urlsplit(target).netloc)]
        found += [f"{name} loads {t}" for t in page.loads if t not in local and not t.startswith("data:")]
        files = [(path.parent / unquote(urlsplit(target).path)).resolve() for target in local]
        found += [f"{name} loads {f.name}, which is not there" for f in files if not f.is_file()]
        if page.maths and not any(MATHS in str(file) for file in files):
            found.append(f"{name} has equations and nothing that sets them")
        if (site / STYLE).resolve() not in files:
            found.append(f"{name} lacks {STYLE}")
    for path in sorted(site.rglob("*.css")):
        remote = re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]+)", path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(site).as_posix()} loads {target}" for target in remote]
    return found


def main(arguments: list[str]) -> int:
    """Print the faults of the site; return 1 if there are any, else 0."""
    if len(arguments) != 1:
        print("usage: python tools/check_site.py FOLDER")
        return 1
    found = faults(Path(arguments[0]))
    print("\n".join(found) if found else f"{arguments[0]}: ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
