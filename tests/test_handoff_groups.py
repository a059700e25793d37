"""States with groups from framework to framework: each goes on with the groups that `arguments` of the state makes.

The whole run is that of the rule in NumPy, which has the groups from the beginning, to 1e-12: float64, and sums in
another order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handoff_support import LR, marked

from ada2ms import core
from ada2ms.core import State
from ada2ms.core.state import Entry, Group
from support import settings

SEGMENT = 3  # steps in each framework
SHAPES = {
    "embed.weight": (5, 4),
    "norm.weight": (4,),
    "norm.bias": (4,),
    "head.weight": (4, 3),
    "head.bias": (3,),
}
CHOICES: dict[str, Any] = {"max_norm": 2.0, "nonfinite": "skip"}
BASE = vars(core.Hyperparameters(lr=LR, weight_decay=0.1, adaptivity=0.25))
# What differs in each group, and the parameters in it: as Hugging Face's Trainer divides them; and all that can differ.
GROUPS: dict[str, list[tuple[dict[str, Any], list[str]]]] = {
    "decay and no decay": [
        ({}, ["embed.weight", "head.weight"]),
        ({"weight_decay": 0.0}, ["norm.weight", "norm.bias", "head.bias"]),
    ],
    "every hyperparameter": [
        ({"lr": LR / 4, "adaptivity": core.Linear(1.0, 0.0, 8)}, ["embed.weight"]),
        ({"b1": 0.5, "b2": 0.75, "eps": 1e-4}, ["norm.weight", "norm.bias"]),
        ({}, ["head.weight", "head.bias"]),
    ],
}


def initial(name: str) -> Any:
    return np.random.default_rng(len(name)).standard_normal(SHAPES[name])


def gradient(name: str, step: int) -> Any:
    """Longer than `max_norm` in even steps, and shorter in odd ones; not finite in the fifth."""
    g = np.random.default_rng(100 * step + sum(map(ord, name))).standard_normal(SHAPES[name]) / (1 + 9 * (step % 2))
    return g * np.nan if step == 4 and name == "norm.bias" else g


def beginning(groups: str, scope: Any) -> State:
    """No step done yet."""
    own = 0.0 if scope == "tensor" else None
    names = [name for _, members in GROUPS[groups] for name in members]
    entries = {n: Entry(np.zeros(SHAPES[n]), np.zeros(SHAPES[n]), 0, own, initial(n)) for n in names}
    s = None if scope == "tensor" else 0.0
    made = [Group(list(members), {**BASE, **hyper}, s, 0) for hyper, members in GROUPS[groups]]
    return State(entries, made, scope=scope, **CHOICES)


def by_the_rule(groups: str, scope: Any, steps: int) -> dict[str, Any]:
    given = [{**BASE, **hyper, "params": [initial(name) for name in names]} for hyper, names in GROUPS[groups]]
    order = [name for _, names in GROUPS[groups] for name in names]
    rule = core.Ada2MS(given, scope=scope, **CHOICES)
    for step in range(steps):
        rule.step([gradient(name, step) for name in order])
    assert rule.skipped == (1 if steps > 4 else 0)
    return dict(zip(order, (p for group in rule.groups for p in group.params), strict=True))


def gone_on(named: dict[str, Any], optimizer: Any, state: State, steps: range) -> State:
    """What comes of a state in torch."""
    import torch

    from ada2ms.torch import export_state, import_state

    import_state(named, optimizer, state)
    for step in steps:
        for name, p in named.items():
            p.grad = torch.tensor(gradient(name, step))
        optimizer.step()
    return export_state(named, optimizer)


def in_torch(state: State, steps: range) -> State:
    import torch

    from ada2ms.torch import Ada2MS, arguments, param_groups

    named = {name: torch.zeros(shape, dtype=torch.float64).requires_grad_() for name, shape in SHAPES.items()}
    options = arguments(state)
    params = param_groups(named, options.pop("groups"), options["lr"], options["betas"])
    optimizer = Ada2MS(params, **options)
    return gone_on(named, optimizer, state, steps)


def as_the_trainer_has_it(state: State, steps: range) -> State:
    """In torch with groups that were made of parameters, by no names, as Hugging Face's Trainer does it."""
    import torch

    from ada2ms.torch import Ada2MS

    named = {name: torch.zeros(shape, dtype=torch.float64).requires_grad_() for name, shape in SHAPES.items()}
    no_decay = [name for name in named if "bias" in name or "norm" in name]
    groups = [
        {"params": [p for name, p in named.items() if name not in no_decay], "weight_decay": 0.1},
        {"params": [p for name, p in named.items() if name in no_decay], "weight_decay": 0.0},
    ]
    optimizer = Ada2MS(groups, lr=LR, adaptivity=0.25, scope=state.scope, **CHOICES)
    return gone_on(named, optimizer, state, steps)


