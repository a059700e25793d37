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


FIXTURE_2 = FIXTURE.with_name("state-format-2.safetensors")


def written_2() -> State:
    """What the second format has besides; the file in data/ was made of it."""
    parameters = {"half": entry((3, 2), step=7, seed=1), "wide": entry((2,), "complex64", step=7, seed=2)}
    half = parameters["half"]
    half.param = np.array([[1, -2], [0.5, 3], [0, np.inf]], np.float32)
    half.compensation = np.array([[2.0**-9, -(2.0**-10)], [0, 2.0**-8], [0, 0]], np.float32)
    extras = {
        "norm.mean": np.array([0.5, np.nan, -0.0]),
        "norm.count": np.array(12, np.int64),
        "half": np.array([[1, 2]], np.float16),
        "seen": np.array([True, False]),
        "none": np.zeros((0, 3), np.uint8),
        "phase": np.array([[1 + 2j, -0.5j]], np.complex64),
    }
    groups = [
        Group(["half"], {"lr": 0.05, "lr_scale": 0.5, "weight_decay": 0.0, "b2": 0.999}, 0.25, 7),
        Group(["wide"], {"lr": 0.1, "weight_decay": 0.01, "b2": 0.99}, 0.125, 7),
    ]
    return State(
        parameters, groups, skipped=2, source="by hand", notes=["a note"], max_norm=0.1, compensated=True, extras=extras
    )


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
    for field in ("scope", "nonfinite", "skipped", "source", "notes", "max_norm", "compensated"):
        assert getattr(left, field) == getattr(right, field)
    assert list(left.extras) == list(right.extras)
    for x, y in zip(left.extras.values(), right.extras.values(), strict=True):
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
    assert str(left.groups) == str(right.groups)  # as text, in which a NaN equals itself; floats show every digit


def fit(state: State, targets: dict[str, Target], **options: Any) -> Any:
    given = {"names": None, "axes": None, "scope": "model", "values": True, "cast": False, **options}
    return from_portable(state, targets, **given)


def target(shape: tuple[int, ...], dtype: str = "float32", **own: str) -> Target:
    return Target(shape, {**dict.fromkeys(("param", "exp_avg", "exp_avg_sq"), dtype), **own})
