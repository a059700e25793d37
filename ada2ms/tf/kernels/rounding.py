"""Rounding to 16 bits in float32, for the backends whose compiler may leave out a cast to 16 bits and back."""

import math
from typing import Any

import keras
from keras import ops

from ada2ms.tf.kernels import Tensor

_LARGEST_FLOAT16 = 65504.0
_SMALLEST_NORMAL_FLOAT16 = 2.0**-14
_UNIT_BELOW = 2.0**-24  # of the last place of float16 below that


def rounded(x: Tensor, dtype: Any) -> Tensor:
    """The nearest values of a 16-bit type, ties to even, in float32; of a wider type, x as it is.

    XLA is allowed more precision than a program asks for (`xla_allow_excess_precision`), and so may take the cast to 16
    bits out of a pair of casts. Integers it leaves alone.
    """
    dtype = keras.backend.standardize_dtype(dtype)
    if dtype == "bfloat16":
        return ops.where(ops.isfinite(x), _without_lower_bits(x, 16), x)
    if dtype != "float16":
        return x
    normal = _without_lower_bits(x, 13)
    normal = ops.where(ops.abs(normal) > _LARGEST_FLOAT16, ops.where(x > 0, math.inf, -math.inf), normal)
    small = ops.round(x / _UNIT_BELOW) * _UNIT_BELOW
    result = ops.where(ops.abs(x) < _SMALLEST_NORMAL_FLOAT16, small, normal)
    return ops.where(ops.isfinite(x), result, x)


def _without_lower_bits(x: Tensor, n: int) -> Tensor:
    """Float32 rounded to zeros in its last n bits."""
    bits = _bitcast(x, "int32")
    odd = ops.cast(ops.not_equal(bits & (1 << n), 0), "int32")  # the last bit that stays, which ties make even
    return _bitcast((bits + ((1 << (n - 1)) - 1) + odd) & -(1 << n), "float32")


def _bitcast(x: Tensor, dtype: str) -> Tensor:
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.bitcast_convert_type(x, dtype)
    if keras.backend.backend() == "torch":
        import torch

        return x.view(getattr(torch, dtype))
    import tensorflow as tf

    return tf.bitcast(x, dtype)
