"""From framework to framework in mid-run: the trajectory that one framework alone would have given."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handoff_support import FRAMEWORKS, LR, PAIRS, assert_equal_states, marked

from ada2ms import core
from ada2ms.cli import main
from ada2ms.core import State, StateError
from ada2ms.core.state import Entry, Group
from ada2ms.demo import digits
from ada2ms.demo.run import deviation, mutual_bound
from support import settings

Array = Any
SEGMENT = 5  # steps in each framework
OPTIONS: dict[str, dict[str, Any]] = {
    "half-way": {"adaptivity": 0.5},
    "transition, tensor": {"adaptivity": core.Cosine(1.0, 0.0, 12), "scope": "tensor", "nonfinite": "skip"},
}


# Trainers and uninterrupted runs are kept and used again, so the tests of one kind are for one worker.
KINDS = pytest.mark.parametrize(
    ("dtype", "options"),
    [
        pytest.param(dtype, options, marks=pytest.mark.xdist_group(dtype), id=f"{dtype}, {options}")
        for dtype, options in (("float64", "half-way"), ("float32", "half-way"), ("float64", "transition, tensor"))
    ],
)


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    with ExitStack() as stack:
        for framework in FRAMEWORKS:
            stack.enter_context(settings(framework, dtype, "cpu"))
        yield


@cache
def trainer(framework: str, dtype: str, options: str) -> Any:
    """One for all tests, since it takes a second to compile: whatever it has been used for, a state replaces it all."""
    weights = digits.initial_weights(digits.CONVNET, seed=1, dtype=dtype)
    if framework == "torch":
        from ada2ms.demo.on_torch import TorchTrainer
        from ada2ms.torch import Ada2MS

        return TorchTrainer(weights, lambda params: Ada2MS(params, lr=LR, **OPTIONS[options]))
    if framework == "jax":
        from ada2ms.demo.on_jax import JaxTrainer
        from ada2ms.jax import ada2ms

        return JaxTrainer(weights, ada2ms(LR, **OPTIONS[options]))
    from ada2ms.demo.on_keras import KerasTrainer
    from ada2ms.tf import Ada2MS as KerasAda2MS

    return KerasTrainer(weights, KerasAda2MS(LR, **OPTIONS[options]))


def beginning(dtype: str, options: str) -> State:
    """No step done yet."""
    weights = digits.initial_weights(digits.CONVNET, seed=0, dtype=dtype)
    scope = OPTIONS[options].get("scope", "model")
    own = 0.0 if scope == "tensor" else None
    names = [f"{i}.{kind}.{role}" for i, kind in enumerate(("conv", "conv", "dense")) for role in ("kernel", "bias")]
    entries = {
        name: Entry(np.zeros_like(w), np.zeros_like(w), 0, own, w) for name, w in zip(names, weights, strict=True)
    }
    return State(entries, [Group(names, {}, None if own is not None else 0.0, 0)], scope=scope)


def run(segments: tuple[str, ...], dtype: str, options: str, file: Path | None = None) -> list[list[Array]]:
    """The parameters after each step, `SEGMENT` in each framework, handed over through a file if one is given."""
    state, found = beginning(dtype, options), []
    batches = digits.load(dtype).batches(SEGMENT * len(segments), seed=0)
    with precision(dtype):
        for framework in segments:
            using = trainer(framework, dtype, options)
            using.import_state(state)
            for _ in range(SEGMENT):
                using.step(*next(batches))
                found.append(using.parameters())
            state = using.export_state()
            if file is not None:
                state.save(file)
                state = State.load(file)
    return found


@cache
def alone(framework: str, segments: int, dtype: str, options: str) -> list[list[Array]]:
    """Without interruption: one segment of all the steps."""
    using = trainer(framework, dtype, options)
    with precision(dtype):
        using.import_state(beginning(dtype, options))
        found = []
        for images, labels in digits.load(dtype).batches(SEGMENT * segments, seed=0):
            using.step(images, labels)
            found.append(using.parameters())
    return found


def assert_same_trajectory(found: list[list[Array]], expected: list[list[Array]], dtype: str) -> None:
    """As far as the closed-loop tests and the demo let frameworks part that each train alone: float64, 1e-13."""
    for step, (a, b) in enumerate(zip(found, expected, strict=True), start=1):
        assert deviation(a, b) < (1e-13 if dtype == "float64" else mutual_bound(step)), f"step {step}"


@KINDS
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_pair(first: str, second: str, dtype: str, options: str) -> None:
    found = run((first, second), dtype, options)
    assert_same_trajectory(found, alone(first, 2, dtype, options), dtype)
    assert_same_trajectory(found, alone(second, 2, dtype, options), dtype)


@pytest.mark.keras
@KINDS
def test_the_chain(dtype: str, options: str, tmp_path: Path) -> None:
    found = run(("torch", "jax", "keras", "torch"), dtype, options, tmp_path / "handoff.safetensors")
    assert_same_trajectory(found, alone("torch", 4, dtype, options), dtype)


@KINDS
@pytest.mark.parametrize("framework", [marked(name) for name in FRAMEWORKS])
def test_resuming_where_it_was_changes_nothing(framework: str, dtype: str, options: str, tmp_path: Path) -> None:
    found = run((framework, framework), dtype, options, tmp_path / "handoff.safetensors")
    for a, b in zip(found, alone(framework, 2, dtype, options), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("framework", [marked(name) for name in FRAMEWORKS])
def test_a_state_that_does_not_fit_changes_nothing(framework: str) -> None:
    using = trainer(framework, "float32", "half-way")
    with precision("float32"):
        before = using.export_state()
        state = beginning("float32", "half-way")
        state.parameters["9.dense.bias"] = state.parameters.pop("2.dense.bias")
        state.parameters["0.conv.bias"] = state.parameters["2.dense.kernel"]
        state.parameters["0.conv.kernel"].exp_avg = np.full((3, 3, 1, 8), 0.1)
        with pytest.raises(StateError) as caught:
            using.import_state(state)
        for part in ("missing: ", "superfluous: '9.dense.bias'", "shape: ", "type: exp_avg of "):
            assert sum(part in problem for problem in caught.value.problems) == 1
        after = using.export_state()
        other = beginning("float32", "transition, tensor")
        with pytest.raises(StateError, match="its scope is 'tensor', the optimizer's 'model'"):
            using.import_state(other)
    for name, entry in before.parameters.items():
        for slot, array in entry.slots().items():
            assert np.array_equal(getattr(after.parameters[name], slot), array)
    assert before.groups == after.groups


# 16 bits, AdamW, names.


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
    assert {float(group["global_exp_avg_sq"]) for group in other.param_groups} == {state.groups[0].global_exp_avg_sq}
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


@pytest.mark.keras
def test_the_demo_hands_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "9", "--out", str(tmp_path), "--frameworks", "torch", "jax", "--handoff", "--json"]
    assert main(["demo", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [f["framework"] for f in found["frameworks"]] == ["torch", "jax", "torch->jax->torch"]
    assert len(found["frameworks"][2]["losses"]) == 9
    assert found["parted"] == []
