"""What a golden case expects, compared with what a run has come to; and the precision and the device of a framework."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ada2ms import core
from ada2ms.core import golden
from ada2ms.core.groups import exactly

Array = NDArray[Any]
EPSILON = {dtype: float(np.finfo(dtype).eps) for dtype in ("float32", "float64")}
# Of a type of 16 bits: the largest share of itself by which a number is rounded, and the smallest number above 0.
SIXTEEN_BITS = {"bfloat16": (2.0**-8, 2.0**-133), "float16": (2.0**-11, 2.0**-24)}


needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("ninja") is None, reason="there is no C++ compiler, or no ninja"
)


def slow(*values: Any) -> list[Any]:
    """More values of a parameter, for `python dev.py slow`: what they cost there, they seldom find."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@dataclass
class Snapshot:
    """Parameters and state after some steps. Lists have an entry for each parameter, group after group; `k` for each
    group, and so has `s` in scope "model".
    """

    params: list[Array]
    exp_avg: list[Array]
    exp_avg_sq: list[Array]
    step: list[int]
    s: list[float]
    k: list[int]
    skipped: int
    compensation: list[Array | None] = field(default_factory=list)  # as `params`; may be left out where all are None


def precisions(case: golden.Case) -> tuple[str, ...]:
    """The types in which a case is run: beside 16 bits, which are computed in float32, in nothing wider."""
    return ("float32",) if case.compensated else ("float64", "float32")


def dtypes(case: golden.Case, dtype: str) -> list[str]:
    """The type of each parameter of a case that is run in `dtype`."""
    return [own or dtype for group in case.groups for own in group.dtypes]


def recorded(case: golden.Case) -> set[int]:
    """The steps of which the case has parameters and state, counted from 1."""
    return {at.step for at in case.expected}


def expected(at: golden.Expected) -> Snapshot:
    """What a golden case expects, as a snapshot."""
    flat = {
        name: [x for group in at.groups for x in getattr(group, name)] for name in ("params", "exp_avg", "exp_avg_sq")
    }
    return Snapshot(
        **flat,
        step=[t for group in at.groups for t in group.step],
        s=[s for group in at.groups for s in group.global_exp_avg_sq],
        k=[group.global_step for group in at.groups],
        skipped=at.skipped,
        compensation=[x for group in at.groups for x in group.compensation],
    )


def check(case: golden.Case, actual: Iterator[Snapshot | None], dtype: str) -> None:
    """Fails unless counts are the case's, and updates and state are within bounds of it, at every recorded step.

    Updates p_t - p_0 are compared, and not parameters, which would hide errors of the update. The bounds, relative to
    the largest entry of a tensor:

    - float64: 1e-12. That is 4500 epsilons: room for the roundings of 1000 steps, and for nothing else; every mutant in
      test_golden.py is off by more.
    - float32: 8 epsilons a step. Each step rounds an average a few times and multiplies beta, itself rounded, in once
      more; the errors add up. A parameter is rounded in its own size, not in its update's, and a first moment in the
      gradients' size, however much they cancel: so those sizes count too.
    - 16 bits with a compensation: as float32, and 2*u*u of the parameter a step more, where u is 2^-8 for bfloat16 and
      2^-11 for float16: the parameter is rounded by at most u of itself, and the remainder by at most u of that, here
      and in what the case expects. (By half the smallest float16, if that is more.) The update is that of
      parameter + compensation, and the parameter is the number nearest to it: half of a unit in the last place away.
    """
    awaited = {at.step: expected(at) for at in case.expected}
    initial = [p for group in case.groups for p in group.params]
    kinds = [kind for group in case.groups for kind in group.dtypes]
    gradients = [0.0] * len(initial)
    compared = 0
    for step, found in enumerate(actual, start=1):
        for i, g in enumerate(case.gradients[step - 1]):
            if g is not None and np.all(np.isfinite(g)):
                gradients[i] = max(gradients[i], float(np.max(np.abs(g), initial=0)))
        if step not in awaited:
            continue
        want = awaited[step]
        compared += 1
        assert found is not None, f"{case.id}, step {step}: no snapshot"
        for name in ("step", "k", "skipped"):
            assert getattr(found, name) == getattr(want, name), f"{case.id}, step {step}: {name}"
        assert len(found.s) == len(want.s), f"{case.id}, step {step}: s"
        compare = [
            (f"s {i}", np.array(a), np.array(b), 0.0, 0.0) for i, (a, b) in enumerate(zip(found.s, want.s, strict=True))
        ]
        for i, p in enumerate(initial):
            size = float(np.max(np.abs(p), initial=0))
            allowed, kind, where = 0.0, kinds[i], f"{case.id}, step {step}: {i}"
            if kind and case.compensated:
                allowed = step * _assert_nearest(found.params[i], remainder(found, i), kind, where)
            left, right = (x.params[i] - p + remainder(x, i) for x in (found, want))
            compare.append((f"update {i}", left, right, size, allowed))
            compare.append((f"exp_avg {i}", found.exp_avg[i], want.exp_avg[i], gradients[i], 0.0))
            compare.append((f"exp_avg_sq {i}", found.exp_avg_sq[i], want.exp_avg_sq[i], 0.0, 0.0))
        for name, left, right, rounded, allowed in compare:
            error, largest = largest_difference(left, right)
            bound = 1e-12 * largest if dtype == "float64" else 8 * step * EPSILON[dtype] * (largest + rounded)
            bound += allowed
            assert error <= bound, f"{case.id}, step {step}: {name} is off by {error:.1e}; the bound is {bound:.1e}"
    assert compared == len(awaited)


