"""A model of Hugging Face, with layers of its own, and its twin in flax.nnx: what `names` and `axes` it takes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "handoff_huggingface.py"


@pytest.mark.slow  # `import transformers` takes longer than the training
def test_gpt2_goes_on_in_flax() -> None:
    """The example, run as a user runs it: the same logits at first, and the same parameters and moments after 30 more
    steps; to some dozen roundings of float32.
    """
    for package in ("transformers", "flax"):
        pytest.importorskip(package)
    result = subprocess.run([sys.executable, "-W", "error", EXAMPLE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = re.fullmatch(
        r"(\d+) parameters handed over\n"
        r"logits, largest difference (\S+)\n"
        r"loss after 60 steps (\S+)\n"
        r"from the run that stayed in torch, largest difference (\S+)\n",
        result.stdout,
    )
    assert found is not None, result.stdout
    assert int(found[1]) == 2 + 2 * (2 + 8 + 2 + 4) + 2
    assert float(found[2]) < 1e-5
    assert float(found[3]) < 0.1  # it counts; by chance it would be log(11) = 2.4
    assert 0 < float(found[4]) < 1e-5
