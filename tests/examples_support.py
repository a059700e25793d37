"""Runs scripts as a user runs them, with the packages that they need."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
APART = Path(sys.prefix) / "apart"  # where `python dev.py slow` has put what is not in the environment itself
BESIDE_TORCHVISION = str(ROOT / "tests" / "run_with_torchvision.py")


def run(package: str, *command: str) -> list[str]:
    """The lines that Python prints, given this command line; skips where the package is not installed."""
    environment = {**os.environ, "JSONARGPARSE_DEPRECATION_WARNINGS": "off"}  # of Lightning's use of it
    if (APART / package).exists():
        environment["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", str(ROOT)), str(APART)])
    else:
        pytest.importorskip(package)
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check_accuracy(line: str) -> None:
    """Nine in ten digits are recognised; one in ten would be by chance."""
    accuracy = re.fullmatch(r"test accuracy (\d\.\d+)", line)
    assert accuracy is not None, line
    assert float(accuracy[1]) > 0.9
