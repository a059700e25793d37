"""The examples that use JAX, each run as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = {
    "jax_nnx": ("flax",),
    "jax_train_state": ("flax",),
    "jax_equinox": ("equinox",),
    "jax_orbax": ("orbax.checkpoint",),
}


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example: str) -> None:
    """Nine in ten digits are recognised; one in ten would be by chance."""
    for package in (*EXAMPLES[example], "sklearn"):
        pytest.importorskip(package)
    script = Path(__file__).parents[1] / "examples" / f"{example}.py"
    result = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    accuracy = re.search(r"test accuracy (\d\.\d+)", result.stdout)
    assert accuracy is not None, result.stdout
    assert float(accuracy[1]) > 0.9
    if example == "jax_train_state":
        assert "resumed half-way, largest difference 0.0\n" in result.stdout
    if example == "jax_orbax":  # goes on from where it was saved, but for sums in another order on eight devices
        found = re.search(r"onto 8 devices, largest difference (\S+)", result.stdout)
        assert found is not None, result.stdout
        assert float(found[1]) < 1e-4


def test_every_example_is_run() -> None:
    assert sorted(p.stem for p in (Path(__file__).parents[1] / "examples").glob("jax_*.py")) == sorted(EXAMPLES)
