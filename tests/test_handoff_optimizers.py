"""The state of each framework's optimizers, from one to another: 16 bits, AdamW, groups, schedules; what is refused."""

from typing import Any

import numpy as np
import pytest
from handoff_support import FRAMEWORKS, LR, PAIRS, assert_equal_states, marked

from ada2ms import core
from ada2ms.core import State, StateError
from ada2ms.core.state import Entry, Group

Array = Any


def tensors(framework: str, arrays: dict[str, Array], dtype: str) -> Any:
    """Parameters of a framework, by name."""
    if framework == "torch":
        import torch

        return {name: torch.tensor(x).to(getattr(torch, dtype)).requires_grad_() for name, x in arrays.items()}
    if framework == "jax":
        import jax.numpy as jnp

        return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    import keras

    return [keras.Variable(x, dtype=dtype, name=name) for name, x in arrays.items()]


class Optimizing:
    """Ada2MS, or the framework's own AdamW, over a few parameters and given gradients."""

    def __init__(self, framework: str, arrays: dict[str, Array], dtype: str, *, ours: bool = True) -> None:
        self.framework, self.dtype = framework, dtype
        self.params: Any = tensors(framework, arrays, dtype)
        if framework == "torch":
            import torch

            from ada2ms.torch import Ada2MS

            self.optimizer: Any = (Ada2MS if ours else torch.optim.AdamW)(list(self.params.values()), lr=LR)
        elif framework == "jax":
            import optax

            from ada2ms.jax import ada2ms

            self.optimizer = ada2ms(LR) if ours else optax.adamw(LR)
            self.state = self.optimizer.init(self.params)
        else:
            import keras

            from ada2ms.tf import Ada2MS as KerasAda2MS

            self.optimizer = (KerasAda2MS if ours else keras.optimizers.AdamW)(LR)
            self.optimizer.build(self.params)

    def step(self, gradients: dict[str, Array]) -> None:
        given = tensors(self.framework, gradients, self.dtype)
        if self.framework == "torch":
            for name, p in self.params.items():
                p.grad = given[name].detach()
            self.optimizer.step()
        elif self.framework == "jax":
            import optax

            updates, self.state = self.optimizer.update(given, self.state, self.params)
            self.params = optax.apply_updates(self.params, updates)
        else:
            self.optimizer.apply([g.value for g in given], self.params)

    def export_state(self) -> State:
        if self.framework == "torch":
            from ada2ms.torch import export_state

            return export_state(self.params, self.optimizer)
        if self.framework == "jax":
            from ada2ms.jax import export_state as export_from_jax

            return export_from_jax(self.params, self.state)
        from ada2ms.tf import export_state as export_from_keras

        return export_from_keras(self.params, self.optimizer)

    def import_state(self, state: State) -> None:
        if self.framework == "torch":
            from ada2ms.torch import import_state

            import_state(self.params, self.optimizer, state)
        elif self.framework == "jax":
            from ada2ms.jax import import_state as import_to_jax

            self.params, self.state, _ = import_to_jax(self.params, self.state, state)
        else:
            from ada2ms.tf import import_state as import_to_keras

            import_to_keras(self.params, self.optimizer, state)


