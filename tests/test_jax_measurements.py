"""`measure` in JAX: against the rule in NumPy, and what a step has changed, within a compiled step and around it."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_support import tree
from measurements_support import EVERY_RUN_COMPILED, RUNS, Run, compare

from ada2ms import core
from ada2ms.core.hyperparameters import to_arguments
from ada2ms.core.measurements import PREFIX, RATIOS, STEPS
from ada2ms.jax import ada2ms, measure, scale_by_ada2ms
from support import settings, slow

pytestmark = pytest.mark.slow  # each compiles programs of its own


def trained(run: Run) -> tuple[Any, Any, Any, Any]:
    """Transformation, state and parameters after a run, and what was measured in its compiled last step."""
    optimizer = ada2ms(**to_arguments({**vars(core.DEFAULTS), **run.hyper}, "optax"), groups=run.groups)
    params = {name: jnp.asarray(p) for name, p in run.params().items()}

    @jax.jit
    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(lambda p, u: p if u is None else p + u, params, updates, is_leaf=lambda x: x is None)
        return params, state, measure(optimizer, state, params, gradients=gradients)

    state, measured = optimizer.init(params), {}
    for gradients in run.gradients():
        params, state, measured = step(params, state, gradients)
    return optimizer, state, params, measured


@EVERY_RUN_COMPILED
def test_it_is_what_the_rule_did(name: str) -> None:
    with settings("jax", "float64", "cpu"):
        *_, measured = trained(RUNS[name])
        compare({name: float(x) for name, x in measured.items()}, RUNS[name], 1e-9)


def test_outside_of_the_compiled_step_it_is_the_same() -> None:
    with settings("jax", "float64", "cpu"):
        optimizer, state, params, _ = trained(RUNS["scheduled"])
        compare(measure(optimizer, state, params, wait=True), RUNS["scheduled"], 1e-9, "gradient_norm")
        assert all(isinstance(x, jax.Array) for x in measure(optimizer, state).values())


RULE = ada2ms(0.1, weight_decay=0.3)
PART = {"empty": "x", "matrix": "y", "scalar": "y", "vector": "x"}
AROUND: dict[str, tuple[Any, Any, Callable[[Any], Any]]] = {
    "chain": (optax.chain(optax.clip(1.0), RULE), None, lambda s: s),
    "multi steps": (optax.MultiSteps(RULE, 2), None, lambda s: s),
    "masked": (optax.masked(RULE, {name: part == "y" for name, part in PART.items()}), None, lambda s: s),
    "finite": (optax.apply_if_finite(RULE, 3), None, lambda s: s),
    "frozen": (optax.partition({"y": RULE, "x": optax.set_to_zero()}, PART), None, lambda s: s),
    "parts": (optax.partition({"y": RULE, "x": ada2ms(1.0)}, PART), RULE, lambda s: s.inner_states["y"]),
    "injected": (
        optax.inject_hyperparams(ada2ms)(optax.linear_schedule(0.1, 0.5, 7), weight_decay=0.3, adaptivity=0.9),
        ada2ms(adaptivity=0.0),
        lambda s: s,
    ),
    "mask": (ada2ms(0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)), None, lambda s: s),
}


@pytest.mark.parametrize(
    "name", ["chain", "parts", "injected", *slow("multi steps", "masked", "finite", "frozen", "mask")]
)
def test_it_finds_its_state_in_what_is_around(name: str) -> None:
    """And has the ratio of what the last update changed. MultiSteps makes one in every second step."""
    optimizer, own, pick = AROUND[name]
    with settings("jax", "float64", "cpu"):
        params = tree(0, np.float64)
        state = optimizer.init(params)
        for i in range(4):
            before = params
            updates, state = optimizer.update(tree(i + 1, np.float64), state, params)
            params = optax.apply_updates(params, updates)
        measured = measure(own or optimizer, pick(state), params, wait=True)
        real = {n: np.linalg.norm(p - before[n]) / np.linalg.norm(p) for n, p in params.items() if p.size}
    found = {n.rpartition("/")[2]: x for n, x in measured.items() if n.startswith(PREFIX + RATIOS) and x == x}
    assert set(found) == ({"matrix", "scalar"} if name in ("masked", "frozen", "parts") else set(real))
    assert found == pytest.approx({n: real[n] for n in found}, rel=1e-9)


def test_updates_are_taken_as_they_are_given() -> None:
    """Where the learning rate is another transformation's."""
    optimizer = optax.chain(scale_by_ada2ms(), optax.add_decayed_weights(0.5), optax.scale(-0.25))
    params = tree(0)
    state = optimizer.init(params)
    updates, state = optimizer.update(tree(1), state, params)
    new = optax.apply_updates(params, updates)
    alone, given = measure(optimizer, state, new, wait=True), measure(optimizer, state, new, updates=updates, wait=True)
    assert set(given) - set(alone) == {f"{PREFIX}{RATIOS}/{name}" for name in params}
    assert PREFIX + "lr" not in given
    ratio = float(jnp.linalg.norm(updates["matrix"]) / jnp.linalg.norm(new["matrix"]))
    assert given[f"{PREFIX}{RATIOS}/matrix"] == pytest.approx(ratio, rel=1e-6)
    with_rate = ada2ms(0.25)
    _, state = with_rate.update(tree(1), with_rate.init(params), params)
    step = measure(with_rate, state, new, wait=True)[f"{PREFIX}{STEPS}/matrix"]
    assert step == pytest.approx(0.25 * alone[f"{PREFIX}{STEPS}/matrix"], rel=1e-6)