def remainder(at: Snapshot, i: int) -> Array:
    """The compensation of a parameter; zeros if it has none."""
    found = at.compensation[i] if at.compensation else None
    return np.zeros(np.shape(at.params[i])) if found is None else found


def _assert_nearest(theta: Array, rest: Array, kind: str, where: str) -> float:
    """Fails unless a parameter is the nearest number to itself + compensation; what a step may differ by from another.

    The compensation is at most half of a unit in the last place, and is itself rounded by at most a share of that.
    """
    share, smallest = SIXTEEN_BITS[kind]
    finite = np.isfinite(theta)
    unit = np.maximum(2 * share * 2.0 ** np.floor(np.log2(np.maximum(np.abs(theta[finite]), smallest))), smallest)
    assert np.all(np.abs(rest[finite]) <= unit / 2), f"{where} is not the nearest number: {rest} are left of {theta}"
    assert np.all(rest[~finite] == 0), f"{where} has a compensation of {rest} at {theta}"
    return float(max(2 * share**2 * np.max(np.abs(theta[finite]), initial=0), smallest))


def largest_difference(left: Array, right: Array) -> tuple[float, float]:
    """The largest difference between entries and the largest entry of `right`; zeros for empty arrays.

    A NaN is as far from a number as can be, and not at all from a NaN.
    """
    if np.shape(left) != np.shape(right):
        raise AssertionError(f"shapes differ: {np.shape(left)} and {np.shape(right)}")
    left, right = np.asarray(left, np.float64), np.asarray(right)
    numbers = ~np.isnan(right)
    if np.any(np.isnan(left) == numbers):
        return np.inf, 0.0
    numbers &= left != right  # of which infinities have no difference
    largest = float(np.max(np.abs(right), initial=0, where=np.isfinite(right)))
    return float(np.max(np.abs(left[numbers] - right[numbers]), initial=0)), largest


def hyperparameters(group: golden.CaseGroup) -> dict[str, Any]:
    """Those that stay the same through a case, by the rule's names."""
    return {name: getattr(group, name) for name in ("b1", "b2", "eps", "weight_decay", "adaptivity")}


def has_one_group(case: golden.Case) -> bool:
    """Whether the groups of a case have the same hyperparameters: a framework without groups can run it."""
    first = case.groups[0]
    return all(hyperparameters(group) == hyperparameters(first) and group.lr == first.lr for group in case.groups)


def only_group(case: golden.Case) -> dict[str, Any]:
    """The hyperparameters of a case for a framework without parameter groups; skips where groups differ."""
    if not has_one_group(case):
        pytest.skip("this framework has no parameter groups, and the case's differ")
    return hyperparameters(case.groups[0])


def factors(case: golden.Case) -> list[float] | None:
    """The learning rate of each group as a factor of the first group's; None if one is not the same at every step."""
    first, found = case.groups[0].lr, []
    for group in case.groups:
        each = {rate / base for rate, base in zip(group.lr, first, strict=True) if base} or {1.0}
        if len(each) > 1 or any(rate and not base for rate, base in zip(group.lr, first, strict=True)):
            return None
        found += each
    return found


def named_groups(case: golden.Case, names: Sequence[str]) -> tuple[dict[str, Any], tuple[core.Group, ...]]:
    """A case for a framework that has groups by name: the first group's hyperparameters, and the other groups.

    Args:
        case: skips the test if its groups' learning rates are no multiples of one.
        names: of the parameters in that framework, group after group.
    """
    scales = factors(case)
    if scales is None:
        pytest.skip("the groups' learning rates are not in a constant proportion")
    groups, remaining = [], iter(names)
    base = hyperparameters(case.groups[0])
    for group, scale in zip(case.groups, scales, strict=True):
        own = [next(remaining) for _ in group.params]
        given = {name: value for name, value in hyperparameters(group).items() if value != base[name]}
        if given or scale != 1:
            groups.append(core.Group(exactly(own), lr_scale=scale, **given))
    return base, tuple(groups)


def of_group(optimizer: Any, group: dict[str, Any]) -> dict[str, Any]:
    """The state of one of the group's parameters in torch, which has the numbers that all of them share."""
    return next((optimizer.state[p] for p in group["params"] if optimizer.state.get(p)), {})


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


@contextmanager
def settings(framework: str, dtype: str, device: str) -> Iterator[None]:
    """The framework's default precision and device, as a user of `dtype` sets them; skips where the device is missing.

    GPUs may multiply float32 in a shorter format, which each framework must be told not to.
    """
    require_device(framework, device)
    with ExitStack() as stack:
        if framework == "keras":
            import keras

            stack.callback(keras.config.set_floatx, keras.config.floatx())
            stack.callback(keras.config.set_dtype_policy, keras.config.dtype_policy())
            keras.config.set_floatx(dtype)
            keras.config.set_dtype_policy(dtype)
            stack.enter_context(keras.device(place("keras", device)))
            framework = keras.backend.backend()
        if framework == "jax":
            import jax

            stack.enter_context(jax.enable_x64(dtype == "float64"))
            stack.enter_context(jax.default_matmul_precision("highest"))
            stack.enter_context(jax.default_device(place("jax", device)))
        if framework == "torch":
            import torch

            stack.enter_context(torch.backends.cudnn.flags(allow_tf32=False))
        yield
