"""The notebooks of docs/notebooks, run as a reader runs them.

    python tests/notebooks.py [NAME ...]

runs those named, or all, in which case a cell that fails ends it, and writes their outputs into them; in the same form
whoever ran them: without times, random ids or what frameworks print to the standard error stream. That of Keras is run
on TensorFlow.
"""

import json
import os
import re
import sys
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?")
MAGIC = re.compile(r"^%.*$", re.MULTILINE)


def load(name: str) -> dict[str, Any]:
    """A notebook's JSON."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.ipynb").read_text())
    return found


def source(cell: dict[str, Any]) -> str:
    """A cell's text."""
    return "".join(cell["source"])


def code(notebook: dict[str, Any]) -> list[str]:
    """The text of each cell of code, without IPython's magics."""
    return [MAGIC.sub("", source(cell)) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(notebook: dict[str, Any]) -> list[str]:
    """What each cell of code has printed."""
    return [
        "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


def words(text: str) -> str:
    """A text but for its numbers and spaces, which may be others on another machine."""
    return " ".join(NUMBER.sub("#", text).split())


def executed(name: str, folder: Path) -> dict[str, Any]:
    """A notebook with the outputs that its cells have when they run in a folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])  # of the kernel
    notebook = nbformat.reads(json.dumps(load(name)), as_version=4)
    client = NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    return tidy(json.loads(nbformat.writes(client.execute())))


def opaque(picture: str) -> str:
    """A PNG picture without its transparency, which takes a seventh of it; both encoded by base64."""
    from PIL import Image

    file = BytesIO()
    Image.open(BytesIO(b64decode(picture))).convert("RGB").save(file, "PNG", optimize=True)
    return b64encode(file.getvalue()).decode()


def tidy(notebook: dict[str, Any]) -> dict[str, Any]:
    """The same notebook as every run writes it; what a cell prints comes in pieces of any length."""
    cells = notebook["cells"]
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i + 1}"
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            text = "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")
            stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
            rest = [output for output in cell["outputs"] if output["output_type"] != "stream"]
            cell["outputs"] = [*([stream] if text else []), *rest]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def main(names: list[str]) -> None:
    for name in names or NAMES:
        with TemporaryDirectory() as folder:
            notebook = executed(name, Path(folder))
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    output["data"]["image/png"] = opaque(output["data"]["image/png"])
        (FOLDER / f"{name}.ipynb").write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(f"{name}: {len(notebook['cells'])} cells")


if __name__ == "__main__":
    main(sys.argv[1:])
