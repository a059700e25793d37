"""Every backend behind one face: replays golden cases, and compares what came of them."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ada2ms import core
from ada2ms.core import golden

Array = NDArray[Any]
EPSILON = {dtype: float(np.finfo(dtype).eps) for dtype in ("float32", "float64")}


needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("ninja") is None, reason="there is no C++ compiler, or no ninja"
)


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


# Runs a case in a dtype on a device; yields a snapshot after each recorded step, and None after the steps between.
Replay = Callable[[golden.Case, str, str], Iterator[Snapshot | None]]


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
    """
    awaited = {at.step: expected(at) for at in case.expected}
    initial = [p for group in case.groups for p in group.params]
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
            (f"s {i}", np.array(a), np.array(b), 0.0) for i, (a, b) in enumerate(zip(found.s, want.s, strict=True))
        ]
        for i, p in enumerate(initial):
            size = float(np.max(np.abs(p), initial=0))
            compare.append((f"update {i}", found.params[i] - p, want.params[i] - p, size))
            compare.append((f"exp_avg {i}", found.exp_avg[i], want.exp_avg[i], gradients[i]))
            compare.append((f"exp_avg_sq {i}", found.exp_avg_sq[i], want.exp_avg_sq[i], 0.0))
        for name, left, right, rounded in compare:
            error, largest = largest_difference(left, right)
            bound = 1e-12 * largest if dtype == "float64" else 8 * step * EPSILON[dtype] * (largest + rounded)
            assert error <= bound, f"{case.id}, step {step}: {name} is off by {error:.1e}; the bound is {bound:.1e}"
    assert compared == len(awaited)


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
    left, right = left[numbers], right[numbers]
    return float(np.max(np.abs(left - right), initial=0)), float(np.max(np.abs(right), initial=0))


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


def replay_numpy(case: golden.Case, dtype: str, device: str) -> Iterator[Snapshot | None]:
    groups = [{"params": [p.astype(dtype) for p in g.params], **hyperparameters(g)} for g in case.groups]
    optimizer = core.Ada2MS(groups, scope=case.scope, nonfinite=case.nonfinite)

    def snapshot() -> Snapshot:
        return Snapshot(
            *(
                [x.astype(np.float64) for g in optimizer.groups for x in getattr(g, n)]
                for n in ("params", "exp_avg", "exp_avg_sq")
            ),
            step=[t for g in optimizer.groups for t in g.step],
            s=[s for g in optimizer.groups for s in g.global_exp_avg_sq],
            k=[g.global_step for g in optimizer.groups],
            skipped=optimizer.skipped,
        )

    for i, gradients in enumerate(case.gradients):
        for group, given in zip(optimizer.groups, case.groups, strict=True):
            group.hyper = core.Hyperparameters(lr=given.lr[i], **hyperparameters(given))
        optimizer.step([None if g is None else g.astype(dtype) for g in gradients])
        yield snapshot() if i + 1 in recorded(case) else None


def torch_replay(**options: Any) -> Replay:
    def replay(case: golden.Case, dtype: str, device: str) -> Iterator[Snapshot | None]:
        import torch

        from ada2ms.torch import Ada2MS

        require_device("torch", device)
        kind = {"dtype": getattr(torch, dtype), "device": place("torch", device)}
        groups = []
        for given in case.groups:
            hyper = hyperparameters(given)
            betas = (hyper.pop("b1"), hyper.pop("b2"))
            groups.append(
                {"params": [torch.tensor(p, **kind).requires_grad_() for p in given.params], "betas": betas, **hyper}
            )
        optimizer = Ada2MS(groups, scope=case.scope, nonfinite=case.nonfinite, **options)
        params = [p for group in optimizer.param_groups for p in group["params"]]

        def slot(name: str) -> list[Array]:  # made at a parameter's first update
            states = [optimizer.state.get(p, {}) for p in params]
            return [
                x[name].double().cpu().numpy() if name in x else np.zeros(p.shape)
                for p, x in zip(params, states, strict=True)
            ]

        def snapshot() -> Snapshot:
            model = case.scope == "model"
            return Snapshot(
                [p.detach().double().cpu().numpy() for p in params],
                slot("exp_avg"),
                slot("exp_avg_sq"),
                step=[int(optimizer.state.get(p, {}).get("step", 0)) for p in params],
                s=[float(of_group(optimizer, g).get("global_exp_avg_sq", 0)) for g in optimizer.param_groups]
                if model
                else [float(optimizer.state.get(p, {}).get("global_exp_avg_sq", 0)) for p in params],
                k=[int(of_group(optimizer, g).get("global_step", 0)) for g in optimizer.param_groups],
                skipped=int(of_group(optimizer, optimizer.param_groups[0]).get("skipped", 0)),
            )

        for i, gradients in enumerate(case.gradients):
            for group, given in zip(optimizer.param_groups, case.groups, strict=True):
                group["lr"] = given.lr[i]
            for p, g in zip(params, gradients, strict=True):
                p.grad = None if g is None else torch.tensor(g, **kind)
            optimizer.step()
            yield snapshot() if i + 1 in recorded(case) else None

    return replay


def of_group(optimizer: Any, group: dict[str, Any]) -> dict[str, Any]:
    """The state of one of the group's parameters, which has the numbers that all of them share."""
    return next((optimizer.state[p] for p in group["params"] if optimizer.state.get(p)), {})


