"""Sets up what it needs and runs it, with nothing but Python: `python dev.py demo`, `python dev.py test`.

    demo [options]     trains the same network on real data in every framework; options are those of `ada2ms demo`
    compare [options]  compares optimizers under one protocol; options are those of `ada2ms compare`
    test               format, lint, types, golden vectors and the tests
    quick              in under a minute, while you work: golden vectors in every framework, mutants, imports
    slow               the frameworks' own test-suites, the multi-process tests and the examples
    release [options]  sdist and wheel, checked, and the quick tests on the installed wheel; see release.py
    docs               the site, in the folder site; a warning or a link that leads nowhere is an error
    gpu [options]      tests and benchmarks on a GPU, in one report, by the Python that runs this; see benchmarks/gpu.py
    setup              only the environment of the tests: .venv, with the versions that constraints.txt pins, or another
                       such file that the environment variable CONSTRAINTS names

Every other command first makes .venv, or adds to it, with what the command uses and nothing else: the demo needs no
linters, and TensorFlow only where it is asked for (`demo --keras-backends tensorflow`). Tests run in one process for
each framework, which imports nothing else and compiles once what several tests use; as many processes as there are
processors run at a time.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "up-to-date"
CONSTRAINTS = os.environ.get("CONSTRAINTS", "constraints.txt")
# Packages of some examples, in a folder of their own: other packages import DeepSpeed and torchvision where they find
# them, and a torchvision of another build than torch's cannot be imported.
APART = VENV / "apart"
OF_APART = ("timm", "torchvision", "deepspeed", "einops", "hjson", "py-cpuinfo")
KERAS_BACKENDS = ("tensorflow", "jax", "torch")
LABEL = 18  # the width of the labels
EXTRAS = {  # which commands use; others use all and dev
    "compare": ("compare",),
    "docs": ("torch", "tf", "jax", "docs"),
    "release": ("all", "dev", "release"),
    "slow": ("all", "dev", "examples", "docs"),
}
TESTS = {  # the files of tests that belong to one framework; all others are for none or for several
    "torch": ("test_torch*.py", "test_compare*.py"),
    "jax": ("test_jax*.py",),
    "keras": ("test_keras*.py",),
}


@dataclass(frozen=True)
class Job:
    """A module of the environment, to be run with arguments."""

    label: str
    command: tuple[str, ...]
    keras_backend: str = "tensorflow"


def setup(*extras: str) -> None:
    """Installs the package, editable, with these extras, unless that has been done for these very files."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"Python 3.11 to 3.13 is needed; this is {sys.version.split()[0]} ({sys.executable})")
    if absent := [module for module in ("venv", "ensurepip") if find_spec(module) is None]:
        sys.exit(f"{sys.executable} lacks {' and '.join(absent)} (on Debian and Ubuntu: apt install python3-venv)")
    import venv

    inputs = [(ROOT / name).read_bytes() for name in ("pyproject.toml", CONSTRAINTS)]
    wanted = hashlib.sha256(b"\0".join([*inputs, sys.version.encode(), str(ROOT).encode()])).hexdigest()
    stamp = STAMP.read_text().split() if STAMP.exists() else []
    done = stamp[1:] if stamp[:1] == [wanted] else []
    missing = sorted(set(extras) - contained(done), key=extras.index)
    size = "3 GB; a few minutes" if "dev" in missing else "2 GB, with torch for CUDA more; a few minutes"
    if stamp[:1] != [wanted]:
        print(f"Setting up .venv (about {size})", flush=True)
        shutil.rmtree(VENV, ignore_errors=True)
        venv.create(VENV, with_pip=True)
    elif missing:
        print(f"Adding {', '.join(missing)} to .venv", flush=True)
    if missing:
        pip = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "-c", CONSTRAINTS]
        if status := subprocess.run([*pip, "--editable", f".[{','.join(missing)}]"], cwd=ROOT).returncode:
            sys.exit(f"pip has not installed the extras {', '.join(missing)} (exit status {status}); it says why above")
        STAMP.write_text(" ".join([wanted, *done, *missing]))