def test_it_is_pure_and_without_parameters_reads_no_moment() -> None:
    params = tree(0)
    state = RULE.init(params)
    program = jax.make_jaxpr(lambda s: measure(RULE, s))(state)
    assert not program.effects
    used = {id(x) for equation in program.jaxpr.eqns for x in equation.invars}
    moments = [x for x in program.jaxpr.invars if x.aval.shape in {p.shape for p in params.values() if p.ndim}]
    assert len(moments) == 6
    assert not used & {id(x) for x in moments}
    jax.make_jaxpr(lambda s, p: measure(RULE, s, p))(state, params)


@pytest.mark.slow
def test_sharded_parameters_are_measured_as_a_whole() -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", __file__]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def sharded() -> None:
    """Under `jax.jit` by XLA, and within `jax.shard_map` by one sum over the devices."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    assert mesh.size == 2
    params = {"w": jnp.arange(8.0).reshape(4, 2) + 1, "b": jnp.ones(3)}
    gradients = jax.tree.map(lambda p: jnp.cos(p) + 0.1 * p, params)
    updates, state = RULE.update(gradients, RULE.init(params), params)
    new = optax.apply_updates(params, updates)
    alone = measure(RULE, state, new, gradients=gradients, wait=True)
    specs = {"w": P("x"), "b": P()}

    def step(optimizer: Any, params: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, optimizer.init(params), params)
        return measure(optimizer, state, optax.apply_updates(params, updates), gradients=gradients)

    placed = jax.tree.map(lambda p, s: jax.device_put(p, NamedSharding(mesh, s)), params, specs)
    inner = ada2ms(0.1, weight_decay=0.3, axis_name="x")
    mapped = jax.shard_map(partial(step, inner), mesh=mesh, in_specs=(specs, specs), out_specs=P())
    for program, given in ((partial(step, RULE), placed), (mapped, params)):
        found = {name: float(x) for name, x in jax.jit(program)(given, gradients).items()}
        assert found == pytest.approx(alone, rel=1e-5)
    text = jax.jit(mapped).lower(params, gradients).as_text()
    assert text.count("all_reduce") == 3  # of the step, of the gradients' norm, and of all parameters' sums


@pytest.mark.slow
def test_flax() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(RULE), wrt=nnx.Param)
    before = nnx.state(model, nnx.Param)
    before = jax.tree.map(jnp.copy, before)
    gradients = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 3))) ** 2))(model)
    optimizer.update(model, gradients)
    after = nnx.state(model, nnx.Param)
    found = measure(optimizer.tx, optimizer.opt_state, after, wait=True)
    for name in ("kernel", "bias"):
        p, q = (np.asarray(x[name][...]) for x in (after, before))
        real = np.linalg.norm(p - q) / np.linalg.norm(p)
        assert found[f"{PREFIX}{RATIOS}/{name}"] == pytest.approx(real, rel=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, *slow(jnp.complex64)])
def test_types(dtype: Any) -> None:
    optimizer, params = ada2ms(0.1, weight_decay=0.1, compensated=dtype is jnp.bfloat16), tree(0, dtype)
    state = optimizer.init(params)
    updates, state = optimizer.update(tree(1, dtype), state, params)
    new = optax.apply_updates(params, updates)
    found = measure(optimizer, state, new, match="^m", wait=True)
    real = [np.asarray(x["matrix"], complex) for x in (params, new)]
    bound = 1e-2 if dtype is jnp.bfloat16 else 1e-5  # the parameters' own rounding
    assert found[f"{PREFIX}{RATIOS}/matrix"] == pytest.approx(
        np.linalg.norm(real[1] - real[0]) / np.linalg.norm(real[1]), rel=bound
    )


def test_errors_name_the_argument() -> None:
    params = tree(0)
    state = RULE.init(params)
    with pytest.raises(ValueError, match="Invalid optimizer: it is not made of ada2ms"):
        measure(optax.adamw(1e-3), state)
    both = optax.partition({"x": RULE, "y": ada2ms(1.0)}, PART)
    with pytest.raises(ValueError, match="Invalid optimizer: it is made of 2 of these"):
        measure(both, state)
    with pytest.raises(ValueError, match=r"Invalid opt_state: it has 2 states .*inner_states\[label\]"):
        measure(RULE, both.init(params))
    with pytest.raises(ValueError, match="Invalid opt_state: it has 0 states"):
        measure(RULE, optax.adamw(1e-3).init(params))
    with pytest.raises(ValueError, match=r"Invalid params: without \['empty'\]"):
        measure(RULE, state, {name: p for name, p in params.items() if name != "empty"})
    with pytest.raises(ValueError, match="Invalid match: 'kernel'"):
        measure(RULE, state, params, match="kernel")
    with pytest.raises(ValueError, match="Invalid state"):
        measure(ada2ms(scope="tensor"), state)


def test_a_tree_without_leaves_has_the_numbers_of_the_model_alone() -> None:
    state = RULE.init({})
    assert measure(RULE, state, {}).keys() == measure(RULE, state).keys()


if __name__ == "__main__":
    sharded()
