"""The links of a built site: `python docs/links.py FOLDER` fails if one leads nowhere within it.

Those that lead to other hosts are listed and not followed: what is built does not depend on who answers today.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The ids on a page, and what it links to or loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("id", "name") and tag != "meta":
                self.ids.add(value)
            if value and (name == "src" or (name == "href" and tag in ("a", "link"))):
                self.targets.append(value)


def check(folder: Path) -> tuple[list[str], list[str]]:
    """The broken links within a built site, each with its page, and the addresses elsewhere."""
    pages = {path.resolve(): _Page(path.read_text()) for path in sorted(folder.rglob("*.html"))}
    broken, elsewhere = [], set()
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                elsewhere.add(target)
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not to.is_file() or (anchor and to in pages and anchor not in pages[to].ids):
                broken.append(f"{path.relative_to(folder.resolve())}: {target}")
    return broken, sorted(elsewhere)


def main(folder: str) -> int:
    """Prints both; 1 if there is a broken link."""
    broken, elsewhere = check(Path(folder))
    print("Not followed:", *elsewhere, sep="\n  ")
    for link in broken:
        print(f"Broken: {link}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
