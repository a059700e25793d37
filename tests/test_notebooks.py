"""The notebooks are notebooks whose code parses and whose imports are there; `python dev.py slow` runs them."""

import ast
import importlib
import os
import re
from pathlib import Path

import pytest

import notebooks

NAMES = [pytest.param(name, marks=[pytest.mark.keras] if name == "keras" else []) for name in notebooks.NAMES]


def test_there_is_one_for_each_framework() -> None:
    assert notebooks.NAMES == ["jax", "keras", "torch"]


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_a_notebook_is_stored_as_it_was_executed(name: str) -> None:
    """In order, without an error, in the form that `tidy` gives it, and small."""
    notebook = notebooks.load(name)
    assert notebooks.tidy(notebooks.load(name)) == notebook
    assert (notebooks.FOLDER / f"{name}.ipynb").stat().st_size < 100_000
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_links_of_a_notebook_lead_somewhere(name: str) -> None:
    text = "".join(notebooks.source(cell) for cell in notebooks.load(name)["cells"] if cell["cell_type"] == "markdown")
    targets = re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", text)
    assert len(targets) >= 4
    assert [target for target in targets if not (notebooks.FOLDER / target).is_file()] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_code_of_a_notebook_parses_and_its_imports_are_there(name: str) -> None:
    nodes = [node for text in notebooks.code(notebooks.load(name)) for node in ast.walk(ast.parse(text))]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names = [(node.module, alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert len(names) >= 10
    for module in modules:
        importlib.import_module(module)
    for module, imported in names:
        assert module is not None
        if module != "IPython.display":  # which is where notebooks are
            assert hasattr(importlib.import_module(module), imported), f"{module} has no {imported}"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_prints_what_is_stored(name: str, tmp_path: Path) -> None:
    """But for numbers, and on Keras' backend that it was stored on; where AdamW and Ada2MS are compared, all learn."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    found = notebooks.printed(notebooks.executed(name, tmp_path))
    if name != "keras" or os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
        stored = notebooks.printed(notebooks.load(name))
        assert [notebooks.words(text) for text in found] == [notebooks.words(text) for text in stored]
    (compared,) = (text for text in found if "of the test images" in text)
    accuracy = [float(x) for x in re.findall(r"(\d+\.\d)% of the test images", compared)]
    assert len(accuracy) == 4
    assert min(accuracy) > 80, accuracy
    assert list(tmp_path.iterdir()) == []  # it writes to a folder of its own
