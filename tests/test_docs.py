"""What the docs say of the tests is so."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_row_of_the_habits_names_tests_that_are_there() -> None:
    rows = [line for line in (ROOT / "docs" / "habits.md").read_text().splitlines() if line.startswith("| ")]
    rows = [line for line in rows if not line.startswith(("| ---", "| what people do"))]
    assert len(rows) >= 40
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, name in named:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
