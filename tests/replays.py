"""Every backend behind one face: runs golden cases, and shows what came of them."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np

from ada2ms import core
from ada2ms.core import golden
from ada2ms.core.hyperparameters import to_arguments
from ada2ms.core.spec import BFLOAT16, rounded, widen
from support import (
    Array,
    Snapshot,
    dtypes,
    factors,
    hyperparameters,
    named_groups,
    of_group,
    place,
    recorded,
    require_device,
    settings,
)

# Runs a case in a dtype on a device; yields a snapshot after each recorded step, and None after the steps between.
Replay = Callable[[golden.Case, str, str], Iterator[Snapshot | None]]


def replay_numpy(case: golden.Case, dtype: str, device: str) -> Iterator[Snapshot | None]:
    optimizer = numpy_optimizer(core, case, dtype)

    def snapshot() -> Snapshot:
        return Snapshot(
            *(
                [widen(x).astype(np.float64) for g in optimizer.groups for x in getattr(g, n)]
                for n in ("params", "exp_avg", "exp_avg_sq")
            ),
            step=[t for g in optimizer.groups for t in g.step],
            s=[s for g in optimizer.groups for s in g.global_exp_avg_sq],
            k=[g.global_step for g in optimizer.groups],
            skipped=optimizer.skipped,
            compensation=[None if x is None else widen(x) for g in optimizer.groups for x in g.compensation],
        )

    for i, gradients in enumerate(case.gradients):
        for group, given in zip(optimizer.groups, case.groups, strict=True):
            group.hyper = core.Hyperparameters(lr=given.lr[i], **hyperparameters(given))
        with np.errstate(invalid="ignore" if any_infinite(gradients) else "raise"):
            optimizer.step([None if g is None else g.astype(dtype) for g in gradients])
        yield snapshot() if i + 1 in recorded(case) else None


def numpy_optimizer(module: Any, case: golden.Case, dtype: str) -> Any:
    """The rule in NumPy for a case: of `ada2ms.core`, or of a mutant of it."""

    def made(p: Array, kind: str | None) -> Array:
        return p.astype(kind or dtype) if kind != "bfloat16" else rounded(p, BFLOAT16)

    groups = [
        {"params": [made(p, kind) for p, kind in zip(g.params, g.dtypes, strict=True)], **hyperparameters(g)}
        for g in case.groups
    ]
    names = ("scope", "nonfinite", "max_norm", "compensated")
    return module.Ada2MS(groups, **{name: getattr(case, name) for name in names})


def any_infinite(gradients: Iterable[Array | None]) -> bool:
    """Whether an infinity, which NumPy warns of where it becomes NaN, is among the gradients."""
    return any(g is not None and bool(np.any(np.isinf(g))) for g in gradients)


def torch_optimizer(case: golden.Case, dtype: str, device: str, options: dict[str, Any]) -> Any:
    """The optimizer of a case, over parameters of its values."""
    import torch

    from ada2ms.torch import Ada2MS

    groups = []
    for given in case.groups:
        hyper = hyperparameters(given)
        betas = (hyper.pop("b1"), hyper.pop("b2"))
        kinds = [{"dtype": getattr(torch, own or dtype), "device": place("torch", device)} for own in given.dtypes]
        params = [torch.tensor(p, **kind).requires_grad_() for p, kind in zip(given.params, kinds, strict=True)]
        groups.append({"params": params, "betas": betas, **hyper})
    names = ("scope", "nonfinite", "max_norm", "compensated")
    return Ada2MS(groups, **{name: getattr(case, name) for name in names}, **options)


def torch_replay(**options: Any) -> Replay:
    def replay(case: golden.Case, dtype: str, device: str) -> Iterator[Snapshot | None]:
        import torch

        require_device("torch", device)
        optimizer = torch_optimizer(case, dtype, device, options)
        params = [p for group in optimizer.param_groups for p in group["params"]]

        def slot(name: str) -> list[Array]:  # made at a parameter's first update
            states = [optimizer.state.get(p, {}) for p in params]
            return [
                x[name].double().cpu().numpy() if name in x else np.zeros(p.shape)
                for p, x in zip(params, states, strict=True)
            ]

        def compensation(p: torch.Tensor) -> Array | None:
            found = optimizer.state.get(p, {}).get("compensation")
            return None if found is None else found.double().cpu().numpy()

        def k(group: dict[str, Any]) -> int:
            """With scope "tensor" it is one for all groups, and one that has no state does not hold it itself."""
            states = [of_group(optimizer, g) for g in (group, *optimizer.param_groups)]
            return int(next((x["global_step"] for x in states if x), 0))

        def s(group: dict[str, Any]) -> float:
            """It is one for groups with the same b2, and one that has no state does not hold it itself."""
            alike = [g for g in optimizer.param_groups if g["betas"][1] == group["betas"][1]]
            states = [of_group(optimizer, g) for g in (group, *alike)]
            return float(next((x["global_exp_avg_sq"] for x in states if x), 0))

        def snapshot() -> Snapshot:
            model = case.scope == "model"
            return Snapshot(
                [p.detach().double().cpu().numpy() for p in params],
                slot("exp_avg"),
                slot("exp_avg_sq"),
                step=[int(optimizer.state.get(p, {}).get("step", 0)) for p in params],
                s=[s(g) for g in optimizer.param_groups]
                if model
                else [float(optimizer.state.get(p, {}).get("global_exp_avg_sq", 0)) for p in params],
                k=[k(g) for g in optimizer.param_groups],
                skipped=int(of_group(optimizer, optimizer.param_groups[0]).get("skipped", 0)),
                compensation=[compensation(p) for p in params],
            )

        for i, gradients in enumerate(case.gradients):
            for group, given in zip(optimizer.param_groups, case.groups, strict=True):
                group["lr"] = given.lr[i]
            for p, g in zip(params, gradients, strict=True):
                p.grad = None if g is None else torch.tensor(g, dtype=p.dtype, device=p.device)
            optimizer.step()
            yield snapshot() if i + 1 in recorded(case) else None

    return replay


def replay_keras(case: golden.Case, dtype: str, device: str) -> Iterator[Snapshot | None]:
    import keras

    from ada2ms.tf import Ada2MS

    initial = [p for group in case.groups for p in group.params]
    called = [f"variable_{i}" for i in range(len(initial))]
    hyper, groups = named_groups(case, called)
    hyper |= {name: getattr(case, name) for name in ("scope", "nonfinite", "max_norm", "compensated")}
    with settings("keras", dtype, device):
        variables = [
            keras.Variable(p, dtype=kind, name=name)
            for p, kind, name in zip(initial, dtypes(case, dtype), called, strict=True)
        ]
        optimizer = Ada2MS(case.groups[0].lr[0], **to_arguments(hyper, "keras"), groups=groups)
        optimizer.build(variables)
        # The first variable of each group, by which its global second moment is found.
        first = [sum(len(g.params) for g in case.groups[:i]) for i in range(len(case.groups))]
        moments = [optimizer._grouping.moment_of[i] for i in first]

        # A thousand small steps one operation at a time take ten seconds; and so the long cases see compiled code.
        apply = keras_compiled(optimizer, variables) if len(case.gradients) > 100 else optimizer.apply

        def numpy(x: Any) -> Array:
            return np.asarray(keras.ops.convert_to_numpy(x), np.float64)

        def of_groups(x: Any) -> Array:
            return np.broadcast_to(numpy(x), max(moments) + 1)[moments]

        def snapshot() -> Snapshot:
            slots = {v.path.rpartition("/")[2]: v for v in optimizer.variables}
            compensations = optimizer._compensations or [None] * len(variables)
            return Snapshot(
                [numpy(v) for v in variables],
                [numpy(v) for v in optimizer._momentums],
                [numpy(v) for v in optimizer._velocities],
                step=[int(t) for t in numpy(slots["steps"])],
                s=(of_groups if case.scope == "model" else numpy)(slots["global_velocity"]).tolist(),
                k=of_groups(slots["global_step"]).astype(int).tolist(),
                skipped=int(numpy(slots["skipped"])),
                compensation=[None if x is None else numpy(x) for x in compensations],
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


# JAX compiles a dozen cases as one program, in half the time that programs of their own take.
CASES_OF_A_PROGRAM = 12


def jax_replay(jit: bool) -> Replay:
    def replay(case: golden.Case, dtype: str, device: str) -> Iterator[Snapshot | None]:
        _jax_arguments(case)  # skips a case that has none
        yield from _jax_snapshots(_program_of(case) if jit else (case.id,), dtype, device, jit)[case.id]

    return replay


def _program_of(case: golden.Case) -> tuple[str, ...]:
    """The cases that are compiled with this one: as many steps, and gradients missing in the same places."""

    def pattern(of: golden.Case) -> list[list[bool]]:
        return [[g is None for g in gradients] for gradients in of.gradients]

    alike = [other.id for other in golden.load() if _compiled(other) and pattern(other) == pattern(case)]
    first = alike.index(case.id) // CASES_OF_A_PROGRAM * CASES_OF_A_PROGRAM
    return tuple(alike[first : first + CASES_OF_A_PROGRAM])


def _compiled(case: golden.Case) -> bool:
    return factors(case) is not None


def _jax_arguments(case: golden.Case) -> dict[str, Any]:
    """Those of `ada2ms`. The parameters are a list, whose leaves are called 0, 1 and so on."""
    names = [str(i) for i in range(sum(len(group.params) for group in case.groups))]
    hyper, groups = named_groups(case, names)
    choices = {name: getattr(case, name) for name in ("scope", "nonfinite", "max_norm", "compensated")}
    return {**hyper, **choices, "groups": groups}


@cache
def _jax_snapshots(ids: tuple[str, ...], dtype: str, device: str, jit: bool) -> dict[str, list[Snapshot | None]]:
    """What each of the cases, stepped together, comes to."""
    import jax
    import jax.numpy as jnp
    import optax

    from ada2ms.jax import ada2ms

    cases = [case for case in golden.load() if case.id in ids]

    def optimizer(case: golden.Case, lr: Any) -> Any:
        return ada2ms(lr, **_jax_arguments(case))

    def step(runs: list[Any], lrs: list[float], gradients: list[Any]) -> list[Any]:
        moved = []
        for case, (params, state), lr, given in zip(cases, runs, lrs, gradients, strict=True):
            updates, state = optimizer(case, lr).update(given, state, params)
            params = [p if u is None else optax.apply_updates(p, u) for p, u in zip(params, updates, strict=True)]
            moved.append((params, state))
        return moved

    found: dict[str, list[Snapshot | None]] = {case.id: [] for case in cases}
    with settings("jax", dtype, device):
        kinds = [dtypes(case, dtype) for case in cases]
        given = [
            [jnp.asarray(p, kind) for p, kind in zip((p for g in case.groups for p in g.params), each, strict=True)]
            for case, each in zip(cases, kinds, strict=True)
        ]
        runs = [(params, optimizer(case, 1.0).init(params)) for case, params in zip(cases, given, strict=True)]
        move = jax.jit(step) if jit else step
        for i in range(len(cases[0].gradients)):
            gradients = [[None if g is None else jnp.asarray(g, dtype) for g in case.gradients[i]] for case in cases]
            runs = move(runs, [case.groups[0].lr[i] for case in cases], gradients)
            for case, run in zip(cases, runs, strict=True):
                found[case.id].append(_jax_snapshot(case, *run) if i + 1 in recorded(case) else None)
    return found


def _jax_snapshot(case: golden.Case, params: Any, state: Any) -> Snapshot:
    import optax

    count, mu, nu, s, steps = (optax.tree.get(state, name) for name in ("count", "mu", "nu", "s", "steps"))
    sizes = [len(group.params) for group in case.groups]
    first = np.cumsum([0, *sizes[:-1]])  # the position of each group's first parameter
    of_each = [float(x) for x in np.broadcast_to(np.asarray(s, np.float64).ravel(), sum(sizes))]
    return Snapshot(
        *([np.asarray(x, np.float64) for x in tree] for tree in (params, mu, nu)),
        step=[int(t) for t in steps],
        s=[of_each[i] for i in first] if case.scope == "model" else of_each,
        k=[int(count)] * len(case.groups),
        skipped=int(optax.tree.get(state, "skipped", 0)),
        compensation=[None if x is None else np.asarray(x, np.float64) for x in state.compensation or []],
    )


REPLAYS: dict[str, Replay] = {
    "numpy": replay_numpy,
    "torch-forloop": torch_replay(foreach=False),
    "torch-foreach": torch_replay(foreach=True),
    "torch-fused": torch_replay(fused=True),
    "jax-eager": jax_replay(jit=False),
    "jax-jit": jax_replay(jit=True),
    "keras": replay_keras,
}
