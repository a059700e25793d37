"""Sums of sketches by C++, where there are many entries and the system has a compiler; as NumPy's, to the resolution.

`sketch.cpp` is compiled on first use, which takes some two seconds, and stays in the user's cache. Where that fails,
for whatever reason, there is none, and callers do without.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ada2ms.core.trace.sketch import WIDTH, Array, Codes, codes, reals, sketch

ENTRIES: Final = 1 << 20  # of a model, from which on it is worth while
DTYPES: Final = ("float32", "float64", "bfloat16", "float16")  # in the order of sketch.cpp's Type
SOURCE: Final = Path(__file__).with_name("sketch.cpp")
_FLAGS: Final = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
_SECONDS: Final = 60.0  # after which a compiler is given up


def is_available(entries: int) -> bool:
    """Whether a model of so many entries is to be summed here; compiles if need be."""
    return entries >= ENTRIES and compiled() is not None


class Sums:
    """Squares and signed sums of tensors, given where they are."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[Codes, tuple[int, ...]]] = {}

    def __call__(self, addresses: Sequence[int], dtypes: Sequence[str], codes: Sequence[Codes], threads: int) -> Array:
        """float64, (tensors, WIDTH); the same whatever the number of threads.

        Args:
            addresses: of the first entry of each; entries are contiguous, in the order of the codes.
            dtypes: of each, among DTYPES.
            codes: of each; what comes again is best the same object.
            threads: at most how many to use.

        Raises:
            MemoryError: there is none left.
        """
        each = zip(addresses, dtypes, codes, strict=True)
        rows = [(address, *self._place(c), DTYPES.index(dtype)) for address, dtype, c in each]
        table = np.array(rows, np.int64).reshape(-1, 6)
        result = np.empty((len(rows), WIDTH))
        library = compiled()
        assert library is not None, "see is_available"
        if library.ada2ms_sums(len(rows), table.ctypes.data, threads, result.ctypes.data):
            raise MemoryError("No memory for the sums of sketches")
        return result

    def _place(self, codes: Codes) -> tuple[int, ...]:
        """Where codes are, and how many; they are kept, and stay there."""
        if id(codes) not in self._places:
            rows, columns = codes
            self._places[id(codes)] = codes, (rows.ctypes.data, columns.ctypes.data, len(rows), len(columns))
        return self._places[id(codes)][1]


class Sketcher:
    """Sketches of NumPy's arrays, as `sketch` makes them; keeps the codes of shapes that come again."""

    def __init__(self) -> None:
        self._sums = Sums()
        self._codes: dict[tuple[Any, ...], Codes] = {}

    def __call__(self, arrays: Sequence[Array], axes: Sequence[Sequence[int] | None]) -> Array:
        """float64, (arrays, WIDTH).

        Args:
            arrays: in a framework's layout.
            axes: of each, for each axis here which axis of the neutral layout it is; None if it is the same.
        """
        laid_out = [reals(x) for x in arrays]
        if not is_available(sum(x.size for x in laid_out)) or any(x.dtype.name not in DTYPES for x in laid_out):
            each = [sketch(x, order) for x, order in zip(arrays, axes, strict=True)]
            return np.stack(each) if each else np.zeros((0, WIDTH))
        addresses, dtypes = [x.ctypes.data for x in laid_out], [x.dtype.name for x in laid_out]
        found = [self._codes_of(x, order) for x, order in zip(arrays, axes, strict=True)]
        sketches = self._sums(addresses, dtypes, found, cores())
        with np.errstate(invalid="ignore"):
            sketches[:, 0] = np.sqrt(sketches[:, 0])
        return sketches

    def _codes_of(self, array: Array, axes: Sequence[int] | None) -> Codes:
        key = array.shape, None if axes is None else tuple(axes), np.iscomplexobj(array)
        if key not in self._codes:
            self._codes[key] = codes(array.shape, axes, is_complex=key[2])
        return self._codes[key]


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """The compiled source; None if it cannot be had."""
    found = built(SOURCE)
    return None if found is None else _declared(found)


def built(source: Path, included: Sequence[Path] = (), folders: Sequence[Path] = ()) -> ctypes.CDLL | None:
    """A source, compiled by the system's compiler or taken from the user's cache; None if it cannot be had.

    Args:
        source: of C++17.
        included: other files that the source includes, of which it is made anew if they change.
        folders: in which they are.
    """
    compiler = _compiler()
    if compiler is None:
        return None
    flags = [*_FLAGS, *_instructions()]
    about = repr((compiler, flags, platform.machine(), platform.libc_ver()))  # machines that differ may share a cache
    cache = _cache()
    with contextlib.suppress(OSError):
        name = f"{source.stem}-{_digest(b''.join(path.read_bytes() for path in (source, *included)) + about.encode())}"
        for kept in [] if cache is None else sorted(cache.glob(f"{name}-*.so")):
            if kept.stem == f"{name}-{_digest(kept.read_bytes())}":  # half a library would end the process
                return ctypes.CDLL(str(kept))
    try:
        with _folder(cache) as folder:
            made = Path(folder, f"{name}.so")
            command = [*compiler, *flags, *(f"-I{path}" for path in folders), str(source), "-o", str(made)]
            quiet = subprocess.DEVNULL
            subprocess.run(command, check=True, stdin=quiet, stdout=quiet, stderr=quiet, timeout=_SECONDS)
            found = ctypes.CDLL(str(made))
            if made.parents[1] == cache:
                made.replace(cache / f"{name}-{_digest(made.read_bytes())}.so")  # at once, whoever else does the same
            return found
    except (OSError, subprocess.SubprocessError):
        return None


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.ada2ms_sums.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    library.ada2ms_sums.restype = ctypes.c_int
    return library


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _compiler() -> list[str] | None:
    """The command of the system's compiler of C++; None if there is none that knows GCC's vectors."""
    if sys.platform == "win32":
        return None
    if given := shlex.split(os.environ.get("CXX", "")):
        return given
    return next(([found] for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def _instructions() -> list[str]:
    """Flags for what the processor has beside the least of its kind; Linux tells it."""
    flags = ("avx2", "fma", "f16c")
    try:
        known = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [f"-m{flag}" for flag in flags] if known.issuperset(flags) else []


def _cache() -> Path | None:
    """The user's folder for such things; None if the user has no home."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path("~/.cache").expanduser()) / "ada2ms"
    except RuntimeError:
        return None


def _folder(cache: Path | None) -> "tempfile.TemporaryDirectory[str]":
    """A new folder in the cache, from which a file can be moved there; or elsewhere, if the cache cannot be written."""
    if cache is not None:
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryDirectory(dir=cache)
    return tempfile.TemporaryDirectory()
