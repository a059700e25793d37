"""The Optax transformations on eight devices and on two processes, each case in processes of its own.

Every case trains a small network, or replays its gradients, and fails unless parameters and state are those of one
device. Every step is waited for: virtual devices share the threads of one CPU, and programs that overlap on them may
wait for each other forever. By hand: `python tests/test_jax_sharding.py data_parallel`.
"""

import functools
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ada2ms.core import Group
from ada2ms.jax import ada2ms, scale_by_ada2ms

pytestmark = pytest.mark.slow

STEPS, BATCH = 5, 16
# In float64. Gradients and their squares are summed in another order on several devices: some roundings, each of which
# an update passes on relative to the learning rate.
CLOSE = {"rtol": 1e-11, "atol": 1e-13}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scope": "tensor", "adaptivity": 0.3},
    {"nonfinite": "skip", "adaptivity": 0.0, "weight_decay": 0.1},
    {"max_norm": 0.1, "groups": [Group("", max_ndim=1, b2=0.9, adaptivity=1.0, weight_decay=0.0)]},
]


def initial() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"bias": (4,), "hidden": (8, 16), "out": (16, 4), "scale": ()}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def batches() -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(1)
    return [(rng.normal(size=(BATCH, 8)), rng.normal(size=(BATCH, 4))) for _ in range(STEPS)]


def loss(params: Any, batch: Any) -> Any:
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] * params["scale"] + params["bias"] - y) ** 2)


def advance(optimizer: Any, params: Any, state: Any, gradients: Any) -> Any:
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


@functools.cache
def one_device(option: int) -> tuple[Any, list[Any]]:
    """Parameters and state in the end, and the gradients of every step."""
    optimizer = ada2ms(0.1, **OPTIONS[option])
    gradients, params = [], jax.tree.map(jnp.asarray, initial())
    state = optimizer.init(params)
    for batch in batches():
        gradients.append(jax.jit(jax.grad(loss))(params, batch))
        params, state = jax.jit(functools.partial(advance, optimizer))(params, state, gradients[-1])
    return jax.tree.map(np.asarray, (params, state)), [jax.tree.map(np.asarray, g) for g in gradients]


def assert_same(found: Any, option: int) -> None:
    expected, _ = one_device(option)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x), y, **CLOSE)
    assert np.max(np.abs(expected[0]["hidden"] - initial()["hidden"])) > 0.1


def all_reduces(f: Callable[..., Any], *args: Any) -> int:
    """The number of them in the compiled module, whether synchronous or not."""
    text = f.lower(*args).compile().as_text()
    assert "ENTRY" in text
    return len(re.findall(r" all-reduce(?:-start)?\(", text))


def mesh(explicit: bool = False) -> Any:
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def specs() -> dict[str, Any]:
    """Leaves that are sharded along both axes, along one, and along none."""
    return {"bias": P(), "hidden": P("x", "y"), "out": P("y"), "scale": P()}


def sharded(tree: Any, grid: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(grid, s)), tree, specs())


def global_array(x: Any, sharding: Any) -> Any:
    """Of which each process makes its own shards."""
    return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])


def jit_auto() -> None:
    grid = mesh()
    for option, options in enumerate(OPTIONS):
        optimizer = ada2ms(0.1, **options)
        step = jax.jit(lambda p, s, b, o=optimizer: advance(o, p, s, jax.grad(loss)(p, b)))
        params = sharded(initial(), grid)
        state = jax.jit(optimizer.init)(params)
        for batch in batches():
            batch = jax.device_put(batch, NamedSharding(grid, P("x")))
            params, state = jax.block_until_ready(step(params, state, batch))
        assert_same((params, state), option)
        assert_all_reduces(optimizer, params)


def assert_all_reduces(optimizer: Any, params: Any) -> None:
    """Under jit the compiler makes one for each different entry in the leaves' specs, however many leaves there are."""
    update = jax.jit(functools.partial(advance, optimizer))
    assert all_reduces(update, params, optimizer.init(params), params) == 2
    leaf = params["out"]
    for found, spec in ((1, P("y")), (1, P(("x", "y"))), (2, P("x", "y"))):
        alike = [jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, spec))] * 6
        assert all_reduces(update, alike, optimizer.init(alike), alike) == found


def jit_explicit() -> None:
    """With the gradients of one device: that part of the loss would have to name its shardings."""
    grid = mesh(explicit=True)
    with jax.set_mesh(grid):
        for option, options in enumerate(OPTIONS):
            optimizer = ada2ms(0.1, **options)
            step = jax.jit(functools.partial(advance, optimizer))
            params = sharded(initial(), grid)
            state = optimizer.init(params)
            for name in params:
                assert state.mu[name].sharding == params[name].sharding
            for gradients in one_device(option)[1]:
                params, state = jax.block_until_ready(step(params, state, sharded(gradients, grid)))
                assert params["hidden"].sharding == sharded(gradients, grid)["hidden"].sharding
            assert_same((params, state), option)
            assert_all_reduces(optimizer, params)


