"""What an import loads, and what is said where a framework is missing, each in an interpreter of its own.

Tests that ask different things of the same imports share one interpreter: starting it is what takes long.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "optax", "mpmath")

# As if modules were not installed: a None in sys.modules, or a finder that raises, breaks libraries that only look.
WITHOUT = """
import json, sys
from importlib.machinery import PathFinder
absent, *arguments = json.loads(sys.argv[1])
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name.partition('.')[0] in absent else find(name, *args)
"""
PROBE = """
statements, frameworks = arguments
for statement in statements:
    error = ''
    try:
        exec(statement, {})
    except ImportError as missing:
        error = f'{missing.name} {missing}'
    rooms = {name.split('.')[1] for name in sys.modules if name.startswith('ada2ms.')}
    print(json.dumps([error, sorted(set(sys.modules) & set(frameworks)), sorted(rooms)]))
"""


def run(code: str, *absent: str, arguments: tuple[Any, ...] = (), keras_backend: str = "jax") -> str:
    """What `code` prints in a fresh interpreter in which `absent` are not installed."""
    environment = {**os.environ, "KERAS_BACKEND": keras_backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", WITHOUT + code, json.dumps([absent, *arguments])]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@cache
def probe(*statements: str, absent: tuple[str, ...] = (), keras_backend: str = "jax") -> list[Any]:
    """Runs statements one after the other; after each: what is missing, and which frameworks and rooms are loaded."""
    shown = run(PROBE, *absent, arguments=(statements, FRAMEWORKS), keras_backend=keras_backend).splitlines()
    return [json.loads(line) for line in shown[-len(statements) :]]


@pytest.mark.parametrize(
    "code",
    [
        "import ada2ms",
        "import ada2ms.core",
        "import ada2ms; ada2ms.core.Ada2MS([]).step([])",
        "import ada2ms; dir(ada2ms)",
        "from ada2ms.core import golden; assert golden.load()",
        "from tests.golden import cases, maker, oracle; assert cases.themes()",
    ],
)
def test_core_loads_no_framework(code: str) -> None:
    """Nor mpmath, which only making golden vectors needs."""
    ((error, loaded, _),) = probe(code)
    assert (error, loaded) == ("", [])


# What is not installed beside TensorFlow, the backend of Keras, and what each room then lacks; the other rooms work.
LACKING: list[tuple[tuple[str, ...], str, dict[str, str]]] = [
    (("torch", "optax"), "jax", {"torch": "torch", "jax": "optax"}),
    (("keras",), "jax", {"tf": "keras"}),
    (("jax",), "torch", {"jax": "jax"}),
]


def imports_without(absent: tuple[str, ...], keras_backend: str) -> list[Any]:
    """After the import of each backend, Keras' first."""
    statements = [f"import ada2ms.{room}" for room in ("tf", "torch", "jax")]
    return probe(*statements, absent=(*absent, "tensorflow"), keras_backend=keras_backend)


@pytest.mark.parametrize(("backend", "own"), [("torch", ["torch"]), ("jax", ["jax", "optax"])])
def test_a_backend_loads_its_own_framework_only(backend: str, own: list[str]) -> None:
    """Keras loads others itself, as it pleases."""
    error, loaded, _ = probe(f"import ada2ms.{backend}")[0]
    assert (error, loaded) == ("", own)


@pytest.mark.parametrize("backend", ["torch", "tf", "jax"])
def test_a_backend_loads_no_other_backend(backend: str) -> None:
    found = imports_without(*LACKING[0][:2]) if backend == "tf" else probe(f"import ada2ms.{backend}")
    error, _, rooms = found[0]
    assert (error, rooms) == ("", sorted(["_extras", backend, "core"]))


@pytest.mark.parametrize(("absent", "keras_backend", "lacking"), LACKING)
def test_a_missing_framework_is_named_and_the_others_work(
    absent: tuple[str, ...], keras_backend: str, lacking: dict[str, str]
) -> None:
    said = "{1} ada2ms.{0} needs {1}, which is not installed: pip install 'ada2ms[{0}]'"
    wanted = {room: said.format(room, lacking[room]) if room in lacking else "" for room in ("tf", "torch", "jax")}
    assert [error for error, _, _ in imports_without(absent, keras_backend)] == list(wanted.values())


@pytest.mark.parametrize(("absent", "keras_backend"), [(x, y) for x, y, lacking in LACKING if "tf" not in lacking])
def test_keras_backend_needs_no_tensorflow(absent: tuple[str, ...], keras_backend: str) -> None:
    error, loaded, _ = imports_without(absent, keras_backend)[0]
    assert error == ""
    assert keras_backend in loaded
    assert "tensorflow" not in loaded


