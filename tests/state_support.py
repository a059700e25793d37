"""States that the tests of states share, and what is compared of two."""

from pathlib import Path
from typing import Any

import numpy as np

from ada2ms import core
from ada2ms.core import State
from ada2ms.core.state import Entry, Group, Target, from_portable

FIXTURE = Path(__file__).with_name("data") / "state-format-1.safetensors"


def entry(shape: tuple[int, ...], dtype: str = "float32", step: int = 3, seed: int = 0, **own: Any) -> Entry:
    rng = np.random.default_rng(seed)

    def array() -> Any:
        real = rng.standard_normal(shape)
        x = real + 1j * rng.standard_normal(shape) if "complex" in dtype else real
        return np.asarray(x, dtype)

    square = array()
    square = np.asarray(np.abs(square.real) + 1j * np.abs(square.imag) if "complex" in dtype else np.abs(square), dtype)
    return Entry(array(), square, step, param=array(), **own)


def written() -> State:
    """What the file in data/ was made of, by the version that wrote the first format."""
    parameters = {
        "dense.kernel": entry((3, 2), step=7, seed=1),
        "dense.bias": entry((2,), "float64", step=5, seed=2),
        "scale": entry((), step=0, seed=3),
        "nothing": entry((0, 4), step=7, seed=4),
        "wave": entry((2, 2), "complex64", step=7, seed=5),
    }
    parameters["scale"].param = None
    hyper = {"lr": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "adaptivity": core.Linear(1, 0, 50)}
    groups = [
        Group(["dense.kernel", "nothing", "wave"], hyper, 0.1 + 0.2, 7),
        Group(["dense.bias", "scale"], {"lr": 0.01, "b2": 0.999}, float("nan"), 6),
    ]
    return State(parameters, groups, nonfinite="skip", skipped=2, source="by hand")


def per_tensor() -> State:
    parameters = {"a": entry((2,), global_exp_avg_sq=0.1), "b": entry((3,), seed=1, global_exp_avg_sq=1e-300)}
    return State(parameters, [Group(["a", "b"], {}, None, 3)], scope="tensor")


def assert_equal(left: State, right: State) -> None:
    assert list(left.parameters) == list(right.parameters)
    for name, a in left.parameters.items():
        b = right.parameters[name]
        assert (a.step, a.global_exp_avg_sq) == (b.step, b.global_exp_avg_sq)
        assert a.slots().keys() == b.slots().keys()
        for x, y in zip(a.slots().values(), b.slots().values(), strict=True):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert x.tobytes() == y.tobytes()
    for field in ("scope", "nonfinite", "skipped", "source", "notes"):
        assert getattr(left, field) == getattr(right, field)
    assert str(left.groups) == str(right.groups)  # as text, in which a NaN equals itself; floats show every digit


def fit(state: State, targets: dict[str, Target], **options: Any) -> Any:
    given = {"names": None, "axes": None, "scope": "model", "values": True, "cast": False, **options}
    return from_portable(state, targets, **given)


def target(shape: tuple[int, ...], dtype: str = "float32", **own: str) -> Target:
    return Target(shape, {slot: own.get(slot, dtype) for slot in ("param", "exp_avg", "exp_avg_sq")})
