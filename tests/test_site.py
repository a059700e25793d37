"""The site and the pages that it is made of: links, and the reference of everything public."""

import ast
import inspect
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs import links

ROOT = Path(__file__).parents[1]
PUBLIC = ("conformance", "core", "jax", "tf", "torch")
MARKDOWN = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


def exported(package: str) -> list[str]:
    """The names in `__all__`, which is a literal."""
    tree = ast.parse((ROOT / "ada2ms" / package / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def definitions(package: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """The functions and classes that a package exports; constants have no docstring."""
    tree = ast.parse((ROOT / "ada2ms" / package / "__init__.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            path = ROOT / node.module.replace(".", "/")
            source = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
            names = {alias.name for alias in node.names} & set(exported(package))
            if names and source.name == "__init__.py":
                inner = dict(definitions(str(path.relative_to(ROOT / "ada2ms"))))
                yield from ((name, inner[name]) for name in sorted(names) if name in inner)
            elif names:
                for found in ast.parse(source.read_text()).body:
                    if isinstance(found, ast.FunctionDef | ast.ClassDef) and found.name in names:
                        yield found.name, found


def test_every_public_package_has_a_page_of_the_reference() -> None:
    """Commands are not imported, and ada2ms.keras is ada2ms.tf."""
    found = [path.parent.name for path in (ROOT / "ada2ms").glob("*/__init__.py") if exported(path.parent.name)]
    assert sorted(set(found) - {"cli", "compare", "demo"}) == sorted(PUBLIC)
    index = (ROOT / "docs" / "api" / "index.md").read_text()
    for package in PUBLIC:
        assert f".. automodule:: ada2ms.{package}\n" in (ROOT / "docs" / "api" / f"{package}.md").read_text()
        assert f"\n{package}\n" in index


def undocumented(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """The parameters, or fields, that a docstring does not describe."""
    doc = inspect.cleandoc(ast.get_docstring(node) or "")
    described = re.search(r"^(?:Args|Attributes):\n((?: +.*\n|\n)*)", f"{doc}\n", re.MULTILINE)
    words = re.findall(r"^ {4}(\w[^:]*):", described[1], re.MULTILINE) if described else []
    names = {name.lstrip("*") for line in words for name in re.split(r"[,\s]+", line)}
    fields: list[str] = []
    function: ast.FunctionDef | None = node if isinstance(node, ast.FunctionDef) else None
    for inner in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
            function = inner
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            constant = "ClassVar" in ast.unparse(inner.annotation) or inner.target.id.startswith("_")
            fields += [] if constant else [inner.target.id]
    if function is not None:
        arguments = function.args
        fields = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if a.arg != "self"]
    return sorted(set(fields) - names)


@pytest.mark.parametrize("package", PUBLIC)
def test_what_is_public_is_documented(package: str) -> None:
    """With every argument; and public methods, of which some are documented by the framework that they override."""
    found = dict(definitions(package))
    constants = {name for name in exported(package) if name.isupper()}
    assert set(found) | constants >= set(exported(package))
    for name, node in found.items():
        assert ast.get_docstring(node), name
        assert undocumented(node) == [], f"{name} does not describe {undocumented(node)}"
        if isinstance(node, ast.ClassDef) and not node.bases:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    assert ast.get_docstring(method), f"{name}.{method.name}"


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ('def f(a, *, b):\n    """F.\n\n    Args:\n        a: one.\n        b: two\n            lines.\n    """', []),
        ('def f(a, b, c):\n    """F.\n\n    Args:\n        a, c: two.\n    """', ["b"]),
        ('def f(a):\n    """F of a: nothing."""', ["a"]),
        ('class C:\n    """C.\n\n    Attributes:\n        a: one.\n    """\n    a: int\n    b: int', ["b"]),
        ('class C:\n    """C."""\n    kind: ClassVar[str] = "c"\n    def __init__(self, a): ...', ["a"]),
    ],
)
def test_what_is_not_described_is_found(source: str, missing: list[str]) -> None:
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    assert undocumented(node) == missing


def anchors(text: str) -> set[str]:
    """Those that GitHub gives to the headings of a page."""
    found = []
    for heading in re.findall(r"^#{1,6} (.+)$", FENCE.sub("", text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(to.read_text()), f"{page.name}: {target}"


def test_every_page_is_on_the_site_once() -> None:
    """Those that no list has are put where index.md says (others), by docs/conf.py."""
    pages = [*(page for page in MARKDOWN if page.parent != ROOT), *(ROOT / "docs").rglob("*.ipynb")]
    names = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in pages}
    listed = [
        f"{page.parent.name}/{entry}" if page.parent.name == "api" else entry
        for page in (ROOT / "docs" / "index.md", ROOT / "docs" / "api" / "index.md")
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL)
        for entry in re.findall(r"^(?!:)(?:.+ <)?([^\s>]+)>?$", tree, re.MULTILINE)  # which may have a title here
    ]
    listed.remove("(others)")
    listed.remove("self")
    assert len(listed) == len(set(listed))
    assert set(listed) <= names
    assert [name for name in names - set(listed) if "/" in name] == []


def test_every_row_of_distributed_training_names_a_case_that_is_there() -> None:
    """In its last column: a test, or what the tests of distributed training call a case."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    text = (ROOT / "docs" / "global.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    assert len(rows) > 30
    for *_, cases, _ in (row for row in rows if row[-2].strip().lower() not in ("case", "test")):
        named = [name.rpartition("::")[2] for name in re.findall(r"`([^`]+)`", cases)]
        assert named, cases
        for name in named:
            assert f"def {name}(" in tests or f'"{name}"' in tests, name


def test_broken_links_of_a_built_site_are_found(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.html").write_text('<p id="x"></p><a href="b/c.html#y">1</a><a href="#x">2</a><img src="no.png">')
    (tmp_path / "b" / "c.html").write_text(
        '<a id="y" href="../a.html#z">3</a><a href="https://b.c/d#e">4</a><a href="..">5</a>'
    )
    broken = ["a.html: no.png", "b/c.html: ../a.html#z", "b/c.html: .."]
    assert links.check(tmp_path) == (broken, ["https://b.c/d#e"])
    assert links.main(str(tmp_path)) == 1


@pytest.mark.slow
def test_the_site_is_built_strictly_and_whole(tmp_path: Path) -> None:
    """Each public name is in its inventory; and but for MathJax it loads nothing from elsewhere."""
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_nb")
    options = ["--fail-on-warning", "--keep-going", "--quiet", "-b", "html", "-d", str(tmp_path / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, "docs", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    broken, elsewhere = links.check(tmp_path / "site")
    assert broken == []
    assert [address for address in elsewhere if ".js" in address or ".css" in address] == [
        "https://cdn.jsdelivr.net/npm/mathjax@4/tex-mml-chtml.js"
    ]
    inventory = (tmp_path / "site" / "objects.inv").read_bytes().split(b"\n", 4)[4]
    known = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    assert {f"ada2ms.{package}.{name}" for package in PUBLIC for name in exported(package)} <= known
