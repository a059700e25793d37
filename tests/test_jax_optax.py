"""Optax' own tests, from the installed wheel, over Ada2MS: see optax_suite.py."""

import json
import subprocess
import sys
from pathlib import Path

import optax
import pytest

# The least number of tests that each module must have run: an empty run passes nothing.
LEAST = {
    "optax._src.alias_test": 64,
    "optax.contrib._common_test": 100,
    "optax._src.transform_test": 1,
    "optax.contrib._complex_valued_test": 2,
    "optax._src.float64_test": 4,
    "optax._src.sharding_test": 9,
    "optax.schedules._schedule_test": 3,
    "optax.transforms._accumulation_test": 14,
    "optax.transforms._combining_test": 1,
    "optax.tree_utils._state_utils_test": 1,
    "optax.contrib._sam_test": 2,
}
if tuple(map(int, optax.__version__.split(".")[:3])) < (0, 2, 7):  # which has no tables of optimizers in these
    del LEAST["optax._src.sharding_test"], LEAST["optax.transforms._accumulation_test"]
# The one that adamw passes and this does not, by choice: the averages of bfloat16 parameters are in float32.
BY_CHOICE = "params_dtype='bfloat16', state_dtype=None"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_optax_own_tests() -> None:
    script = Path(__file__).with_name("optax_suite.py")
    result = subprocess.run([sys.executable, str(script), *LEAST], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    modules = {report["module"]: report for report in map(json.loads, result.stdout.splitlines())}
    assert modules.keys() == LEAST.keys()
    broken = [entry for report in modules.values() for entry in report["broken"]]
    by_choice = [entry for entry in broken if BY_CHOICE in entry[0]]
    assert len(by_choice) == 1
    assert broken == by_choice, "\n".join(f"{name}\n{text}" for name, text in broken)
    for name, least in LEAST.items():
        assert modules[name]["run"] - len(modules[name]["skipped"]) >= least, (name, modules[name]["skipped"])
