"""What the small models of the hand-off's tests are made of, and trained on."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Array = Any
TIME, WIDTH, HEADS = 5, 8, 2  # 4 features a head: Keras takes 1 / sqrt(4) in float32, in which it is exact
WORDS = 11


class Row(NamedTuple):
    """The same model in some frameworks, and what it is trained on."""

    build: Mapping[str, Callable[[], Any]]
    data: Callable[[int], tuple[Array, Array]]
    dtype: str = "float64"
    trained: str = "Param"  # flax.nnx' type of parameters
    given: Mapping[str, Mapping[str, Any]] = {}  # to `plain_layers`, by framework


def vectors(seed: int) -> tuple[Array, Array]:
    """Sequences of vectors, and targets of 8 features."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((3, TIME, WIDTH)), rng.standard_normal((3, TIME, WIDTH))


def words(seed: int) -> tuple[Array, Array]:
    """Sequences of words, and a target for each word that might be next."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, WORDS, (3, TIME)).astype(np.int32), rng.standard_normal((3, TIME, WORDS))


def last(seed: int) -> tuple[Array, Array]:
    """Sequences of vectors, and targets of 6 features in both directions."""
    return vectors(seed)[0], np.random.default_rng(seed).standard_normal((3, TIME, 12))


def forward(seed: int) -> tuple[Array, Array]:
    x, y = last(seed)
    return x, y[..., :6]


# How a model is made of layers


def torch_model(call: Callable[..., Any], **layers: Any) -> Any:
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, layer in layers.items():
                setattr(self, name, layer)

        def forward(self, x: Any) -> Any:
            return call(self, x)

    return Model()


def nnx_model(call: Callable[..., Any], **layers: Any) -> Any:
    from flax import nnx

    class Model(nnx.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            for name, layer in layers.items():
                setattr(self, name, layer)

        def __call__(self, x: Any) -> Any:
            return call(self, x)

    return Model()


def keras_model(call: Callable[[Any], Any], shape: tuple[int, ...] = (TIME, WIDTH), dtype: str | None = None) -> Any:
    import keras

    x = keras.Input(shape, dtype=dtype)
    return keras.Model(x, call(x))


def new(*kernels: str) -> Any:
    """What layers of nnx are made with; kernels of zeros, since others are compiled for half a second."""
    from flax import nnx

    zeros = dict.fromkeys(kernels, nnx.initializers.zeros_init())
    return {"rngs": nnx.Rngs(0), "param_dtype": floats(), **zeros}


def floats() -> Any:
    """float64, if JAX has it."""
    import jax.numpy as jnp

    return jnp.zeros(0, float).dtype