def in_jax(state: State, steps: range) -> State:
    import jax.numpy as jnp
    import optax

    from ada2ms.jax import ada2ms, arguments, export_state, import_state

    names = {name.replace(".", "/"): name for name in SHAPES}

    def tree(leaf: Callable[[str], Any]) -> Any:
        found: dict[str, dict[str, Any]] = {}
        for name in SHAPES:
            layer, role = name.split(".")
            found.setdefault(layer, {})[role] = jnp.asarray(leaf(name))
        return found

    options = arguments(state, names)
    optimizer = ada2ms(**options)
    params: Any = tree(lambda name: np.zeros(SHAPES[name]))
    params, opt_state, _ = import_state(params, optimizer.init(params), state, names=names)
    for step in steps:
        updates, opt_state = optimizer.update(tree(lambda name, step=step: gradient(name, step)), opt_state, params)
        params = optax.apply_updates(params, updates)
    return export_state(params, opt_state, names=names, options=options)


def in_keras(state: State, steps: range) -> State:
    import keras

    from ada2ms.tf import Ada2MS, arguments, export_state, import_state

    variables = [keras.Variable(np.zeros(shape), name=name.replace(".", "_")) for name, shape in SHAPES.items()]
    names = {name.replace(".", "_"): name for name in SHAPES}
    optimizer = Ada2MS(**arguments(state, names))
    optimizer.build(variables)
    import_state(variables, optimizer, state, names=names)
    for step in steps:
        optimizer.apply([keras.ops.convert_to_tensor(gradient(name, step)) for name in SHAPES], variables)
    return export_state(variables, optimizer, names=names)


RUN = {"torch": in_torch, "trainer": as_the_trainer_has_it, "jax": in_jax, "keras": in_keras}


@contextmanager
def double(frameworks: tuple[str, ...]) -> Iterator[None]:
    with settings("jax", "float64", "cpu") if "jax" in frameworks else settings("torch", "float64", "cpu"):
        if "keras" not in frameworks:
            yield
            return
        with settings("keras", "float64", "cpu"):
            yield


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize(
    ("first", "second", "third"),
    [
        marked("torch", "jax", "torch"),
        marked("torch", "keras", "torch"),
        marked("trainer", "jax", "torch"),
        marked("trainer", "keras", "torch"),
        marked("jax", "keras", "torch"),
        marked("keras", "jax", "keras"),
    ],
)
@pytest.mark.parametrize("groups", GROUPS)
def test_groups_go_from_framework_to_framework(
    groups: str, first: str, second: str, third: str, scope: Any, tmp_path: Path
) -> None:
    """Through a file each time; hyperparameters, and the norm to clip by, are at the end what they were at first."""
    frameworks = first, second, third
    if "trainer" in frameworks and groups != "decay and no decay":
        pytest.skip("the Trainer makes no such groups")
    state = beginning(groups, scope)
    with double(frameworks):
        for i, framework in enumerate(frameworks):
            state = RUN[framework](state, range(SEGMENT * i, SEGMENT * (i + 1)))
            state.save(tmp_path / "state.safetensors")
            state = State.load(tmp_path / "state.safetensors")
    expected = by_the_rule(groups, scope, SEGMENT * len(frameworks))
    for name, value in expected.items():
        moved = np.abs(value - initial(name)).max()
        found = state.parameters[name].param
        assert found is not None
        assert np.abs(found - value).max() <= 1e-12 * moved, name
    assert (state.max_norm, state.nonfinite, state.scope, state.skipped) == (2.0, "skip", scope, 1)
    for hyper, names in GROUPS[groups]:
        for name in names:
            (group,) = (group for group in state.groups if name in group.params)
            kept = {key: x for key, x in group.hyper.items() if key != "lr_scale"}
            assert kept == pytest.approx({**BASE, **hyper}) if "adaptivity" not in hyper else kept == {**BASE, **hyper}
