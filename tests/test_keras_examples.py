"""The Keras examples, as a reader runs them, on each Keras backend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
@pytest.mark.parametrize(("name", "least"), [("keras_convnet", 0.94), ("keras_text", 0.98)])
def test_an_example_learns(name: str, least: float, backend: str) -> None:
    """By `least`, which leaves room below what it reaches for another processor's rounding, and is far above chance."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    told, accuracy = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert told == f"{backend}: accuracy"
    assert float(accuracy) >= least