def data_parallel() -> None:
    """By shard_map: gradients are averaged, which leaves nothing for the optimizer to do."""
    grid = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    for option, options in enumerate(OPTIONS):
        optimizer = ada2ms(0.1, **options)
        for check_vma in (True, False) if option == 0 else (True,):

            def step(params: Any, state: Any, batch: Any, o: Any = optimizer, checked: bool = check_vma) -> Any:
                if checked:  # differentiates through the mean over devices
                    gradients = jax.grad(lambda p: jax.lax.pmean(loss(p, batch), "batch"))(params)
                else:
                    gradients = jax.lax.pmean(jax.grad(loss)(params, batch), "batch")
                return advance(o, params, state, gradients)

            mapped = jax.jit(
                jax.shard_map(
                    step, mesh=grid, in_specs=(P(), P(), P("batch")), out_specs=(P(), P()), check_vma=check_vma
                )
            )
            params = initial()
            state = optimizer.init(params)
            for batch in batches():
                params, state = jax.block_until_ready(mapped(params, state, batch))
            assert_same((params, state), option)
            alone = jax.shard_map(
                functools.partial(advance, optimizer), mesh=grid, in_specs=P(), out_specs=P(), check_vma=check_vma
            )
            assert all_reduces(jax.jit(alone), params, state, params) == 0


def pmapped() -> None:
    for option, options in enumerate(OPTIONS):
        optimizer = ada2ms(0.1, **options)

        def step(params: Any, state: Any, batch: Any, o: Any = optimizer) -> Any:
            return advance(o, params, state, jax.lax.pmean(jax.grad(loss)(params, batch), "batch"))

        parallel = jax.pmap(step, axis_name="batch")
        params, state = (
            jax.tree.map(lambda x: np.stack([x] * 8), tree) for tree in (initial(), optimizer.init(initial()))
        )
        for batch in batches():
            params, state = jax.block_until_ready(
                parallel(params, state, jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch))
            )
        for device in range(8):
            assert_same(jax.tree.map(lambda x, i=device: np.asarray(x)[i], (params, state)), option)


def state_specs(state: Any) -> Any:
    """Of a state: moments are sharded like their parameters, and the rest is not."""
    return jax.tree.map(lambda _: P(), state)._replace(mu=specs(), nu=specs())


def sharded_step(optimizer: Any, grid: Any) -> Any:
    """A step over shards of parameters, state and gradients, inside shard_map."""
    spec = state_specs(jax.eval_shape(optimizer.init, initial()))
    return jax.jit(
        jax.shard_map(
            functools.partial(advance, optimizer),
            mesh=grid,
            in_specs=(specs(), spec, specs()),
            out_specs=(specs(), spec),
        )
    )


def sharded_parameters() -> None:
    """In shard_map by axis_name, among them leaves that are replicated along one axis or both."""
    grid = mesh()
    for option, options in enumerate(OPTIONS):
        optimizer = ada2ms(0.1, **options, axis_name=("x", "y"))
        step = sharded_step(optimizer, grid)
        params = sharded(initial(), grid)
        state = optimizer.init(params)
        for gradients in one_device(option)[1]:
            params, state = jax.block_until_ready(step(params, state, sharded(gradients, grid)))
        assert_same((params, state), option)
        assert all_reduces(step, params, state, params) == 1

    # One axis by its name, with a loss that gathers the parameters, and a gradient that scatters them again.
    params_specs = {"bias": P(), "hidden": P("x"), "out": P("x"), "scale": P()}
    optimizer = ada2ms(0.1, axis_name="x")
    spec = jax.tree.map(lambda _: P(), optimizer.init(initial()))._replace(mu=params_specs, nu=params_specs)

    def trained(params: Any, state: Any, batch: Any) -> Any:
        def whole(params: Any) -> Any:
            gathered = {n: jax.lax.all_gather(params[n], "x", tiled=True) for n in ("hidden", "out")}
            return jax.lax.pmean(loss({**params, **gathered}, batch), ("x", "y"))

        return advance(optimizer, params, state, jax.grad(whole)(params))

    mapped = jax.shard_map(
        trained, mesh=grid, in_specs=(params_specs, spec, P(("x", "y"))), out_specs=(params_specs, spec)
    )
    params = initial()
    state = optimizer.init(params)
    for batch in batches():
        params, state = jax.block_until_ready(jax.jit(mapped)(params, state, batch))
    assert_same((params, state), 0)


