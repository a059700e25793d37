"""What is released, and the files that a host of repositories reads: workflows, forms, the citation."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import ada2ms
import release

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FILES = ["ada2ms/__init__.py", "ada2ms/core/vectors/basics.json", "ada2ms/py.typed", "tests/data/a.pt", ".ci/run"]


def test_the_version_is_one() -> None:
    assert release.version() == ada2ms.__version__
    assert release.wrong_version(None) == []


def test_a_tag_must_be_the_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "the tag 0.2 is not v" in release.wrong_version("0.2")[0]
    (tmp_path / "ada2ms").mkdir()
    (tmp_path / "ada2ms" / "__init__.py").write_text('"""A."""\n\n__version__ = "1.2.3"\n')
    (tmp_path / "CITATION.cff").write_text("title: A\nversion: 1.2.3\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [1.2.3] - 2026-01-01\n")
    monkeypatch.setattr(release, "ROOT", tmp_path)
    assert release.wrong_version("v1.2.3") == []
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n")
    assert release.wrong_version("v1.2.3") == ["CHANGELOG.md has no section [1.2.3]"]
    assert release.wrong_version(None) == []
    (tmp_path / "CITATION.cff").write_text("version: 1.2.2\n")
    assert release.wrong_version(None) == ["CITATION.cff is not of the version 1.2.3"]


@pytest.mark.parametrize(
    ("sdist", "wheel", "problems"),
    [
        (FILES[:-1], [*FILES[:3], "a-1.dist-info/METADATA"], []),
        ([*FILES[:-1], "PKG-INFO"], FILES[:3], []),
        (FILES[1:-1], FILES[:3], ["the sdist lacks ada2ms/__init__.py"]),
        (FILES[:3], FILES[:3], ["the sdist lacks tests/data/a.pt"]),
        (FILES[:-1], FILES[:2], ["the wheel lacks ada2ms/py.typed"]),
        (FILES[:-1], [*FILES[:3], "tests/a.py"], ["the wheel has tests/a.py"]),
    ],
)
def test_files_that_are_missing_are_named(sdist: list[str], wheel: list[str], problems: list[str]) -> None:
    assert release.missing(FILES, sdist, wheel) == problems


SCHEMAS = {
    "github-workflows": WORKFLOWS,
    "github-issue-forms": [ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml" for name in ("bug", "port")],
    "github-issue-config": [ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"],
    "citation-file-format": [ROOT / "CITATION.cff"],
}
needs_files = pytest.mark.skipif(not WORKFLOWS, reason="a source distribution has no workflows")


@needs_files
@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_are_what_their_readers_take(schema: str) -> None:
    if find_spec("check_jsonschema") is None:
        pytest.skip("check-jsonschema is not installed")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *SCHEMAS[schema]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_files
def test_workflows_pass_their_linter() -> None:
    """Among others: actions are pinned, and nothing that others write becomes a command."""
    program = shutil.which("zizmor", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("zizmor is not installed")
    command = [program, "--offline", "--no-progress", "--format", "json", ROOT / ".github"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout) == [], done.stderr
    assert done.returncode == 0, done.stderr


@needs_files
def test_workflows_run_commands_that_there_are() -> None:
    """And nothing but these, so that what fails there fails here, too."""
    commands = [line for path in WORKFLOWS for line in re.findall(r"^ +(?:- )?run: (.*)$", path.read_text(), re.M)]
    assert len(commands) >= 5
    told = (ROOT / "dev.py").read_text().partition('"""')[2].partition('"""')[0]
    for command in commands:
        found = re.fullmatch(r"python dev\.py (\w+)(?: --tag \"\$TAG\")?", command)
        assert found, command
        assert re.search(rf"^    {found[1]}\b", told, re.MULTILINE), command


def test_the_oldest_versions_are_those_that_the_package_asks_for() -> None:
    pinned = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    asked = dict(re.findall(r'"(\w+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert {"torch", "keras", "jax", "optax", "numpy"} <= set(asked)
    for name in ("torch", "keras", "jax", "optax", "numpy"):
        least = asked[name].split(".")
        assert pinned[name].split(".")[: len(least)] == least, name
        assert set(pinned[name].split(".")[len(least) :]) <= {"0"}, name