def replay_keras(case: golden.Case, dtype: str, device: str) -> Iterator[Snapshot | None]:
    import keras

    from ada2ms.tf import Ada2MS

    hyper = only_group(case)
    names = {"b1": "beta_1", "b2": "beta_2", "eps": "epsilon"}
    model = case.scope == "model"
    with settings("keras", dtype, device):
        variables = [keras.Variable(p, dtype=dtype) for group in case.groups for p in group.params]
        optimizer = Ada2MS(
            case.groups[0].lr[0],
            **{names.get(name, name): value for name, value in hyper.items()},
            scope=case.scope,
            nonfinite=case.nonfinite,
        )
        optimizer.build(variables)

        # A thousand small steps one operation at a time take ten seconds; and so the long cases see compiled code.
        apply = keras_compiled(optimizer, variables) if len(case.gradients) > 100 else optimizer.apply

        def numpy(x: Any) -> Array:
            return np.asarray(keras.ops.convert_to_numpy(x), np.float64)

        def snapshot() -> Snapshot:
            slots = {v.path.rpartition("/")[2]: v for v in optimizer.variables}
            return Snapshot(
                [numpy(v) for v in variables],
                [numpy(v) for v in optimizer._momentums],
                [numpy(v) for v in optimizer._velocities],
                step=[int(t) for t in numpy(slots["steps"])],
                s=[float(numpy(slots["global_velocity"]))] * len(case.groups)
                if model
                else [float(s) for s in numpy(slots["global_velocity"])],
                k=[int(numpy(slots["global_step"]))] * len(case.groups),
                skipped=int(numpy(slots["skipped"])),
            )

        for i, gradients in enumerate(case.gradients):
            optimizer.learning_rate = case.groups[0].lr[i]
            if any(g is not None for g in gradients):  # Keras raises when there is none at all
                tensors = [None if g is None else keras.ops.convert_to_tensor(g.astype(dtype)) for g in gradients]
                apply(tensors, variables)
            yield snapshot() if i + 1 in recorded(case) else None


def keras_compiled(optimizer: Any, variables: list[Any]) -> Callable[[list[Any], list[Any]], None]:
    """`optimizer.apply`, compiled as `fit` compiles it on the Keras backend in use; on torch, as it is."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda gradients, _: optimizer.apply(gradients, variables))
    if keras.backend.backend() == "jax":
        import jax

        update = jax.jit(optimizer.stateless_apply)

        def apply(gradients: list[Any], _: list[Any]) -> None:
            state = [v.value for v in optimizer.variables]
            moved = update(state, gradients, [v.value for v in variables])
            for kept, values in zip((variables, optimizer.variables), moved, strict=True):
                for variable, value in zip(kept, values, strict=True):
                    variable.assign(value)

        return apply
    return optimizer.apply


@cache
def jax_step(hyper: tuple[tuple[str, Any], ...], scope: Any, nonfinite: Any, jit: bool) -> Callable[..., Any]:
    """A step of JAX's optimizer; one function for all cases of the same options, which are compiled once a shape."""
    import jax
    import optax

    from ada2ms.jax import ada2ms

    def step(lr: Any, gradients: Any, state: Any, params: Any) -> Any:
        transformation = ada2ms(lr, **dict(hyper), scope=scope, nonfinite=nonfinite)
        updates, state = transformation.update(gradients, state, params)
        moved = [p if u is None else optax.apply_updates(p, u) for p, u in zip(params, updates, strict=True)]
        return moved, state

    return jax.jit(step) if jit else step


def jax_replay(jit: bool) -> Replay:
    def replay(case: golden.Case, dtype: str, device: str) -> Iterator[Snapshot | None]:
        import jax.numpy as jnp
        import optax

        from ada2ms.jax import ada2ms

        hyper = only_group(case)
        step = jax_step(tuple(hyper.items()), case.scope, case.nonfinite, jit)
        with settings("jax", dtype, device):
            params = [jnp.asarray(p, dtype) for group in case.groups for p in group.params]
            state = ada2ms(1.0, **hyper, scope=case.scope, nonfinite=case.nonfinite).init(params)

            def snapshot() -> Snapshot:
                count, mu, nu, s, steps = (optax.tree.get(state, name) for name in ("count", "mu", "nu", "s", "steps"))
                return Snapshot(
                    *([np.asarray(x, np.float64) for x in tree] for tree in (params, mu, nu)),
                    step=[int(t) for t in steps],
                    s=[float(s)] * len(case.groups) if case.scope == "model" else [float(x) for x in s],
                    k=[int(count)] * len(case.groups),
                    skipped=int(optax.tree.get(state, "skipped", 0)),
                )

            for i, gradients in enumerate(case.gradients):
                tensors = [None if g is None else jnp.asarray(g, dtype) for g in gradients]
                params, state = step(case.groups[0].lr[i], tensors, state, params)
                yield snapshot() if i + 1 in recorded(case) else None

    return replay


REPLAYS: dict[str, Replay] = {
    "numpy": replay_numpy,
    "torch-forloop": torch_replay(foreach=False),
    "torch-foreach": torch_replay(foreach=True),
    "torch-fused": torch_replay(fused=True),
    "jax-eager": jax_replay(jit=False),
    "jax-jit": jax_replay(jit=True),
    "keras": replay_keras,
}


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
