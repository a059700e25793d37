"""In which precision variables are updated."""

from typing import Any

import keras
from keras import ops

Tensor = Any  # of whichever backend Keras runs on


def compute_dtype(dtype: Any) -> str:
    """The type in which a variable of this one is updated and its state kept: at least float32."""
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"


def is_16_bit(dtype: Any) -> bool:
    """Whether it is float16 or bfloat16."""
    return keras.backend.standardize_dtype(dtype) in ("float16", "bfloat16")


def cast(x: Tensor | float, dtype: str) -> Tensor | float:
    """A tensor in this type; a float stays one, since it has no type that would widen others."""
    return x if isinstance(x, float) else ops.cast(x, dtype)


def to_dense(gradient: Tensor) -> Tensor:
    """A dense gradient, in at least float32; repeated rows of a sparse one are summed."""
    if str(gradient.dtype) in ("torch.float32", "torch.float64"):
        return gradient  # dense and wide as it is; the conversions below would only cost time
    if hasattr(gradient, "dense_shape"):  # a tf.IndexedSlices, which keras.ops takes for a tensor of its rows
        import tensorflow as tf

        gradient = tf.convert_to_tensor(gradient)
    gradient = ops.convert_to_tensor(gradient, sparse=False)
    return ops.cast(gradient, compute_dtype(gradient.dtype))
