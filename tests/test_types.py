"""Scripts of users pass pyright in its strict mode; mypy checks them with the package, in `make test`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "typing"


@pytest.mark.slow
def test_scripts_of_users_pass_pyright() -> None:
    """In basedpyright, which is pyright in a wheel that has all that it runs on. What is ignored must be an error."""
    pytest.importorskip("basedpyright")
    command = [sys.executable, "-m", "basedpyright", "--project", SCRIPTS, "--pythonpath", sys.executable]
    done = subprocess.run([*command, "--outputjson"], capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert found["generalDiagnostics"] == []
    assert found["summary"]["filesAnalyzed"] == len(list(SCRIPTS.glob("*.py")))
