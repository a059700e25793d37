"""Parts of packed arrays, and hyperparameters of groups, as the recorders of torch and JAX write them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ada2ms.core.trace import Trace, TraceError
from ada2ms.core.trace.model import resolve, sample
from ada2ms.core.trace.parts import Part
from ada2ms.core.trace.sketch import sketch

Cut = Callable[[Any], Any]
CUTS: dict[str, tuple[Cut, bool]] = {  # and whether entries are evenly spaced
    "split": (lambda w: np.split(w, 3), True),
    "transposed": (lambda w: [x.T.reshape(4, 2, 2) for x in np.split(w, 3)], True),
    "interleaved": (lambda w: list(w.reshape(2, 3, 2, 4).swapaxes(0, 1)), True),
    "one row each": (lambda w: list(w.reshape(3, 4, 4)), True),
    "reversed": (lambda w: [x[::-1] for x in np.split(w, 3)], True),
    "gates in another order": (lambda w: [w[[0, 5, 1, 7]], w[[2, 3, 4, 6]], w[8:]], False),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_part_has_the_entries_that_the_function_cuts(name: str) -> None:
    cut, even = CUTS[name]
    w = np.random.default_rng(0).normal(size=(12, 4))
    found = resolve({"w": ((12, 4), "float64", 2)}, {"w": ("a", "b", "c")}, {"w": cut})
    assert [(p.name, p.own, p.group, p.axes) for p in found] == [(n, "w", 2, None) for n in "abc"]
    for p, expected in zip(found, cut(w), strict=True):
        assert p.shape == expected.shape
        assert np.array_equal(p.of(w), expected)
        assert np.array_equal(sample(w, p, 100), expected)
        assert "part" not in p.data()
        assert p.part is not None
        assert (p.part.strides is not None) == (even or p.name == "c")


def test_parts_of_nothing_and_of_one_entry() -> None:
    assert Part.of(np.zeros((0, 3), int)).take(np.arange(6.0)).shape == (0, 3)
    assert Part.of(np.array([[4]])).take(np.arange(6.0)).tolist() == [[4.0]]
    assert Part.of(np.array(3)).take(np.arange(6.0)) == 3.0


def test_what_does_not_cut_an_array_is_refused() -> None:
    shapes = {"w": ((12, 4), "float32", 0)}
    with pytest.raises(TraceError, match="must be a function that cuts it"):
        resolve(shapes, {"w": ("a", "b")}, None)
    with pytest.raises(TraceError, match="does not give every entry once"):
        resolve(shapes, {"w": ("a", "b")}, {"w": lambda w: (w[:6], w[:6])})
    with pytest.raises(TraceError, match=r"into 3 arrays \(must be 2"):
        resolve(shapes, {"w": ("a", "b")}, {"w": lambda w: np.split(w, 3)})


def test_torch_records_the_parts_of_a_packed_projection(tmp_path: Path) -> None:
    """Evenly spaced or not, with a gradient that is missing once; s and steps are those of the optimizer alone."""
    import torch

    from ada2ms.torch import Recorder

    rng = np.random.default_rng(1)
    params = {name: torch.nn.Parameter(torch.from_numpy(rng.normal(size=(12, 4)))) for name in ("w", "u")}
    optimizer = torch.optim.SGD(params.values(), lr=0.5)
    cuts: Any = {"w": CUTS["interleaved"][0], "u": CUTS["gates in another order"][0]}
    names = {own: tuple(f"{own}.{x}" for x in "abc") for own in params}
    grads = rng.normal(size=(2, 12, 4))
    with Recorder(tmp_path / "run", params, optimizer, names=names, axes=cuts) as recorder:
        assert recorder is not None
        for i in range(2):
            params["w"].grad = torch.from_numpy(grads[i])
            params["u"].grad = None if i else torch.from_numpy(2 * grads[i])
            optimizer.step()
    trace = Trace.load(tmp_path / "run")
    assert [p.name for p in trace.parameters] == [*names["w"], *names["u"]]
    for k, (own, scale) in enumerate((("w", 1.0), ("u", 2.0))):
        for j, expected in enumerate(cuts[own](scale * grads[0])):
            row = trace.steps[0].sketches["gradient"][3 * k + j]
            assert np.allclose(row, sketch(np.ascontiguousarray(expected)), rtol=1e-12, atol=1e-12)
            assert np.array_equal(trace.steps[0].full["gradient"][names[own][j]], expected)
            assert np.allclose(trace.steps[0].full["update"][names[own][j]], -0.5 * expected)
    assert trace.steps[1].missing.tolist() == [False] * 3 + [True] * 3
    assert "untraced" not in trace.steps[0].extra


@pytest.mark.slow
def test_jax_records_parts_under_jit(tmp_path: Path) -> None:
    import jax
    import jax.numpy as jnp
    import optax

    from ada2ms.jax import Recorder, recorded

    rng = np.random.default_rng(2)
    start, grad = (rng.normal(size=(12, 4)).astype(np.float32) for _ in range(2))
    params = {"w": jnp.asarray(start), "u": jnp.asarray(start)}
    cuts: Any = {"w": CUTS["transposed"][0], "u": CUTS["gates in another order"][0]}
    names = {own: tuple(f"{own}.{x}" for x in "abc") for own in params}
    with Recorder(tmp_path / "run", params, names=names, axes=cuts) as recorder:
        optimizer = recorded(optax.sgd(0.5), recorder)
        jax.jit(optimizer.update)({"w": grad, "u": grad}, optimizer.init(params), params)
    step, trace = Trace.load(tmp_path / "run").steps[0], Trace.load(tmp_path / "run")
    for p, row in zip(trace.parameters, step.sketches["gradient"], strict=True):
        expected = cuts[p.own](grad)[names[p.own].index(p.name)]
        assert np.allclose(row, sketch(np.ascontiguousarray(expected)), rtol=1e-5, atol=1e-5)
        assert np.array_equal(step.full["gradient"][p.name], expected)


def test_jax_records_the_hyperparameters_of_each_group(tmp_path: Path) -> None:
    """Those that are told for each leaf, and those that the states of a `multi_transform` hold."""
    import jax
    import jax.numpy as jnp
    import optax

    from ada2ms.jax import Recorder, recorded

    params = {"body": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
    labels = {"body": {"kernel": "slow", "bias": "slow"}, "head": {"kernel": "fast"}}
    inject: Any = optax.inject_hyperparams
    rates: Any = {"slow": inject(optax.adamw)(0.125), "fast": inject(optax.adamw)(lambda k: 0.5 / (1 + k))}
    plain: Any = inject(optax.sgd)(0.25)
    cases = {
        "several": optax.multi_transform(rates, labels),
        "one": plain,
        "unknown": optax.multi_transform({"slow": plain, "fast": inject(optax.sgd)(0.5)}, labels),
    }

    def told(name: str) -> dict[str, Any]:
        return {"weight_decay": 0.0 if "bias" in name else 0.25}

    found = {}
    for case, made in cases.items():
        with Recorder(tmp_path / case, params, hyper=told) as recorder:
            optimizer = recorded(made, recorder)
            state = optimizer.init(params)
            for _ in range(2):
                _, state = jax.jit(optimizer.update)(params, state, params)
        trace = Trace.load(tmp_path / case)
        found[case] = [{p.own: step.hyper[p.group] for p in trace.parameters} for step in trace.steps]
    first, second = ({own: (h["lr"], h["weight_decay"]) for own, h in step.items()} for step in found["several"])
    assert first == {"body/kernel": (0.125, 1e-4), "body/bias": (0.125, 1e-4), "head/kernel": (0.5, 1e-4)} or first == {
        "body/kernel": (0.125, np.float32(1e-4)),
        "body/bias": (0.125, np.float32(1e-4)),
        "head/kernel": (0.5, np.float32(1e-4)),
    }
    assert second["head/kernel"][0] == 0.25
    assert found["one"][0] == {
        "body/kernel": {"lr": 0.25, "weight_decay": 0.25},
        "body/bias": {"lr": 0.25, "weight_decay": 0.0},
        "head/kernel": {"lr": 0.25, "weight_decay": 0.25},
    }
    assert "lr" not in found["unknown"][0]["head/kernel"], "a rate that may be another leaf's is told"
    with pytest.raises(TypeError, match=r"'lr' of 'body/bias' is 'fast' \(must be a number or a schedule\)"):
        Recorder(tmp_path / "no", params, hyper=lambda name: {"lr": "fast" if "bias" in name else 1.0})
