"""The rule with `fused=True`: one pass over all tensors together, in C++ on CPUs and in Triton on CUDA."""

import functools
import hashlib
import importlib
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ada2ms.torch import reduction
from ada2ms.torch.functional import Options, Scalar, together

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
    """Compiles and loads fused.cpp; for named instructions, since machines that differ may share torch's cache."""
    from torch.utils import cpp_extension

    source = Path(__file__).with_name("fused.cpp")
    if sys.platform == "win32":
        flags = ["/O2", "/openmp"]
    else:
        flags = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
        if platform.machine() in ("x86_64", "AMD64"):
            flags += _FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
        if sys.platform == "linux":
            flags.append("-fopenmp")  # of which torch brings the library
    content = source.read_bytes() + repr((str(source), flags, torch.__version__)).encode()
    cpp_extension.load(
        f"ada2ms_{hashlib.sha256(content).hexdigest()[:16]}",  # the cache itself compares but times of files
        [str(source)],
        extra_cflags=flags,
        is_python_module=False,
    )
    return torch.ops.ada2ms


@functools.cache
def _cuda() -> ModuleType | None:
    """The kernel in Triton, which comes with torch for CUDA; None, after a warning, where it does not."""
    try:
        return importlib.import_module("ada2ms.torch.fused_cuda")
    except ImportError as error:
        warnings.warn(
            f"Ada2MS(fused=True) needs Triton on CUDA ({error}): pip install triton; the default implementation takes "
            "its place.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def supports(tensors: Sequence[Tensor]) -> bool:
    """Whether there is a kernel for these, all on CPUs or all on CUDA; compiles it if need be."""
    if not all(type(x) is Tensor for x in tensors):  # torch's FakeTensor, which has no data, among others
        return False
    if all(x.is_cpu for x in tensors):
        return extension() is not None
    return all(x.is_cuda for x in tensors) and _cuda() is not None


def squares(grads: list[Tensor], grad_scale: Tensor | None) -> Tensor:
    """sum(g*g) of each, less its scale, in float64."""
    sums: Tensor = extension().squares(grads) if grads[0].is_cpu else reduction.squares(grads, torch.float64)
    return sums if grad_scale is None else sums / grad_scale.to(sums.device, sums.dtype) ** 2


def _fused_ada2ms(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    s_hats: Sequence[Scalar],
    o: Options,
) -> None:
    if not params[0].is_cpu:
        kernel = _cuda()
        assert kernel is not None
        for indices in together(params, lambda x: x.device):
            with torch.cuda.device(params[indices[0]].device):
                lists = (params, grads, exp_avgs, exp_avg_sqs, steps, s_hats)
                kernel._fused_ada2ms(*([x[i] for i in indices] for x in lists), o)
        return
    if o.live is not None and not o.live:
        return
    unscale = 1.0 if o.grad_scale is None else 1 / float(o.grad_scale)
    extension().step(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        [float(s) for s in s_hats],
        float(o.lr),
        float(o.beta1),
        float(o.beta2),
        o.eps,
        float(o.weight_decay),
        float(o.adaptivity),
        -unscale if o.maximize else unscale,
    )