def setup_apart() -> None:
    """Installs what is kept apart from the environment, unless it is there; `setup` has removed what is too old."""
    if APART.exists():
        return
    print(f"Adding {', '.join(OF_APART)} to {APART.relative_to(VENV.parent)}", flush=True)
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "-c", CONSTRAINTS]
    if status := subprocess.run([*pip, "--no-deps", "--target", APART, *OF_APART], cwd=ROOT).returncode:
        sys.exit(f"pip has not installed {', '.join(OF_APART)} (exit status {status}); it says why above")


def contained(extras: Iterable[str]) -> set[str]:
    """These extras of pyproject.toml, and those that they consist of, as "all" does of several."""
    import tomllib  # not in Python 3.10, to whose users `setup` says that they need another

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found: set[str] = set()
    left = list(extras)
    while left:
        found.add(extra := left.pop())
        own = [re.fullmatch(r"ada2ms\[(.+)\]", requirement) for requirement in declared[extra]]
        left += [name for match in own if match for name in match[1].split(",") if name not in found]
    return found


def of_demo(options: list[str]) -> list[str]:
    """The extras that the demo uses with these options; what is wrong with them the demo says itself."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--frameworks", nargs="+", default=["torch", "tf", "jax"])
    parser.add_argument("--keras-backends", nargs="+", default=[])
    parser.add_argument("--handoff", action="store_true")
    try:
        given, _ = parser.parse_known_args(options)
    except argparse.ArgumentError:
        given = parser.parse_args([])
    backends = given.keras_backends or [os.environ.get("KERAS_BACKEND", "jax")] * ("tf" in given.frameworks)
    of_backend = {"torch": "torch", "jax": "jax", "tensorflow": "tensorflow-cpu"}
    wanted = [name for name in ("torch", "tf", "jax") if name in given.frameworks]
    wanted += [of_backend[name] for name in backends if name in of_backend]
    return list(dict.fromkeys([*wanted, "demo", *["flax"] * (given.handoff and "jax" in given.frameworks)]))


def run(job: Job, shared: str, python: Path, root: Path) -> bool:
    """Runs a job, each line of its output behind its label; whether it succeeded. `shared` is for all jobs' tests."""
    label = f"{job.label:>{LABEL}} |"
    print(f"{label} KERAS_BACKEND={job.keras_backend} python -m {' '.join(job.command)}\n", end="", flush=True)
    environment = {**os.environ, "KERAS_BACKEND": job.keras_backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    environment["SHARED_TRAJECTORIES"] = shared  # see tests/test_trajectories.py
    environment["JAX_COMPILATION_CACHE_DIR"] = os.path.join(shared, "jax")  # what several tests compile, once for all
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment["PYTHONDONTWRITEBYTECODE"] = ""  # pytest rewrites tests for seconds, and the next process reads them
    environment["PATH"] = os.pathsep.join([str(PYTHON.parent), environment.get("PATH", "")])  # for ninja
    start = time.monotonic()
    command = [python, "-m", *job.command]
    with subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{label} {line}", end="", flush=True)  # in one piece, beside the lines of other jobs
    ended = f"FAILED (exit status {process.returncode})" if process.returncode else "ok"
    print(f"{label} {ended} in {time.monotonic() - start:.0f} s\n", end="", flush=True)
    return process.returncode == 0


def run_all(jobs: list[Job], python: Path = PYTHON, root: Path = ROOT) -> bool:
    """Starts jobs in this order, in a folder, as many at a time as there are processors; whether all succeeded."""
    start = time.monotonic()
    with TemporaryDirectory() as shared, ThreadPoolExecutor(os.cpu_count()) as pool:
        succeeded = list(pool.map(run, jobs, repeat(shared), repeat(python), repeat(root)))
    for job, ok in zip(jobs, succeeded, strict=True):
        print(f"{job.label:>{LABEL}} | {'ok' if ok else 'FAILED'}")
    print(f"{time.monotonic() - start:.0f} s in all", flush=True)
    return all(succeeded)


def pytest(label: str, marks: str, *arguments: str, keras_backend: str = "tensorflow") -> Job:
    return Job(label, ("pytest", "--quiet", "-m", marks, *arguments), keras_backend)


def files(framework: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for name in TESTS[framework] for path in (ROOT / "tests").glob(name))


def without(*frameworks: str) -> list[str]:
    return [f"--ignore-glob=*/{name}" for framework in frameworks for name in TESTS[framework]]


def lanes(marks: str) -> list[Job]:
    """Every test with these marks once, and those that use Keras once for each of its backends."""
    on_keras = [
        pytest(f"Keras on {name}", f"keras and {marks}", *without("torch", "jax"), keras_backend=name)
        for name in KERAS_BACKENDS
    ]
    return [  # such that of two processors neither is left with a long one alone; they share trajectories of networks
        pytest("several", f"not keras and {marks}", *without("torch", "jax", "keras")),
        on_keras[0],
        pytest("JAX", f"not keras and {marks}", *files("jax")),
        pytest("PyTorch", f"not keras and {marks}", *files("torch")),
        *on_keras[1:],
    ]


def test() -> list[Job]:
    return [
        *lanes("not slow"),
        *([Job("types", ("mypy",))] if CONSTRAINTS == "constraints.txt" else []),  # older frameworks state others
        Job("golden vectors", ("tests.golden", "--check")),
        Job("lint", ("ruff", "check", ".")),
        Job("format", ("ruff", "format", "--check", ".")),
    ]


def quick() -> list[Job]:
    def vectors(label: str, marks: str, way: str) -> Job:
        return pytest(
            label, marks, "-k", f"test_golden and (float64 or compensated) and {way}", "tests/test_trajectories.py"
        )

    return [
        vectors("Keras", "keras", "keras"),
        vectors("PyTorch, JAX", "not keras", "(torch-foreach or jax-jit)"),
        pytest("NumPy", "not slow", "tests/test_spec.py", "tests/test_golden.py", "tests/test_imports.py"),
    ]


def slow() -> list[Job]:
    own = pytest("Keras", "not keras and slow", *files("keras"))  # these choose a backend, in processes of their own
    return [own, *lanes("slow")]


def site() -> list[Job]:
    build = ("-b", "html", "-d", "site/.doctrees", "docs", "site")
    return [Job("site", ("sphinx", "--fail-on-warning", "--keep-going", "--fresh-env", "--quiet", *build))]


def docs() -> bool:
    """Builds the site and checks its links; whether it is whole."""
    shutil.rmtree(ROOT / "site", ignore_errors=True)
    whole = run_all(site()) and run_all([Job("links", ("docs.links", "site"))])
    print(f"Site: {ROOT / 'site' / 'index.html'}" if whole else "The site is not whole")
    return whole


def main() -> int:
    command, *options = sys.argv[1:] or ["--help"]
    if command == "gpu":
        return subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu.py", *options]).returncode
    takes_options = command in ("demo", "compare", "release")
    jobs = {"test": test, "quick": quick, "slow": slow, "docs": site, "setup": lambda: []}
    if not (takes_options or command in jobs) or (options and not takes_options):
        print(__doc__)
        return 0 if command in ("-h", "--help") else 2
    setup(*(of_demo(options) if command == "demo" else EXTRAS.get(command, ("all", "dev"))))
    if command == "release":
        import release

        return 0 if release.main(options) else 1
    if command == "slow":
        setup_apart()
    if takes_options:
        return subprocess.run([PYTHON, "-m", "ada2ms", command, *options]).returncode
    return 0 if (docs() if command == "docs" else run_all(jobs[command]())) else 1


if __name__ == "__main__":
    sys.exit(main())
