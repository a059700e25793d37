"""What an import loads, and what is said where a framework is missing. Each test has an interpreter of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "optax")


# As if the module were not installed: a None in sys.modules, or a finder that raises, breaks libraries that only look.
ABSENT = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name.partition('.')[0] == {!r} else find(name, *args)
"""


def run(code: str, absent: str = "", keras_backend: str = "jax") -> str:
    """What `code` prints in a fresh interpreter in which `absent` is not installed."""
    code = ABSENT.format(absent) + code
    environment = {**os.environ, "KERAS_BACKEND": keras_backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


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
    assert run(f"{code}\nprint(sorted(set(sys.modules) & set({(*FRAMEWORKS, 'mpmath')})))") == "[]"


@pytest.mark.parametrize(("backend", "own"), [("torch", ["torch"]), ("jax", ["jax", "optax"])])
def test_a_backend_loads_its_own_framework_only(backend: str, own: list[str]) -> None:
    """Keras loads others itself, as it pleases."""
    assert run(f"import ada2ms.{backend}\nprint(sorted(set(sys.modules) & set({FRAMEWORKS})))") == str(own)


@pytest.mark.parametrize("backend", ["torch", "tf", "jax"])
def test_a_backend_loads_no_other_backend(backend: str) -> None:
    loaded = "{name.split('.')[1] for name in sys.modules if name.startswith('ada2ms.')}"
    assert run(f"import ada2ms.{backend}\nprint(sorted({loaded}))") == str(sorted(["_extras", backend, "core"]))


@pytest.mark.parametrize(
    ("absent", "extra", "keras_backend"),
    [("torch", "torch", "jax"), ("keras", "tf", "jax"), ("jax", "jax", "torch"), ("optax", "jax", "jax")],
)
def test_a_missing_framework_is_named_and_the_others_work(absent: str, extra: str, keras_backend: str) -> None:
    others = "".join(f"import ada2ms.{name}\n" for name in ("torch", "tf", "jax") if name != extra)
    code = f"""
try:
    import ada2ms.{extra}
except ImportError as error:
    print(error.name, error)
{others}"""
    wanted = f"{absent} ada2ms.{extra} needs {absent}, which is not installed: pip install 'ada2ms[{extra}]'"
    assert run(code, absent, keras_backend) == wanted


@pytest.mark.parametrize("keras_backend", ["torch", "jax"])
def test_keras_backend_needs_no_tensorflow(keras_backend: str) -> None:
    assert run("import ada2ms.tf; print(ada2ms.tf.Ada2MS.__name__)", "tensorflow", keras_backend) == "Ada2MS"


def test_unknown_attribute() -> None:
    import ada2ms

    with pytest.raises(AttributeError, match="'ada2ms' has no attribute 'tensorflow'"):
        ada2ms.tensorflow  # noqa: B018


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
