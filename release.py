"""What is released, built and tested as it will be installed: `python dev.py release`.

The wheel is made from the sdist; both are compared with the repository's files. Then the quick tests run from the
unpacked sdist, without its package, on the wheel in an environment of its own, to which .venv lends the frameworks.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import dev

ROOT = dev.ROOT
NOT_RELEASED = (".ci/", ".github/")


def version() -> str:
    """That of `ada2ms/__init__.py`, which needs nothing installed to be read."""
    (found,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "ada2ms" / "__init__.py").read_text(), re.MULTILINE)
    return str(found)


def wrong_version(tag: str | None) -> list[str]:
    """What is not of this version: a tag, if there is one, the changelog's section of it, and CITATION.cff."""
    found = []
    if f"\nversion: {version()}\n" not in (ROOT / "CITATION.cff").read_text():
        found.append(f"CITATION.cff is not of the version {version()}")
    if tag is not None and tag != f"v{version()}":
        found.append(f"the tag {tag} is not v{version()}")
    if tag is not None and f"\n## [{version()}]" not in (ROOT / "CHANGELOG.md").read_text():
        found.append(f"CHANGELOG.md has no section [{version()}]")
    return found


def missing(tracked: Sequence[str], sdist: Sequence[str], wheel: Sequence[str]) -> list[str]:
    """The repository's files that a distribution lacks, and those of the wheel that are not the package's.

    Args:
        tracked: the repository's files, relative to it.
        sdist: those of the source distribution, without its folder.
        wheel: those of the wheel.
    """
    package = {name for name in tracked if name.startswith("ada2ms/")}
    released = {name for name in tracked if not name.startswith(NOT_RELEASED)}
    inside = {name for name in wheel if ".dist-info/" not in name}
    return [
        *(f"the sdist lacks {name}" for name in sorted(released - set(sdist))),
        *(f"the wheel lacks {name}" for name in sorted(package - inside)),
        *(f"the wheel has {name}" for name in sorted(inside - package)),
    ]


def built() -> tuple[Path, Path]:
    """Builds both into dist; the sdist and the wheel."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    if not dev.run_all([dev.Job("build", ("build", "--outdir", "dist"))]):
        sys.exit("The release cannot be built")
    (sdist,), (wheel,) = (ROOT / "dist").glob("*.tar.gz"), (ROOT / "dist").glob("*.whl")
    return sdist, wheel


def lent(folder: Path, wheel: Path) -> Path:
    """The Python of a new environment with the wheel alone, which finds everything else in .venv."""
    venv.create(folder, with_pip=False)
    python = folder / dev.PYTHON.relative_to(dev.VENV)
    pip = [dev.PYTHON, "-m", "pip", "--disable-pip-version-check", "--python", python]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own, lender = (subprocess.check_output([x, "-c", show], text=True).strip() for x in (python, dev.PYTHON))
    (Path(own) / "lent.pth").write_text(f"{lender}\n")  # whose own .pth files, one of them .venv's ada2ms, do not count
    return python


def tested(sdist: Path, wheel: Path) -> bool:
    """Runs the quick tests of the sdist on the installed wheel; whether all passed."""
    os.environ.pop("PYTHONPATH", None)  # which may lead to the package in the repository
    with TemporaryDirectory() as folder:
        python = lent(Path(folder) / "environment", wheel)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        root = Path(folder) / sdist.name.removesuffix(".tar.gz")
        shutil.rmtree(root / "ada2ms")
        show = "import ada2ms; print(ada2ms.__version__, ada2ms.__file__)"
        found = subprocess.run([python, "-c", show], cwd=root, capture_output=True, text=True, check=True).stdout
        print(f"Tested is {found}", end="", flush=True)
        if not found.startswith(f"{version()} {python.parents[1]}"):
            sys.exit("This is not the wheel")
        return dev.run_all([dev.Job("command", ("ada2ms", "--version")), *dev.quick()], python, root)


def main(options: Sequence[str]) -> bool:
    """Builds, checks and tests; whether all is right. What was built stays in dist."""
    parser = argparse.ArgumentParser(prog="dev.py release", description=__doc__)
    parser.add_argument("--tag", help="that of the commit: must be v and the version")
    if problems := wrong_version(parser.parse_args(options).tag):
        sys.exit("\n".join(problems))
    sdist, wheel = built()
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    with tarfile.open(sdist) as archive:
        in_sdist = [name.partition("/")[2] for name in archive.getnames()]
    with zipfile.ZipFile(wheel) as zipped:
        in_wheel = zipped.namelist()
    if problems := missing(tracked, in_sdist, in_wheel):
        sys.exit("\n".join(problems))
    checks = dev.Job("twine", ("twine", "check", "--strict", str(sdist), str(wheel)))
    return dev.run_all([checks]) and tested(sdist, wheel)
