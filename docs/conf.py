"""Sphinx builds the site from these pages, README.md, CHANGELOG.md and CONTRIBUTING.md: `python dev.py docs`.

The pages are notebooks, and plain Markdown whose links hold in the repository, too. `_read` makes those of them that
leave this folder links of the site.
"""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

os.environ["KERAS_BACKEND"] = "jax"  # of which the reference needs no more than that it can be imported

import ada2ms

project = "Ada2MS"
author = "The Ada2MS project"
copyright = "the Ada2MS project"  # noqa: A001  # Sphinx' name
release = ada2ms.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx_copybutton"]
nb_execution_mode = "off"  # notebooks have their outputs: `python tests/notebooks.py` writes them
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 4  # those of GitHub
suppress_warnings = ["myst.header"]  # the rows of a table of contents may leave out a level

default_role = "code"  # docstrings write `name` for code
autodoc_member_order = "groupwise"
autodoc_typehints_format = "short"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 100

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"Ada2MS {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
exclude_patterns = ["_build"]
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}  # on the site

INCLUDE = re.compile(r"```\{include\} (\S+)\n```")
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\((?![a-z]+:)([^)\s]+)\)")


def on_site(text: str, file: Path, page: Path) -> str:
    """A Markdown file's text with its links and images as they are on a page of the site.

    Links to pages of the site lead there; those to other files of the repository offer the file; those to folders, of
    which there is no page, are plain text.

    Args:
        text: of the file.
        file: in the repository.
        page: in `docs`, the same file or the one that includes it.
    """

    def relative(target: Path) -> str:
        return os.path.relpath(target, page.parent)

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        path = (file.parent / target).resolve()
        if path.is_dir():
            return words
        name = str(path.relative_to(ROOT))
        return f"[{words}]({relative(DOCS / PAGES[name] if name in PAGES else path)}{anchor})"

    def image(match: re.Match[str]) -> str:
        return f"![{match[1]}]({relative((file.parent / match[2]).resolve())})"

    parts = FENCE.split(text)  # what is between fences is at even places
    return "".join(part if i % 2 else IMAGE.sub(image, LINK.sub(link, part)) for i, part in enumerate(parts))


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    page = DOCS / f"{docname}.md"
    if not page.exists():  # a notebook, whose links are to pages
        return

    def included(match: re.Match[str]) -> str:
        file = (page.parent / match[1]).resolve()
        app.env.note_dependency(str(file))
        return on_site(file.read_text(), file, page)

    text = source[0]
    text = INCLUDE.sub(included, text) if INCLUDE.search(text) else on_site(text, page, page)
    listed = {line.rstrip(">").rpartition("<")[2] for line in text.splitlines()} | {docname}
    others = sorted(name for name in app.env.found_docs if "/" not in name and name not in listed)
    source[0] = text.replace("\n(others)\n", "\n" + "".join(f"{name}\n" for name in others))


def _docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """In docstrings, code is what is indented after an empty line, and links are Markdown's."""
    found: list[str] = []
    for i, line in enumerate(lines):
        before, after = (lines[i - 1] if i else ""), (lines[i + 1] if i + 1 < len(lines) else "")
        starts = not line and before and not re.match(r" *(-|\.\.|>>>) ?", before) and indent(after) > indent(before)
        if starts and not before.endswith("::"):
            found += ["", " " * indent(before) + "::"]
        found.append(re.sub(r"\[([^\]]+)\]\((https?:[^)]+)\)", r"`\1 <\2>`__", line))
    lines[:] = found


def _skipped(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """The fields of named tuples are among their class' attributes; by themselves they say nothing more."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


# Types that have a name which annotations lose; as autodoc writes them, "~" before what is shown by its last part.
NAMES = {
    re.compile(
        r"~?(numpy\.)?ndarray\[tuple\[~?(typing\.)?Any, \.\.\.\], ~?(numpy\.)?dtype\[~?(typing\.)?Any\]\]"
    ): "~numpy.ndarray",
    re.compile(r"~?[\w.]*Array \| ~?[\w.]*ndarray \| [^,=]*?Mapping\[~?[\w.]*Any, ArrayTree\]"): "ArrayTree",
}


def _signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, result: str | None
) -> tuple[str | None, str | None]:
    for pattern, short in NAMES.items():
        signature = signature and pattern.sub(short, signature)
        result = result and pattern.sub(short, result)
    return signature, result


def indent(line: str) -> int:
    """The number of spaces before a line's text."""
    return len(line) - len(line.lstrip())


def setup(app: Sphinx) -> None:
    """Registers what reads the pages and, before napoleon does, the docstrings."""
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _docstring, priority=100)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skipped)
