"""Outputs in traces of JAX: from wherever in a program they are told, each of its own step and in order."""

import os
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

from ada2ms.core.trace import Trace
from ada2ms.core.trace.outputs import activation, apart
from ada2ms.jax import Recorder, recorded
from ada2ms.jax.outputs import Outputs
from support import slow

STEPS = 5
X = np.random.default_rng(1).normal(size=(STEPS, 8, 6)).astype(np.float32)
START = {"w": np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32) / 3}
Tell = Callable[[str, Any], None]


def layer(w: Any, h: Any, tell: Tell) -> Any:
    h = h @ w
    tell("dense", h)
    h = jnp.tanh(h)
    tell("tanh", h)
    return h


def plain(w: Any, x: Any, tell: Tell) -> Any:
    return layer(w, layer(w, x, tell), tell)


def scanned(w: Any, x: Any, tell: Tell) -> Any:
    return jax.lax.scan(lambda h, _: (layer(w, h, tell), None), x, None, length=2)[0]


def checkpointed(w: Any, x: Any, tell: Tell) -> Any:
    return jax.checkpoint(lambda x: plain(w, x, tell))(x)


def scanned_checkpoints(w: Any, x: Any, tell: Tell) -> Any:
    step = jax.checkpoint(lambda h, _: (layer(w, h, tell), None))
    return jax.lax.scan(step, x, None, length=2)[0]


def mapped(w: Any, x: Any, tell: Tell) -> Any:
    return jax.vmap(lambda x: plain(w, x, tell))(x)


def mapped_twice(w: Any, x: Any, tell: Tell) -> Any:
    return jax.vmap(jax.vmap(lambda x: plain(w, x, tell)))(x.reshape(2, 4, 6)).reshape(8, 6)


def chosen(w: Any, x: Any, tell: Tell) -> Any:
    return jax.lax.cond(x.sum() < 1e9, lambda x: plain(w, x, tell), lambda x: x, x)


FORMS: dict[str, Any] = {
    f.__name__: f for f in (plain, scanned, checkpointed, scanned_checkpoints, mapped, mapped_twice, chosen)
}
NAMES = ["dense", "tanh", "dense (2)", "tanh (2)"]


def train(path: Path, form: Any, way: str = "jit", **options: Any) -> tuple[Trace, Any]:
    params = jax.tree.map(jnp.asarray, START)
    with Recorder(path, params, **options) as recorder:
        optimizer = recorded(optax.sgd(0.1), recorder)
        state = optimizer.init(params)

        def loss_of(params: Any, x: Any) -> Any:
            return jnp.mean(jnp.square(form(params["w"], x, recorder.output)))

        def step(carry: Any, x: Any) -> Any:
            params, state = carry
            loss, grads = jax.value_and_grad(loss_of)(params, x)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        if way == "scan":
            (params, _), _ = jax.jit(lambda carry, x: jax.lax.scan(step, carry, x))((params, state), X)
        elif way == "apart":
            gradient, update = jax.jit(jax.grad(loss_of)), jax.jit(optimizer.update)
            for x in X:
                updates, state = update(gradient(params, x), state, params)
                params = optax.apply_updates(params, updates)
        else:
            run = jax.jit(step) if way == "jit" else step
            for x in X:
                (params, state), _ = run((params, state), x)
    return Trace.load(path), params


def expected(i: int) -> list[Any]:
    """By NumPy, from a plain run."""
    w = START["w"].astype(np.float64)
    for k in range(i + 1):
        x = X[k].astype(np.float64)
        h1 = np.tanh(x @ w)
        h2 = np.tanh(h1 @ w)
        found = [x @ w, h1, h1 @ w, h2]
        d2 = 2 * h2 / h2.size * (1 - h2**2)
        d1 = (d2 @ w.T) * (1 - h1**2)
        w = w - 0.1 * (x.T @ d1 + h1.T @ d2)
    return found


@pytest.mark.parametrize(
    "form", ["plain", "scanned_checkpoints", *slow("mapped", "scanned", "checkpointed", "mapped_twice", "chosen")]
)
@pytest.mark.parametrize("way", ["jit", *slow("eager", "apart", "scan")])
def test_outputs_are_of_their_step_and_in_order(form: str, way: str, tmp_path: Path) -> None:
    """As NumPy computes them; and parameters are those of a run that tells nothing, to the last bit."""
    trace, params = train(tmp_path / "a", FORMS[form], way)
    assert [len(step.outputs) for step in trace.steps] == [4, 4, 4, 0, 0]
    for i in range(3):
        outputs = trace.steps[i].outputs
        assert [each.name for each in outputs] == NAMES
        for each, array in zip(outputs, expected(i), strict=True):
            (found,) = each.arrays
            assert found.dtype == "float32"
            d = apart(found, activation(array.reshape(found.shape)), same_layout=True, same_order=True)
            assert d is not None
            assert d < 1e-6
    _, silent = train(tmp_path / "b", lambda w, x, _: FORMS[form](w, x, lambda *_: None), way)
    assert np.array_equal(params["w"], silent["w"])


