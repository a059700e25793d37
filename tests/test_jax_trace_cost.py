"""What a recorder adds to a compiled step in JAX: no bit of the parameters, and little memory; and sums by C++."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax_support import squares_are_summed_at_once

from ada2ms.core.trace import Trace, TraceError, native
from ada2ms.core.trace.model import resolve
from ada2ms.core.trace.sketch import resolution, sketch
from ada2ms.jax import Recorder, ada2ms, recorded, sketches_cpu
from support import slow

SHAPE = (160, 128)  # of arrays that are large enough that their order matters


def tree(seed: int, count: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {f"w{i}": jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for i in range(count)} | {"b": jnp.ones(5)}


def compiled(optimizer: Any, params: Any) -> Any:
    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, optimizer.init(params), params).compile()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is large enough to be summed in C++."""
    monkeypatch.setattr(native, "ENTRIES", math.inf)


@pytest.fixture
def in_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of any size are summed in C++."""
    monkeypatch.setattr(native, "ENTRIES", 0)
    if jax.default_backend() != "cpu" or not sketches_cpu.is_available([{}]):
        pytest.skip("JAX has no CPU alone, or there is no compiler of C++")


MORE = [(1, "in_cpp"), (0, "plain"), (1, "plain")]
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda: optax.adamw(0.1),
    "clipped adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
    "scheduled": lambda: optax.inject_hyperparams(optax.sgd)(optax.cosine_decay_schedule(0.1, 9), momentum=0.9),
    "sgd": lambda: optax.sgd(0.1),
    "lamb": lambda: optax.lamb(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "ada2ms": lambda: ada2ms(0.1),
}


@pytest.mark.parametrize("name", ["adamw", *slow(*(name for name in OPTIMIZERS if name != "adamw"))])
@pytest.mark.parametrize(("full", "how"), [(0, "in_cpp"), *(pytest.param(*x, marks=pytest.mark.slow) for x in MORE)])
def test_large_parameters_are_the_same_to_the_last_bit(
    name: str, full: int, how: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(how)
    results = []
    with Recorder(tmp_path / "run", tree(0), full=full) as recorder:
        for optimizer in (OPTIMIZERS[name](), recorded(OPTIMIZERS[name](), recorder)):
            params, step = tree(0), compiled(optimizer, tree(0))
            state = optimizer.init(params)
            for i in range(3):
                params, state = step(params, state, tree(i + 1))
            results.append((params, state))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    for x, y in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_array_equal(x, y)


@squares_are_summed_at_once
@pytest.mark.parametrize(("how", "full", "arrays"), [("in_cpp", 0, 0), ("in_cpp", 1, 0), ("plain", 0, 10)])
def test_no_further_model_is_held_in_memory(
    how: str, full: int, arrays: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Neither updates, nor a copy of parameters that are written over, nor squares; XLA sums all updates at once."""
    request.getfixturevalue(how)
    params = tree(0, 8)
    with Recorder(tmp_path / "run", params, full=full, entries=100) as recorder:
        program = compiled(recorded(optax.adamw(0.1), recorder), params)
    size = params["w0"].nbytes
    assert program.memory_analysis().temp_size_in_bytes < (arrays + 0.5) * size
    assert ("ada2ms_sketch_sums" in program.as_text()) == (how == "in_cpp")
    if how == "in_cpp":
        assert f"f32[{SHAPE[0]},{SHAPE[1]}]{{1,0}} copy(" not in program.as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *slow("float16", "complex64")])
def test_sums_in_cpp_are_those_of_numpy(in_cpp: None, dtype: str) -> None:
    """In any layout, by part, and of arrays that some are missing of."""
    rng = np.random.default_rng(2)
    shapes: dict[str, tuple[int, ...]] = {"a": (), "b": (0,), "c": (40_001,), "d": (7, 3, 3, 16), "e": (30, 40)}
    known = {name: (shape, dtype, 0) for name, shape in (shapes | {"absent": (2,)}).items()}

    def halves(x: Any) -> Any:
        return [x[:, ::2], x[:, 1::2]]

    axes: dict[str, Any] = {"d": (3, 0, 2, 1), "e": halves}
    parameters = resolve(known, {"e": ["e/0", "e/1"]}, axes)
    given = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    if dtype == "complex64":
        given = {name: x + 1j * rng.normal(size=x.shape) for name, x in given.items()}
    arrays = {name: jnp.asarray(x, dtype) for name, x in given.items()}
    found = sketches_cpu.unpacked(jax.jit(lambda arrays: sketches_cpu.sums(arrays, parameters))(arrays))
    for p, row in zip(parameters, found, strict=True):
        if p.own == "absent":
            assert np.isnan(row).all()
            continue
        expected = sketch(np.asarray(p.of(np.asarray(arrays[p.own]))), p.axes)
        bound = 2 * resolution(dtype) * expected[0]
        assert abs(np.sqrt(row[0]) - expected[0]) <= bound
        assert np.abs(row[1:] - expected[1:]).max() <= bound


