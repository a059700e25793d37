"""What a golden case expects, compared with what a run has come to; and the precision and the device of a framework."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import pytest
from numpy.typing import NDArray

from ada2ms import core
from ada2ms.conformance.bounds import EPSILON, deviations, largest_difference
from ada2ms.core import cases, golden
from ada2ms.core.cases import (
    Snapshot,
    dtypes,
    expected,
    factors,
    has_one_group,
    hyperparameters,
    precisions,
    recorded,
)

Array = NDArray[Any]
# What tests take from here is the package's.
__all__ = [
    "EPSILON",
    "Snapshot",
    "dtypes",
    "expected",
    "factors",
    "has_one_group",
    "hyperparameters",
    "largest_difference",
    "precisions",
    "recorded",
]

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("ninja") is None, reason="there is no C++ compiler, or no ninja"
)


def slow(*values: Any) -> list[Any]:
    """More values of a parameter, for `python dev.py slow`: what they cost there, they seldom find."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def check(case: golden.Case, actual: Iterator[Snapshot | None], dtype: str) -> None:
    """Fails unless counts are the case's, and updates and state are within bounds of it, at every recorded step.

    The bounds and their reasons are those of `ada2ms.conformance.bounds.deviations`.
    """
    for found in deviations(case, actual, dtype):
        assert found.ok, str(found)


def named_groups(case: golden.Case, names: Sequence[str]) -> tuple[dict[str, Any], tuple[core.Group, ...]]:
    """As in `ada2ms.core.cases`; skips the test of a case that cannot be stated so."""
    try:
        return cases.named_groups(case, names)
    except cases.NotStated as reason:
        pytest.skip(str(reason))


def require_device(framework: str, device: str) -> None:
    """Skips, with the reason, where this framework sees no GPU and one is asked for."""
    if framework == "keras":
        import keras

        framework = keras.backend.backend()
    if device == "gpu" and not _HAS_GPU[framework]():
        pytest.skip(f"{framework} sees no GPU")


def _torch_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _jax_has_gpu() -> bool:
    import jax

    return any(d.platform == "gpu" for d in jax.devices())


def _tensorflow_has_gpu() -> bool:
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


_HAS_GPU = {"torch": _torch_has_gpu, "jax": _jax_has_gpu, "tensorflow": _tensorflow_has_gpu}


def place(framework: str, device: str) -> Any:
    """The framework's own name of the device."""
    if framework == "torch":
        return "cuda" if device == "gpu" else "cpu"
    if framework == "keras":
        import keras

        cpu = "cpu:0" if keras.backend.backend() == "jax" else "cpu"  # torch would copy variables to its cpu:0
        return "gpu:0" if device == "gpu" else cpu
    import jax

    return jax.devices("gpu" if device == "gpu" else "cpu")[0]


def device_name(framework: str, device: str) -> str:
    """What the framework calls the device that tests call cpu or gpu."""
    return {"torch": {"gpu": "cuda"}, "keras": {"gpu": "gpu:0"}}.get(framework, {}).get(device, device)


@contextmanager
def settings(framework: str, dtype: str, device: str) -> Iterator[None]:
    """The framework's default precision and device, as a user of `dtype` sets them; skips where the device is missing.

    GPUs may multiply float32 in a shorter format, which each framework must be told not to.
    """
    require_device(framework, device)
    with ExitStack() as stack:
        if framework in ("torch", "keras", "jax"):
            drive = import_module(f"ada2ms.{'tf' if framework == 'keras' else framework}.drive")
            stack.enter_context(drive.settings(dtype, device_name(framework, device)))
        yield
