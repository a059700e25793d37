"""How the code is built, as CONTRIBUTING says: who imports whom, and how long files and functions are."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BACKENDS = ("torch", "tf", "jax", "keras")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "ada2ms").rglob("*.py"))}


def imported(tree: ast.Module, package: str, modules: frozenset[str]) -> Iterator[str]:
    """The modules that a module imports, wherever in it; but for type checkers alone."""
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in modules else source


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """By module: those of the package that it imports."""
    known = frozenset(sources)
    found = {}
    for name, source in sources.items():
        is_package = any(other.startswith(f"{name}.") for other in known)
        package = name if is_package else name.rpartition(".")[0]
        found[name] = set(imported(ast.parse(source), package, known)) & known - {name}
    return found


GRAPH = graph({name: path.read_text() for name, path in MODULES.items()})


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; none if there is no circle."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def area(module: str) -> str:
    """core, torch and so on; "" for what is above them."""
    return module.split(".")[1] if "." in module else ""


def test_there_is_no_circle_of_imports() -> None:
    assert not circle(GRAPH)


def test_core_imports_no_backend_and_no_backend_another() -> None:
    assert {area(name) for name in MODULES} >= {"core", *BACKENDS}
    for name, others in GRAPH.items():
        for other in others:
            if area(name) == "core":
                assert area(other) in ("core", "_extras"), f"{name} imports {other}"
            if area(name) in BACKENDS and area(other) in BACKENDS and name != "ada2ms.keras":
                assert area(other) == area(name), f"{name} imports {other}"


def test_conformance_needs_the_core_alone() -> None:
    """Also by way of what it imports; backends use its cases, but not it."""
    for name, others in GRAPH.items():
        if area(name) == "conformance":
            assert {area(other) for other in others} <= {"core", "conformance", ""}, name
        elif area(name) in (*BACKENDS, "core"):
            assert "conformance" not in {area(other) for other in others}, name


def test_the_specification_is_independent_of_what_backends_use() -> None:
    """It judges them: what they compute by core's functions, it computes by itself."""
    assert GRAPH["ada2ms.core.spec"] == {"ada2ms.core.hyperparameters"}


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"p": "", "p.a": "from p import b", "p.b": "def f():\n    import p.a"}, True),
        ({"p": "from p.a import x", "p.a": "from . import y"}, True),
        ({"p": "", "p.a": "from .b import x", "p.b": "from p.a import y"}, True),
        ({"p": "", "p.a": "from p.b import x", "p.b": "if TYPE_CHECKING:\n    from p.a import y"}, False),
        ({"p": "from p.a import x", "p.a": "from p.b import x", "p.b": "import os"}, False),
    ],
)
def test_circles_are_found(sources: dict[str, str], found: bool) -> None:
    assert bool(circle(graph(sources))) is found


def lengths(path: Path) -> Iterator[tuple[str, int]]:
    """The lines of each function, without its docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(node.body) > 1
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            yield node.name, node.end_lineno - node.lineno + 1 - docstring


def python_files() -> list[Path]:
    folders = ("ada2ms", "tests", "benchmarks", "docs", "examples")
    return [*sorted(ROOT.glob("*.py")), *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))]


def test_files_and_functions_are_short() -> None:
    """A file has at most 400 lines, a function 60."""
    files = [path.name for path in python_files() if len(path.read_text().splitlines()) > 400]
    functions = [
        f"{path.relative_to(ROOT)}: {name}" for path in python_files() for name, length in lengths(path) if length > 60
    ]
    assert (files, functions) == ([], [])


def test_backends_have_the_same_rooms() -> None:
    """Those of CONTRIBUTING's table, which says where one is missing."""
    rows = re.findall(r"^ *\| `([\w.]+/?)` \|(.*)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert {"optimizer.py", "step.py", "kernels/"} <= {room for room, _ in rows}
    for backend in ("torch", "tf", "jax"):
        for room, purpose in rows:
            expected = not (backend == "jax" and "not in JAX" in purpose)
            assert (ROOT / "ada2ms" / backend / room).exists() is expected, f"{backend}: {room}"


def test_a_leading_underscore_marks_what_is_a_files_own() -> None:
    """One file is above the backends, and one is where pickles of before look."""
    files = [name for name in MODULES if name.rpartition(".")[2].startswith("_") and "__" not in name]
    assert files == ["ada2ms._extras", "ada2ms.jax._rule"]
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "ada2ms").startswith("ada2ms"):
                assert [a.name for a in node.names if a.name.startswith("_") and a.name != "__version__"] == [], name


MARKER = re.compile(r"^\s*(#|//) d = ", re.MULTILINE)  # above each statement that states the denominator
MARKED = ("ada2ms", "tests/golden")


def test_every_statement_of_the_denominator_is_listed() -> None:
    """In CONTRIBUTING, "Changing the rule": the files with the number of marked statements in each."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Changing the rule")[2].partition("\n## ")[0]
    listed = {file: int(count) for file, count in re.findall(r"^- `([^`]+)` \((\d+)\)", section, re.MULTILINE)}
    files = [path for folder in MARKED for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp")]
    found = {str(path.relative_to(ROOT)): len(MARKER.findall(path.read_text())) for path in files}
    assert {file: count for file, count in found.items() if count} == listed
