"""The update on CPUs in C++: one pass over all tensors together, and one over the gradients for their squares."""

import functools
import hashlib
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ada2ms.core.coefficients import Coefficients
from ada2ms.torch.kernels import Compensations, Options, of_each

_FLAGS = {  # what torch compiles its own kernels with, where it finds these instructions
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}


@functools.cache
def extension() -> Any:
    """The C++ of this folder, as torch.ops.ada2ms; None, after a warning, where it cannot be built.

    The first process that asks has it compiled, which takes some ten seconds; it stays in torch's cache of extensions.
    """
    try:
        return _build()
    except Exception as error:  # whatever is amiss with this machine's compiler, training goes on
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(
            f"Ada2MS(fused=True) compiles its update on first use, which failed ({reason}); the default implementation "
            "takes its place. It needs a C++ compiler (Linux: g++; macOS: xcode-select --install; Windows: Visual "
            "Studio's cl) and ninja (pip install ninja), both on the PATH.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _build() -> Any:
    """Compiles and loads fused_cpu.cpp; for named instructions, since machines that differ may share torch's cache."""
    from filelock import FileLock  # which torch needs itself
    from torch.utils import cpp_extension

    source = Path(__file__).with_name("fused_cpu.cpp")
    if sys.platform == "win32":
        flags = ["/O2", "/openmp"]
    else:
        flags = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
        if platform.machine() in ("x86_64", "AMD64"):
            flags += _FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
        if sys.platform == "linux":
            flags.append("-fopenmp")  # of which torch brings the library
    content = source.read_bytes() + repr((str(source), flags, torch.__version__)).encode()
    name = f"ada2ms_{hashlib.sha256(content).hexdigest()[:16]}"  # the cache itself compares but times of files
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root(), name)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "build.lock"):  # the system lets go of it when its process dies, however that happens
        (folder / "lock").unlink(missing_ok=True)  # torch would wait for ever for a process that was killed
        cpp_extension.load(name, [str(source)], extra_cflags=flags, build_directory=str(folder), is_python_module=False)
    return torch.ops.ada2ms


def supports(tensors: Sequence[Tensor]) -> bool:
    """Whether there is a kernel for these; compiles it if need be. Torch's FakeTensor, among others, has no data."""
    return set(map(type, tensors)) == {Tensor} and all(x.is_cpu for x in tensors) and extension() is not None


def squares(grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    """sum(g*g) of each, in float64, and then of this dtype."""
    sums: Tensor = extension().squares(grads)
    return sums.to(dtype)


def counts(steps: list[Tensor]) -> list[float]:
    """The values of these counts."""
    values: list[float] = extension().counts(steps)
    return values


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    coefficients: Coefficients,
    options: Options,
    compensations: Compensations = (),
) -> None:
    """See `ada2ms.torch.kernels`; reads what is on the device, which is the CPU."""
    if options.step_is_live is not None and not options.step_is_live:
        return
    step_sizes, denom_scales, eps = (
        [float(x) for x in of_each(1.0 if column is None else column, 1)] for column in coefficients
    )
    inv_scale = float(options.inv_scale)
    extension().step(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [x for x in compensations if x is not None],
        step_sizes,
        denom_scales,
        eps,
        float(options.beta1),
        float(options.beta2),
        1.0 if options.decay_factor is None else float(options.decay_factor),
        float(options.adaptivity),
        -inv_scale if options.maximize else inv_scale,
    )
