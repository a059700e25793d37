"""Traces of JAX: what a recorder sees of updates, whatever compiles, loops, shards and surrounds them."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ada2ms.core.trace import Trace, TraceError
from ada2ms.core.trace.model import Parameter, fingerprint, positions
from ada2ms.core.trace.sketch import resolution, sketch
from ada2ms.jax import Recorder, ada2ms, recorded
from ada2ms.jax.sketches import sketch as sketch_of
from support import slow

STEPS = 5


def start() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "dense": {
            "kernel": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=4), jnp.float32),
        },
        "scale": jnp.float32(1.5),
    }


def batches(steps: int = STEPS) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(steps, 8, 6)).astype(np.float32)


def loss_of(params: Any, x: Any) -> Any:
    return jnp.mean(jnp.square(params["scale"] * jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"])))


def step_of(optimizer: Any) -> Any:
    def step(params: Any, state: Any, x: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params, x)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, grads, updates

    return step


def leaves(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def check(trace: Trace, seen: list[tuple[Any, Any, Any]]) -> None:
    """The trace has the sketches, by NumPy, of values, gradients and updates that another run has had."""
    assert len(trace.steps) == len(seen)
    for step, trees in zip(trace.steps, seen, strict=True):
        for what, tree in zip(("value", "gradient", "update"), trees, strict=True):
            for own, x in leaves(tree).items():
                expected = sketch(np.asarray(x))
                found = step.sketches[what][trace.index[own]]
                assert np.abs(found - expected).max() <= 4 * resolution("float32") * expected[0] + 1e-7, (what, own)


def by_hand(optimizer: Any, steps: int = STEPS) -> tuple[list[Any], Any]:
    """Values, gradients and updates of each step without a recorder, and the last parameters."""
    step, params, seen = jax.jit(step_of(optimizer)), start(), []
    state = optimizer.init(params)
    for x in batches(steps):
        before = params
        params, state, _, grads, updates = step(params, state, x)
        seen.append((before, grads, updates))
    return seen, params


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda: optax.adamw(0.1),
    "ada2ms": lambda: ada2ms(0.1),
}


@pytest.mark.parametrize(("name", "donated"), [("adamw", True), pytest.param("ada2ms", False, marks=pytest.mark.slow)])
def test_any_optimizer_is_recorded_under_jit(name: str, donated: bool, tmp_path: Path) -> None:
    """And computes what it computed without; its state is its own."""
    seen, last = by_hand(OPTIMIZERS[name]())
    params = start()
    with Recorder(tmp_path / "run", params, hyper={"lr": 0.1, "x": lambda n: 2.0 * n}, full=2, flush=2) as recorder:
        optimizer = recorded(OPTIMIZERS[name](), recorder)
        step = jax.jit(step_of(optimizer), donate_argnums=(0, 1) if donated else ())
        state = optimizer.init(params)
        assert jax.tree.structure(state) == jax.tree.structure(OPTIMIZERS[name]().init(params))
        losses = []
        for x in batches():
            recorder.batch(x)
            params, state, loss, _, _ = step(params, state, x)
            recorder.loss(loss)
            losses.append(float(loss))
    assert step._cache_size() == 1
    trace = Trace.load(tmp_path / "run")
    check(trace, seen)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(last), strict=True))
    assert [s.loss for s in trace.steps] == losses
    assert [s.hyper for s in trace.steps] == [[{"lr": 0.1, "x": 2.0 * i}] for i in range(STEPS)]
    assert [s.batches for s in trace.steps] == [[[fingerprint(x)]] for x in batches()]
    assert [bool(s.full) for s in trace.steps] == [True, True, False, False, False]
    for what, tree in zip(("value", "gradient", "update"), seen[1], strict=True):
        for own, x in leaves(tree).items():
            assert np.allclose(trace.steps[1].full[what][own], x, rtol=1e-6, atol=1e-8)


def test_in_a_scan_and_in_multi_steps(tmp_path: Path) -> None:
    seen, _ = by_hand(optax.adam(0.1))
    params = start()
    with Recorder(tmp_path / "scan", params) as recorder:
        optimizer = recorded(optax.adam(0.1), recorder)
        step = step_of(optimizer)

        def body(carry: Any, x: Any) -> Any:
            return step(*carry, x)[:2], None

        jax.jit(partial(jax.lax.scan, body))((params, optimizer.init(params)), batches())
    check(Trace.load(tmp_path / "scan"), seen)

    with Recorder(tmp_path / "multi", params, full=1) as recorder:
        multi = recorded(optax.MultiSteps(optax.adam(0.1), every_k_schedule=2), recorder)
        step, state = jax.jit(step_of(multi)), multi.init(params)
        grads = []
        for x in batches(4):
            recorder.batch(x)
            params, state, loss, g, _ = step(params, state, x)
            recorder.loss(loss)
            grads.append(g)
    trace = Trace.load(tmp_path / "multi")
    assert [(len(s.batches), s.losses) for s in trace.steps] == [(2, 2), (2, 2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads[:2])
    expected = sketch(np.asarray(mean["dense"]["kernel"]))
    assert np.allclose(trace.steps[0].sketches["gradient"][trace.index["dense/kernel"]], expected, rtol=1e-4)
    assert trace.steps[1].sketches["update"][:, 0].min() > 0


def test_injected_hyperparameters_are_seen_and_missing_gradients_too(tmp_path: Path) -> None:
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    with Recorder(tmp_path / "run", params) as recorder:
        schedule = optax.linear_schedule(1.0, 0.0, 4)
        optimizer = recorded(optax.inject_hyperparams(optax.sgd)(learning_rate=schedule), recorder)
        state = optimizer.init({"a": params["a"], "b": None})
        for _ in range(2):
            _, state = jax.jit(optimizer.update)({"a": jnp.ones(3), "b": None}, state, {"a": params["a"], "b": None})
    trace = Trace.load(tmp_path / "run")
    assert [s.hyper[0]["lr"] for s in trace.steps] == [1.0, 0.75]
    assert trace.steps[0].missing.tolist() == [False, True]
    assert np.isnan(trace.steps[0].sketches["gradient"][1]).all()
    assert set(trace.steps[0].full["gradient"]) == {"a"}


CASES = [
    ((70_001,), "float32"),
    ((2, 20_000), "float32"),
    ((60, 4000), "float32"),
    ((3, 300, 100), "bfloat16"),
    ((), "float32"),
    ((0,), "float32"),
    ((5,), "float16"),
    ((64, 33), "bfloat16"),
    ((7, 3, 3, 16), "complex64"),
]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_sketches_are_those_of_numpy(shape: tuple[int, ...], dtype: str) -> None:
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=shape) + (1j * rng.normal(size=shape) if dtype == "complex64" else 0), dtype)
    axes = tuple(range(len(shape)))[::-1]
    neutral = np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32))).transpose()
    parameter = Parameter("x", "x", neutral.shape, dtype, axes)
    expected = sketch(neutral)
    found = np.asarray(jax.jit(lambda x: sketch_of(x, parameter))(x))
    assert np.abs(found - expected).max() <= 2 * resolution(dtype) * expected[0]


SHARDED = """
import sys
sys.path.insert(0, "tests")
from test_jax_trace import sharded
sharded(sys.argv[1])
"""


def sharded(path: str) -> None:
    """Kernels divided among four devices, in both ways, batches too."""
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    params = start()
    params["dense"]["kernel"] = jax.device_put(params["dense"]["kernel"], NamedSharding(mesh, P(None, "d")))
    params["dense"]["bias"] = jax.device_put(params["dense"]["bias"], NamedSharding(mesh, P("d")))
    params["scale"] = jax.device_put(params["scale"], NamedSharding(mesh, P()))
    with Recorder(path, params, full=1) as recorder:
        optimizer = recorded(optax.adamw(0.1), recorder)
        step, state = jax.jit(step_of(optimizer)), optimizer.init(params)
        for x in batches():
            params, state, *_ = step(params, state, jax.device_put(x, NamedSharding(mesh, P("d"))))
            jax.block_until_ready(params)
    assert not params["dense"]["kernel"].sharding.is_fully_replicated
    with pytest.raises(TraceError, match=r"cannot be recorded within jax\.shard_map or jax\.pmap"):
        jax.shard_map(optimizer.update, mesh=mesh, in_specs=P(), out_specs=P())(params, state, params)


@pytest.mark.slow
def test_sharded_arrays_are_recorded_as_the_whole(tmp_path: Path) -> None:
    flags = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "run")]
    subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], check=True, timeout=240)
    seen, _ = by_hand(optax.adamw(0.1))
    trace = Trace.load(tmp_path / "run")
    assert trace.about["devices"] == 4
    assert [bool(step.full) for step in trace.steps][:2] == [jax.__version_info__ >= (0, 10), False]
    check(trace, seen)


def test_large_arrays_are_sampled(tmp_path: Path) -> None:
    params = {"w": jnp.arange(100.0).reshape(10, 10)}
    with Recorder(tmp_path / "run", params, axes={"w": (1, 0)}, entries=10) as recorder:
        optimizer = recorded(optax.sgd(1.0), recorder)
        jax.jit(optimizer.update)({"w": jnp.ones((10, 10))}, optimizer.init(params), params)
    full = Trace.load(tmp_path / "run").steps[0].full
    assert full["value"]["w"].tolist() == np.arange(100.0).reshape(10, 10).T.reshape(-1)[positions(100, 10)].tolist()


def test_what_does_not_fit_is_refused_and_what_is_closed_is_silent(tmp_path: Path) -> None:
    params = {"a": jnp.ones(3)}
    with pytest.raises(TypeError, match="Invalid hyper: 'lr' is 'x'"):
        Recorder(tmp_path / "run", params, hyper={"lr": "x"})  # type: ignore[dict-item]
    with pytest.raises(TraceError, match="no parameter 'b'"):
        Recorder(tmp_path / "run", params, names={"b": "c"})
    recorder = Recorder(tmp_path / "run", params)
    optimizer = recorded(optax.sgd(1.0), recorder)
    with pytest.raises(TraceError, match="does not know these leaves: \\['b'\\]"):
        optimizer.update({"b": jnp.ones(3)}, optimizer.init({"b": jnp.ones(3)}))
    update = jax.jit(optimizer.update)
    update(params, optimizer.init(params), params)
    recorder.close()
    update(params, optimizer.init(params), params)
    jax.effects_barrier()
    assert len(Trace.load(tmp_path / "run").steps) == 1


@pytest.mark.parametrize("full", [*slow(0), 1])
def test_that_vmap_cannot_be_recorded_is_said(full: int, tmp_path: Path) -> None:
    params = {"a": jnp.ones((2, 3))}
    with Recorder(tmp_path / "run", {"a": params["a"][0]}, full=full) as recorder:
        optimizer = recorded(optax.adam(0.1), recorder)
        with pytest.raises(TraceError, match=r"cannot be recorded under jax\.vmap"):
            jax.vmap(lambda p: optimizer.update(p, optimizer.init(p), p)[0])(params)


@pytest.mark.slow
def test_clipping_of_its_own_is_recorded_as_clipping_before_the_rule(tmp_path: Path) -> None:
    """Where it is told; the gradient is what the rule gets."""
    traces = []
    for own in (False, True):
        path, params = tmp_path / f"{own}.trace", start()
        with Recorder(path, params, hyper={"max_norm": 0.1} if own else {}) as recorder:
            rule = recorded(ada2ms(1e-2, max_norm=0.1 if own else None), recorder)
            optimizer = rule if own else optax.chain(optax.clip_by_global_norm(0.1), rule)
            step, state = jax.jit(step_of(optimizer)), optimizer.init(params)
            for x in batches():
                params, state, _, grads, _ = step(params, state, x)
                assert optax.tree.norm(grads) > 0.1, "there is something to clip"
        traces.append(Trace.load(path))
    for one, other in zip(*(trace.steps for trace in traces), strict=True):
        found, expected = other.sketches["gradient"], one.sketches["gradient"]
        assert np.all(np.abs(found - expected) <= 4 * resolution("float32") * expected[:, :1])
        for name, gradient in one.full.get("gradient", {}).items():
            np.testing.assert_allclose(other.full["gradient"][name], gradient, rtol=1e-5, atol=1e-8)
    assert one.number == STEPS
    assert traces[0].steps[0].full


@pytest.mark.slow
def test_statistics_are_those_that_were_told_of_each_step(tmp_path: Path) -> None:
    """Before the first step, and after each update by accumulated gradients, whatever is told between two of them."""
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
    from ada2ms.jax import plain_layers

    model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    mappings, path = plain_layers(model), tmp_path / "run"
    told = [{f"layers/1/{x}": np.full(4, i, np.float32) for x in ("mean", "var")} for i in range(5)]
    params, moving = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    with Recorder(path, params, statistics=moving, full=1, flush=1, **mappings) as recorder:
        optimizer = recorded(optax.MultiSteps(optax.sgd(0.1), 2), recorder)
        update, state = jax.jit(optimizer.update), optimizer.init(params)
        for statistics in told[1:]:
            _, state = update(params, state, params)
            recorder.statistics(statistics)
        with pytest.raises(TraceError, match=r"Invalid statistics: \['mean'\].*'layers/1/mean', 'layers/1/var'"):
            recorder.statistics({"mean": np.ones(4)})
    trace = Trace.load(path)
    assert trace.statistics is not None
    assert trace.start is not None
    assert [p.name for p in trace.statistics] == ["1.norm.mean", "1.norm.var"]
    expected = [[np.zeros(4), np.ones(4)], *([np.full(4, i)] * 2 for i in (2, 4))]
    for step, each in zip([trace.start, *trace.steps], expected, strict=True):
        assert np.allclose(step.sketches["statistics"], [sketch(x) for x in each])
    assert [sorted(step.full.get("statistics", {})) for step in trace.steps] == [["1.norm.mean", "1.norm.var"], []]
    with Recorder(path, params) as recorder:
        pass
    assert Trace.load(path).statistics is None


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_batches_and_losses_are_told_within_a_scan(tmp_path: Path, late: bool) -> None:
    """They are of their own step, as they are where each step is called by itself."""
    xs = batches()

    def run(path: Path, *, scanned: bool) -> Trace:
        with Recorder(path, start()) as recorder:
            step = step_of(optimizer := recorded(optax.adam(1e-2), recorder))

            def one(carry: Any, x: Any) -> Any:
                recorder.batch(x)
                if not late:
                    recorder.loss(loss_of(carry[0], x))
                params, state, loss, *_ = step(*carry, x)
                if late:
                    recorder.loss(loss)
                return (params, state), None

            carry = start(), optimizer.init(start())
            if scanned:
                jax.jit(lambda carry: jax.lax.scan(one, carry, jnp.asarray(xs)))(carry)
            else:
                for x in xs:
                    carry, _ = one(carry, jnp.asarray(x))
        return Trace.load(path)

    one, other = (run(tmp_path / f"{scanned}.trace", scanned=scanned) for scanned in (True, False))
    assert len(one.steps) == len(other.steps) == STEPS
    for x, y, batch in zip(one.steps, other.steps, xs, strict=True):
        assert x.batches == y.batches == [[fingerprint(batch)]]
        assert x.loss is not None
        assert x.loss == pytest.approx(y.loss, rel=1e-6)


def test_leaves_of_other_shapes_are_refused(tmp_path: Path) -> None:
    params = start()
    turned = {**params, "dense": {**params["dense"], "kernel": params["dense"]["kernel"].T}}
    with Recorder(tmp_path / "x.trace", turned) as recorder:
        optimizer = recorded(optax.sgd(0.1), recorder)
        with pytest.raises(TraceError, match=r"other shapes: 'dense/kernel' has \(6, 4\), the recorder \(4, 6\)"):
            optimizer.update(params, optimizer.init(params), params)


def test_the_learning_rate_may_have_the_name_that_optax_gives_it(tmp_path: Path) -> None:
    with Recorder(path := tmp_path / "x.trace", start(), hyper={"learning_rate": 0.5}) as recorder:
        optimizer = recorded(optax.sgd(0.5), recorder)
        optimizer.update(start(), optimizer.init(start()), start())
    assert Trace.load(path).steps[0].hyper == [{"lr": 0.5}]