def compensated_shards() -> None:
    """Parameters in bfloat16, by jit and by shard_map: what rounding loses is sharded like them."""
    grid = mesh()

    def narrow(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)

    def whole(params: Any, state: Any) -> Any:
        return jax.tree.map(
            lambda p, c: np.asarray(p, np.float32) + np.asarray(c, np.float32), params, state.compensation
        )

    gradients = [narrow(g) for g in one_device(0)[1]]
    plain, everywhere = (ada2ms(1e-3, compensated=True, max_norm=0.1, axis_name=a) for a in (None, ("x", "y")))
    params, state = narrow(initial()), plain.init(narrow(initial()))
    for g in gradients:
        params, state = jax.jit(functools.partial(advance, plain))(params, state, g)
    expected = whole(params, state)
    params = sharded(narrow(initial()), grid)
    assert plain.init(params).compensation["hidden"].sharding == params["hidden"].sharding
    spec = jax.tree.map(lambda _: P(), plain.init(params))._replace(mu=specs(), nu=specs(), compensation=specs())
    mapped = jax.shard_map(
        functools.partial(advance, everywhere), mesh=grid, in_specs=(specs(), spec, specs()), out_specs=(specs(), spec)
    )
    for step in (jax.jit(functools.partial(advance, plain)), jax.jit(mapped)):
        params, state = sharded(narrow(initial()), grid), plain.init(sharded(narrow(initial()), grid))
        for g in gradients:
            params, state = jax.block_until_ready(step(params, state, sharded(g, grid)))
        for name, x in whole(params, state).items():
            np.testing.assert_allclose(x, expected[name], rtol=2**-15)
            nearest = np.asarray(x, jnp.bfloat16).astype(np.float32)  # of half a unit there are two
            assert np.all(np.abs(x - np.asarray(params[name], np.float32)) <= np.abs(x - nearest)), name
    assert all_reduces(jax.jit(mapped), params, state, params) == 1


def untold_shards() -> None:
    """Where JAX does not tell which leaves are sharded, there is an error, and not a wrong mean."""
    optimizer = scale_by_ada2ms(axis_name="x")

    def directions(g: Any) -> Any:
        return optimizer.update(g, optimizer.init(g))[0]

    mapped = jax.shard_map(directions, mesh=mesh(), in_specs=P("x"), out_specs=P("x"), check_vma=False)
    others = jax.jit(directions), jax.vmap(directions, axis_name="x"), jax.pmap(directions, axis_name="x")
    for f in (jax.jit(mapped), *others):
        with pytest.raises(
            ValueError, match=r"Invalid axis_name: 'x' \(must be axes of a jax.shard_map with check_vma"
        ):
            f(np.ones([8, 3]))
    # Where an axis was forgotten, JAX itself finds that the state differs between devices, unless told not to look.
    forgotten = scale_by_ada2ms()

    def second_moment(g: Any) -> Any:
        return forgotten.update(g, forgotten.init(g))[1].s[None]

    g = np.arange(1.0, 9.0)
    with pytest.raises(ValueError, match="out_specs"):
        jax.shard_map(second_moment, mesh=mesh(), in_specs=P("x"), out_specs=P())(g)
    unchecked = jax.shard_map(second_moment, mesh=mesh(), in_specs=P("x"), out_specs=P("x"), check_vma=False)(g)
    np.testing.assert_allclose(unchecked, 0.001 * np.mean(g.reshape(4, 2) ** 2, 1))  # each its own, and none the mean


def two_processes(process: int, port: int) -> None:
    """Four devices in each of two processes, by jit and by shard_map."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    assert (len(jax.local_devices()), jax.device_count(), jax.process_count()) == (4, 8, 2)
    grid = mesh()

    def spread(tree: Any, spec: Any) -> Any:
        return jax.tree.map(lambda x, s: global_array(x, NamedSharding(grid, s)), tree, spec)

    for option, options in enumerate(OPTIONS):
        for axis_name in (None, ("x", "y")):
            optimizer = ada2ms(0.1, **options, axis_name=axis_name)
            params = spread(initial(), specs())
            state = optimizer.init(initial())
            state = spread(state, state_specs(state))
            if axis_name is None:
                step = jax.jit(lambda p, s, b, o=optimizer: advance(o, p, s, jax.grad(loss)(p, b)))
                given = [spread(b, (P("x"), P("x"))) for b in batches()]
            else:
                step = sharded_step(optimizer, grid)
                given = [spread(g, specs()) for g in one_device(option)[1]]
            for x in given:
                params, state = jax.block_until_ready(step(params, state, x))
            assert_same(multihost_utils.process_allgather((params, state), tiled=True), option)


CASES = {
    f.__name__: f
    for f in (
        jit_auto,
        jit_explicit,
        data_parallel,
        pmapped,
        sharded_parameters,
        compensated_shards,
        untold_shards,
        two_processes,
    )
}


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 4 if sys.argv[1] == two_processes.__name__ else 8)
    jax.config.update("jax_enable_x64", True)
    CASES[sys.argv[1]](*map(int, sys.argv[2:]))
    print("ok")


@pytest.mark.parametrize("case", CASES)
def test_equals_one_device(case: str) -> None:
    command = [sys.executable, "-W", "error", str(Path(__file__)), case]
    arguments: list[list[str]] = [[]]
    if case == two_processes.__name__:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            arguments = [[str(process), str(free.getsockname()[1])] for process in (0, 1)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen([*command, *a], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for a in arguments
    ]
    for process in processes:
        out, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        assert out.strip().endswith("ok")


if __name__ == "__main__":
    main()