@pytest.mark.parametrize("around", ["jit", *slow("scan", "multi", "none", "disable_jit")])
def test_a_recorder_by_cpp_sees_what_another_sees(
    in_cpp: None, around: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients to the resolution, updates to that of the values, and entries of all."""

    def run(path: Path) -> Trace:
        params = tree(0)
        with Recorder(path, params, full=2) as recorder:
            optimizer: Any = optax.adamw(0.1)
            optimizer = recorded(optax.MultiSteps(optimizer, 2) if around == "multi" else optimizer, recorder)

            def step(carry: Any, gradients: Any) -> Any:
                updates, state = optimizer.update(gradients, carry[1], carry[0])
                return (optax.apply_updates(carry[0], updates), state), None

            carry, each = (params, optimizer.init(params)), [tree(i + 1) for i in range(6)]
            if around == "scan":
                jax.jit(lambda c, x: jax.lax.scan(step, c, x))(carry, jax.tree.map(lambda *x: jnp.stack(x), *each))
            else:
                call = step if around == "none" else jax.jit(step, donate_argnums=(0,))
                with jax.disable_jit(around == "disable_jit"):
                    for gradients in each:
                        carry, _ = call(carry, gradients)
        return Trace.load(path)

    one = run(tmp_path / "one")
    monkeypatch.setattr(native, "ENTRIES", math.inf)
    other = run(tmp_path / "other")
    assert len(one.steps) == len(other.steps) == (3 if around == "multi" else 6)
    for x, y in zip(one.steps, other.steps, strict=True):
        values = y.sketches["value"][:, :1]
        for what in ("value", "gradient"):
            near = 4 * resolution("float32") * y.sketches[what][:, :1]
            assert np.all(np.abs(x.sketches[what] - y.sketches[what]) <= near)
        assert np.all(np.abs(x.sketches["update"] - y.sketches["update"])[:, 1:] <= 4 * resolution("float32") * values)
        ratio = x.sketches["update"][:, 0] / y.sketches["update"][:, 0]
        assert np.all((ratio > 0.4) & (ratio < 1.8)), "the norm is an estimate"
        assert {what: sorted(each) for what, each in x.full.items()} == {w: sorted(each) for w, each in y.full.items()}
        for what, each in x.full.items():
            for name, entries in each.items():
                np.testing.assert_allclose(entries, y.full[what][name], rtol=1e-6, atol=1e-6)
    assert [sorted(x.full) for x in one.steps[:3]] == [["gradient", "update", "value"]] * 2 + [[]]


def test_where_cpp_cannot_be_had_xla_sums(in_cpp: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler, over several devices, of types that it has not, and of small models."""
    arrays = [{"a": jnp.ones(3)}, {"a": jnp.ones(3)}]
    assert sketches_cpu.is_available(arrays)
    assert not sketches_cpu.is_available([*arrays, {"a": jnp.ones(3, "int8")}])
    with monkeypatch.context() as patch:
        patch.setattr(native, "ENTRIES", 4)
        assert not sketches_cpu.is_available(arrays)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 2)
        assert not sketches_cpu.is_available(arrays)
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(sketches_cpu, "_is_registered", functools.cache(sketches_cpu._is_registered.__wrapped__))
    assert not sketches_cpu.is_available(arrays)


def test_that_vmap_cannot_be_recorded_is_said_of_cpp_too(in_cpp: None, tmp_path: Path) -> None:
    params = {"a": jnp.ones((2, 3))}
    with Recorder(tmp_path / "run", {"a": params["a"][0]}) as recorder:
        optimizer = recorded(optax.adam(0.1), recorder)
        with pytest.raises(TraceError, match=r"cannot be recorded under jax\.vmap"):
            jax.vmap(lambda p: optimizer.update(p, optimizer.init(p), p)[0])(params)
