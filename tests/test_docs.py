"""What the docs say of the tests is so."""

import ast
import re
from pathlib import Path

from handoff_rows import ROWS

ROOT = Path(__file__).parent.parent


def rows(page: str, header: str) -> list[str]:
    """Those of the page's tables."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    return [line for line in lines if line.startswith("| ") and not line.startswith(("| ---", f"| {header}"))]


def named_tests(text: str) -> int:
    """How many tests a text names, all of which are there."""
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
    return len(named)


def test_every_row_of_the_habits_names_tests_that_are_there() -> None:
    found = rows("habits.md", "what people do")
    assert len(found) >= 40
    for row in found:
        assert named_tests(row), row


def test_every_row_of_the_layers_is_tested_and_every_tested_one_is_there() -> None:
    found = rows("layers.md", "layer")
    named = [re.findall(r"`([^`]+)`", part) for row in found for part in re.findall(r"rows? (`[^;|]*)", row)]
    assert sorted(name for names in named for name in names) == sorted(ROWS)
    for row in found:
        assert "row" in row.split("|")[-2] or named_tests(row), row
        named_tests(row)
