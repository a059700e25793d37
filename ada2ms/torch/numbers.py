"""Types and places of the state: moments, and counts in 0-d tensors; to NumPy and back."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


class _ComputeDtypes(dict[torch.dtype, torch.dtype]):
    """Of parameters' dtypes those of their averages: at least float32, since b2 = 0.999 moves nothing in 16 bits."""

    def __missing__(self, dtype: torch.dtype) -> torch.dtype:
        self[dtype] = torch.promote_types(dtype, torch.float32)
        return self[dtype]


COMPUTE_DTYPES = _ComputeDtypes()
_SIXTEEN_BITS = {torch.float16, torch.bfloat16, torch.complex32}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return COMPUTE_DTYPES[dtype]


def compensation_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of a parameter's compensation: its own if its real numbers have 16 bits; None for a wider one."""
    return dtype if dtype in _SIXTEEN_BITS else None


def count_dtype(fused: bool | None = False) -> torch.dtype:
    """As torch's own `step`; never less than float32, which counts to 16 million."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 and not fused else torch.float32


def counts_on_device(group: dict[str, Any], device: torch.device) -> bool:
    """Whether the counts live beside the parameters, so that nothing waits for them; else on the CPU, as in torch."""
    return bool(group["capturable"] or group["fused"]) or (group["nonfinite"] == "skip" and device.type != "cpu")


def known_to_host(group: dict[str, Any], tensor: Tensor) -> bool:
    """Whether Python may read this scalar without waiting for a device; torch's FakeTensor it may not."""
    return tensor.is_cpu and type(tensor) is Tensor and not group["capturable"] and not torch.compiler.is_compiling()


def number(value: Any) -> Any:
    """A Python number for a tensor of one element; else the value."""
    return value.detach().item() if isinstance(value, Tensor) and value.numel() == 1 else value


def count(value: Any, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """A tensor of its own for a count, which may be a number, or have been cast to 16 bits."""
    if isinstance(value, Tensor):
        if value.dtype == torch.float16:  # its infinity is a count above its range
            value = value.clamp(max=torch.finfo(value.dtype).max)
        dtype = value.dtype if value.dtype in (torch.float32, torch.float64) else dtype
        own: Tensor = value.detach().to(device or value.device, dtype, copy=True)
        return own
    return torch.tensor(float(value), dtype=dtype, device=device or "cpu")


def numpy(tensor: Tensor) -> Any:
    """A copy as an array, dense, and at least float32 if it is not of integers."""
    counts = not (tensor.is_floating_point() or tensor.is_complex())
    wide = tensor.detach().to_dense().to("cpu", tensor.dtype if counts else compute_dtype(tensor.dtype))
    return np.array(wide.resolve_conj().resolve_neg().numpy())


def tensor(array: Any) -> Tensor:
    """A tensor of its own, contiguous."""
    return torch.tensor(np.ascontiguousarray(array).reshape(array.shape), device="cpu")


def as_tensor(value: Any) -> Tensor:
    """A tensor as it is, a number as one on the CPU: `torch.as_tensor` moves either to the default device."""
    return value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
