"""Where a state has no global second moment, as AdamW's: s = mean(v), and k its highest count."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from handoff_support import FRAMEWORKS, marked
from state_support import entry, fit, target

from ada2ms.core import State, StateError
from ada2ms.core.state import Group


def test_a_state_of_adamw_is_given_the_mean_of_v() -> None:
    state = State(
        {"a": entry((2,), step=3), "b": entry((3, 2), step=5), "c": entry((4,), step=0)}, [Group(["a", "b", "c"])]
    )
    assert not state.has_global
    v = [state.parameters[name].exp_avg_sq.astype(np.float64) for name in "ab"]
    model = state.with_global("model")
    assert model.groups[0].global_exp_avg_sq == pytest.approx(np.concatenate([x.ravel() for x in v]).mean(), rel=1e-15)
    assert model.groups[0].global_step == 5
    own = [entry.global_exp_avg_sq for entry in state.with_global("tensor").parameters.values()]
    assert own == [pytest.approx(v[0].mean(), rel=1e-15), pytest.approx(v[1].mean(), rel=1e-15), 0.0]
    assert fit(state, {n: target(e.exp_avg.shape) for n, e in state.parameters.items()}, scope=None).entries


def test_a_warm_start_has_a_count_in_either_scope() -> None:
    """Schedules are given k, also where no bias correction needs it: updates done elsewhere count."""
    state = State({"a": entry((2,), step=3), "b": entry((3,), step=5)}, [Group(["a"]), Group(["b"])])
    for scope in ("model", "tensor"):
        assert [group.global_step for group in state.with_global(scope).groups] == [5, 5]  # type: ignore[arg-type]
    targets = {name: target(e.exp_avg.shape) for name, e in state.parameters.items()}
    fitted = fit(state, targets, scope="tensor")
    assert fitted.groups == [(None, 5)]
    assert None not in [e.global_exp_avg_sq for e in fitted.entries.values()]


@pytest.mark.parametrize("framework", [marked(name) for name in FRAMEWORKS])
def test_adamw_goes_on_with_its_count_in_scope_tensor(framework: str) -> None:
    """Which a schedule of the adaptivity is given; each tensor's s is mean(v)."""
    seen: list[int] = []

    def adaptivity(count: Any) -> Any:
        seen.append(count if isinstance(count, int) else int(float(np.asarray(count))))
        return 0.5 + 0 * (count / 1)

    state = State({"a": entry((2,), step=7), "b": entry((3,), step=7, seed=1)}, [Group(["a", "b"])])
    optimizing = Optimizing(framework, state, adaptivity)
    optimizing.step()
    assert optimizing.exported.groups[0].global_step == 7
    for name, e in optimizing.exported.parameters.items():
        assert e.global_exp_avg_sq == pytest.approx(state.parameters[name].exp_avg_sq.astype(float).mean(), rel=1e-6)
    assert seen[-1] == 7


class Optimizing:
    """Ada2MS in scope "tensor", of a framework, that goes on from a state."""

    def __init__(self, framework: str, state: State, adaptivity: Any) -> None:
        options: dict[str, Any] = {"scope": "tensor", "adaptivity": adaptivity}
        arrays = {name: e.param for name, e in state.parameters.items()}
        if framework == "torch":
            import torch

            from ada2ms.torch import Ada2MS, export_state, import_state

            params: Any = {name: torch.tensor(x, requires_grad=True) for name, x in arrays.items()}
            optimizer: Any = Ada2MS(list(params.values()), **options)
            import_state(params, optimizer, state)
            self.exported = export_state(params, optimizer)
            for p in params.values():
                p.grad = torch.ones_like(p)
            self.step = optimizer.step
        elif framework == "jax":
            import jax.numpy as jnp

            from ada2ms.jax import ada2ms, export_state, import_state

            params = {name: jnp.asarray(x) for name, x in arrays.items()}
            optimizer = ada2ms(**options)
            params, opt_state, _ = import_state(params, optimizer.init(params), state)
            self.exported = export_state(params, opt_state)
            self.step = lambda: optimizer.update(params, opt_state, params)
        else:
            import keras

            from ada2ms.tf import Ada2MS as KerasAda2MS
            from ada2ms.tf import export_state, import_state

            params = [keras.Variable(x, name=name) for name, x in arrays.items()]
            optimizer = KerasAda2MS(**options)
            import_state(params, optimizer, state)
            self.exported = export_state(params, optimizer)
            self.step = lambda: optimizer.apply([keras.ops.ones_like(v.value) for v in params], params)


def test_a_warm_start_counts_complex_tensors_as_pairs_of_reals() -> None:
    e = entry((2, 2), "complex64", step=3)
    state = State({"a": e}, [Group(["a"])])
    mean = float(np.concatenate([e.exp_avg_sq.real, e.exp_avg_sq.imag]).astype(np.float64).mean())
    assert state.with_global("model").groups[0].global_exp_avg_sq == pytest.approx(mean, rel=1e-15)
    own = state.with_global("tensor").parameters["a"].global_exp_avg_sq
    assert own == pytest.approx(mean, rel=1e-15)


def test_a_part_without_a_global_moment_is_given_its_like() -> None:
    """That of a group with the same b2, or else the s_hat of another; with scope "tensor", each tensor's own mean."""
    parameters = {name: entry((2,), seed=i) for i, name in enumerate("abcd")}
    groups = [
        Group(["a"], {"b2": 0.99}, 0.25, 9),
        Group(["b"], {"b2": 0.99}),
        Group(["c"], {"b2": 0.9}),
        Group(["d"], {"b2": 0.5}, 0.5, 8),
    ]
    found = State(parameters, groups).with_global("model").groups
    s_hat = 0.25 / (1 - 0.99**9)
    assert [(g.global_exp_avg_sq, g.global_step) for g in found] == [
        (0.25, 9),
        (0.25, 9),
        (pytest.approx(s_hat * (1 - 0.9**9), rel=1e-14), 9),
        (0.5, 8),
    ]
    unknown = [groups[0], Group(["b", "c", "d"])]  # nothing is known of its b2
    v = np.concatenate([e.exp_avg_sq for e in parameters.values()]).astype(np.float64)
    found = State(parameters, unknown).with_global("model").groups
    assert (found[1].global_exp_avg_sq, found[1].global_step) == (pytest.approx(v.mean(), rel=1e-15), 3)
    with pytest.raises(StateError, match="its scope is 'model', the optimizer's 'tensor'"):
        State(parameters, groups).with_global("tensor")
    parameters["a"].global_exp_avg_sq = 0.125
    found_own = State(parameters, [Group(list("abcd"), {}, None, 9)], scope="tensor").with_global("tensor")
    own = [e.global_exp_avg_sq for e in found_own.parameters.values()]
    assert own == [0.125, *(pytest.approx(parameters[n].exp_avg_sq.astype(float).mean()) for n in "bcd")]
    assert found_own.groups[0].global_step == 9


def test_a_group_that_has_no_parameters_takes_the_models_global_moment() -> None:
    state = State({"a": entry((2,))}, [Group(["a"], {}, 0.5, 3)])
    targets = {"a": replace(target((2,)), group=1)}
    assert fit(state, targets, groups=3).groups == [(0.5, 3)] * 3
    state = State({"a": entry((2,))}, [Group(["a"], {}, 0.5, 3), Group([], {}, 0.0, 0)])
    assert fit(state, {"a": target((2,))}).groups == [(0.5, 3)], "a group without parameters has no say"
