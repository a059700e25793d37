"""What `python dev.py` installs for a command: what the command uses, and what is not there yet."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dev

FRAMEWORKS = ["torch", "tf", "jax"]


@pytest.mark.parametrize(
    ("options", "extras"),
    [
        ("", [*FRAMEWORKS, "demo"]),
        ("--steps 20 --adaptivity cosine:1:0:20", [*FRAMEWORKS, "demo"]),
        ("--frameworks torch", ["torch", "demo"]),
        ("--frameworks tf", ["tf", "jax", "demo"]),
        ("--frameworks tf --keras-backends torch", ["tf", "torch", "demo"]),
        ("--keras-backends tensorflow jax torch", [*FRAMEWORKS, "tensorflow-cpu", "demo"]),
        ("--keras-backends=tensorflow --steps 3", [*FRAMEWORKS, "tensorflow-cpu", "demo"]),
        ("--handoff", [*FRAMEWORKS, "demo", "flax"]),
        ("--handoff --frameworks torch tf --keras-backends torch", ["torch", "tf", "demo"]),
        ("--frameworks mxnet", ["demo"]),  # the demo says what is wrong
        ("--frameworks", [*FRAMEWORKS, "demo"]),
    ],
)
def test_the_demo_installs_what_its_options_use(
    options: str, extras: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    assert dev.of_demo(options.split()) == extras


def test_the_demo_installs_the_backend_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    assert dev.of_demo([]) == [*FRAMEWORKS, "tensorflow-cpu", "demo"]
    assert dev.of_demo(["--frameworks", "torch"]) == ["torch", "demo"]


def test_extras_contain_extras() -> None:
    assert dev.contained(["all", "dev"]) >= {"all", "dev", *FRAMEWORKS, "demo", "compare", "tensorflow-cpu", "flax"}
    assert dev.contained(["demo"]) == {"demo"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What pip has been asked to install, one entry for each call."""
    import venv

    calls: list[str] = []

    def run(command: list[Any], **_: Any) -> SimpleNamespace:
        calls.append(command[-1])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(dev, "VENV", tmp_path / "venv")
    monkeypatch.setattr(dev, "STAMP", tmp_path / "venv" / "stamp")
    monkeypatch.setattr(dev, "APART", tmp_path / "venv" / "apart")
    monkeypatch.setattr(venv, "create", lambda path, **_: path.mkdir())
    monkeypatch.setattr(dev, "subprocess", SimpleNamespace(run=run))
    return calls


def test_each_command_adds_what_is_missing(installed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    dev.setup("torch", "demo")
    dev.setup("torch", "demo")
    assert installed == [".[torch,demo]"]
    dev.setup("all", "dev")
    dev.setup("torch", "jax", "flax", "demo")  # of all and dev
    dev.setup("all", "dev", "examples")
    assert installed[1:] == [".[all,dev]", ".[examples]"]
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("Setting up .venv (about 2 GB")
    assert told[1:] == ["Adding all, dev to .venv", "Adding examples to .venv"]


def test_other_constraints_are_another_environment(installed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As CONSTRAINTS names them; the same again is the same."""
    assert dev.CONSTRAINTS == "constraints.txt"
    dev.setup("torch")
    monkeypatch.setattr(dev, "CONSTRAINTS", "constraints-oldest.txt")
    dev.setup("torch")
    dev.setup("torch")
    assert installed == [".[torch]"] * 2


def test_other_versions_are_another_environment(
    installed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With what the command uses, whatever the one before had."""
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((dev.ROOT / name).read_bytes())
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    dev.setup("all", "dev")
    (dev.VENV / "old").touch()
    with (tmp_path / "constraints.txt").open("a") as file:
        file.write("another==1\n")
    dev.setup("torch")
    assert installed == [".[all,dev]", ".[torch]"]
    assert not (dev.VENV / "old").exists()
    assert dev.STAMP.read_text().split()[1:] == ["torch"]


def test_what_is_kept_apart_is_installed_once(installed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """At versions that are pinned, since nothing else chooses them."""
    dev.setup("all", "dev", "examples")
    dev.setup_apart()
    dev.APART.mkdir()  # as pip does
    dev.setup_apart()
    assert installed == [".[all,dev,examples]", dev.OF_APART[-1]]
    assert capsys.readouterr().out.splitlines()[-1] == f"Adding {', '.join(dev.OF_APART)} to venv/apart"
    pinned = {line.partition("==")[0] for line in (dev.ROOT / "constraints.txt").read_text().splitlines()}
    assert pinned >= set(dev.OF_APART)
