"""The Keras examples, as a reader runs them, on each Keras backend."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, backend: str) -> list[str]:
    """The lines that an example prints."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def learns(told: list[str], least: float, backend: str) -> None:
    label, accuracy = told[-1].rsplit(" ", 1)
    assert label == f"{backend}: accuracy"
    assert float(accuracy) >= least


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
@pytest.mark.parametrize(("name", "least"), [("keras_convnet", 0.94), ("keras_text", 0.98)])
def test_an_example_learns(name: str, least: float, backend: str) -> None:
    """By `least`, which leaves room below what it reaches for another processor's rounding, and is far above chance."""
    told = run(name, backend)
    learns(told, least, backend)
    if name == "keras_convnet":
        assert told[-2] == "resumed half-way, largest difference 0.0"


def test_a_search_that_is_stopped_goes_on() -> None:
    """By KerasTuner, which needs tensorboard on TensorFlow; nine in ten digits are recognised after the best trial."""
    pytest.importorskip("keras_tuner")
    told = run("keras_tuner_digits", "jax")
    assert len([line for line in told if re.match(r"adaptivity \d\.\d+, learning rate \d\.\d+: \d", line)]) == 3
    assert told[-2] == "resumed, the same trials: True"
    learns(told, 0.9, "jax")


def test_every_example_is_run() -> None:
    assert sorted(p.stem for p in EXAMPLES.glob("keras_*.py")) == ["keras_convnet", "keras_text", "keras_tuner_digits"]