def test_after_the_first_steps_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays do not leave the program then."""
    read: list[int] = []
    take = Outputs._take
    monkeypatch.setattr(Outputs, "_take", lambda self, place, *rest: (read.append(place), take(self, place, *rest))[1])
    train(tmp_path / "a", plain, full=2)
    assert len(read) == 2 * len(NAMES)


def test_what_is_told_outside_of_programs(tmp_path: Path) -> None:
    """Values at once; pairs and dictionaries; of the first steps alone. What is no array is refused."""
    params = jax.tree.map(jnp.asarray, START)
    with Recorder(tmp_path / "a", params, full=1) as recorder:
        optimizer = recorded(optax.sgd(0.1), recorder)
        state = optimizer.init(params)
        with pytest.raises(TypeError, match="must be an array, or a tuple"):
            recorder.output("h", object())
        for x in X[:2]:
            recorder.output("h", {"b": x, "a": (x[:1], jnp.asarray(x[:2], jnp.bfloat16))})
            recorder.output("h", jnp.asarray(x))
            _, state = jax.jit(optimizer.update)(params, state, params)
    trace = Trace.load(tmp_path / "a")
    assert [len(step.outputs) for step in trace.steps] == [2, 0]
    first, second = trace.steps[0].outputs
    assert (first.name, second.name) == ("h", "h (2)")
    assert [(x.shape, x.dtype) for x in first.arrays] == [
        ([1, 6], "float32"),
        ([2, 6], "bfloat16"),
        ([8, 6], "float32"),
    ]
    assert second.arrays == [activation(X[0])]


def test_the_path_of_a_module_stands_for_the_neutral_name_of_its_parameters(tmp_path: Path) -> None:
    params = {"blocks": {"0": {"norm": {"scale": jnp.ones(6), "bias": jnp.ones(6)}}}}
    names = {"blocks/0/norm/scale": "3.norm.scale", "blocks/0/norm/bias": "3.norm.bias"}
    with Recorder(tmp_path / "a", params, names=names) as recorder:
        optimizer = recorded(optax.sgd(0.1), recorder)
        for name in ("blocks/0/norm", "blocks/0", "norm"):
            recorder.output(name, X[0])
        optimizer.update(params, optimizer.init(params), params)
    assert [each.name for each in Trace.load(tmp_path / "a").steps[0].outputs] == ["3.norm", "blocks/0", "norm"]


def test_accumulated_and_closed(tmp_path: Path) -> None:
    """Within MultiSteps all batches of a step are its; after the recorder is closed a program goes on without it."""
    params = jax.tree.map(jnp.asarray, START)
    recorder = Recorder(tmp_path / "a", params)
    optimizer = recorded(optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(), recorder)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, x: Any) -> Any:
        grads = jax.grad(lambda p: jnp.mean(plain(p["w"], x, recorder.output)))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for x in X[:4]:
        params, state = step(params, state, x)
    recorder.close()
    step(params, state, X[4])
    jax.effects_barrier()
    trace = Trace.load(tmp_path / "a")
    assert [len(each.outputs) for each in trace.steps] == [8, 8]
    assert [each.name for each in trace.steps[0].outputs if each.name.startswith("dense")] == [
        "dense",
        "dense (2)",
        "dense (3)",
        "dense (4)",
    ]


def test_a_program_without_outputs_is_the_same(tmp_path: Path) -> None:
    """What is off costs nothing: no callback more, and no operation."""

    def program(with_method: bool) -> str:
        params = jax.tree.map(jnp.asarray, START)
        with Recorder(tmp_path / "a", params) as recorder:
            if not with_method:
                recorder.outputs.mark = lambda: None  # type: ignore[method-assign]
            optimizer = recorded(optax.sgd(0.1), recorder)
            return str(jax.make_jaxpr(optimizer.update)(params, optimizer.init(params), params))

    count = [program(each).count("callback") for each in (True, False)]
    assert count[0] == count[1] > 0


DEVICES = """
import sys
sys.path.insert(0, "tests")
import jax
from pathlib import Path
from test_jax_outputs import FORMS, NAMES, X, train
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import test_jax_outputs as here
import numpy as np
from ada2ms.core.trace import TraceError
assert jax.device_count() == 2
mesh = Mesh(np.array(jax.devices()), ("d",))
here.X = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("d"))) for x in X]
for form in ("plain", "scanned"):
    alone, _ = train(Path(sys.argv[1], form), FORMS[form])
    names = NAMES if form == "plain" else sorted(NAMES)
    found = [[each.name for each in step.outputs] for step in alone.steps]
    assert [each if form == "plain" else sorted(each) for each in found] == [names] * 3 + [[], []]

def divided(w, x, tell):
    spec = PartitionSpec("d")
    return jax.shard_map(lambda x: FORMS["plain"](w, x, tell), mesh=mesh, in_specs=spec, out_specs=spec)(x)

try:
    train(Path(sys.argv[1], "divided"), divided)
except TraceError as error:
    assert "tell them outside" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.slow
def test_over_several_devices(tmp_path: Path) -> None:
    """Sharded batches are recorded as the whole that they are."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, "-c", DEVICES, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for form in ("plain", "scanned"):
        trace = Trace.load(tmp_path / form)
        for i in range(3):
            by_name = {each.name: each.arrays[0] for each in trace.steps[i].outputs}
            for name, array in zip(NAMES, expected(i), strict=True):
                d = apart(by_name[name], activation(array), same_layout=True, same_order=True)
                assert d is not None
                assert d < 1e-6, (form, i, name)
