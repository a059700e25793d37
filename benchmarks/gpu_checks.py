"""The parts of `python dev.py gpu` that say right or wrong: `ada2ms check`, and the tests marked `gpu`."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Section:
    """A part of the report."""

    title: str
    lines: list[str]  # Markdown
    data: dict[str, dict[str, Any]] = field(default_factory=dict)  # the same as numbers, by row
    ok: bool = True


@dataclass
class Limits:
    """What the command line asks of these parts."""

    smoke: bool
    test_seconds: float


# Whether it computes the rule


def run_check(options: Limits) -> Iterator[Section]:
    """`ada2ms check`: the golden vectors in every framework, on every device; with --smoke in torch alone."""
    command = [sys.executable, "-m", "ada2ms", "check", "--json", *(["--framework", "torch"] if options.smoke else [])]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=options.test_seconds
        )
    except subprocess.TimeoutExpired:
        yield Section("Check", [f"Not done after {options.test_seconds:.0f} s."], ok=False)
        return
    if done.returncode not in (0, 1):  # 2: torch and JAX are not there, or the command itself failed
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        yield Section("Check", [f"Not run: exit status {done.returncode}: {reason}"], ok=done.returncode == 2)
        return
    yield checked(json.loads(done.stdout))


def checked(found: dict[str, Any]) -> Section:
    """The table that `ada2ms check --json` has as data."""
    from ada2ms.cli import check
    from ada2ms.conformance.rows import Row

    rows = [Row(**row) for row in found["rows"]]
    table = [check.HEADER, ["---"] * len(check.HEADER), *map(check.cells, rows)]
    lines = [f"| {' | '.join(line)} |" for line in table]
    notes = [f"- {note}" for note in check.notes(rows, everything=False)]
    data = {f"{row.framework}, {row.device}, {row.path}, {row.dtype}": row.data() for row in rows}
    return Section("Check: epsilons off the golden vectors", [*lines, "", *notes], data, ok=found["status"] == 0)


# Tests


def run_tests(options: Limits) -> Iterator[Section]:
    """The tests marked `gpu`, once; those that depend on Keras once more on its other backend."""
    if options.smoke or find_spec("pytest") is None:
        yield Section("Tests", ["Not run: --smoke leaves them out." if options.smoke else "pytest is not installed."])
        return
    with_keras = find_spec("keras") is not None
    backends = [name for name in ("torch", "jax") if find_spec(name)]
    for backend, marker in zip(backends, ("gpu" if with_keras else "gpu and not keras", "gpu and keras"), strict=False):
        if "and keras" in marker and not with_keras:
            continue
        command = [sys.executable, "-m", "pytest", "-q", "-m", marker, "-p", "no:cacheprovider", "-p", "no:benchmark"]
        # torch's own test tools import Numba, which newer versions of NumPy warn
        command += ["-W", "ignore:The 'generic' unit for NumPy timedelta:DeprecationWarning"]
        if find_spec("xdist"):
            command += ["-n", str(min(os.cpu_count() or 1, 14))]
        yield tested(command, backend, marker, options.test_seconds)


def tested(command: list[str], backend: str, marker: str, seconds: float) -> Section:
    title = f"Tests, `KERAS_BACKEND={backend} pytest -m '{marker}'`"
    environment = {**os.environ, "KERAS_BACKEND": backend}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        print((error.stdout or b"").decode(errors="replace")[-4000:])
        return Section(title, [f"Not done after {seconds:.0f} s."], ok=False)
    ok = done.returncode in (0, 5)  # 5: there are none
    if not ok:
        print(done.stdout[-12000:], done.stderr[-2000:])
    output = done.stdout.strip() or done.stderr.strip() or "no output"
    notable = re.findall(r"^(?:SKIPPED|FAILED|ERROR) .*", output, re.MULTILINE)
    return Section(title, [output.splitlines()[-1].strip("= "), "", *[f"- {line}" for line in notable]], ok=ok)