def test_unknown_attribute() -> None:
    import ada2ms

    with pytest.raises(AttributeError, match="'ada2ms' has no attribute 'tensorflow'"):
        ada2ms.tensorflow  # noqa: B018


def test_a_missing_backend_of_keras_is_named() -> None:
    [(error, _, _)] = probe("import ada2ms.tf", absent=("tensorflow",), keras_backend="tensorflow")
    assert error.startswith("tensorflow ada2ms.tf needs a backend of Keras, and tensorflow is not installed")


ENTRY_POINTS = [
    ("rich", ["ada2ms", "demo"], "The demo needs rich: pip install 'ada2ms[demo]'"),
    ("sklearn", ["ada2ms", "demo"], "The demo needs sklearn: pip install 'ada2ms[demo]'"),
    ("torch", ["ada2ms", "demo", "--frameworks", "torch"], "torch: torch not installed (pip install 'ada2ms[torch]')"),
    ("jax", ["ada2ms", "demo", "--frameworks", "tf"], "tf: jax, which KERAS_BACKEND names, not installed"),
    (
        "pytorch_optimizer",
        ["ada2ms", "compare"],
        "The comparison needs pytorch_optimizer: pip install 'ada2ms[compare]'",
    ),
    ("torch", ["ada2ms", "compare"], "The comparison needs torch: pip install 'ada2ms[compare]'"),
    (
        "safetensors",
        ["ada2ms", "state", "show", "tests/data/state-format-1.safetensors"],
        "ada2ms.state needs safetensors, which is not installed: pip install 'ada2ms[state]'",
    ),
    (
        "torch",
        ["ada2ms", "state", "show", "a.pt"],
        "ada2ms.torch needs torch, which is not installed: pip install 'ada2ms[torch]'",
    ),
    (
        "keras",
        ["ada2ms", "state", "show", "a.keras"],
        "ada2ms.tf needs keras, which is not installed: pip install 'ada2ms[tf]'",
    ),
    (
        "timm",
        ["ada2ms.timm", "train.py"],
        "ada2ms.timm needs timm, which is not installed: pip install 'ada2ms[timm]'",
    ),
    (
        "mpmath",
        ["tests.golden", "--check"],
        "making or checking golden vectors needs mpmath, which is not installed: pip install 'ada2ms[dev]'",
    ),
]


@pytest.mark.parametrize(("absent", "command", "sentence"), ENTRY_POINTS)
def test_an_entry_point_says_in_one_line_what_it_needs(absent: str, command: list[str], sentence: str) -> None:
    """And fails, with the exit status of a wrong argument."""
    module, *arguments = command
    code = f"""
import contextlib, io, runpy
sys.argv = {[module, *arguments]}
said = io.StringIO()
try:
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        runpy.run_module({module!r}, run_name="__main__")
except SystemExit as exit_:
    print(exit_.code)
print(said.getvalue())"""
    status, *lines = run(code, absent).splitlines()
    assert (status, len(lines)) == ("2", 1)
    assert sentence in lines[0]


def test_checking_what_is_installed_needs_nothing_else() -> None:
    assert "golden cases" in run("from ada2ms.core import golden; golden.main(['--check'])", "mpmath")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("dev.sys.version_info = (3, 10, 1)", "Python 3.11 to 3.13 is needed"),
        ("dev.find_spec = lambda module: None if module == 'ensurepip' else module", " lacks ensurepip (on Debian"),
        (
            "dev.subprocess.run = lambda *_, **__: SimpleNamespace(returncode=1)",
            "pip has not installed the extras all, dev",
        ),
    ],
)
def test_the_development_command_says_in_one_line_what_it_needs(change: str, sentence: str, tmp_path: Path) -> None:
    code = f"""
import dev
from pathlib import Path
from types import SimpleNamespace
dev.VENV, dev.STAMP = Path({str(tmp_path)!r}) / "venv", Path({str(tmp_path)!r}) / "venv" / "stamp"
import venv
venv.create = lambda *_, **__: None
{change}
try:
    dev.setup("all", "dev")
except SystemExit as exit_:
    print(exit_.code)"""
    said = run(code).splitlines()
    assert [line for line in said if sentence in line] == said[-1:]
    assert said[:-1] in ([], ["Setting up .venv (about 3 GB; a few minutes)"])
