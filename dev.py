"""Sets up what it needs and runs it, with nothing but Python: `python dev.py demo`, `python dev.py test`.

    demo [options]     trains the same network on real data in every framework; options are those of `ada2ms demo`
    compare [options]  compares optimizers under one protocol; options are those of `ada2ms compare`
    test               format, lint, types, golden vectors and the tests
    slow               the frameworks' own test-suites, the multi-process tests and the examples
    setup              only the environment: .venv, with the versions that constraints.txt pins

Every command makes or mends .venv first, and leaves it alone where it is up to date.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "up-to-date"
KERAS_BACKENDS = ("tensorflow", "jax", "torch")
PYTEST = ("pytest", "-n", "2", "--dist", "loadgroup", "-m")


def setup(*extras: str) -> None:
    """Installs the package, editable, with these extras, unless that has been done for these very files."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"Python 3.11 to 3.13 is needed; this is {sys.version.split()[0]} ({sys.executable})")
    inputs = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    wanted = hashlib.sha256(b"\0".join([*inputs, sys.version.encode(), str(ROOT).encode()])).hexdigest()
    done = STAMP.read_text().split() if STAMP.exists() else []
    if done[:1] != [wanted]:
        print("Setting up .venv (about 3 GB; a few minutes)", flush=True)
        shutil.rmtree(VENV, ignore_errors=True)
        venv.create(VENV, with_pip=True)
        done = [wanted]
    missing = [extra for extra in extras if extra not in done]
    if missing:
        pip = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "-c", "constraints.txt"]
        subprocess.run([*pip, "--editable", f".[{','.join(missing)}]"], cwd=ROOT, check=True)
        STAMP.write_text(" ".join([*done, *missing]))


def run(*command: str, keras_backend: str = "tensorflow") -> bool:
    """Runs a module of the environment; whether it succeeded."""
    print(f"\n=== KERAS_BACKEND={keras_backend} python -m {' '.join(command)}", flush=True)
    environment = {**os.environ, "KERAS_BACKEND": keras_backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    environment["PATH"] = os.pathsep.join([str(PYTHON.parent), environment.get("PATH", "")])  # for ninja
    start = time.monotonic()
    code = subprocess.run([PYTHON, "-m", *command], cwd=ROOT, env=environment).returncode
    print(
        f"=== {'ok' if code == 0 else f'FAILED (exit status {code})'} in {time.monotonic() - start:.0f} s", flush=True
    )
    return code == 0


def test() -> list[bool]:
    """Tests that use Keras run on each of its backends, which is chosen once in a process; all others run once."""
    return [
        run("ruff", "format", "--check", "."),
        run("ruff", "check", "."),
        run("mypy"),
        run("tests.golden", "--check"),
        run(*PYTEST, "not slow", keras_backend=KERAS_BACKENDS[0]),
        *(run(*PYTEST, "keras and not slow", keras_backend=backend) for backend in KERAS_BACKENDS[1:]),
    ]


def slow() -> list[bool]:
    return [run(*PYTEST, "slow")]  # those that use Keras choose its backend themselves, in processes of their own


def main() -> int:
    command, *options = sys.argv[1:] or ["--help"]
    takes_options = command in ("demo", "compare")
    if not (takes_options or command in ("test", "slow", "setup")) or (options and not takes_options):
        print(__doc__)
        return 0 if command in ("-h", "--help") else 2
    setup("all", "dev", *(["examples"] if command == "slow" else []))
    if takes_options:
        return subprocess.run([PYTHON, "-m", "ada2ms", command, *options]).returncode
    succeeded = {"test": test, "slow": slow, "setup": lambda: []}[command]()
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    sys.exit(main())
