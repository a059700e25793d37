"""Ada2MS written once more, in C, and checked against the golden vectors: what a port to any language takes.

    python examples/port_c.py    # needs a C compiler, by the name that CC has, or cc

The rule is port.c. `Port` is all that `ada2ms.conformance.check` asks of an implementation: NumPy arrays in and out.
The port knows neither groups nor 16 bits, and `Port` has no arguments for them, so that the report says of these cases
that they are not checked.
"""

import ctypes
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ada2ms.conformance import check

SOURCE = Path(__file__).with_name("port.c")
Array = NDArray[np.float64]
Pointer = ctypes.POINTER(ctypes.c_double)


class Tensor(ctypes.Structure):
    _fields_ = (
        ("n", ctypes.c_size_t),
        *((name, Pointer) for name in "pmv"),
        ("s", ctypes.c_double),
        ("t", ctypes.c_long),
    )


class Optimizer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("b1", "b2", "eps", "weight_decay", "max_norm")),
        *((name, ctypes.c_int) for name in ("per_tensor", "skip")),
        ("s", ctypes.c_double),
        *((name, ctypes.c_long) for name in ("k", "skipped")),
    )


def compiled(source: Path, folder: Path) -> ctypes.CDLL:
    """The C code as a library."""
    library = folder / "port.so"
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-o", str(library), str(source), "-lm"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def port(library: ctypes.CDLL) -> type:
    """The class that `check` makes optimizers of."""

    class Port:
        def __init__(
            self, params: list[Array], *, lr: Any, b1: float, b2: float, eps: float, weight_decay: float,
            adaptivity: Any, scope: str, nonfinite: str = "propagate", max_norm: float = math.inf,
        ) -> None:  # fmt: skip
            self.params, self.lr, self.adaptivity = params, lr, adaptivity
            moments = [(np.zeros_like(p), np.zeros_like(p)) for p in params]
            self.moments = moments  # C has pointers to them
            self.tensors = (Tensor * len(params))(
                *(Tensor(p.size, *map(address, (p, m, v))) for p, (m, v) in zip(params, moments, strict=True))
            )
            self.optimizer = Optimizer(b1, b2, eps, weight_decay, max_norm, scope == "tensor", nonfinite == "skip")

        def step(self, gradients: Sequence[Array | None]) -> None:
            lr, a = (x(self.optimizer.k) if callable(x) else x for x in (self.lr, self.adaptivity))
            pointers = (Pointer * len(gradients))(*(None if g is None else address(g) for g in gradients))
            library.ada2ms_step(
                ctypes.byref(self.optimizer), self.tensors, ctypes.c_size_t(len(gradients)), pointers,
                ctypes.c_double(lr), ctypes.c_double(a),
            )  # fmt: skip

    return Port


def address(x: Array) -> Any:
    """Where C finds the entries of an array."""
    return x.ctypes.data_as(Pointer)


def main(source: Path = SOURCE) -> int:
    """Prints what came of it; the exit status is 1 where the port is off."""
    with tempfile.TemporaryDirectory() as folder:
        report = check(port(compiled(source, Path(folder))))
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
