"""The snippets of README and the pages run as they stand, given what `snippets.py` makes for the text around them."""

import ast
import builtins
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import snippets

ROOT = Path(__file__).parents[1]
PAGES = [
    str(page.relative_to(ROOT))
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
    if snippets.snippets(str(page.relative_to(ROOT)))
]
NEEDS = {"docs/layers.md": "transformers", "docs/handoff.md": "flax", "README.md": "flax"}
NEEDS |= {"docs/trainers.md": "keras_tuner"}  # and the others that `python dev.py slow` installs with it


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page: str, tmp_path: Path) -> None:
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    environment = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(ROOT / "tests" / "snippets.py"), page]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith(f"{len(snippets.snippets(page))} snippets of {page}\n")
    if page == "README.md":  # the first minute, in each framework at three adaptivities: far above chance
        accuracy = [
            float(x) for x in re.findall(r"^adaptivity \d\.\d: .* (\d+\.\d)% of the test images$", done.stdout, re.M)
        ]
        assert len(accuracy) == 9
        assert min(accuracy) > 80, accuracy


def test_every_snippet_is_python_and_every_given_has_its_snippet() -> None:
    assert len(PAGES) >= 5
    for page in PAGES:
        for number, text in snippets.snippets(page):
            ast.parse(text, f"{page}:{number}")
    for page, line in {**snippets.GIVEN, **snippets.THEN}:
        found = [text for _, text in snippets.snippets(page) if snippets.begins(text, line)]
        assert len(found) == 1, f"{page} has {len(found)} snippets with a line that begins {line!r}"


def undefined(page: str) -> set[str]:
    """Names that snippets use and none so far defines, up to the first snippet that has something given."""
    known, missing = set(dir(builtins)), set[str]()
    for _, text in snippets.snippets(page):
        if any(of == page and snippets.begins(text, line) for of, line in snippets.GIVEN):
            break
        for node in (nodes := list(ast.walk(ast.parse(text)))):
            if isinstance(node, ast.alias):
                known.add(node.asname or node.name.partition(".")[0])
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                known.add(node.name)
            elif isinstance(node, ast.arg):
                known.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
        missing |= {node.id for node in nodes if isinstance(node, ast.Name)} - known
    return missing


@pytest.mark.parametrize("page", PAGES)
def test_what_a_snippet_takes_as_given_is_made(page: str) -> None:
    assert undefined(page) == set()
