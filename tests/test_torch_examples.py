"""The examples that use torch, each run as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
# What each imports; updates and learning rate at its end, as its options and schedule have it (1437 images: 45 batches
# of 32, the gradients of two of them accumulated, in 10 epochs).
EXAMPLES = {
    "torch_accelerate": ("accelerate", "230 updates, lr 5.0e-04"),
    "torch_lightning": ("lightning", "230 updates, lr 0.0e+00"),
    "torch_trainer": ("transformers", "200 updates, weight decay 0.01 and 0.0, lr 0.0"),
}
THEIRS = "ignore:`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning"  # Lightning's use of torch


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example: str) -> None:
    """As many updates as it should make; resumed from its checkpoint without any difference; nine in ten recognised."""
    package, end = EXAMPLES[example]
    for name in (package, "sklearn"):
        pytest.importorskip(name)
    command = [sys.executable, "-W", "error", "-W", THEIRS, str(FOLDER / f"{example}.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert result.returncode == 0, result.stderr
    told = result.stdout.splitlines()
    assert told[-3:-1] == [end, "resumed half-way, largest difference 0.0"]
    accuracy = re.fullmatch(r"test accuracy (\d\.\d+)", told[-1])
    assert accuracy is not None, told
    assert float(accuracy[1]) > 0.9


def test_every_example_is_run() -> None:
    assert sorted(p.stem for p in FOLDER.glob("torch_*.py")) == sorted(EXAMPLES)
