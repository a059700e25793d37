"""What the tests of the Keras optimizer share: variables, gradients, and the NumPy rule beside them."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from ada2ms import core
from ada2ms.tf import Ada2MS

BACKEND = keras.backend.backend()
SHAPES = ((3, 4), (4,), (), (0,))
# What separates two orders of the same float32 operations: a few roundings a step, of updates a tenth of the values.
CLOSE = {"rtol": 2e-6, "atol": 2e-7}
only_on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow alone")
needs_sparse_gradients = pytest.mark.skipif(BACKEND == "torch", reason="Keras has no sparse gradients on torch")


def arrays(seed: int, shapes: Any = SHAPES) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.normal(size=shape), "float32") for shape in shapes]


def variables(values: list[Any], dtype: str = "float32") -> list[Any]:
    return [keras.Variable(x, dtype=dtype, name=f"v{i}") for i, x in enumerate(values)]


def numpy(x: Any) -> Any:
    return np.array(ops.convert_to_numpy(ops.cast(x, "float64" if "float64" in str(x.dtype) else "float32")))


def apply(optimizer: Any, gradients: list[Any], targets: list[Any]) -> None:
    dense = [ops.convert_to_tensor(g) if isinstance(g, np.ndarray) else g for g in gradients]
    optimizer.apply(dense, targets)


def state(optimizer: Any) -> dict[str, Any]:
    return {f"{i} {v.path}": numpy(v) for i, v in enumerate(optimizer.variables)}


def small(optimizer: Any, name: str) -> Any:
    return next(numpy(v) for v in optimizer.variables if v.path.endswith("/" + name))


def by_core(values: list[Any], rows: list[list[Any]], **hyper: Any) -> list[Any]:
    params = [x.copy() for x in values]
    optimizer = core.Ada2MS(params, **hyper)
    for row in rows:
        optimizer.step(row)
    return params


def by_keras(values: list[Any], rows: list[list[Any]], **arguments: Any) -> list[Any]:
    targets = variables(values)
    optimizer = Ada2MS(**arguments)
    for row in rows:
        apply(optimizer, row, targets)
    return [numpy(v) for v in targets]


def assert_close(left: list[Any], right: list[Any], **bound: float) -> None:
    for x, y in zip(left, right, strict=True):
        np.testing.assert_allclose(x, y, **(bound or CLOSE))


# AdamW and Ada2MS side by side

START = np.array([[1.0, 2.0], [3.0, 4.0]], "float32")
ONES = np.ones_like(START)
UNEVEN = np.array([[3.0, -1.0], [0.5, 2.0]], "float32")
Make = Callable[..., Any]


def maker(cls: Any) -> Make:
    """The class, with a learning rate of 0.1 where none is given."""
    return lambda *args, **kwargs: cls(*args, **({"learning_rate": 0.1} if not args else {}), **kwargs)


# What AdamW does changes with Keras alone.
ADAMW = pytest.param(maker(keras.optimizers.AdamW), id="AdamW", marks=pytest.mark.slow)
BOTH = pytest.mark.parametrize("make", [pytest.param(maker(Ada2MS), id="Ada2MS"), ADAMW])


def adamw_fails(request: pytest.FixtureRequest, cause: str) -> None:
    """Expects the running test to fail for AdamW, and only for it."""
    if "AdamW" in request.node.name:
        request.applymarker(pytest.mark.xfail(strict=True, reason=f"Keras' AdamW: {cause}"))


def variable(value: Any = START, **kwargs: Any) -> Any:
    return keras.Variable(value, **kwargs)


def after(optimizer: Any, *gradients: Any) -> Any:
    """A variable's value after updates by these gradients."""
    target = variable()
    for g in gradients:
        apply(optimizer, [g], [target])
    return numpy(target)


def slots(optimizer: Any, name: str) -> list[Any]:
    return [numpy(v) for v in optimizer.variables if v.path.endswith(name)]


@keras.saving.register_keras_serializable(package="test_keras")
def halving(count: Any) -> Any:
    return 0.5 ** (count + 1)


ADAPTIVITIES = {
    "number": 0.3,
    "constant": core.Constant(0.3),
    "linear": core.Linear(1.0, 0.0, steps=4),
    "cosine": core.Cosine(1.0, 0.2, steps=4),
    "exponential": core.Exponential(0.0, 1.0, half_life=2.0),
    "keras schedule": keras.optimizers.schedules.PolynomialDecay(1.0, 4, 0.0),
    "function": halving,
}