def arrays(seed: int, size: float = 1.0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        name: (size * rng.standard_normal(shape)).astype(np.float32) for name, shape in (("a", (3, 4)), ("b", (5,)))
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_16_bit_parameters_keep_float32_state(first: str, second: str, dtype: str) -> None:
    one, two = Optimizing(first, arrays(0), dtype), Optimizing(second, arrays(1), dtype)
    for i in range(3):
        one.step(arrays(10 + i))
    state = one.export_state()
    assert all(x.dtype == np.float32 for entry in state.parameters.values() for x in entry.slots().values())
    state.skipped = 2
    two.import_state(state)
    moved = two.export_state()
    assert_equal_states(state, moved)
    assert moved.skipped == 2
    assert moved.groups[0].global_exp_avg_sq == state.groups[0].global_exp_avg_sq
    assert moved.groups[0].global_step == 3


@pytest.mark.parametrize(("first", "second"), [*PAIRS, *[marked(name, name) for name in FRAMEWORKS]])
def test_from_adamw_and_back(first: str, second: str) -> None:
    """Ada2MS starts from AdamW's averages, and s = mean(v); AdamW, given the state back, has lost nothing."""
    adamw, ours = Optimizing(first, arrays(0), "float32", ours=False), Optimizing(second, arrays(1), "float32")
    for i in range(3):
        adamw.step(arrays(10 + i))
    state = adamw.export_state()
    assert not state.has_global
    ours.import_state(state)
    moved = ours.export_state()
    assert_equal_states(state, moved)
    v = np.concatenate([entry.exp_avg_sq.ravel() for entry in state.parameters.values()]).astype(np.float64)
    assert moved.groups[0].global_exp_avg_sq == pytest.approx(v.mean(), rel=1e-7)
    assert moved.groups[0].global_step == 3
    ours.step(arrays(20))
    other = Optimizing(first, arrays(2), "float32", ours=False)
    other.import_state(moved)
    assert_equal_states(state, other.export_state())
    adamw.step(arrays(21))
    other.step(arrays(21))
    assert_equal_states(adamw.export_state(), other.export_state())


@pytest.mark.parametrize("framework", [marked(name) for name in FRAMEWORKS])
def test_arguments_continue_the_hyperparameters(framework: str) -> None:
    import importlib

    module = importlib.import_module(f"ada2ms.{'tf' if framework == 'keras' else framework}")
    hyper = {
        "lr": 0.125,
        "b1": 0.5,
        "b2": 0.75,
        "eps": 2.0**-20,
        "weight_decay": 0.25,
        "adaptivity": core.Linear(1, 0, 9),
    }
    entries = {name: Entry(np.zeros_like(x), np.zeros_like(x), 0, 0.0, x) for name, x in arrays(0).items()}
    state = State(entries, [Group(list(entries), hyper)], scope="tensor", nonfinite="skip")
    options = module.arguments(state)
    params = tensors(framework, arrays(0), "float32")
    if framework == "torch":
        optimizer = module.Ada2MS(list(params.values()), **options)
        found = module.export_state(params, optimizer)
    elif framework == "jax":
        found = module.export_state(params, module.ada2ms(**options).init(params), options=options)
    else:
        optimizer = module.Ada2MS(**options)
        optimizer.build(params)
        found = module.export_state(params, optimizer)
    assert (found.groups[0].hyper, found.scope, found.nonfinite) == (hyper, "tensor", "skip")
    state.groups.append(Group([], {"lr": 1.0}))
    with pytest.raises(StateError, match="hyperparameters of their own"):
        module.arguments(state)


# Each framework's own ways.


def test_groups_of_torch_go_where_there_are_none_and_come_back() -> None:
    """Groups may differ in learning rate and decay, which stay behind; not in b2, of which one s cannot keep two."""
    import jax.numpy as jnp
    import torch

    from ada2ms import jax as on_jax
    from ada2ms import torch as on_torch

    def made(b2: float = 0.999) -> tuple[dict[str, Any], Any]:
        params = tensors("torch", arrays(0), "float32")
        second = {"params": [params["b"]], "lr": 0.5, "betas": (0.9, b2)}
        return params, on_torch.Ada2MS([{"params": [params["a"]]}, second])

    params, optimizer = made()
    for i in range(2):
        for name, g in arrays(5 + i).items():
            params[name].grad = torch.tensor(g)
        if i:
            params["b"].grad = None  # the counts of the tensors differ
        optimizer.step()
    state = on_torch.export_state(params, optimizer)
    assert [entry.step for entry in state.parameters.values()] == [2, 1]
    assert [group.hyper["lr"] for group in state.groups] == [1e-3, 0.5]
    template = {name: jnp.zeros(x.shape) for name, x in arrays(0).items()}
    new, opt_state, _ = on_jax.import_state(template, on_jax.ada2ms().init(template), state)
    back = on_jax.export_state(new, opt_state)
    assert_equal_states(state, back)
    params, other = made()
    on_torch.import_state(params, other, back)
    assert_equal_states(state, on_torch.export_state(params, other))
    assert {float(x["global_exp_avg_sq"]) for x in other.state.values()} == {state.groups[0].global_exp_avg_sq}
    assert [group["lr"] for group in other.param_groups] == [1e-3, 0.5]

    params, optimizer = made(b2=0.9)
    for name, g in arrays(5).items():
        params[name].grad = torch.tensor(g)
    optimizer.step()
    with pytest.raises(StateError, match="groups: 2 global second moments"):
        on_jax.import_state(template, on_jax.ada2ms().init(template), on_torch.export_state(params, optimizer))


@pytest.mark.parametrize("made", ["chain", "inject_hyperparams", "MultiSteps", "partition", "frozen", "schedule"])
def test_states_within_states_of_optax(made: str) -> None:
    import jax
    import jax.numpy as jnp
    import optax

    from ada2ms.jax import ada2ms, export_state, import_state

    one = ada2ms(LR, adaptivity=0.25)
    optimizer, inner = {
        "chain": lambda: (optax.chain(optax.clip_by_global_norm(1e9), one), "ab"),
        "inject_hyperparams": lambda: (optax.inject_hyperparams(ada2ms)(LR, adaptivity=0.25), "ab"),
        "MultiSteps": lambda: (optax.MultiSteps(one, 1), "ab"),
        "partition": lambda: (optax.partition({"x": one, "y": optax.sgd(LR)}, {"a": "x", "b": "y"}), "a"),
        "frozen": lambda: (optax.masked(one, {"a": True, "b": False}), "a"),
        "schedule": lambda: (optax.adamw(optax.linear_schedule(1.0, 0.0, 10)), "ab"),
    }[made]()
    params = {name: jnp.asarray(x) for name, x in arrays(0).items()}
    opt_state = optimizer.init(params)
    for i in range(2):
        gradients = {name: jnp.asarray(x) for name, x in arrays(5 + i).items()}
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
    state = export_state(params, opt_state)
    assert list(state.parameters) == list(inner)
    fresh = {name: jnp.zeros_like(x) for name, x in params.items()}
    moved, restored, _ = import_state(fresh, optimizer.init(fresh), state)
    assert_equal_states(state, export_state(moved, restored))
    assert jax.tree.structure(restored) == jax.tree.structure(opt_state)
    if made == "schedule":
        counts = [
            x.count
            for x in jax.tree.leaves(restored, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
            if isinstance(x, optax.ScaleByScheduleState)
        ]
        assert counts == [2]


def test_what_has_no_such_state_is_refused() -> None:
    import jax.numpy as jnp
    import optax
    import torch

    from ada2ms import jax as on_jax
    from ada2ms import torch as on_torch

    params = {name: jnp.asarray(x) for name, x in arrays(0).items()}
    for optimizer, count in ((optax.sgd(0.1), 0), (optax.chain(optax.adam(0.1), on_jax.ada2ms()), 2)):
        with pytest.raises(StateError, match=f"it has {count} states of Ada2MS or Adam"):
            on_jax.export_state(params, optimizer.init(params))
    tensors_ = tensors("torch", arrays(0), "float32")
    every = list(tensors_.values())
    for refused, message in (
        (torch.optim.SGD(every, lr=0.1), "SGD has another state"),
        (torch.optim.AdamW(every, amsgrad=True), "amsgrad"),
        (torch.optim.AdamW([*every, torch.zeros(2, requires_grad=True)]), "is not in the model"),
    ):
        with pytest.raises(StateError, match=message):
            on_torch.export_state(tensors_, refused)


@pytest.mark.keras
def test_what_of_keras_has_no_such_state_is_refused() -> None:
    import keras

    from ada2ms.tf import Ada2MS, export_state, import_state

    variables = tensors("keras", arrays(0), "float32")
    for optimizer, message in (
        (keras.optimizers.SGD(0.1), "SGD has another state"),
        (keras.optimizers.AdamW(amsgrad=True), "amsgrad"),
        (Ada2MS(), "it is not built"),
    ):
        with pytest.raises(StateError, match=message):
            export_state(variables, optimizer)
    entries = {
        v.path: Entry(np.zeros(v.shape, np.float32), np.zeros(v.shape, np.float32), i) for i, v in enumerate(variables)
    }
    state = State(entries, [Group(list(entries), {}, 0.0, 1)])
    with pytest.raises(StateError, match=r"has one count of updates; the state's parameters have \[0, 1\]"):
        import_state(variables, keras.optimizers.AdamW(), state, values=False)


@pytest.mark.keras
def test_schedules_of_keras_go_on_from_the_updates_done() -> None:
    import keras

    from ada2ms.tf import Ada2MS, import_state

    variables = tensors("keras", arrays(0), "float32")
    entries = {v.path: Entry(np.zeros(v.shape, np.float32), np.ones(v.shape, np.float32), 4) for v in variables}
    state = State(entries, [Group(list(entries), {}, 1.0, 4)])
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([3, 11], [0.5, 0.25, 0.125])
    for options, iterations in (({}, 4), ({"gradient_accumulation_steps": 3}, 12)):
        for optimizer in (Ada2MS(rate, **options), keras.optimizers.AdamW(rate, **options)):
            import_state(variables, optimizer, state, values=False)
            assert int(optimizer._iterations) == iterations
            assert float(optimizer.learning_rate) == (0.25 if iterations == 4 else 0.125)
